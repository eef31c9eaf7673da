"""Functions of torch taken by kernels, wherever they are called: in our networks and in anybody's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from skipway.kernels.attention import attention, fits
from skipway.kernels.autotune import enabled
from skipway.kernels.depthwise import depthwise
from skipway.kernels.maps import Pack, linear, packed, packed_product, pointwise, worthwhile

__all__ = ["ROUTES", "Packed", "Routed"]

LARGE = 1 << 18
"""Numbers in a tensor below which torch's own function is as good: an operator written in Python costs some 50 µs."""


def take_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return linear(x, weight, bias) if worthwhile(x, weight) else NotImplemented


def take_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if is_depthwise(x, weight, stride, padding, dilation, groups):
        return depthwise(x, weight, bias)
    plain = x.ndim == 4 and x.numel() >= LARGE and pair(stride) == pair(dilation) == (1, 1) and pair(padding) == (0, 0)
    if plain and groups == 1 and weight.shape[-2:] == (1, 1):
        return pointwise(x, weight.flatten(1), bias)
    return NotImplemented


def is_depthwise(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether a convolution is one that `kernels.depthwise` computes, and large enough to gain."""
    if x.ndim != 4 or x.numel() < LARGE or pair(stride) != (1, 1) or pair(dilation) != (1, 1):
        return False
    rows, columns = weight.shape[-2:]
    around = pair(padding) == (rows // 2, rows // 2)
    return groups == x.shape[1] == len(weight) and rows == columns and rows % 2 == 1 and around


def pair(value: Any) -> Any:
    """A stride or padding for both axes."""
    return (value, value) if isinstance(value, int) else tuple(value) if not isinstance(value, str) else value


def take_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if q.ndim != 4 or q.numel() < LARGE or dropout_p or is_causal or enable_gqa:
        return NotImplemented
    if scale is not None and not math.isclose(scale, q.shape[-1] ** -0.5):
        return NotImplemented
    if attn_mask is not None and (attn_mask.dtype == torch.bool or not fits(attn_mask, q, k)):
        return NotImplemented
    return attention(q, k, v, attn_mask)


ROUTES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: take_linear,
    F.conv2d: take_convolution,
    F.scaled_dot_product_attention: take_attention,
}
"""What is taken, and by what; a route answers NotImplemented where it has nothing better."""


class Routed(TorchFunctionMode):
    """Within, the functions in `ROUTES` are computed by kernels, on the CPU, whoever calls them.

    >>> from skipway.kernels import choices
    >>> layer, x = torch.nn.Linear(256, 256), torch.randn(256, 256)
    >>> with Routed():
    ...     y = layer(x)
    >>> torch.allclose(y, layer(x), atol=1e-5)
    True
    """

    def taken(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a kernel computes in the function's place; NotImplemented where none is better."""
        route = ROUTES.get(func)
        return NotImplemented if route is None else route(*args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if enabled() and args and isinstance(args[0], Tensor) and args[0].device.type == "cpu":
            found = self.taken(func, args, kwargs)
            if found is not NotImplemented:
                return found
        return func(*args, **kwargs)


class Packed(Routed):
    """`Routed` for inference with weights that no longer change: those of a model's linear maps lie as oneDNN's
    products want them, in float32 and bfloat16, beside the weights themselves, and are taken where that is quicker.

    Args:
        model: whose `torch.nn.Linear` weights are packed.
        rows: of the inputs that they are packed for: products of other sizes are right as well, and may be slower.

    >>> layer, x = torch.nn.Linear(64, 64), torch.randn(256, 64)
    >>> with torch.no_grad(), Packed(layer, 256):
    ...     y = layer(x)
    >>> torch.allclose(y, layer(x), atol=1e-5)
    True
    """

    def __init__(self, model: torch.nn.Module, rows: int) -> None:
        super().__init__()
        weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
        found = {weight: packed(weight.detach(), rows) for weight in weights}
        self.packed = {weight: Pack(reordered) for weight, reordered in found.items() if reordered is not None}

    def taken(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if func is F.linear and not kwargs and len(args) >= 2 and args[1] in self.packed:
            x, weight, bias = (*args, None)[:3]
            if x.dtype == weight.dtype and x.numel() >= LARGE:
                return packed_product(x, weight, bias, self.packed[weight])
        return super().taken(func, args, kwargs)
