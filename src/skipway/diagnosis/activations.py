"""The largest activations of a pass, and how sharp its attention is: whatever operators a network is written in."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from skipway.tracing.restoration import without_fused_layers

__all__ = ["ActivationObserver", "Activations"]

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution"})
SOFTMAXES = frozenset({"_softmax", "_safe_softmax"})
MASKED = -9e3
"""Attention logits up to which a mask has put them there."""
QUERIES = 64
"""The last queries of a sample, whose attention logits are looked at."""


@dataclass(frozen=True)
class Activations:
    """What one pass computes on the way.

    Args:
        largest: largest magnitude of a product of matrices or of two signals.
        largest_in: path of the module that computes it.
        spread: largest standard deviation, over the keys, of the logits of an attention, or of another softmax inside
            of the network, averaged over its queries; nan without one.
        spread_in: path of the module that computes it.
    """

    largest: float = 0.0
    largest_in: str = ""
    spread: float = math.nan
    spread_in: str = ""


class ActivationObserver(TorchDispatchMode):
    """Context manager around one pass without gradients, after which `read()` has what it computed.

    Compiled parts run eagerly inside of it, and torch's fused transformer layers are off.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.running, self.cleanup = model, [""], ExitStack()
        self.sizes: list[tuple[str, Tensor]] = []
        self.spreads: list[tuple[str, Tensor]] = []

    def __enter__(self):
        self.cleanup.enter_context(without_fused_layers())
        if "torch._dynamo" in sys.modules:
            self.cleanup.enter_context(torch.compiler.set_stance("force_eager"))
        for path, module in self.model.named_modules():
            self.cleanup.callback(module.register_forward_pre_hook(partial(self.enter_module, path)).remove)
            self.cleanup.callback(module.register_forward_hook(self.leave_module).remove)
        return super().__enter__()

    def enter_module(self, path: str, module: nn.Module, args: Any) -> None:
        self.running.append(path)

    def leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        self.cleanup.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(output, Tensor) and not output.numel():
            return output  # an expert that no token came to
        if name in PRODUCTS or (name == "mul" and is_gate(args)):
            self.sizes.append((self.running[-1], output.detach().abs().amax()))
        elif name in SOFTMAXES:
            self.note(args[0][:1], args[1])
        elif "scaled_dot_product" in name and "backward" not in name:
            self.note(attention_logits(args[0], args[1], kwargs or {}), -1)
        return output

    def note(self, logits: Tensor, axis: int) -> None:
        """Note the spread of the logits of a softmax with more than one entry."""
        if logits.ndim and logits.shape[axis] > 1:
            self.spreads.append((self.running[-1], spread(logits, axis)))

    def read(self) -> Activations:
        """What was computed."""
        largest = max(((float(size), path) for path, size in self.sizes), key=rank, default=(0.0, ""))
        widest = max(((float(size), path) for path, size in self.spreads), key=rank, default=(math.nan, ""))
        return Activations(*largest, *widest)


def rank(pair: tuple[float, str]) -> float:
    """The order of sizes, in which what is no number is the largest."""
    return math.inf if math.isnan(pair[0]) else pair[0]


def is_gate(args: Sequence[Any]) -> bool:
    """Whether two signals of one shape are multiplied, and no mask or number."""
    shapes = [each.shape for each in args[:2] if isinstance(each, Tensor) and each.is_floating_point()]
    return len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) > 1


def attention_logits(queries: Tensor, keys: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The logits of the last queries of the first sample, without a mask."""
    queries, keys = queries[:1, ..., -QUERIES:, :].float(), keys[:1].float()
    if queries.ndim == 4 and queries.shape[1] != keys.shape[1]:
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    scale = options.get("scale")
    return queries @ keys.mT * (queries.shape[-1] ** -0.5 if scale is None else scale)


def spread(logits: Tensor, axis: int) -> Tensor:
    """Mean standard deviation of logits along an axis, without those that a mask put there."""
    logits = logits.detach().float()
    seen = logits > MASKED
    count = seen.sum(axis, keepdim=True).clamp_min(1)
    middle = torch.where(seen, logits, 0.0).sum(axis, keepdim=True) / count
    return (torch.where(seen, (logits - middle).square(), 0.0).sum(axis, keepdim=True) / count).sqrt().mean()
