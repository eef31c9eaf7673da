"""What accelerated modules compute in another way: methods by the class that they are overridden in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skipway import kernels
from skipway.kernels import dispatch
from skipway.kernels.triton_launch import HAS_TRITON, fits_windows
from skipway.nn import Branch, DropPath, Gain, Residual, WindowAttention
from skipway.surgery.fusion import computes, hooked

__all__ = ["OVERRIDES", "overridden"]


def on_card(x: Tensor) -> bool:
    """Whether Triton's programs can run where x is: under `torch.compile` as well, but not in what is exported to run
    without us."""
    return HAS_TRITON and x.is_cuda and kernels.enabled() and not torch.compiler.is_exporting()


def simple(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a slot holds what the kernel computes, and nobody watches it."""
    routed_kind = getattr(type(module), "unrouted", None)
    return not hooked(module) and (routed_kind is kind or computes(module, (kind,)))


def epilogue(self: Any, x: Tensor) -> Tensor:
    """A connection whose gain, stochastic depth and addition are one pass."""
    h = self.pre(x)
    branch, gain, mask = self.branch(h), None, None
    if simple(self.scale, Gain):
        gain = (self.scale.factor * self.scale.gain).view(self.scale.shape)
    else:
        branch = self.scale(branch)
    if simple(self.drop, DropPath):
        mask = self.drop.mask(branch)
    else:
        branch = self.drop(branch)
    shortcut = self.shortcut(x, h)
    if gain is None and mask is None and unneeded(self.branch) and fits(shortcut, branch):
        return self.post(branch.add_(shortcut))
    return self.post(kernels.residual(shortcut, branch, gain, mask))


FORGETTING = (nn.Identity, nn.BatchNorm2d, nn.LayerNorm)
"""Modules whose gradients are not computed from what they put out, as those of linear maps are not."""


def unneeded(branch: nn.Module) -> bool:
    """Whether what a branch puts out is needed by the addition alone, so that the shortcut may be added in place."""
    if not isinstance(branch, Branch) or (closing := branch.closing()) is None:
        return False
    watched = hooked(branch) or hooked(branch.path()[-1].module)
    return not watched and all(any(simple(each, kind) for kind in FORGETTING) for each in closing)


def fits(shortcut: Tensor, branch: Tensor) -> bool:
    """Whether the sum has the place and type of the branch; autograd copies what is changed through a view."""
    alike = shortcut.shape == branch.shape and shortcut.dtype == branch.dtype and shortcut.stride() == branch.stride()
    return alike and not branch._is_view()


def mixed(self: Any, h: Tensor) -> Tensor:
    """Windows where they lie on the map: nothing is cut, rolled or copied, on a GPU."""
    fits = fits_windows(self.window.side**2, self.dim // self.heads)
    if not (fits and on_card(h) and simple(self.norm_q, nn.Identity) and simple(self.norm_k, nn.Identity)):
        return WindowAttention.mixed(self, h)
    height, width = h.shape[1:3]
    qkv = self.inside(self.bias(self.qkv(self.window.padded(h)))).contiguous()
    out = kernels.windowed_attention(qkv, self.position(), *self.window.shifts(height, width))
    return out[:, :height, :width]


def weighed(self: Any, q: Tensor, k: Tensor, v: Tensor, added: Tensor, images: int) -> Tensor:
    """B + M of one image for all, by broadcasting, on a CPU."""
    if torch.compiler.is_compiling() or q.device.type != "cpu" or q.numel() < dispatch.LARGE or not kernels.enabled():
        return WindowAttention.weighed(self, q, k, v, added, images)
    return kernels.attention(q, k, v, added)


def convolved(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A depthwise convolution of a map that lies channels-last, on a GPU."""
    if (
        on_card(x)
        and self.padding_mode == "zeros"
        and dispatch.is_depthwise(x, weight, self.stride, self.padding, self.dilation, self.groups)
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        return kernels.depthwise(x, weight, bias)
    return nn.Conv2d._conv_forward(self, x, weight, bias)


OVERRIDES: dict[type[nn.Module], dict[str, Callable[..., Any]]] = {
    Residual: {"forward": epilogue},
    WindowAttention: {"mixed": mixed, "weighed": weighed},
    nn.Conv2d: {"_conv_forward": convolved},
}


def overridden(kind: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """The methods of a class that are overridden; those that it has of its own are not.

    >>> sorted(overridden(WindowAttention)), overridden(nn.Linear)
    (['mixed', 'weighed'], {})
    """
    return {
        name: function
        for base, methods in OVERRIDES.items()
        if issubclass(kind, base)
        for name, function in methods.items()
        if getattr(kind, name) is getattr(base, name)
    }
