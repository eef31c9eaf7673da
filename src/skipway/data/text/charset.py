"""Text from bytes: its encoding by content, line ends as one newline, and what was noted on the way."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from skipway.data.sources.tables import BYTE_ORDER_MARKS
from skipway.errors import counted, printable

__all__ = ["NotText", "Notes", "decode_text_file"]

HEAD = 4096
# share of control characters from which a file is no text, as in lists
MOST_CONTROLS = 1 / 50
# bytes of C0 that occur in texts: tab, line feed, vertical tab, form feed, carriage return, escape
TEXT_CONTROLS = b"\t\n\x0b\x0c\r\x1b"
CONTROLS = bytes(sorted(set(range(32)) - set(TEXT_CONTROLS)))


class NotText(Exception):
    """A file is no text; the message says what it is."""


@dataclass
class Notes:
    """What was noted about documents while they were read: how many of them, and the first, by what.

    >>> notes = Notes()
    >>> notes.add("line ends are CRLF, read as \\\\n", ["a.txt"])
    >>> notes.sentences()
    ["line ends are CRLF, read as \\\\n: 'a.txt'"]
    """

    first: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, name: str) -> None:
        """Note something about a document."""
        self.first.setdefault(what, name)
        self.counts[what] = self.counts.get(what, 0) + 1

    def sentences(self) -> list[str]:
        """One sentence for each thing noted."""
        return [
            f"{what}: {printable(self.first[what])!r}"
            + (f" and {counted(count - 1, 'other document')}" if count > 1 else "")
            for what, count in self.counts.items()
        ]


def decode_text_file(content: bytes, name: str, notes: Notes, encoding: str | None = None) -> str:
    r"""Decode a text file, with \n for any line end.

    UTF-8 and UTF-16 with or without a byte order mark, UTF-32 with one; bytes that are no UTF-8 are read as
    Windows-1252, but for a text that is UTF-8 with some damage, where they become U+FFFD. All but plain UTF-8 is noted.

    Raises:
        NotText: it is binary.

    >>> decode_text_file("naïve".encode("utf-16"), "a.txt", notes := Notes())
    'naïve'
    >>> notes.sentences()
    ["read as UTF-16: 'a.txt'"]
    """
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if content.startswith(mark)), "") or wide(content)
    if encoding == "utf-8-sig":
        notes.add("a byte order mark is left out", name)
    elif encoding:
        notes.add(f"read as {re.sub('-[LB]E$', '', encoding.upper())}", name)
    try:
        text = content.decode(encoding or "utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if encoding not in ("", "utf-8-sig"):
            raise NotText(f"damaged {encoding.upper()}") from error
        check_controls(content)
        text = decode_damaged(content, name, notes)
    if encoding.startswith(("utf-16", "utf-32")):
        check_controls(text.encode("utf-8", "replace"))
    else:
        check_controls(content)
    if "\0" in text:
        notes.add("NUL characters are kept", name)
    if "\r" in text:
        notes.add(r"line ends with \r, read as \n", name)
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def wide(content: bytes) -> str:
    """UTF-16 without a mark, by where its zeros are; "": it is not."""
    head = content[:HEAD]
    if head.count(0) <= len(head) / 4:
        return ""
    low, high = head[1::2].count(0), head[::2].count(0)
    if min(low, high) > max(low, high) / 4:
        return ""
    return "utf-16-le" if low > high else "utf-16-be"


def check_controls(content: bytes) -> None:
    """Check that a file is text.

    Raises:
        NotText: too many of its bytes are control characters.
    """
    head = content[:HEAD]
    if len(head) - len(head.translate(None, CONTROLS)) > len(head) * MOST_CONTROLS:
        from skipway.data.content import describe_content

        what = describe_content(content).removeprefix("not an image but ")
        raise NotText("a binary file" if what.startswith("not an image") else what)


def decode_damaged(content: bytes, name: str, notes: Notes) -> str:
    """Decode bytes that are no UTF-8: as UTF-8 with damage, if most of what is beyond ASCII is UTF-8."""
    text = content.decode("utf-8", "replace")
    lost = text.count("\ufffd")
    beyond = sum(map(len, re.findall(r"[^\x00-\x7f\ufffd]+", text)))
    if beyond > lost:
        notes.add("UTF-8 with damaged characters, read as U+FFFD", name)
        return text
    try:
        notes.add("read as Windows-1252, since it is no UTF-8", name)
        return content.decode("cp1252")
    except UnicodeDecodeError:  # five bytes have no letter there
        return content.decode("latin-1")
