"""A model with a batch and a loss: what can be run, forward and backward, without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from skipway.errors import SkipwayError
from skipway.probes import Probe, Signals
from skipway.probes.measures import DIAGNOSIS_MEASURES, MODULE_MEASURES
from skipway.probes.objective import Loss, compute_loss, main_output
from skipway.tracing import Example, Program, preserved_state, watch
from skipway.tracing.chain import Chain, WatchedConnection, chain_from_program
from skipway.tracing.example import call_model

__all__ = ["Gradients", "Subject"]

Gradients = list[Tensor]


@dataclass
class Subject:
    """What is diagnosed.

    Args:
        model: any module.
        inputs: what it is called with; every tensor's first axis counts the samples.
        targets: what the loss compares the output with; None: labels drawn at random.
        loss: (output, targets) → a number; None: cross-entropy, or the loss that the model itself puts out.
        training: run it in training mode.
        seed: of dropout, stochastic depth and targets, the same in every pass.
    """

    model: nn.Module
    inputs: Example
    targets: Any = None
    loss: Loss | None = None
    training: bool = True
    seed: int = 0
    passes: float = field(default=0.0, init=False)
    """Forward-backward passes over the whole batch so far; a backward pass counts two forward passes."""

    @cached_property
    def program(self) -> Program:
        """What the model runs on the samples that are probed."""
        return watch(self.model, self.probed_part[0], training=self.training)

    @cached_property
    def chain(self) -> Chain[WatchedConnection]:
        """The residual connections, numbered as they run in the chosen mode."""
        return chain_from_program(self.model, self.program)

    @cached_property
    def layers(self) -> list[str]:
        """The modules that hold the network's linear maps, in the order in which the signal meets them."""
        maps = [value for value in self.program.values if value.part == "map" and value.norm is None]
        return list(dict.fromkeys(self.program.weight_owner(value) for value in maps))

    @property
    def size(self) -> int:
        """Samples in the batch."""
        return count(self.inputs)

    @property
    def chunk(self) -> int:
        """Samples in one step of the look ahead: an eighth of the batch, but 8 where a quarter of it has as many."""
        return max(min(8, self.size // 4), self.size // 8)

    @cached_property
    def probed_part(self) -> tuple[Example, Any]:
        """The first quarter of the batch, at least two chunks of it: enough to read signals from."""
        return self.part(0, min(self.size, max(2 * self.chunk, self.size // 4)))

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @cached_property
    def skippable(self) -> tuple[str, ...]:
        """Modules that a skip fits around: in a row, they put out what is shaped like what they take, and hold maps.

        Of several rows (blocks, and the layers in them) that of most modules is taken, and of equally many the outer.
        """
        shapes: dict[str, bool] = {}
        handles = []

        def watcher(name: str) -> Callable[..., None]:
            def look(module: nn.Module, given: Any, out: Any) -> None:
                first = given[0] if given else None
                shapes[name] = isinstance(first, Tensor) and isinstance(out, Tensor) and first.shape == out.shape

            return look

        holding = {
            ".".join(parts[:length])
            for parts in (path.split(".") for path in self.layers)
            for length in range(1, len(parts) + 1)
        }
        for name, module in self.model.named_modules():
            if name in holding:
                handles.append(module.register_forward_hook(watcher(name)))
        try:
            with self.running(), torch.no_grad():
                call_model(self.model, self.probed_part[0])
        finally:
            for handle in handles:
                handle.remove()
        rows: dict[str, list[str]] = {}
        for name in (name for name, _ in self.model.named_modules() if shapes.get(name)):
            rows.setdefault(name.rpartition(".")[0], []).append(name)
        # blocks of several stages stand in rows of their own; rows on one level are one
        levels: dict[int, list[str]] = {}
        for parent, members in rows.items():
            if len(members) > 1:
                levels.setdefault(parent.count("."), []).extend(members)
        return tuple(max(levels.values(), key=len, default=()))

    @contextmanager
    def running(self) -> Iterator[None]:
        """In the chosen mode, with the same random numbers each time, and everything put back afterwards."""
        with preserved_state(self.model), seeded(self.seed), torch.enable_grad():
            if any(module.training != self.training for module in self.model.modules()):
                self.model.train(self.training)
            yield

    def part(self, start: int, stop: int) -> tuple[Example, Any]:
        """Some of the samples."""
        size = self.size

        def cut(tensor: Tensor) -> Tensor:
            return tensor[start:stop] if tensor.ndim and tensor.shape[0] == size else tensor

        return tree_map_only(Tensor, cut, self.inputs), tree_map_only(Tensor, cut, self.targets)

    def value(self, output: Any, targets: Any) -> Tensor:
        """The loss."""
        return compute_loss(output, targets, self.loss)

    def share(self, part: tuple[Example, Any]) -> float:
        """How much of the batch a part is."""
        return count(part[0]) / self.size

    def gradients(self, part: tuple[Example, Any]) -> tuple[Tensor, Gradients]:
        """Loss on a part of the batch and the gradient of each parameter, zeros where none arrives."""
        self.passes += self.share(part)
        with self.running():
            loss = self.value(call_model(self.model, part[0]), part[1])
            parameters = list(self.parameters.values())
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = [
            torch.zeros_like(parameter) if gradient is None else gradient.detach()
            for parameter, gradient in zip(parameters, found, strict=True)
        ]
        return loss.detach(), gradients

    def probed(self) -> tuple[Tensor, Tensor, Gradients, Signals]:
        """Loss, output, gradients and all readings of one pass."""
        inputs, targets = self.probed_part
        self.passes += self.share(self.probed_part)
        parameters = list(self.parameters.values())
        measures = (*DIAGNOSIS_MEASURES, *MODULE_MEASURES)
        with self.running(), Probe(self.model, self.chain, measures, self.layers) as probe:
            output = call_model(self.model, inputs)
            loss = self.value(output, targets)
            if not loss.requires_grad:
                raise SkipwayError("the loss depends on no trainable parameter; unfreeze some to diagnose training")
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            loss, output = loss.detach(), main_output(output).detach()
        gradients = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, found, strict=True)
        ]
        return loss, output, gradients, probe.readings()


def count(inputs: Example) -> int:
    """Samples in a batch: the first axis of its first tensor."""
    return next((leaf.shape[0] for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor) and leaf.ndim), 0)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The same random numbers in every pass, and the caller's random state put back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
