"""Gradient clipping. Importable without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from skipway.registry import Registry, parse_spec
from skipway.validation import check_positive

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CLIPPERS", "AdaptiveClip", "ClipNorm", "Clipper", "parse_clipper"]


class Clipper(Protocol):
    """Clips gradients in place and returns their total norm before clipping, on the device."""

    def __call__(self, parameters: Sequence[Tensor]) -> Tensor: ...


CLIPPERS: Registry[Callable[..., Clipper]] = Registry("clipping")


def parse_clipper(text: str) -> Clipper:
    """Parse a spec string into a clipper.

    >>> parse_clipper("norm(0.5)")
    ClipNorm(most=0.5)
    """
    return parse_spec(text, CLIPPERS.__getitem__)


def total_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients together."""
    from torch.nn.utils import get_total_norm

    return get_total_norm([each.grad for each in parameters if each.grad is not None])


@dataclass(frozen=True)
class ClipNorm:
    """g <- g min(1, most / |g|) over all gradients together (Pascanu 2013)."""

    most: float = 1.0

    def __post_init__(self) -> None:
        check_positive("most", self.most)

    def __call__(self, parameters: Sequence[Tensor]) -> Tensor:
        from torch.nn.utils import clip_grad_norm_

        return clip_grad_norm_(list(parameters), self.most)


@dataclass(frozen=True)
class AdaptiveClip:
    """Adaptive gradient clipping per unit: g_i <- g_i min(1, share max(|w_i|, 1e-3) / |g_i|) (Brock 2021, eq. 3).

    A unit is a row of a weight matrix or kernel; a parameter of at most one axis is one unit. The last weight, the
    classifier's, is not clipped, as in the paper.

    >>> import torch
    >>> first, last = torch.nn.Parameter(torch.ones(1, 4)), torch.nn.Parameter(torch.ones(1, 4))
    >>> first.grad, last.grad = torch.full((1, 4), 5.0), torch.full((1, 4), 5.0)
    >>> round(float(AdaptiveClip(0.01)([first, last])), 4)  # sqrt(200)
    14.1421
    >>> round(first.grad.norm().item(), 4), last.grad.norm().item()
    (0.02, 10.0)
    """

    share: float = 0.01

    def __post_init__(self) -> None:
        check_positive("share", self.share)

    def __call__(self, parameters: Sequence[Tensor]) -> Tensor:
        import torch

        norm = total_norm(parameters)
        last = max((number for number, each in enumerate(parameters) if each.ndim > 1), default=-1)
        for number, parameter in enumerate(parameters):
            if parameter.grad is None or number == last:
                continue
            axes = tuple(range(1, parameter.ndim)) if parameter.ndim > 1 else tuple(range(parameter.ndim))
            weight = torch.linalg.vector_norm(parameter.detach(), dim=axes or None, keepdim=parameter.ndim > 0)
            grad = torch.linalg.vector_norm(parameter.grad, dim=axes or None, keepdim=parameter.ndim > 0)
            most = weight.clamp(min=1e-3) * self.share
            parameter.grad.mul_((most / grad.clamp(min=1e-6)).clamp(max=1.0))
        return norm


CLIPPERS.add("norm", ClipNorm)
CLIPPERS.add("agc", AdaptiveClip)
