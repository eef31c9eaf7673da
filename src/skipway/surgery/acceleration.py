"""`accelerate(model)`: kernels in anybody's network, in place, for training and inference."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from skipway.errors import SkipwayError
from skipway.kernels.dispatch import KernelMode
from skipway.surgery.checks import EQUAL
from skipway.surgery.class_factory import class_factory
from skipway.surgery.operation import Operation
from skipway.surgery.overrides import overridden
from skipway.surgery.preconditions import require_operable
from skipway.surgery.transaction import transaction
from skipway.tracing import Example, as_example
from skipway.validation import check_call, check_tolerance

__all__ = ["accelerate"]

TOLERANCE = 1e-3
"""Bound on the relative difference of outputs: sums in another order, through a hundred layers."""
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@check_call
def accelerate(model: nn.Module, example: Example | None = None, *, tolerance: float = TOLERANCE) -> Operation:
    """Let linear maps, attention, and convolutions that are depthwise or whose patches do not overlap (1 × 1, patch
    embeddings) be computed on the CPU by `skipway.kernels`, in anybody's network, in place; on a GPU depthwise
    convolutions of maps that lie channels-last, attention within our windows, and the end of our residual connections.

    Classes are swapped for subclasses whose forward routes torch's functions (`kernels.dispatch.ROUTES`), so keys,
    `isinstance`, hooks and checkpointing survive, and code that calls functions instead of modules is reached, except
    for functions that are checkpointed by themselves. Each kernel times its implementations at first use and never
    takes one that is slower than torch or differs from it. Outputs lie in memory as those of torch do, and gradients
    are those of torch up to rounding; which implementation is the quickest may change from run to run, and the last
    bits with it. Under `torch.compile` the network is left to the compiler and its own kernels, except for the
    first two on a GPU, where the compiler calls external kernels as well.

    Args:
        model: any module.
        example: what the model is called with; outputs are compared on it.
        tolerance: bound on the difference of the outputs, relative to their largest value.

    Raises:
        SkipwayError: the model cannot be operated on, was accelerated already, or the output changed; the model is as
            before.

    >>> layer = nn.Linear(512, 512)
    >>> operation = accelerate(layer, torch.randn(64, 512))
    >>> operation.report["difference"] < 1e-4, type(operation.undo())
    (True, <class 'torch.nn.modules.linear.Linear'>)
    """
    model, example = require_operable(model), None if example is None else as_example(example)
    check_tolerance("tolerance", tolerance)
    if any(is_routed(module) for module in model.modules()):
        raise SkipwayError(f"{type(model).__name__} is accelerated already; undo that first")
    with transaction(
        model, example, title=f"{type(model).__name__} computes by kernels", tolerance=tolerance, checks=EQUAL
    ) as change:
        for name, module in model.named_modules():
            kind = type(module)
            if module is not model and not has_weights(module):
                continue
            try:
                change.set_class(module, routed(kind))
            except SkipwayError as problem:
                change.refused[name] = str(problem)
            except TypeError as problem:
                change.refused[name] = f"the class {kind.__name__} cannot be derived from: {problem}"
            else:
                change.touched[name] = kind.__name__
        return change.commit()


def has_weights(module: nn.Module) -> bool:
    """Whether a module has weights, and may be called by itself, by an activation checkpoint for example."""
    return not isinstance(module, CONTAINERS) and next(module.parameters(), None) is not None


def is_routed(module: nn.Module) -> bool:
    """Whether a module was accelerated."""
    return hasattr(type(module), "unrouted")


class Active(threading.local):
    """Whether a forward pass of a thread is routed already, and how autograd saved tensors where the innermost
    accelerated module was called.
    """

    now, hooks = False, None


ACTIVE = Active()


def saving_hooks() -> Any:
    """Return the functions by which autograd saves tensors now, those of an activation checkpoint for example."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class NetworkMode(KernelMode):
    """`KernelMode` within accelerated modules, without functions that are checkpointed by themselves.

    What an activation checkpoint computes again, within the backward pass, it computes outside of the modules that
    called it. Kernels save other tensors than torch's functions, so both passes have to take the same ones.
    """

    def route(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Follow `ROUTES` where an accelerated module is within every checkpoint around the function."""
        return super().route(func, args, kwargs) if saving_hooks() == ACTIVE.hooks else NotImplemented


@class_factory
def routed(kind: type[nn.Module]) -> tuple[str, dict[str, Any]]:
    """A subclass of `kind` whose forward is routed; the outermost module of a call routes for all within."""
    methods = overridden(kind)
    own = methods.pop("forward", kind.forward)

    def forward(self: nn.Module, *given: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return kind.forward(self, *given, **named)
        before = ACTIVE.now, ACTIVE.hooks
        ACTIVE.now, ACTIVE.hooks = True, saving_hooks()
        try:
            with nullcontext() if before[0] else NetworkMode():
                return own(self, *given, **named)
        finally:
            ACTIVE.now, ACTIVE.hooks = before

    return kind.__name__, {**methods, "forward": forward, "unrouted": kind}
