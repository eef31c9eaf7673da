"""Fast paths behind plain functions, each beside its reference in plain torch.

Every function here is a `torch.library` operator with a shape function and an autograd formula, so that
`torch.compile`, `torch.export` and autocast see through it. A `Kernel` holds the reference and the other ways to
compute the same and takes the quickest on this machine, found by measurement at the first call with arguments of a
kind (`choices()` tells); `off()` or SKIPWAY_KERNELS=off leaves the reference alone.
"""

from skipway.kernels.attention import attention, window_attention
from skipway.kernels.autotune import Choice, Kernel, Way, choices, enabled, forget, off, only
from skipway.kernels.depthwise import depthwise
from skipway.kernels.maps import linear, pointwise
from skipway.kernels.mlp import ACTIVATIONS, mlp
from skipway.kernels.norms import batch_norm_relu, channel_norm, residual_norm
from skipway.kernels.residual import residual
from skipway.kernels.windows import windowed_attention

__all__ = [
    "ACTIVATIONS",
    "Choice",
    "Kernel",
    "Way",
    "attention",
    "batch_norm_relu",
    "channel_norm",
    "choices",
    "depthwise",
    "enabled",
    "forget",
    "linear",
    "mlp",
    "off",
    "only",
    "pointwise",
    "residual",
    "residual_norm",
    "window_attention",
    "windowed_attention",
]
