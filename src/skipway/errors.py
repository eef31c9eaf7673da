"""Errors. Each message names the argument, its value, the rule and the way out."""

from __future__ import annotations

import difflib
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

__all__ = [
    "CallError",
    "CheckpointError",
    "DataError",
    "DivergedError",
    "MissingExtraError",
    "SkipwayError",
    "clock_text",
    "counted",
    "did_you_mean",
    "duration",
    "first_line",
    "printable",
    "similar_names",
    "spell",
    "spelling",
    "suggest",
    "warn_caller",
]

# names that `suggest` shows: close ones, and others
MAX_CLOSE, MAX_LISTED = 5, 10
# with so few more than those all are shown
MAX_MORE = 4


class SkipwayError(ValueError):
    """Something the caller gave cannot be used; the message says what, why and what to do instead.

    `exit_status` is what the command line ends with.
    """

    exit_status = 2


class DataError(SkipwayError):
    """The images cannot be trained on: an empty folder, a single class, unreadable files."""

    exit_status = 3


class CheckpointError(SkipwayError):
    """Weights or a run folder cannot be used: wrong shapes, unknown keys, a damaged file."""

    exit_status = 4


class DivergedError(SkipwayError):
    """Training produced a loss or a gradient that is not finite; the last good weights are kept."""

    exit_status = 5


class CallError(SkipwayError, TypeError):
    """A function was called without a required argument, or with one that it does not have."""


class MissingExtraError(SkipwayError, ImportError):
    """An optional dependency is not installed; the message holds the line that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'skipway[{extra}]'")


def printable(name: str | Path) -> str:
    r"""A name that a terminal can show: what is not text becomes an escape.

    >>> printable("caf\u00e9\x1b[31m")
    'café\\x1b[31m'
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(name))


def first_line(error: BaseException, most: int | None = None) -> str:
    r"""The first line of a foreign error's message, cut to so many letters, or its class if it has none.

    >>> first_line(ValueError("no such file\nC++ stack:")), first_line(TimeoutError())
    ('no such file', 'TimeoutError')
    """
    return (str(error) or type(error).__name__).splitlines()[0][:most]


def counted(count: int, thing: str, things: str = "") -> str:
    """A number of things in words.

    >>> counted(1, "sample"), counted(2000, "sample"), counted(2, "branch", "branches")
    ('1 sample', '2,000 samples', '2 branches')
    """
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"


def clock_text(seconds: float) -> str:
    """The time of day in so many seconds: 14:05."""
    return time.strftime("%H:%M", time.localtime(time.time() + seconds))


def duration(seconds: float) -> str:
    """Format a duration for people.

    >>> duration(12.34), duration(75), duration(7322)
    ('12.3 s', '1 min 15 s', '2 h 02 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


RENAMED: ContextVar[dict[str, str]] = ContextVar("RENAMED")


@contextmanager
def spelling(**names: str) -> Iterator[None]:
    """Context in which messages call arguments by the names that the caller knows them by: fields of a recipe, say.

    >>> with spelling(entry="weights_entry"):
    ...     spell("entry", "ema")
    "weights_entry='ema'"
    """
    token = RENAMED.set(names)
    try:
        yield
    finally:
        RENAMED.reset(token)


def spell(name: str, value: object) -> str:
    """An argument with its value, for a message, by the name that the caller knows it by.

    A recipe's fields hold several words as one text. The command line spells them as options
    (`skipway.argument_names`).

    >>> spell("adapt", ("classes", "size"))
    "adapt=('classes', 'size')"
    """
    renamed = RENAMED.get({}).get(name)
    if renamed is None:
        return f"{name}={value!r}"
    return f"{renamed}={(','.join(value) if isinstance(value, tuple) else value)!r}"


def beginning_alike(name: str, known: Sequence[str]) -> list[str]:
    """Known names that share the longest beginning with a name, three letters at least; the most similar first.

    >>> beginning_alike("vit_nope", ["resnet18", "vit_base_patch16_224", "vit_tiny"])
    ['vit_tiny', 'vit_base_patch16_224']
    """
    for length in range(len(name), 2, -1):
        alike = [each for each in known if each.startswith(name[:length])]
        if alike:
            return difflib.get_close_matches(name, alike, n=MAX_CLOSE, cutoff=0.0)
    return []


def similar_names(path: Path) -> str:
    """The entries of a folder whose names are like one that is not there, as a clause."""
    try:
        entries = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = [
        name
        for name in difflib.get_close_matches(path.name, entries, n=3)
        if difflib.SequenceMatcher(None, Path(name).stem, path.stem).ratio() > 0.6  # not for the ending alone
    ]
    return f"; did you mean {' or '.join(printable(path.parent / name) for name in close)}?" if close else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question for the known names, at most five, that are closest to an unknown one; "" where none is close.

    >>> did_you_mean("adamW", ["adam", "adamw", "sgd"]), did_you_mean("zzz", ["sgd"])
    ("did you mean 'adamw'?", '')
    """
    known = sorted(known)
    close = [each for each in known if each.lower() == name.lower()]
    close = close or difflib.get_close_matches(name, known, n=MAX_CLOSE, cutoff=0.6) or beginning_alike(name, known)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""


def suggest(kind: str, name: str, known: Iterable[str], command: str = "") -> str:
    """One sentence for an unknown `name`: the closest known ones, at most five, or else ten or a few more of all.

    Args:
        kind: what the name is of.
        name: that is unknown.
        known: names.
        command: that lists all of them, shown where the sentence does not.

    >>> suggest("scheme", "layerscal", ["layerscale", "skipinit"])
    "unknown scheme 'layerscal'; did you mean 'layerscale'?"
    >>> suggest("scheme", "zzz", ["layerscale", "skipinit"])
    "unknown scheme 'zzz'; there are: layerscale, skipinit"
    >>> suggest("optimizer", "SGD", ["adam", "sgd"])
    "unknown optimizer 'SGD'; did you mean 'sgd'?"
    """
    known = sorted(known)
    if question := did_you_mean(name, known):
        return f"unknown {kind} {name!r}; {question}"
    if len(known) <= MAX_LISTED + MAX_MORE:
        return f"unknown {kind} {name!r}; there are: {', '.join(known)}"
    listed = f"{', '.join(known[:MAX_LISTED])} … and {len(known) - MAX_LISTED:,} more"
    return f"unknown {kind} {name!r}; there are: {listed}" + f" ({command} lists them)" * bool(command)


def warn_caller(sentence: str) -> None:
    """Warn in the name of the line outside of Skipway and torch that made the call."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("skipway", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, stacklevel=level)
