"""What all charts drawn as SVG share: their size, their colours, and text that fits."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable
from html import escape
from itertools import accumulate

from skipway.schemes.cards import POWER

__all__ = [
    "BOLD_LETTER",
    "COLORS",
    "DASHES",
    "HEIGHT",
    "LETTER",
    "WIDTH",
    "clipped",
    "clipped_path",
    "name_text",
    "series_class",
    "text_width",
    "wrapped_text",
]

WIDTH, HEIGHT = 420, 262
LETTER, BOLD_LETTER = 6.6, 7.5
"""Width of a character, and of one in a title; those of a wide font, as no one knows which the reader has."""
COLORS = (
    ("#0072b2", "#56b4e9"),
    ("#bf5000", "#f0975a"),
    ("#00805f", "#3cc79c"),
    ("#a8528a", "#e39cc9"),
    ("#8a6d00", "#e6c14e"),
    ("#b2182b", "#ff6f78"),
    ("#5048b8", "#a09af8"),
    ("#4a7a00", "#a8e04a"),
    ("#5a2a00", "#cfb48c"),
    ("#8400b8", "#d070ff"),
    ("#4a5a6c", "#a9b8c6"),
    ("#003f8a", "#5f8dff"),
)
"""Of the series, on light and on dark paper, each with a contrast of 4.5, as names are written in them. Dashes and
markers tell apart those that share a colour, or that a reader sees as one."""
DASHES = ("none", "7 3", "2 2.5", "9 3 2 3")
FILLER = "\0"
"""Takes the second place of a wide letter while lines are wrapped."""


def series_class(index: int) -> str:
    """The style classes of the series at an index among the names.

    >>> series_class(1), series_class(13)
    ('series c1 d0', 'series c1 d1')
    """
    return f"series c{index % len(COLORS)} d{index // len(COLORS) % len(DASHES)}"


def wrapped_text(text: str, letter: float = LETTER) -> list[str]:
    """Wrap text of such letters to the width of a figure."""
    padded = "".join(each + FILLER * (letter_width(each) - 1) for each in text)
    lines = (line.replace(FILLER, "") for line in textwrap.wrap(padded, int((WIDTH - 24) / letter)))
    return [line for line in lines if line]


def name_text(name: str) -> str:
    """A name as the content of a text element, with its powers raised.

    >>> name_text("L^-1/2")
    'L<tspan class="small" dy="-4">-1/2</tspan><tspan dy="4">\\u200b</tspan>'
    """
    # the empty part brings what follows back to the line
    raised = '<tspan class="small" dy="-4">{}</tspan><tspan dy="4">\u200b</tspan>'
    return POWER.sub(lambda match: raised.format(match[1] or match[2]), escape(name))


def text_width(text: str) -> int:
    """The width of a text in letters, of which those of Chinese, Japanese and Korean take two.

    >>> text_width("cat"), text_width("猫")
    (3, 2)
    """
    return sum(map(letter_width, text))


def letter_width(letter: str) -> int:
    """The width of a letter: 0 of a mark on the one before it, and of the later parts of a Korean syllable."""
    if unicodedata.combining(letter) or "\u1160" <= letter <= "\u11ff":
        return 0
    return 2 if unicodedata.east_asian_width(letter) in ("W", "F") else 1


def clipped(text: str, letters: int) -> str:
    """Shorten text to the width of so many letters.

    >>> clipped("abcdefgh", 4), clipped("金毛寻回犬", 6)
    ('abc…', '金毛…')
    """
    if text_width(text) <= letters:
        return text
    return f"{text[: max(1, fitting(text, letters - 1))]}…"


def fitting(text: Iterable[str], room: int) -> int:
    """How many letters fit into the width of so many."""
    return sum(width <= room for width in accumulate(map(letter_width, text)))


def clipped_path(name: str, letters: int) -> str:
    """Shorten a name to the width of so many letters: of the path of a module the beginning goes, of others the end.

    >>> clipped_path("encoder.layers.10.attention", 14), clipped_path("golden retriever", 8)
    ('…10.attention', 'golden …')
    """
    if text_width(name) <= letters or "." not in name or " " in name:
        return clipped(name, letters)
    end = name[len(name) - max(1, fitting(reversed(name), letters - 1)) :]
    return f"…{end.partition('.')[2] or end}"
