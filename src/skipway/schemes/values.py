"""Checks of the values that schemes are given."""

from __future__ import annotations

import math

from skipway.errors import SkipwayError

__all__ = ["checked", "number"]


def checked(argument: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise unless `value` is one of the allowed words."""
    if value not in allowed:
        raise SkipwayError(f"{argument}={value!r}: the rule is one of {', '.join(map(repr, allowed))}")


def number(argument: str, value: object, *, also: str | None = None) -> None:
    """Raise unless `value` is a finite number, or the word that stands for the scheme's depth rule."""
    if value == also and also is not None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        extra = f" or {also!r}" if also else ""
        raise SkipwayError(f"{argument}={value!r}: the rule is a finite number{extra}")
