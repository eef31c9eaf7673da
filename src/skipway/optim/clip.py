"""Gradient clipping. Importable without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from skipway.optim.optimizers import Groups
from skipway.registry import Registry, parse_spec
from skipway.validation import check_positive

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CLIPPERS", "AdaptiveClip", "ClipNorm", "Clipper", "parse_clipper"]


class Clipper(Protocol):
    """Clips gradients in place and returns their total norm before clipping, on the device.

    `groups` are those of the optimizer, which say what the parameters are where `param_groups` made them.
    """

    def __call__(self, parameters: Sequence[Tensor], groups: Groups = ()) -> Tensor: ...


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

    def __call__(self, parameters: Sequence[Tensor], groups: Groups = ()) -> Tensor:
        from torch.nn.utils import clip_grad_norm_

        return clip_grad_norm_(list(parameters), self.most)


@dataclass(frozen=True)
class AdaptiveClip:
    """Adaptive gradient clipping per unit: g_i <- g_i min(1, share max(|w_i|, 1e-3) / |g_i|) (Brock 2021, eq. 3).

    A unit is a row of a weight matrix or kernel; a parameter of at most one axis is one unit. The classifier's weight,
    which the groups of `param_groups` name, is not clipped, as in the paper; without groups, or with groups that were
    made otherwise, which name none, it is clipped as well.

    >>> import torch
    >>> first, last = torch.nn.Parameter(torch.ones(1, 4)), torch.nn.Parameter(torch.ones(1, 4))
    >>> first.grad, last.grad = torch.full((1, 4), 5.0), torch.full((1, 4), 5.0)
    >>> groups = [{"params": [first, last], "classifier": [1]}]
    >>> round(float(AdaptiveClip(0.01)([first, last], groups)), 4)  # sqrt(200)
    14.1421
    >>> round(first.grad.norm().item(), 4), last.grad.norm().item()
    (0.02, 10.0)
    """

    share: float = 0.01

    def __post_init__(self) -> None:
        check_positive("share", self.share)

    def __call__(self, parameters: Sequence[Tensor], groups: Groups = ()) -> Tensor:
        import torch

        norm = total_norm(parameters)
        classifier = {
            id(each)
            for group in groups
            for place, each in enumerate(group["params"])
            if place in group.get("classifier", ())
        }
        for parameter in parameters:
            if parameter.grad is None or id(parameter) in classifier:
                continue
            axes = tuple(range(1, parameter.ndim)) if parameter.ndim > 1 else tuple(range(parameter.ndim))
            weight = torch.linalg.vector_norm(parameter.detach(), dim=axes or None, keepdim=parameter.ndim > 0)
            grad = torch.linalg.vector_norm(parameter.grad, dim=axes or None, keepdim=parameter.ndim > 0)
            most = weight.clamp(min=1e-3) * self.share
            parameter.grad.mul_((most / grad.clamp(min=1e-6)).clamp(max=1.0))
        return norm


CLIPPERS.add("norm", ClipNorm)
CLIPPERS.add("agc", AdaptiveClip)
