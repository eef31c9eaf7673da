"""Kernels: functions with a reference in plain torch and faster implementations, chosen by measurement.

Every function is a `torch.library` operator with a shape function and an autograd formula (`operator.Operator`), so
that `torch.compile`, `torch.export` and autocast see through it. A `Kernel` holds the reference and the other
implementations; the first call with arguments of some device, type, shape and layout times all of them on this machine
and later calls use the fastest. `choices()` lists what was chosen. `off()` or SKIPWAY_KERNELS=off restricts every
kernel to its reference.
"""

from skipway.kernels.autotune import (
    Implementation,
    Kernel,
    KernelChoice,
    choices,
    clear_choices,
    enabled,
    off,
    only,
)
from skipway.kernels.dense_conv import convolve, convolve_patches
from skipway.kernels.depthwise_conv import depthwise
from skipway.kernels.matmul import linear
from skipway.kernels.residual_add import residual
from skipway.kernels.sdpa import attention
from skipway.kernels.window_attention import windowed_attention

__all__ = [
    "Implementation",
    "Kernel",
    "KernelChoice",
    "attention",
    "choices",
    "clear_choices",
    "convolve",
    "convolve_patches",
    "depthwise",
    "enabled",
    "linear",
    "off",
    "only",
    "residual",
    "windowed_attention",
]
