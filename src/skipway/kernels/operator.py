"""The interface that every kernel's operator implements: forward, shape function and autograd formula in one class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

__all__ = ["Operator"]


class Operator:
    """A `torch.library` operator `skipway::NAME`, written like a `torch.autograd.Function`.

    Defining a subclass registers the operator; `apply` calls it. The methods are static:

    | method | purpose |
    |---|---|
    | `forward(*arguments)` | compute the outputs; its annotations are the operator's schema |
    | `fake(*arguments)` | return empty outputs of the same shape, type and layout, for `torch.compile` and export |
    | `setup_context(ctx, inputs, output)` | save for backward |
    | `backward(ctx, *gradients)` | return one gradient for each input |

    The last two are left out where no gradient passes: the backward pass of another operator.

    >>> class Halve(Operator, name="doctest_halve"):
    ...     @staticmethod
    ...     def forward(x: torch.Tensor) -> torch.Tensor:
    ...         return x / 2
    ...
    ...     @staticmethod
    ...     def fake(x):
    ...         return torch.empty_like(x)
    >>> Halve.apply(torch.ones(2))
    tensor([0.5000, 0.5000])
    """

    forward: Callable[..., Any]
    fake: Callable[..., Any]
    setup_context: Callable[..., None]
    backward: Callable[..., tuple[Any, ...]]
    apply: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls, *, name: str) -> None:
        operator = torch.library.custom_op(f"skipway::{name}", cls.forward, mutates_args=())
        operator.register_fake(cls.fake)
        if hasattr(cls, "backward"):
            operator.register_autograd(cls.backward, setup_context=cls.setup_context)
        cls.apply = operator
