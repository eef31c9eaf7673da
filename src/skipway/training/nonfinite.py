"""Where a number that is not finite comes from: the step is run again under watch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipway.tracing.chain import chain

__all__ = ["Culprit", "find_culprit"]


@dataclass(frozen=True)
class Culprit:
    """What was not finite first.

    Args:
        kind: "input", "weight", "forward", "loss", "gradient", or "gone" where the step is fine when it is run again.
        name: of the connection or the weight; empty for the others.
    """

    kind: str
    name: str = ""

    def __str__(self) -> str:
        return {
            "input": "the images themselves hold a value that is not finite",
            "weight": f"the weight {self.name} is not finite",
            "forward": f"first in the forward pass of {self.name}",
            "loss": "the network's output is finite, the loss is not",
            "gradient": f"first in the gradient of {self.name}",
            "gone": "the same step run again is fine: a fault of the machine, or of something that does not repeat",
        }[self.kind]


def find_culprit(model: nn.Module, inputs: Tensor, loss_of: Callable[[], Tensor]) -> Culprit:
    """Run a step again, with a watch on every connection, and say where it went wrong.

    Forward, it is the first connection that puts out such a number; the head counts as one, and so does the stem.
    Backward, it is the last connection that was given a finite gradient and hands on another.

    Args:
        model: the network as it was at that step.
        inputs: of the step.
        loss_of: forward passes of that step, with the random state that it had.

    >>> model = nn.Linear(2, 2)
    >>> _ = nn.init.constant_(model.bias, float("inf"))
    >>> print(find_culprit(model, torch.zeros(1, 2), lambda: model(torch.zeros(1, 2)).sum()))
    the weight bias is not finite
    """
    if not finite(inputs):
        return Culprit("input")
    for name, parameter in model.named_parameters():
        if not finite(parameter):
            return Culprit("weight", name)
    places = watched(model)
    forward: dict[str, bool] = {}
    backward: dict[str, bool] = {}
    streams: list[tuple[str, Tensor]] = []
    with ExitStack() as stack:
        for name, module in places.items():

            def keep(_: nn.Module, given: object, out: object, name: str = name) -> None:
                if isinstance(out, Tensor):
                    forward.setdefault(name, finite(out))
                    if out.requires_grad:
                        streams.append((name, out))

            handle = module.register_forward_hook(keep)
            stack.callback(handle.remove)
        was = model.training
        loss = loss_of()
        model.train(was)
    wrong = next((name for name, fine in forward.items() if not fine), None)
    if wrong is not None:
        return Culprit("forward", wrong)
    if not finite(loss):
        return Culprit("loss")
    given = torch.autograd.grad(loss, [out for _, out in streams], retain_graph=True, allow_unused=True)
    for (name, _), grad in zip(streams, given, strict=True):
        backward[name] = grad is None or finite(grad)
    # the stream behind place k is finite backward and in front of it not: k spoilt it
    order = list(backward)
    for here, name in reversed(list(enumerate(order))):
        if backward[name] and here > 0 and not backward[order[here - 1]]:
            return Culprit("gradient", name)
    if order and not backward[order[-1]]:
        return Culprit("gradient", "head" if "head" in places else order[-1])
    own = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    grads = torch.autograd.grad(loss, [each for _, each in own], allow_unused=True)
    for (name, _), grad in zip(own, grads, strict=True):
        if grad is not None and not finite(grad):
            return Culprit("gradient", next((place for place in places if name.startswith(place + ".")), name))
    return Culprit("gone")


def watched(model: nn.Module) -> dict[str, nn.Module]:
    """The stem, the connections and the head, in order, by name."""
    places: dict[str, nn.Module] = {}
    stem, head = getattr(model, "stem", None), getattr(model, "head", None)
    if isinstance(stem, nn.Module):
        places["stem"] = stem
    places.update((connection.name, connection.residual) for connection in chain(model))
    if isinstance(head, nn.Module):
        places["head"] = head
    return places


def finite(values: Tensor) -> bool:
    """Whether all values are finite numbers."""
    return bool(torch.isfinite(values.detach()).all())
