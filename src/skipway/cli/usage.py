"""What the command line says to wrong usage, or where no command is given: what is wrong, and the next command."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from skipway._version import __version__
from skipway.errors import counted, suggest

if TYPE_CHECKING:
    from cyclopts import CycloptsError

__all__ = ["see_help", "start_text", "usage_text", "version_text"]


def start_text() -> str:
    """Three things to try, for who gives no command."""
    missing = "" if find_spec("sklearn") else "; needs pip install 'skipway[digits]'"
    return f"""Skipway {__version__}: residual networks at any depth. Three things to try:

  skipway diagnose resnet56 --scheme plain --input 1,8,8 --batch digits
      whether a deep network without skip connections will train, and why not{missing}
  skipway train
      a small residual network on 1,797 handwritten digits{missing}
  skipway train PHOTOS
      a classifier from photographs, one folder for each class: PHOTOS/cat/1.jpg

All commands: skipway --help
What is installed, and what is slow here: skipway doctor
"""


def version_text() -> str:
    """The versions of Skipway, Python and torch, and the machine. Imports nothing heavy."""
    from skipway.hardware.limits import cpu_count
    from skipway.hardware.processor import cpu_name

    try:
        torch = f"torch {version('torch')}"
    except PackageNotFoundError:
        torch = "no torch"
    machine = f"{platform.system()} {platform.machine()}, {counted(cpu_count(), 'core')} of {cpu_name()}"
    return f"skipway {__version__}\nPython {platform.python_version()}, {torch}\n{machine}"


def usage_text(error: CycloptsError, given: Sequence[str], commands: Sequence[str]) -> str:
    """What is wrong with a command line, the command that was probably meant, and where its help is.

    Args:
        error: what the parser found.
        given: the words of the command line.
        commands: the names of all commands.
    """
    from cyclopts import MissingArgumentError, UnknownCommandError, UnknownOptionError, UnusedCliTokensError

    wrong, meant, message = "", [], str(error)
    command = given[0] if given and given[0] in commands else ""
    if isinstance(error, UnknownCommandError) and given:
        wrong, options = given[0], given[0].startswith("-")
        message = suggest("option" if options else "command", wrong, ("--help", "--version") if options else commands)
        meant = message.partition("did you mean ")[2].split("'")[1:2]
    elif isinstance(error, UnknownOptionError):
        wrong = error.token.keyword or error.token.value
        meant = [message.rpartition("Did you mean ")[2].rstrip("?")] if "Did you mean " in message else []
    elif isinstance(error, MissingArgumentError) and (found := re.search(r"(--\S+) requires an argument", message)):
        if not any(word.partition("=")[0] == found[1] for word in given):
            message = f"{found[1]} is missing"
    elif isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        extra = " ".join(map(repr, error.unused_tokens))
        message = (
            f"too many arguments: {extra}; a value follows the name of its option, and a name with spaces needs "
            "quotation marks"
        )
    words = [meant[0] if word == wrong else word for word in given] if meant else []
    retry = f"\nTry: skipway {shlex.join(words)}" if words else ""
    return f"{message}{retry}\n{see_help(command if not words else words[0])}"


def see_help(command: str) -> str:
    """Where the help of a command is; an option is none.

    >>> see_help("train"), see_help("--version")
    ('See: skipway train --help', 'See: skipway --help')
    """
    return f"See: skipway {'' if command.startswith('-') else command} --help".replace("  ", " ")
