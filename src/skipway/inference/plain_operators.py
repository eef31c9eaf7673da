"""Operators in the form in which OpenVINO's conversion makes the fastest network of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["PlainOperators"]


class PlainOperators(TorchFunctionMode):
    """Context in which some functions are computed by others that are equal up to rounding, for a network to be traced.

    * Attention: softmax(q kᵀ / √d + B) v operator by operator. OpenVINO's product reads kᵀ in place; of torch's fused
      function it makes a transposition in memory of its own. Rows that a mask hides throughout give 0 as in torch, and
      not the NaN of OpenVINO's softmax.
    * Norms over the channels of a map that were moved to its end, as in ConvNeXt: over (N, positions, C). OpenVINO has
      an operator for those, and puts one of four axes together from several, with layouts that go back and forth.

    >>> import torch
    >>> q = torch.randn(1, 2, 3, 4)
    >>> plain = F.scaled_dot_product_attention(q, q, q)
    >>> with PlainOperators():
    ...     torch.allclose(F.scaled_dot_product_attention(q, q, q), plain, atol=1e-6)
    True
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func is F.layer_norm:
            return layer_norm(*args, **kwargs)
        return func(*args, **kwargs)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q kᵀ scale + mask) v, by torch's function where that does something else; 0 in rows that the mask hides
    throughout.
    """
    added = attn_mask is None or attn_mask.is_floating_point()
    if dropout_p or is_causal or enable_gqa or not added:
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        out = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    else:
        logits = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
        out = (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ value
    if attn_mask is None:
        return out
    seen = attn_mask != float("-inf") if added else attn_mask  # OpenVINO's maximum of -inf alone is a finite number
    return out.masked_fill(~seen.any(-1, keepdim=True), 0)


def layer_norm(input: Tensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
    """torch's function, of a map of channels that were moved to the end over (N, positions, C)."""
    if len(normalized_shape) != 1 or not channels_moved(input):
        return F.layer_norm(input, normalized_shape, *args, **kwargs)
    return F.layer_norm(input.flatten(1, -2), normalized_shape, *args, **kwargs).unflatten(1, input.shape[1:-1])


def channels_moved(x: Tensor) -> bool:
    """Whether x is a view (N, …, C) of a map (N, C, …)."""
    base = x._base
    return base is not None and base.ndim == x.ndim > 3 and x.shape == base.movedim(1, -1).shape != base.shape
