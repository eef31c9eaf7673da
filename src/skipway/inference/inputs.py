"""Inputs of networks that are exported or run by other runtimes: one tensor."""

from __future__ import annotations

from torch import Tensor, nn

from skipway.errors import SkipwayError, printable
from skipway.tracing.example import Example, as_example

__all__ = ["call_for_tensor", "describe_call", "root_cause", "single_tensor"]

REASON = 200
"""Letters of a foreign error that a message repeats."""


def single_tensor(example: Example) -> Tensor:
    """Return the one tensor of an example.

    Raises:
        SkipwayError: the example has several arguments, or keyword arguments.

    >>> import torch
    >>> single_tensor((torch.ones(2),))
    tensor([1., 1.])
    """
    given = as_example(example)
    if isinstance(given, tuple) and len(given) == 1:
        given = given[0]
    if isinstance(given, Tensor):
        return given
    raise SkipwayError(
        f"example: {describe_call(given)}; the rule is one tensor; wrap the model in a module that takes one and makes "
        "the others"
    )


def describe_call(given: tuple[object, ...] | dict[str, object]) -> str:
    """Arguments in words.

    >>> describe_call((1, 2)), describe_call({"input_ids": 1})
    ('2 positional arguments', 'keyword arguments input_ids')
    """
    return f"keyword arguments {', '.join(given)}" if isinstance(given, dict) else f"{len(given)} positional arguments"


def call_for_tensor(model: nn.Module, given: Tensor) -> Tensor:
    """Call a model with its example.

    Raises:
        SkipwayError: the model fails, or does not return one tensor.
    """
    try:
        output = model(given)
    except Exception as error:  # a network raises whatever it likes
        raise SkipwayError(
            f"this {type(model).__name__} fails on its example of shape {tuple(given.shape)}: {root_cause(error)}"
        ) from error
    if not isinstance(output, Tensor):
        raise SkipwayError(
            f"this {type(model).__name__} returns a {type(output).__name__}; the rule is one tensor: wrap the model in "
            "a module that returns the one that is wanted"
        )
    return output


def root_cause(error: BaseException) -> str:
    """The first sentences of a foreign error, or of the one that caused it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(printable(line) for line in str(error).splitlines() if line.strip())
    return f"{type(error).__name__}: {text[:REASON]}{' …' if len(text) > REASON else ''}"
