"""Faults of torch's own kernels that end a process, and how they are avoided."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipway.nn import maps

__all__ = ["subsample_first"]

FEW_CHANNELS = 8
"""Numbers in a vector of AVX2: convolutions of fewer channels are faulty."""


class SubsamplingConv2d(nn.Conv2d):
    """A 1 x 1 convolution with stride s, computed as the one with stride 1 of every s-th pixel, which is the same map.

    (N, C, H, W) -> (N, D, ceil(H / s), ceil(W / s)).
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = self.stride
        return nn.functional.conv2d(input[..., ::rows, ::columns], weight, bias)


class SubsamplingMap(SubsamplingConv2d, maps.Conv2d):
    """Of our convolution."""


class SubsamplingStandardMap(SubsamplingConv2d, maps.ScaledStandardConv2d):
    """Of ours with standardised weights."""


KINDS: dict[type[nn.Module], type[SubsamplingConv2d]] = {
    nn.Conv2d: SubsamplingConv2d,
    maps.Conv2d: SubsamplingMap,
    maps.ScaledStandardConv2d: SubsamplingStandardMap,
}


def subsample_first(model: nn.Module) -> list[str]:
    """Let 1 x 1 convolutions of few channels skip pixels before they multiply, where torch corrupts the heap otherwise.

    On CPUs with AVX2 and without AVX-512, the gradient of the weight by oneDNN writes beyond its memory if the stride
    is above 1, the input has fewer than 8 channels and its layout or the weight's is channels-last (torch 2.13;
    `MALLOC_CHECK_=3` shows it at once, and without it a process aborts sooner or later). Activations are in that layout
    in `skipway train`, and wherever a permuted tensor comes in, as from several streams.

    Args:
        model: the classes of its convolutions are changed in place.

    Returns:
        names of the changed convolutions.

    >>> subsample_first(nn.Conv2d(16, 16, 1, stride=2))
    []
    """
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        return []
    changed = {name: module for name, module in model.named_modules() if is_faulty(module)}
    for module in changed.values():
        module.__class__ = KINDS[type(module)]
    return [*changed]


def is_faulty(module: nn.Module) -> bool:
    """Whether a module is a convolution whose gradient is one of those."""
    if type(module) not in KINDS or not isinstance(module, nn.Conv2d):
        return False
    if module.kernel_size != (1, 1) or max(module.stride) == 1:
        return False
    if module.weight.device.type != "cpu":
        return False
    return module.in_channels < FEW_CHANNELS and module.groups == 1 and module.padding in ((0, 0), "valid")
