"""The end of a residual connection in one pass: y = shortcut + g ⊙ m ⊙ branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipway.kernels import triton
from skipway.kernels.autotune import Way, enabled, kernel

__all__ = ["factored", "in_one_pass", "plain", "plain_backward", "residual"]


def plain(shortcut: Tensor, branch: Tensor, gain: Tensor | None, mask: Tensor | None) -> Tensor:
    for factor in (gain, mask):
        branch = branch if factor is None else branch * factor
    return shortcut + branch


def in_one_pass(shortcut: Tensor, branch: Tensor, gain: Tensor | None, mask: Tensor | None) -> Tensor:
    """The two factors are small: their product has one number per sample and channel."""
    return torch.addcmul(shortcut, branch, both(gain, mask))


def both(gain: Tensor | None, mask: Tensor | None) -> Tensor:
    """The product of the factors that are there; one at least is."""
    if gain is None or mask is None:
        found = mask if gain is None else gain
        assert found is not None
        return found
    return gain * mask


def factored(shortcut: Tensor, branch: Tensor, gain: Tensor | None, mask: Tensor | None, *others: Any) -> bool:
    return (gain is not None or mask is not None) and shortcut.shape == branch.shape


forward = kernel(
    "residual",
    plain,
    Way("one pass", in_one_pass, factored),
    Way("triton", triton.residual, triton.serves_residual),
)


@torch.library.custom_op("skipway::residual", mutates_args=())
def operator(shortcut: Tensor, branch: Tensor, gain: Tensor | None, mask: Tensor | None) -> Tensor:
    return forward(shortcut, branch, gain, mask)


@operator.register_fake
def _(shortcut: Tensor, branch: Tensor, gain: Any, mask: Any) -> Tensor:
    return plain(shortcut, branch, gain, mask)


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, branch, gain, mask = inputs
    learned = gain is not None and gain.requires_grad
    ctx.save_for_backward(branch if learned else None, gain, mask)


def plain_backward(
    gradient: Tensor, branch: Tensor | None, gain: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of the branch, and of the gain where a branch is given (else nothing)."""
    to_branch = gradient * both(gain, mask).to(gradient.dtype)
    if branch is None or gain is None:
        return to_branch, gradient.new_empty(0)
    masked = gradient if mask is None else gradient * mask
    return to_branch, (masked * branch).sum_to_size(gain.shape).to(gain.dtype)


def by_triton(
    gradient: Tensor, branch: Tensor | None, gain: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    to_branch, sums = triton.residual_backward(gradient, branch, gain, mask)
    if branch is None or gain is None:
        return to_branch, gradient.new_empty(0)
    return to_branch, (sums.sum() if gain.numel() == 1 else sums).view(gain.shape).to(gain.dtype)


def served(gradient: Tensor, branch: Tensor | None, gain: Tensor | None, mask: Tensor | None) -> bool:
    return triton.serves_residual(gradient, gradient if branch is None else branch, gain, mask)


backward_kernel = kernel("residual backward", plain_backward, Way("triton", by_triton, served))


@torch.library.custom_op("skipway::residual_backward", mutates_args=())
def backward_operator(
    gradient: Tensor, branch: Tensor | None, gain: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    return backward_kernel(gradient, branch, gain, mask)


@backward_operator.register_fake
def _(gradient: Tensor, branch: Any, gain: Any, mask: Any) -> tuple[Tensor, Tensor]:
    learned = branch is not None and gain is not None
    return torch.empty_like(gradient), torch.empty_like(gain) if learned else gradient.new_empty(0)


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """∂/∂shortcut is the gradient itself: nothing is computed for it. Where a shape or a type was widened autograd sums
    and casts back."""
    branch, gain, mask = ctx.saved_tensors
    branch = branch if ctx.needs_input_grad[2] else None
    # an operator where there is a kernel: plain torch has further derivatives, and the compiler fuses it
    run = backward_operator if served(gradient, branch, gain, mask) else plain_backward
    to_branch, to_gain = run(gradient, branch, gain, mask)
    return gradient, to_branch, to_gain if ctx.needs_input_grad[2] else None, None


operator.register_autograd(backward, setup_context=keep)


def residual(shortcut: Tensor, branch: Tensor, gain: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """y = shortcut + g ⊙ m ⊙ branch: gain, stochastic depth and addition in one pass over memory in place of three.

    Backward, the shortcut's gradient is the gradient itself, the branch's is one pass, and the branch's output is kept
    only where the gain is learned.

    Shapes: shortcut and branch alike; gain and mask broadcast to them, (C, 1, 1) or (C,), (N, 1, …).

    Args:
        gain: g, what a scheme multiplies the branch with.
        mask: m, stochastic depth's: 0 or 1/(1 − p) for each sample; it has no gradient.

    >>> residual(torch.ones(2), torch.ones(2), torch.tensor(0.5))
    tensor([1.5000, 1.5000])
    """
    if not enabled() or (gain is None and mask is None):
        return plain(shortcut, branch, gain, mask)
    return operator(shortcut, branch, gain, mask)
