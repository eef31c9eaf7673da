"""Gradients held in bounds before an update. No torch until one is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from skipway.errors import SkipwayError
from skipway.registry import Registry, parse_spec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CLIPPERS", "Adaptive", "Clipper", "Norm", "clipper"]


class Clipper(Protocol):
    """Changes gradients in place; returns their norm as it was before, on the device."""

    def __call__(self, parameters: Sequence[Tensor]) -> Tensor: ...


CLIPPERS: Registry[Callable[..., Clipper]] = Registry("clipping")


def clipper(text: str) -> Clipper:
    """The clipping that a spec string describes.

    >>> clipper("norm(0.5)")
    Norm(most=0.5)
    """
    return parse_spec(text, CLIPPERS.__getitem__)


def total_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together."""
    from torch.nn.utils import get_total_norm

    return get_total_norm([each.grad for each in parameters if each.grad is not None])


@dataclass(frozen=True)
class Norm:
    """g <- g min(1, most / |g|) over all gradients together (Pascanu 2013)."""

    most: float = 1.0

    def __post_init__(self) -> None:
        positive("most", self.most)

    def __call__(self, parameters: Sequence[Tensor]) -> Tensor:
        from torch.nn.utils import clip_grad_norm_

        return clip_grad_norm_(list(parameters), self.most)


@dataclass(frozen=True)
class Adaptive:
    """AGC: unit by unit, g_i <- g_i min(1, share max(|w_i|, 1e-3) / |g_i|) (Brock 2021, eq. 3).

    A unit is a row of a map's weight; of a parameter of one axis or none the whole. The last weight, the classifier's,
    is left alone, as in the paper.

    >>> import torch
    >>> first, last = torch.nn.Parameter(torch.ones(1, 4)), torch.nn.Parameter(torch.ones(1, 4))
    >>> first.grad, last.grad = torch.full((1, 4), 5.0), torch.full((1, 4), 5.0)
    >>> round(float(Adaptive(0.01)([first, last])), 4)  # sqrt(200)
    14.1421
    >>> round(first.grad.norm().item(), 4), last.grad.norm().item()
    (0.02, 10.0)
    """

    share: float = 0.01

    def __post_init__(self) -> None:
        positive("share", self.share)

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


def positive(name: str, value: float) -> None:
    """A number above 0."""
    if not value > 0:
        raise SkipwayError(f"{name}={value}: the rule is {name} > 0")


CLIPPERS.add("norm", Norm)
CLIPPERS.add("agc", Adaptive)
