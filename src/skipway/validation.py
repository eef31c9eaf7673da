"""Checks of arguments: of operations on models, schemes, configs, optimizers, schedules and recipes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import wraps
from numbers import Integral, Real
from typing import ParamSpec, TypeVar

from skipway.errors import CallError, SkipwayError, spell

__all__ = [
    "check_blocks",
    "check_call",
    "check_choice",
    "check_finite",
    "check_flag",
    "check_fraction",
    "check_least",
    "check_positive",
    "check_positive_int",
    "check_rule",
    "check_seed",
    "check_tolerance",
    "check_whole",
    "is_real",
    "is_whole",
    "whole_numbers",
]

P = ParamSpec("P")
R = TypeVar("R")
SHOWN = 60
"""Letters of a value that a message shows."""


def check_rule(argument: str, value: object, fits: bool, rule: str) -> None:
    """Raise unless `value` fits the rule, which is given in words; all other checks are cases of this one.

    >>> check_rule("rate", "0.1", is_real("0.1"), "a number between 0 and 1")
    Traceback (most recent call last):
    skipway.errors.SkipwayError: rate='0.1': the rule is a number between 0 and 1
    """
    if not fits:
        shown = spell(argument, value)
        if len(shown) > len(argument) + SHOWN or "\n" in shown:
            article = "an" if type(value).__name__[0] in "aeiouAEIOU" else "a"
            shown = f"{argument} is {article} {type(value).__name__}"
        raise SkipwayError(f"{shown}: the rule is {rule}")


def is_real(value: object, least: float = -math.inf) -> bool:
    """Whether a value is a number of at least `least`: True and False are none, and nan is none.

    >>> is_real(0.5), is_real(0.5, 1), is_real(True), is_real(math.nan), is_real("1")
    (True, False, False, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool) and value >= least  # type: ignore[operator]


def is_whole(value: object, least: float = -math.inf) -> bool:
    """Whether a value is a whole number of at least `least`, of Python or NumPy; True and False are none.

    >>> is_whole(2, 1), is_whole(0, 1), is_whole(2.0), is_whole(True)
    (True, False, False, False)
    """
    return isinstance(value, Integral) and is_real(value, least)


def whole_numbers(value: object, least: float = -math.inf) -> tuple[int, ...]:
    """A row of whole numbers of at least `least` as Python's integers; () where the value is none. An iterator is used
    up.

    >>> whole_numbers(range(2, 4), 1), whole_numbers((2, 0), 1), whole_numbers(2), whole_numbers("")
    ((2, 3), (), (), ())
    """
    try:
        found = tuple(value)  # type: ignore[var-annotated, arg-type]
    except TypeError:  # among others of an array without axes, which is an Iterable by its class
        return ()
    return tuple(map(int, found)) if all(is_whole(each, least) for each in found) else ()


def check_blocks(value: Iterable[int]) -> tuple[int, ...]:
    """Return the blocks of each stage as Python's integers.

    >>> check_blocks([3, 4])
    (3, 4)
    >>> check_blocks(3)
    Traceback (most recent call last):
    skipway.errors.SkipwayError: blocks=3: the rule is a number for each stage, at least one block in every one
    """
    found = whole_numbers(value, 1)
    check_rule("blocks", value, found != (), "a number for each stage, at least one block in every one")
    return found


def check_seed(argument: str, value: object) -> None:
    """Raise unless `value` is a seed of PyTorch."""
    fits = is_whole(value, -(2**63)) and value < 2**64  # type: ignore[operator]
    check_rule(argument, value, fits, "a whole number of at most 64 bits")


def check_choice(argument: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless `value` is one of the allowed words."""
    fits = isinstance(value, str) and value in allowed
    check_rule(argument, value, fits, f"one of {', '.join(map(repr, allowed))}")


def check_flag(argument: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    check_rule(argument, value, isinstance(value, bool), "True or False")


def check_finite(argument: str, value: object, *, also: str | None = None) -> None:
    """Raise unless `value` is a finite number, or the word that stands for the scheme's depth rule."""
    fits = is_real(value) and math.isfinite(value)  # type: ignore[arg-type]
    named = also is not None and isinstance(value, str) and value == also
    check_rule(argument, value, fits or named, f"a finite number{f' or {also!r}' if also else ''}")


def check_positive(argument: str, value: object) -> None:
    """Raise unless `value` > 0."""
    check_rule(argument, value, is_real(value, 0) and value != 0, bound(value, f"{argument} > 0"))


def check_fraction(argument: str, value: object) -> None:
    """Raise unless 0 <= `value` < 1.

    >>> check_fraction("momentum", 1.0)
    Traceback (most recent call last):
    skipway.errors.SkipwayError: momentum=1.0: the rule is 0 <= momentum < 1
    """
    fits = is_real(value, 0) and value < 1  # type: ignore[operator]
    check_rule(argument, value, fits, bound(value, f"0 <= {argument} < 1"))


def check_whole(argument: str, value: object, least: int, most: int | None = None, *, of: str = "") -> None:
    """Raise unless `value` is a whole number from `least` to `most`, of something.

    >>> check_whole("to", True, 0, of="blocks")
    Traceback (most recent call last):
    skipway.errors.SkipwayError: to=True: the rule is a whole number of blocks, at least 0
    """
    fits = is_whole(value, least) and (most is None or value <= most)  # type: ignore[operator]
    reach = f"at least {least}" if most is None else f"from {least} to {most}"
    check_rule(argument, value, fits, f"a whole number of {of}, {reach}" if of else f"a whole number of {reach}")


def check_positive_int(argument: str, value: object) -> None:
    """Raise unless `value` is a whole number of at least 1.

    >>> check_positive_int("width", 0)
    Traceback (most recent call last):
    skipway.errors.SkipwayError: width=0: the rule is a whole number of at least 1
    """
    check_whole(argument, value, 1)


def check_least(argument: str, value: object, least: float) -> None:
    """Raise unless `value` is a number of at least `least`.

    >>> check_least("warmup", -1, 0)
    Traceback (most recent call last):
    skipway.errors.SkipwayError: warmup=-1: the rule is warmup >= 0
    """
    check_rule(argument, value, is_real(value, least), bound(value, f"{argument} >= {least}"))


def check_tolerance(argument: str, value: object) -> None:
    """Raise unless `value` is a number of at least 0, infinity included.

    >>> check_tolerance("tolerance", float("nan"))
    Traceback (most recent call last):
    skipway.errors.SkipwayError: tolerance=nan: the rule is a number of at least 0, 1e-5 for example
    """
    check_rule(argument, value, is_real(value, 0), "a number of at least 0, 1e-5 for example")


def bound(value: object, rule: str) -> str:
    """A bound on a number, for the message about a value."""
    return rule if is_real(value) else f"a number, {rule}"


def check_call(function: Callable[P, R]) -> Callable[P, R]:
    """Let calls without a required argument, or with one that the function does not have, be refused like any other
    wrong argument: with the order of the arguments.

    >>> @check_call
    ... def cut(model, example, to): ...
    >>> cut("model", to=4)
    Traceback (most recent call last):
    skipway.errors.CallError: cut: missing a required argument: 'example'; it is called as cut(model, example, to)
    """
    signature = inspect.signature(function)
    plain = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    order = str(signature.replace(parameters=plain, return_annotation=signature.empty))

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as problem:
            name = function.__name__
            raise CallError(f"{name}: {problem}; it is called as {name}{order}") from None
        return function(*args, **kwargs)

    return checked
