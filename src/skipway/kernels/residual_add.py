"""The end of a residual connection in one pass over memory: y = shortcut + g ⊙ m ⊙ branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipway.kernels import triton_launch
from skipway.kernels.autotune import Implementation, add_kernel, enabled
from skipway.kernels.operator import Operator

__all__ = ["residual"]


def residual_reference(shortcut: Tensor, branch: Tensor, gain: Tensor | None, mask: Tensor | None) -> Tensor:
    """Multiply by each factor, then add."""
    for factor in (gain, mask):
        branch = branch if factor is None else branch * factor
    return shortcut + branch


def residual_by_addcmul(shortcut: Tensor, branch: Tensor, gain: Tensor | None, mask: Tensor | None) -> Tensor:
    """Multiply the two factors first: their product has one number for each sample and channel."""
    return torch.addcmul(shortcut, branch, combined_factor(gain, mask))


def combined_factor(gain: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return g ⊙ m, or the one of the two that is given."""
    if gain is None or mask is None:
        factor = mask if gain is None else gain
        assert factor is not None
        return factor
    return gain * mask


def supports_addcmul(shortcut: Tensor, branch: Tensor, gain: Tensor | None, mask: Tensor | None) -> bool:
    """Return whether there is a factor, and the shortcut is not broadcast."""
    return (gain is not None or mask is not None) and shortcut.shape == branch.shape


residual_forward = add_kernel(
    "residual",
    residual_reference,
    Implementation("one pass", residual_by_addcmul, supports_addcmul),
    Implementation("triton", triton_launch.launch_residual, triton_launch.supports_residual),
)


def residual_backward_reference(
    gradient: Tensor, branch: Tensor | None, gain: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the branch, and of the gain where the branch is given (else an empty tensor)."""
    to_branch = gradient * combined_factor(gain, mask).to(gradient.dtype)
    if branch is None or gain is None:
        return to_branch, gradient.new_empty(0)
    masked = gradient if mask is None else gradient * mask
    return to_branch, (masked * branch).sum_to_size(gain.shape).to(gain.dtype)


def residual_backward_by_triton(
    gradient: Tensor, branch: Tensor | None, gain: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same by Triton, which sums the gain's gradient for each channel."""
    to_branch, sums = triton_launch.launch_residual_backward(gradient, branch, gain, mask)
    if branch is None or gain is None:
        return to_branch, gradient.new_empty(0)
    return to_branch, (sums.sum() if gain.numel() == 1 else sums).view(gain.shape).to(gain.dtype)


def supports_residual_backward(
    gradient: Tensor, branch: Tensor | None, gain: Tensor | None, mask: Tensor | None
) -> bool:
    """Return whether Triton can compute the gradients."""
    return triton_launch.supports_residual(gradient, gradient if branch is None else branch, gain, mask)


residual_backward = add_kernel(
    "residual backward",
    residual_backward_reference,
    Implementation("triton", residual_backward_by_triton, supports_residual_backward),
)


class ResidualBackward(Operator, name="residual_backward"):
    """Gradients of the branch and of the gain."""

    @staticmethod
    def forward(
        gradient: Tensor, branch: Tensor | None, gain: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return residual_backward(gradient, branch, gain, mask)

    @staticmethod
    def fake(gradient: Tensor, branch: Any, gain: Any, mask: Any) -> tuple[Tensor, Tensor]:
        learned = branch is not None and gain is not None
        return torch.empty_like(gradient), torch.empty_like(gain) if learned else gradient.new_empty(0)


class ResidualOperator(Operator, name="residual"):
    """shortcut + g ⊙ m ⊙ branch."""

    @staticmethod
    def forward(shortcut: Tensor, branch: Tensor, gain: Tensor | None, mask: Tensor | None) -> Tensor:
        return residual_forward(shortcut, branch, gain, mask)

    @staticmethod
    def fake(shortcut: Tensor, branch: Tensor, gain: Any, mask: Any) -> Tensor:
        return residual_reference(shortcut, branch, gain, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, branch, gain, mask = inputs
        learned = gain is not None and gain.requires_grad
        ctx.save_for_backward(branch if learned else None, gain, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The shortcut's gradient is the gradient itself. Autograd sums and casts where a shape or type was widened."""
        branch, gain, mask = ctx.saved_tensors
        branch = branch if ctx.needs_input_grad[2] else None
        # an operator only where there is a kernel: plain torch has further derivatives, and the compiler fuses it
        by_kernel = supports_residual_backward(gradient, branch, gain, mask)
        compute = ResidualBackward.apply if by_kernel else residual_backward_reference
        to_branch, to_gain = compute(gradient, branch, gain, mask)
        return gradient, to_branch, to_gain if ctx.needs_input_grad[2] else None, None


def residual(shortcut: Tensor, branch: Tensor, gain: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Compute y = shortcut + g ⊙ m ⊙ branch: gain, stochastic depth and addition in one pass over memory, not three.

    In backward the shortcut's gradient is the gradient itself, the branch's takes one pass, and the branch's output is
    kept only where the gain is learned.

    Shapes: shortcut and branch have the same; gain and mask broadcast to it, (C, 1, 1) or (C,), (N, 1, …).

    Args:
        shortcut: x.
        branch: F(x).
        gain: g, a scheme's factor of the branch.
        mask: m of stochastic depth, 0 or 1/(1 − p) for each sample; it has no gradient.

    >>> residual(torch.ones(2), torch.ones(2), torch.tensor(0.5))
    tensor([1.5000, 1.5000])
    """
    if not enabled() or (gain is None and mask is None):
        return residual_reference(shortcut, branch, gain, mask)
    return ResidualOperator.apply(shortcut, branch, gain, mask)
