"""The size of attention logits, |q·k| / √d, before mask and softmax, of whatever attention a network runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["AttentionLogits", "largest_logit"]

PAIRS = 1 << 22
"""Products of a query and a key that are computed of one attention."""
MASKED = -1e4
"""A score below it is taken for masked."""


class AttentionLogits(TorchDispatchMode):
    """Context that notes the largest attention logit of each part of a network.

    It sees all implementations of torch's attention as they are dispatched, also within `MultiheadAttention`, and
    softmax over tensors of three axes or more, as in attention that is written out (a router of experts may count as
    one). Kernels of other libraries are not seen.

    Args:
        part: names the part of the network that runs.
    """

    def __init__(self, part: Callable[[], str | None]) -> None:
        super().__init__()
        self.part = part
        self.largest: dict[str, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        found: Tensor | None = None
        if (
            "scaled_dot_product" in name
            and "backward" not in name
            and isinstance(args[0], Tensor)
            and args[0].ndim == 4
        ):
            found = largest_logit(args[0], args[1], kwargs.get("scale"))
        elif name in ("_softmax", "_safe_softmax") and args[0].ndim >= 3:
            scores = args[0].detach().float()
            found = torch.where(scores > MASKED, scores.abs(), 0.0).amax()
        key = None if found is None else self.part()
        if found is not None and key is not None:
            self.largest[key] = torch.maximum(found, self.largest[key]) if key in self.largest else found
        return func(*args, **kwargs)


def largest_logit(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """max |q·k| · scale over queries (N, H, T, D) and keys (N, G, S, D), G a divisor of H.

    Exact up to 4 million pairs; of more, over evenly spaced queries, of the first sample where it has as many alone.

    Args:
        query, key: the operands of attention.
        scale: None is 1/√D.

    >>> largest_logit(torch.full((1, 1, 1, 4), 2.0), torch.full((1, 1, 1, 4), -3.0)).item()
    12.0
    """
    query, key = query.detach(), key.detach()
    if query.shape[0] * query.shape[1] * key.shape[2] > PAIRS:
        query, key = query[:1], key[:1]
    most = max(1, PAIRS // max(1, query.shape[0] * query.shape[1] * key.shape[2]))
    query = query[:, :, :: math.ceil(query.shape[2] / most)].float()
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    products = query @ key.float().mT
    return products.abs().amax() * (query.shape[-1] ** -0.5 if scale is None else scale)
