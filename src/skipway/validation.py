"""Checks of arguments: schemes, configs, optimizers, schedules and recipes."""

from __future__ import annotations

import math

from skipway.errors import SkipwayError

__all__ = [
    "check_choice",
    "check_finite",
    "check_fraction",
    "check_least",
    "check_positive",
    "check_positive_int",
    "check_tolerance",
]


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


def check_tolerance(argument: str, value: object) -> None:
    """Raise unless `value` is a number of at least 0, infinity included.

    >>> check_tolerance("tolerance", float("nan"))
    Traceback (most recent call last):
    skipway.errors.SkipwayError: tolerance=nan: the rule is a number of at least 0, 1e-5 for example
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise SkipwayError(f"{argument}={value!r}: the rule is a number of at least 0, 1e-5 for example")


def check_positive(argument: str, value: float) -> None:
    """Raise unless `value` > 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise SkipwayError(f"{argument}={value!r}: the rule is {argument} > 0")


def check_fraction(argument: str, value: float) -> None:
    """Raise unless 0 <= `value` < 1.

    >>> check_fraction("momentum", 1.0)
    Traceback (most recent call last):
    skipway.errors.SkipwayError: momentum=1.0: the rule is 0 <= momentum < 1
    """
    if not 0 <= value < 1:
        raise SkipwayError(f"{argument}={value}: the rule is 0 <= {argument} < 1")


def check_positive_int(argument: str, value: object) -> None:
    """Raise unless `value` is a whole number of at least 1.

    >>> check_positive_int("width", 0)
    Traceback (most recent call last):
    skipway.errors.SkipwayError: width=0: the rule is a whole number of at least 1
    """
    if not isinstance(value, int) or value < 1:
        raise SkipwayError(f"{argument}={value!r}: the rule is a whole number of at least 1")


def check_least(argument: str, value: object, least: float) -> None:
    """Raise unless `value` is a number of at least `least`.

    >>> check_least("warmup", -1, 0)
    Traceback (most recent call last):
    skipway.errors.SkipwayError: warmup=-1: the rule is warmup >= 0
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        raise SkipwayError(f"{argument}={value!r}: the rule is {argument} >= {least}")
