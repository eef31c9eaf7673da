"""Methods of accelerated modules that call kernels, by the class whose methods they override."""

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


def runs_triton(x: Tensor) -> bool:
    """Whether Triton kernels can run on the device of x: under `torch.compile` as well, but not in exported programs,
    which run without this package."""
    return HAS_TRITON and x.is_cuda and kernels.enabled() and not torch.compiler.is_exporting()


def computes_only(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what `kind` does, which the kernel computes too, and has no hooks."""
    routed_kind = getattr(type(module), "unrouted", None)
    return not hooked(module) and (routed_kind is kind or computes(module, (kind,)))


def add_in_one_pass(self: Any, x: Tensor) -> Tensor:
    """Forward of a connection whose gain, stochastic depth and addition are one pass over memory."""
    if self.streams is not None or self.join is not None:
        return Residual.forward(self, x)
    h = self.pre(x)
    branch, gain, mask = self.branch(h), None, None
    if computes_only(self.scale, Gain):
        gain = (self.scale.factor * self.scale.gain).view(self.scale.shape)
    else:
        branch = self.scale(branch)
    if computes_only(self.drop, DropPath):
        mask = self.drop.mask(branch)
    else:
        branch = self.drop(branch)
    shortcut = self.shortcut(x, h)
    if mask is None and adds_branch(self) and same_layout(shortcut, branch):
        return self.post(branch.add_(shortcut))
    return self.post(kernels.residual(shortcut, branch, gain, mask))


def adds_branch(connection: Any) -> bool:
    """Whether a connection adds the output of its branch as it is, in a tensor that nothing else reads."""
    scale, drop = connection.scale, connection.drop
    passed = computes_only(scale, nn.Identity) and any(computes_only(drop, kind) for kind in (nn.Identity, DropPath))
    return passed and is_unsaved(connection.branch)


OUTPUT_UNSAVED = (nn.Identity, nn.BatchNorm2d, nn.LayerNorm)
"""Modules whose gradients are not computed from their output; those of linear maps are not either."""


def is_unsaved(branch: nn.Module) -> bool:
    """Whether the output of a branch is read by the addition alone, so that the shortcut may be added in place."""
    if not isinstance(branch, Branch) or (closing := branch.closing()) is None:
        return False
    watched = hooked(branch) or hooked(branch.path()[-1].module)
    return not watched and all(any(computes_only(each, kind) for kind in OUTPUT_UNSAVED) for each in closing)


def same_layout(shortcut: Tensor, branch: Tensor) -> bool:
    """Whether the sum fits into the memory of the branch; autograd copies a view that is written into."""
    alike = shortcut.shape == branch.shape and shortcut.dtype == branch.dtype and shortcut.stride() == branch.stride()
    return alike and not branch._is_view()


def mix_on_map(self: Any, h: Tensor) -> Tensor:
    """Attention within windows read from the map directly, on a GPU: nothing is partitioned, rolled or copied."""
    fits = fits_windows(self.window.side**2, self.dim // self.heads)
    plain = all(computes_only(norm, nn.Identity) for norm in (self.norm_q, self.norm_k, self.norm_v))
    if not (fits and plain and runs_triton(h)):
        return WindowAttention.mixed(self, h)
    height, width = h.shape[1:3]
    qkv = self.inside(self.bias(self.qkv(self.window.padded(h)))).contiguous()
    out = kernels.windowed_attention(qkv, self.position(), *self.window.shifts(height, width))
    return out[:, :height, :width]


def attend(self: Any, q: Tensor, k: Tensor, v: Tensor, added: Tensor, images: int) -> Tensor:
    """Attention whose bias and mask of one image are broadcast to all, on a CPU."""
    if torch.compiler.is_compiling() or q.device.type != "cpu" or q.numel() < dispatch.LARGE or not kernels.enabled():
        return WindowAttention.weighed(self, q, k, v, added, images)
    return kernels.attention(q, k, v, added)


def convolve_depthwise(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution of a channels-last map, on a GPU."""
    if (
        runs_triton(x)
        and self.padding_mode == "zeros"
        and dispatch.is_depthwise(x, weight, self.stride, self.padding, self.dilation, self.groups)
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        return kernels.depthwise(x, weight, bias)
    return nn.Conv2d._conv_forward(self, x, weight, bias)


OVERRIDES: dict[type[nn.Module], dict[str, Callable[..., Any]]] = {
    Residual: {"forward": add_in_one_pass},
    WindowAttention: {"mixed": mix_on_map, "weighed": attend},
    nn.Conv2d: {"_conv_forward": convolve_depthwise},
}


def overridden(kind: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """Methods of a class to override; methods that the class defines itself are left.

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
