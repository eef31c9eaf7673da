"""Inputs of networks that are exported or run by other runtimes: one tensor."""

from __future__ import annotations

from torch import Tensor

from skipway.errors import SkipwayError
from skipway.tracing.example import Example, as_example

__all__ = ["single_tensor"]


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
    form = f"keyword arguments {', '.join(given)}" if isinstance(given, dict) else f"{len(given)} positional arguments"
    raise SkipwayError(
        f"example: {form}; the rule is one tensor; wrap the model in a module that takes one and makes the others"
    )
