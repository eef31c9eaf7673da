"""Kernels in place of torch's own functions, whoever calls them: a `TorchFunctionMode` with a table of routes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from skipway.kernels.autotune import enabled, only, prescribed
from skipway.kernels.cast import eligible, to_autocast
from skipway.kernels.dense_conv import convolve, convolve_patches, has_slow_weight_gradient, product_may_pay
from skipway.kernels.depthwise_conv import depthwise
from skipway.kernels.matmul import PackedWeight, is_large_linear, linear, pack_weight, packed_linear
from skipway.kernels.onednn import supports_onednn_matmul
from skipway.kernels.patch_conv import multiply_patches
from skipway.kernels.sdpa import attention, bias_fits

__all__ = ["LARGE", "ROUTES", "KernelMode", "PackedKernelMode", "bfloat16_kernels", "is_depthwise"]

LARGE = 1 << 18
"""Elements of a tensor below which torch's own function is as fast: an operator written in Python costs some 50 µs."""
LARGE_ATTENTION = 1 << 14
"""The same of queries: torch's backward pass of attention is slow from a few rows on."""
FEW_KEYS = 384
"""Keys up to which attention in bfloat16 is faster by our kernel."""


def route_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Compute a linear map by `kernels.linear` where it is large."""
    return linear(x, weight, bias) if is_large_linear(x, weight) else NotImplemented


def route_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry: Any, **named: Any) -> Any:
    """Compute convolutions of large maps by kernels: depthwise ones, those whose patches do not overlap, and those
    whose weight's gradient may be faster as a product.
    """
    if is_depthwise(x, weight, *geometry, **named):
        return depthwise(x, weight, bias)
    if is_patchwise(x, weight, *geometry, **named):
        return convolve_patches(x, weight, bias)
    steps = dense_geometry(x, weight, *geometry, **named) if needs_weight_gradient(weight) else None
    if steps is None or x.numel() < LARGE or not product_may_pay(x, weight, *steps):
        return NotImplemented
    return convolve(x, weight, bias, *steps)


def needs_weight_gradient(weight: Tensor) -> bool:
    """Return whether autograd will ask for the gradient of a weight."""
    return torch.is_grad_enabled() and weight.requires_grad


def dense_geometry(
    x: Tensor, weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[int, int] | None:
    """Return stride and padding of a convolution that `kernels.dense_conv` computes; None of another one."""
    padding = 0 if padding == "valid" else padding
    if x.ndim != 4 or groups != 1 or pair(dilation) != (1, 1) or isinstance(padding, str):
        return None
    (down, across), (above, left), (rows, columns) = pair(stride), pair(padding), weight.shape[-2:]
    return (down, above) if down == across and above == left and rows == columns else None


def is_patchwise(
    x: Tensor, weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> bool:
    """Return whether the patches of a convolution do not overlap, and the map is large enough to gain by a product."""
    if x.ndim != 4 or x.numel() < LARGE or groups != 1 or padding not in ("valid", 0, (0, 0), [0, 0]):
        return False
    rows, columns = weight.shape[-2:]
    fits = rows == columns <= min(x.shape[-2:]) and pair(stride) == (rows, rows)
    return fits and (rows == 1 or pair(dilation) == (1, 1))


def is_depthwise(
    x: Tensor, weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> bool:
    """Return whether a convolution is one that `kernels.depthwise` computes, and large enough to gain by it."""
    if x.ndim != 4 or x.numel() < LARGE or pair(stride) != (1, 1) or pair(dilation) != (1, 1):
        return False
    rows, columns = weight.shape[-2:]
    same_size = pair(padding) == (rows // 2, rows // 2)
    return groups == x.shape[1] == len(weight) and rows == columns and rows % 2 == 1 and same_size


def pair(value: Any) -> Any:
    """Return a stride or padding for both axes; torch takes a tuple of one number for both."""
    if isinstance(value, str):
        return value
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def route_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Compute attention without dropout and grouped heads by `kernels.attention`; a causal mask over all keys alone."""
    if q.ndim != 4 or q.numel() < LARGE_ATTENTION or dropout_p or enable_gqa:
        return NotImplemented
    if is_causal and (attn_mask is not None or q.shape[2] != k.shape[2]):
        return NotImplemented
    if scale is not None and not math.isclose(scale, q.shape[-1] ** -0.5):
        return NotImplemented
    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:  # torch broadcasts them
        return NotImplemented
    if attn_mask is not None and not (bias_fits(attn_mask, q, k) and len(attn_mask) in (1, len(q))):
        return NotImplemented
    out = attention(q, k, v, attn_mask, is_causal)
    q, k, v, attn_mask = to_autocast(q, k, v, attn_mask)  # type: ignore[assignment] - as torch does before it chooses
    plain = torch._fused_sdp_choice(q, k, v, attn_mask, dropout_p, is_causal) == SDPBackend.MATH.value
    return out.contiguous() if plain else out  # as torch lays it out


ROUTES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: route_linear,
    F.conv2d: route_convolution,
    F.scaled_dot_product_attention: route_attention,
}
"""Route of each function; it returns NotImplemented where torch's own function is to be called."""


PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
"""Classes of tensors that kernels take. Others, sharded or quantised ones, have rules of their own for each operator of
torch, and none for ours.
"""


def is_plain(argument: Any) -> bool:
    """Return whether an argument is no tensor, or one of floating-point numbers on the CPU that kernels take."""
    if not isinstance(argument, Tensor):
        return True
    return type(argument) in PLAIN and argument.device.type == "cpu" and argument.is_floating_point()


class KernelMode(TorchFunctionMode):
    """Compute the functions in `ROUTES` by kernels within the context, on the CPU, whoever calls them.

    >>> layer, x = torch.nn.Linear(256, 256), torch.randn(256, 256)
    >>> with KernelMode():
    ...     y = layer(x)
    >>> torch.allclose(y, layer(x), atol=1e-5)
    True
    """

    def route(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return what a kernel computes in the function's place; NotImplemented where torch's function is called."""
        return ROUTES[func](*args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if func in ROUTES and args else None
        if isinstance(first, Tensor) and enabled() and all(map(is_plain, (*args, *kwargs.values()))):
            result = self.route(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


class Bfloat16Mode(KernelMode):
    """Compute in bfloat16 what torch is slow at on every CPU measured, and nothing else: attention by
    `kernels.attention` up to `FEW_KEYS` keys, twice as many under a causal mask, convolutions of patches that do not
    overlap, beyond 1 × 1, as products, and, on AMX, gradients of weights where images have few pixels.
    """

    def route(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not in_bfloat16(args[0]):
            return NotImplemented
        if func is F.scaled_dot_product_attention and len(args) >= 3:
            q, k = args[:2]
            few = FEW_KEYS * 2 if kwargs.get("is_causal") else FEW_KEYS
            small = q.ndim != 4 or q.numel() < 2 * LARGE_ATTENTION or k.shape[-2] > few
            return NotImplemented if small else route_attention(*args, **kwargs)
        return route_patches(*args, **kwargs) if func is F.conv2d else NotImplemented


def route_patches(x: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry: Any, **named: Any) -> Any:
    """Compute convolutions of patches that do not overlap as torch's own products, always the same one, and gradients
    of weights as products by a fixed rule.
    """
    if weight.shape[-1] > 1 and is_patchwise(x, weight, *geometry, **named):
        return multiply_patches(*to_autocast(x, weight, bias))  # type: ignore[arg-type]
    steps = dense_geometry(x, weight, *geometry, **named) if needs_weight_gradient(weight) else None
    if steps is None or not has_slow_weight_gradient(x, weight, *steps):
        return NotImplemented
    return convolve(x, weight, bias, *steps, by_rule=True)


def in_bfloat16(x: Tensor) -> bool:
    """Return whether a product of x is computed in bfloat16."""
    if torch.is_autocast_enabled("cpu"):
        return eligible(x) and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.bfloat16


@contextmanager
def bfloat16_kernels() -> Iterator[None]:
    """Compute attention and patch embeddings in bfloat16 on the CPU by products within the context, both passes,
    whoever calls them.

    torch's backward passes of them cost up to ten times as much in bfloat16 as plain products. Unlike elsewhere nothing
    is measured: the implementation is the same in every run, so that runs can be repeated bit for bit.

    >>> q = torch.randn(2, 4, 64, 32, dtype=torch.bfloat16)
    >>> with bfloat16_kernels():
    ...     y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    >>> torch.allclose(y, F.scaled_dot_product_attention(q, q, q, is_causal=True), atol=0.05)
    True
    """
    choice = "onednn" if supports_onednn_matmul() else "blocks"
    if prescribed() not in (None, choice):  # it is choice where another thread is within: modes are those of a thread
        yield
        return
    with only(choice), Bfloat16Mode():
        yield


class PackedKernelMode(KernelMode):
    """`KernelMode` for inference with weights that no longer change.

    The weights of linear maps are kept a second time in oneDNN's order for products, in float32 and bfloat16, and used
    where that is faster.

    Args:
        model: network whose `torch.nn.Linear` weights are packed.
        rows: of the inputs that weights are packed for; other products are correct but may be slower.

    >>> layer, x = torch.nn.Linear(64, 64), torch.randn(256, 64)
    >>> with torch.no_grad(), PackedKernelMode(layer, 256):
    ...     y = layer(x)
    >>> torch.allclose(y, layer(x), atol=1e-5)
    True
    """

    def __init__(self, model: torch.nn.Module, rows: int) -> None:
        super().__init__()
        weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
        reordered = {weight: pack_weight(weight.detach(), rows) for weight in weights}
        self.packed = {weight: PackedWeight(packed) for weight, packed in reordered.items() if packed is not None}

    def route(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Use a packed weight for a large product; else follow `ROUTES`."""
        if func is F.linear and not kwargs and len(args) >= 2 and args[1] in self.packed:
            x, weight, bias = (*args, None)[:3]
            if x.dtype == weight.dtype and x.numel() >= LARGE:
                return packed_linear(x, weight, bias, self.packed[weight])
        return super().route(func, args, kwargs)
