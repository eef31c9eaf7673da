"""Text from bytes: its encoding by content, line ends as one newline, and what was noted on the way."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from skipway.data.content import HEAD_BYTES, MARKUP, OTHERS, image_format
from skipway.data.sources.tables import BYTE_ORDER_MARKS
from skipway.errors import counted, printable

__all__ = ["NotText", "Notes", "decode_text_file"]

HEAD = 4096
# share of control characters from which a file is no text, as in lists
MOST_CONTROLS = 1 / 50
# characters of C0 that occur in texts: tab, line feed, vertical tab, form feed, carriage return, escape
TEXT_CONTROLS = b"\t\n\x0b\x0c\r\x1b"
CONTROLS = bytes(sorted(set(range(32)) - set(TEXT_CONTROLS)))


class NotText(Exception):
    """A file is no text; the message says what it is."""


@dataclass
class Notes:
    """What was noted about documents while they were read: how many of them, and the first, by what.

    >>> notes = Notes()
    >>> notes.add("read as UTF-16", "a.txt")
    >>> notes.sentences()
    ["read as UTF-16: 'a.txt'"]
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
        NotText: it is binary, or not in that encoding.

    >>> decode_text_file("naïve".encode("utf-16"), "a.txt", notes := Notes())
    'naïve'
    >>> notes.sentences()
    ["read as UTF-16: 'a.txt'"]
    """
    check_signature(content)
    text = decode_bytes(content, name, notes, encoding)
    check_controls(text.encode("utf-8", "replace"))
    if "\0" in text:
        notes.add("NUL characters are kept", name)
    if "\r" in text:
        notes.add(r"line ends with \r, read as \n", name)
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if re.match(r'\{\s*"', text) and not name.endswith((".jsonl", ".ndjson", ".json")):
        notes.add("looks like JSON and is read as text; .jsonl is the suffix of JSON lines", name)
    start = text[:HEAD].lstrip().encode("utf-8", "replace")
    for pattern, markup in (*MARKUP, (rb"\{\\rtf", "RTF")):
        if re.match(pattern, start, re.DOTALL | re.IGNORECASE):
            notes.add(f"the markup of {markup.removeprefix('an ')} is read as text", name)
            break
    return text


def check_signature(content: bytes) -> None:
    """Check that a file does not begin as one of another kind.

    Raises:
        NotText: it does.
    """
    head = content[:HEAD_BYTES]
    for pattern, what in OTHERS:
        if re.match(pattern, head, re.DOTALL):
            raise NotText(re.split("[,:]", what.removeprefix("not an image but "))[0])


def decode_bytes(content: bytes, name: str, notes: Notes, encoding: str | None) -> str:
    """Decode bytes in an encoding, or in the one that they look like; a byte order mark is left out.

    Raises:
        NotText: they are damaged.
    """
    if encoding is None:
        mark = next((each for mark, each in BYTE_ORDER_MARKS if content.startswith(mark)), "")
        encoding = mark or wide(content)
        if mark == "utf-8-sig":
            notes.add("a byte order mark is left out", name)
        elif encoding:
            notes.add(f"read as {re.sub('-[LB]E$', '', encoding.upper())}", name)
    try:
        return content.decode(encoding or "utf-8").removeprefix("\ufeff")
    except (UnicodeError, ValueError) as error:
        if encoding not in ("", "utf-8-sig"):
            raise NotText(f"damaged, or not {encoding.upper()}") from error
    check_controls(content)
    text = content.decode("utf-8", "replace")
    if sum(map(len, re.findall(r"[^\x00-\x7f\ufffd]+", text))) >= text.count("\ufffd"):
        notes.add("UTF-8 with damaged characters, read as U+FFFD", name)
        return text.removeprefix("\ufeff")
    notes.add("read as Windows-1252, since it is no UTF-8; an encoding can be named", name)
    try:
        return content.decode("cp1252")
    except UnicodeDecodeError:  # five bytes have no letter there
        return content.decode("latin-1")


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
    """Check that bytes are text, in their beginning and as a whole.

    Raises:
        NotText: too many of them are control characters.
    """
    for part in (content[:HEAD], content):
        if len(part) - len(part.translate(None, CONTROLS)) > len(part) * MOST_CONTROLS:
            form = image_format(content)
            raise NotText(f"a {form} image" if form else "a binary file, or in an encoding that has to be named")
