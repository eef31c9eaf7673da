"""`find_culprit`: where a value that is not finite comes from, found by running the step again under observation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from skipway.errors import SkipwayError
from skipway.probes.measures import is_inexact
from skipway.probes.observer import Observer
from skipway.tracing import Example, as_example, unwrap
from skipway.tracing.chain import WatchedConnection, chain

__all__ = ["Culprit", "find_culprit"]


@dataclass(frozen=True)
class Culprit:
    """The first value of a step that is not finite.

    Args:
        kind: "input", "weight", "forward", "loss", "gradient", or "gone" where the step is fine when it is run again.
        name: of the connection, or of the module or weight where it lies in no connection; empty for the others.
        module: the module in that connection, where it is known.
    """

    kind: str
    name: str = ""
    module: str = ""

    def __str__(self) -> str:
        inside = f", in its module {self.module}" if self.module not in ("", self.name) else ""
        return {
            "input": "the images themselves hold a value that is not finite",
            "weight": f"the weight {self.name} is not finite",
            "forward": f"first in the forward pass of {self.name}{inside}",
            "loss": "the network's output is finite, the loss is not",
            "gradient": f"first in the gradient of {self.name}{inside}",
            "gone": "the same step run again is fine: a fault of the machine, or of something that does not repeat",
        }[self.kind]


def find_culprit(model: nn.Module, example: Example, compute_loss: Callable[[], Tensor]) -> Culprit:
    """Run a step of any network again, observe every connection and module, and name the first that goes wrong.

    Forward, it is the first addition or module with an output that is not finite. Backward, it is the last one whose
    gradient is finite before one is not: the fault lies on the way from there to the next. The model is left alone,
    but for the buffers and the random state that `compute_loss` itself changes.

    Args:
        model: the network as it was at that step.
        example: what it was called with.
        compute_loss: the forward pass of that step, with the random state that it had.

    >>> model = nn.Linear(2, 2)
    >>> _ = nn.init.constant_(model.bias, float("inf"))
    >>> print(find_culprit(model, torch.zeros(1, 2), lambda: model(torch.zeros(1, 2)).sum()))
    the weight bias is not finite
    """
    example, model = as_example(example), unwrap(model)
    if not all(finite(leaf) for leaf in tree_leaves(example) if isinstance(leaf, Tensor)):
        return Culprit("input")
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if not finite(parameter):
            return Culprit("weight", name)
    try:
        connections = tuple(chain(model, example))
        return search(FinitenessObserver(model, connections), compute_loss)
    except SkipwayError:  # its additions cannot be watched; its modules can
        return search(FinitenessObserver(model, ()), compute_loss)


class FinitenessObserver(Observer):
    """Notes at every addition and module output whether the value, and later its gradient, is finite."""

    def __init__(self, model: nn.Module, connections: Iterable[WatchedConnection]) -> None:
        self.connections = tuple(connections)
        super().__init__(model, self.connections, [name for name, _ in model.named_modules()])

    def start(self) -> None:
        self.forward: list[tuple[str, bool]] = []
        self.backward: list[tuple[str, bool]] = []

    def stream(self, connection: WatchedConnection, stream: Tensor) -> None:
        self.note(connection.name, stream)

    def module_output(self, name: str, value: Any) -> None:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and is_inexact(leaf):
                self.note(name, leaf)

    def note(self, name: str, value: Tensor) -> None:
        self.forward.append((name, finite(value)))
        self.listen(value, partial(self.arrive, name))

    def arrive(self, name: str, gradient: Tensor) -> None:
        self.backward.append((name, finite(gradient)))

    def culprit(self, kind: str, name: str) -> Culprit:
        """Name the connection that a connection's sum or a module belongs to; the module itself where it is in none."""
        if name in {connection.name for connection in self.connections}:
            return Culprit(kind, name)
        inside = [c for c in self.connections if name in c.seen.modules or name in c.seen.shortcut]
        around = [c for c in self.connections if c.seen.owner and f"{name}.".startswith(f"{c.seen.owner}.")]
        if inside or around:
            # a block with two connections returns the sum of its last
            owner = inside[0] if inside else max(around, key=lambda c: len(c.seen.owner))
            last = [c for c in around if c.seen.owner == name]
            return Culprit(kind, last[-1].name if last else owner.name, name)
        return Culprit(kind, name or "the network")


def search(observer: FinitenessObserver, compute_loss: Callable[[], Tensor]) -> Culprit:
    """Run the step under the observer."""
    modes = [(module, module.training) for module in observer.model.modules()]
    parameters = {name: each for name, each in observer.model.named_parameters() if each.requires_grad}
    with observer, torch.enable_grad():
        loss = compute_loss()
        for module, mode in modes:
            module.training = mode
        for name, fine in observer.forward:
            if not fine:
                return observer.culprit("forward", name)
        if not finite(loss):
            return Culprit("loss")
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    before = "the loss"
    for name, fine in observer.backward:
        if not fine:
            return Culprit("gradient", before) if before == "the loss" else observer.culprit("gradient", before)
        before = name
    for name, grad in zip(parameters, grads, strict=True):
        if grad is not None and not finite(grad):
            return observer.culprit("gradient", name.rpartition(".")[0])
    return Culprit("gone")


def finite(values: Tensor) -> bool:
    """Whether all values are finite numbers."""
    return bool(torch.isfinite(values.detach()).all())
