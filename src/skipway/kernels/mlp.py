"""Two linear maps with an activation between them, computed a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.kernels.autotune import Way, enabled, kernel
from skipway.kernels.cast import lowered
from skipway.kernels.maps import product

__all__ = ["ACTIVATIONS", "mlp"]

CACHE = 1 << 20
"""Bytes of hidden values that are computed at a time: what a core keeps close."""
LEAST = 64
"""Rows of a block at least, below which a matrix product is not at its rate."""


class Activation(NamedTuple):
    """A function between two maps, and its derivative: from the gradient behind it and the value before it."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu-tanh": Activation(
        lambda h: F.gelu(h, approximate="tanh"),
        lambda gradient, h: torch.ops.aten.gelu_backward(gradient, h, approximate="tanh"),
    ),
    "relu": Activation(F.relu, lambda gradient, h: torch.ops.aten.threshold_backward(gradient, h, 0)),
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
}
"""What may stand between the maps."""


def whole(x: Tensor, inner: Tensor, inner_bias: Any, outer: Tensor, outer_bias: Any, act: str) -> Tensor:
    return F.linear(ACTIVATIONS[act].forward(F.linear(x, inner, inner_bias)), outer, outer_bias)


def in_blocks(x: Tensor, inner: Tensor, inner_bias: Any, outer: Tensor, outer_bias: Any, act: str) -> Tensor:
    """The hidden values of a block are gone before they leave the cache."""
    activate = ACTIVATIONS[act].forward
    y = x.new_empty(x.shape[0], outer.shape[0])
    for block, out in zip(blocks(x, inner), blocks(y, inner), strict=True):
        out.copy_(product(activate(product(block, inner, inner_bias)), outer, outer_bias))
    return y


def blocks(x: Tensor, inner: Tensor) -> tuple[Tensor, ...]:
    """The rows of x, so many at a time that their hidden values fill `CACHE`."""
    rows = CACHE // (inner.shape[0] * x.element_size())
    return x.split(max(LEAST, rows - rows % LEAST))


def several(x: Tensor, inner: Tensor, *others: Any) -> bool:
    return x.device.type == "cpu" and len(blocks(x, inner)) > 1


forward = kernel("mlp", whole, Way("blocks", in_blocks, several))


def whole_backward(
    gradient: Tensor, x: Tensor, inner: Tensor, inner_bias: Any, outer: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    activate, differentiate = ACTIVATIONS[act]
    before = F.linear(x, inner, inner_bias)
    within = differentiate(gradient @ outer, before)
    return within @ inner, within.t() @ x, within.sum(0), gradient.t() @ activate(before), gradient.sum(0)


def blockwise_backward(
    gradient: Tensor, x: Tensor, inner: Tensor, inner_bias: Any, outer: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums over blocks are kept in the type of the weights; in 16 bits in float32, since rounding adds up."""
    activate, differentiate = ACTIVATIONS[act]
    to_x, total = torch.empty_like(x), torch.promote_types(x.dtype, torch.float32)
    to_inner, to_outer = (torch.zeros_like(each, dtype=total) for each in (inner, outer))
    to_inner_bias = torch.zeros(inner.shape[0], dtype=total, device=x.device)
    inner_across, outer_across = inner.t().contiguous(), outer.t().contiguous()
    for g, block, out in zip(blocks(gradient, inner), blocks(x, inner), blocks(to_x, inner), strict=True):
        before = product(block, inner, inner_bias)
        within = differentiate(product(g, outer_across, None), before)
        add_product(to_outer, g, activate(before))
        add_product(to_inner, within, block)
        to_inner_bias += within.sum(0)
        out.copy_(product(within, inner_across, None))
    found = (to_inner, to_inner_bias, to_outer)
    return to_x, *(each.to(inner.dtype) for each in found), gradient.sum(0)  # type: ignore[return-value]


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += leftᵀ right."""
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right


backward_kernel = kernel(
    "mlp backward", whole_backward, Way("blocks", blockwise_backward, lambda g, x, inner, *rest: several(x, inner))
)


@torch.library.custom_op("skipway::mlp", mutates_args=())
def operator(
    x: Tensor, inner: Tensor, inner_bias: Tensor | None, outer: Tensor, outer_bias: Tensor | None, act: str
) -> Tensor:
    y = forward(x.flatten(0, -2), inner, inner_bias, outer, outer_bias, act)
    return y.view(*x.shape[:-1], -1)


@operator.register_fake
def _(x: Tensor, inner: Tensor, inner_bias: Any, outer: Tensor, outer_bias: Any, act: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], outer.shape[0]))


@torch.library.custom_op("skipway::mlp_backward", mutates_args=())
def backward_operator(
    gradient: Tensor, x: Tensor, inner: Tensor, inner_bias: Tensor | None, outer: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = backward_kernel(gradient.flatten(0, -2), x.flatten(0, -2), inner, inner_bias, outer, act)
    return found[0].view(x.shape), *found[1:]


@backward_operator.register_fake
def _(gradient: Tensor, x: Tensor, inner: Tensor, inner_bias: Any, outer: Tensor, act: str) -> tuple[Tensor, ...]:
    sizes = x.shape, inner.shape, inner.shape[:1], outer.shape, outer.shape[:1]
    return tuple(x.new_empty(size) for size in sizes)


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, inner, inner_bias, outer, outer_bias, act = inputs
    ctx.save_for_backward(x, inner, inner_bias, outer)
    ctx.act, ctx.biased = act, (inner_bias is not None, outer_bias is not None)


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    to_x, to_inner, to_inner_bias, to_outer, to_outer_bias = backward_operator(
        gradient.contiguous(), *ctx.saved_tensors, ctx.act
    )
    inner_biased, outer_biased = ctx.biased
    return (
        to_x,
        to_inner,
        to_inner_bias if inner_biased else None,
        to_outer,
        to_outer_bias if outer_biased else None,
        None,
    )


operator.register_autograd(backward, setup_context=keep)


def mlp(
    x: Tensor,
    inner: Tensor,
    inner_bias: Tensor | None,
    outer: Tensor,
    outer_bias: Tensor | None,
    act: str = "gelu",
) -> Tensor:
    """y = W₂ φ(W₁ x + b₁) + b₂ for every row of x, as two linear maps and an activation.

    The hidden values, four times the stream in ViT, Swin and ConvNeXt, are computed a block of rows at a time and
    never written to memory; for backward x alone is kept, and they are computed again. One product of seven more is
    paid, the traffic of six passes over the hidden values is saved, and four fifths of the memory that the three
    operations keep.

    Shapes: x (…, d), inner (m, d), outer (d′, m) → (…, d′). First derivatives only; second ones exist under `off()`.

    Args:
        act: φ, a name in `ACTIVATIONS`.

    Raises:
        SkipwayError: an unknown activation.

    >>> x, inner, outer = torch.randn(5, 8), torch.randn(32, 8), torch.randn(8, 32)
    >>> y = mlp(x, inner, None, outer, None)
    >>> torch.allclose(y, F.linear(F.gelu(F.linear(x, inner)), outer), atol=1e-4)
    True
    """
    if act not in ACTIVATIONS:
        raise SkipwayError(f"act={act!r}: the rule is one of {', '.join(ACTIVATIONS)}")
    given = lowered(x, inner, inner_bias, outer, outer_bias)
    if not enabled() or x.ndim < 2:
        return whole(*given, act)  # type: ignore[arg-type]
    return operator(*given, act)
