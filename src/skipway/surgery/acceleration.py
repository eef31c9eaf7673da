"""`accelerate(model)`: kernels in anybody's network, in place, for training and inference."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import torch
from torch import nn

from skipway.errors import SkipwayError
from skipway.kernels.dispatch import KernelMode
from skipway.surgery.block_rows import changed
from skipway.surgery.operation import Operation
from skipway.surgery.overrides import overridden
from skipway.surgery.preconditions import admitted
from skipway.surgery.verification import difference, outputs
from skipway.tracing import Example

__all__ = ["accelerate"]

TOLERANCE = 1e-3
"""How far outputs may move, over the largest: sums in another order, through a hundred layers."""
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def accelerate(model: nn.Module, example: Example | None = None, *, tolerance: float = TOLERANCE) -> Operation:
    """Let linear maps, 1 × 1 and depthwise convolutions and attention on the CPU be computed by `skipway.kernels`, in
    anybody's network, in place; on a GPU depthwise convolutions of maps that lie channels-last, attention within our
    windows, and the end of our residual connections.

    Classes are swapped for subclasses whose forward routes torch's functions (`kernels.dispatch.ROUTES`), so keys,
    `isinstance`, hooks and checkpointing survive, and code that calls functions instead of modules is reached. Each
    kernel measures its ways at first use and never takes one that is slower or that differs. Gradients are those of
    plain torch up to rounding; which way is the quickest may change from run to run, and the last bits with it. Under
    `torch.compile` the network is left to the compiler and its own kernels, but for the first two on a GPU, where the
    compiler calls others' as well.

    Args:
        model: any module.
        example: what the model is called with; outputs are compared on it, and everything is put back where they move.
        tolerance: the largest difference over the largest output that is allowed.

    Raises:
        SkipwayError: the model cannot be operated on, was accelerated already, or outputs moved.

    >>> layer = nn.Linear(512, 512)
    >>> operation = accelerate(layer, torch.randn(64, 512))
    >>> operation.report["difference"] < 1e-4, type(operation.undo())
    (True, <class 'torch.nn.modules.linear.Linear'>)
    """
    model = admitted(model)
    if any(is_routed(module) for module in model.modules()):
        raise SkipwayError(f"{type(model).__name__} is accelerated already; undo that first")
    before = None if example is None else outputs(model, example)
    operation = Operation(model, f"{type(model).__name__} computes by kernels", {}, {}, {})
    touched, refused = {}, {}
    for name, module in model.named_modules():
        kind = type(module)
        if module is not model and not computing(module):
            continue
        try:
            operation.steps.append(changed(module, routed(kind)))
        except SkipwayError as problem:
            refused[name] = str(problem)
        except TypeError as problem:
            refused[name] = f"the class {kind.__name__} cannot be derived from: {problem}"
        else:
            touched[name] = kind.__name__
    operation.touched, operation.refused = touched, refused
    if before is not None and example is not None:
        try:
            gap = difference(before, outputs(model, example))
            if not gap <= tolerance:
                raise SkipwayError(f"outputs moved by {gap:.2g} of the largest, more than tolerance={tolerance:g}")
        except BaseException:
            operation.undo()
            raise
        operation.report = {"difference": gap}
    return operation


def computing(module: nn.Module) -> bool:
    """Whether a module may be called by itself, by a checkpoint say, and has weights to compute with."""
    return not isinstance(module, CONTAINERS) and next(module.parameters(), None) is not None


def is_routed(module: nn.Module) -> bool:
    return hasattr(type(module), "unrouted")


class Active(threading.local):
    """Whether the functions of this thread's forward pass are routed already."""

    now = False


ACTIVE = Active()


@cache
def routed(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `kind` whose forward is routed; the outermost module of a call routes for all within."""
    methods = overridden(kind)
    own = methods.pop("forward", kind.forward)

    def forward(self: nn.Module, *given: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return kind.forward(self, *given, **named)
        if ACTIVE.now:
            return own(self, *given, **named)
        ACTIVE.now = True
        try:
            with KernelMode():
                return own(self, *given, **named)
        finally:
            ACTIVE.now = False

    named = {"forward": forward, "__module__": kind.__module__, "unrouted": kind}
    return type(kind.__name__, (kind,), {**methods, **named})
