"""Checks of the values that schemes and configs are given."""

from __future__ import annotations

import math

from skipway.errors import SkipwayError

__all__ = ["check_choice", "check_finite", "check_positive_int"]


def check_choice(argument: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise unless `value` is one of the allowed words."""
    if value not in allowed:
        raise SkipwayError(f"{argument}={value!r}: the rule is one of {', '.join(map(repr, allowed))}")


def check_finite(argument: str, value: object, *, also: str | None = None) -> None:
    """Raise unless `value` is a finite number, or the word that stands for the scheme's depth rule."""
    if value == also and also is not None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        extra = f" or {also!r}" if also else ""
        raise SkipwayError(f"{argument}={value!r}: the rule is a finite number{extra}")


def check_positive_int(argument: str, value: object) -> None:
    """Raise unless `value` is a whole number of at least 1.

    >>> check_positive_int("width", 0)
    Traceback (most recent call last):
    skipway.errors.SkipwayError: width=0: the rule is a whole number of at least 1
    """
    if not isinstance(value, int) or value < 1:
        raise SkipwayError(f"{argument}={value!r}: the rule is a whole number of at least 1")
