"""A model with its example, targets and loss, and the passes over them that leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from skipway.errors import SkipwayError
from skipway.probes import MEASURES, Observer, Probe, Signals
from skipway.probes.objective import Loss, compute_loss, main_output
from skipway.tracing import Example, Program, preserved_state, watch
from skipway.tracing.chain import Chain, WatchedConnection, chain_from_program
from skipway.tracing.example import call_model

__all__ = ["Gradients", "Subject"]

Gradients = list[Tensor]


@dataclass
class Subject:
    """The subject of a diagnosis.

    Args:
        model: any module.
        inputs: what the model is called with; the first axis of every tensor counts the samples.
        targets: what the loss compares the output with; None: labels drawn at random.
        loss: (output, targets) → a scalar; None: as in `skipway.probes.objective.compute_loss`.
        training: run the model in training mode.
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
        """The program that the model runs on the probed samples."""
        return watch(self.model, self.probed_part[0], training=self.training)

    @cached_property
    def chain(self) -> Chain[WatchedConnection]:
        """The residual connections, in the order in which they run."""
        return chain_from_program(self.model, self.program)

    @cached_property
    def layers(self) -> list[str]:
        """The modules with linear maps, in the order in which the signal meets them."""
        maps = [value for value in self.program.values if value.part == "map" and value.norm is None]
        return list(dict.fromkeys(self.program.weight_owner(value) for value in maps))

    @property
    def size(self) -> int:
        """Samples in the batch."""
        return count(self.inputs)

    @property
    def chunk(self) -> int:
        """Samples in one trial step: an eighth of the batch, at least 8 where a quarter of the batch has as many."""
        return max(min(8, self.size // 4), self.size // 8)

    @cached_property
    def probed_part(self) -> tuple[Example, Any]:
        """The first quarter of the batch, at least two chunks: enough to measure signals on."""
        return self.part(0, min(self.size, max(2 * self.chunk, self.size // 4)))

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that require a gradient, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @cached_property
    def skippable(self) -> tuple[str, ...]:
        """The modules that a skip fits around: siblings with linear maps whose outputs are shaped like their inputs.

        Of several levels of nesting (blocks, the layers in them) the one with most such modules, of equals the outer.
        """
        holding = {
            ".".join(parts[:length])
            for parts in (path.split(".") for path in self.layers)
            for length in range(1, len(parts) + 1)
        }
        names = [name for name, _ in self.model.named_modules() if name in holding]
        with self.running(), torch.no_grad(), ShapeObserver(self.model, (), names) as observer:
            call_model(observer.model, self.probed_part[0])
        rows: dict[str, list[str]] = {}
        for name in (name for name in names if observer.kept.get(name)):
            rows.setdefault(name.rpartition(".")[0], []).append(name)
        # the blocks of several stages have several parents on one level, and are taken together
        levels: dict[int, list[str]] = {}
        for parent, members in rows.items():
            if len(members) > 1:
                levels.setdefault(parent.count("."), []).extend(members)
        return tuple(max(levels.values(), key=len, default=()))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Enter the chosen mode with the same random numbers each time, and put everything back afterwards."""
        with preserved_state(self.model), seeded(self.seed), torch.enable_grad():
            if any(module.training != self.training for module in self.model.modules()):
                self.model.train(self.training)
            yield

    def part(self, start: int, stop: int) -> tuple[Example, Any]:
        """Example and targets of some of the samples."""
        size = self.size

        def cut(tensor: Tensor) -> Tensor:
            return tensor[start:stop] if tensor.ndim and tensor.shape[0] == size else tensor

        return tree_map_only(Tensor, cut, self.inputs), tree_map_only(Tensor, cut, self.targets)

    def value(self, output: Any, targets: Any) -> Tensor:
        """The loss of an output."""
        return compute_loss(output, targets, self.loss)

    def share(self, part: tuple[Example, Any]) -> float:
        """Fraction of the batch that is in a part."""
        return count(part[0]) / self.size

    def gradients(self, part: tuple[Example, Any]) -> tuple[Tensor, Gradients]:
        """Loss on a part of the batch, and the gradient of each parameter, 0 where none arrives."""
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
        """Loss, output, gradients and the probe's readings of one pass."""
        inputs, targets = self.probed_part
        self.passes += self.share(self.probed_part)
        parameters = list(self.parameters.values())
        measures = [name for name in MEASURES if name not in ("largest", "finite")]
        with self.running(), Probe(self.model, self.chain, measures, self.layers) as probe:
            output = call_model(self.model, inputs)
            loss = self.value(output, targets)
            if not loss.requires_grad:
                raise SkipwayError(
                    f"the loss {float(loss):.3g} depends on no parameter with requires_grad=True; unfreeze some, "
                    "or give a loss that uses the output"
                )
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            loss, output = loss.detach(), main_output(output).detach()
        gradients = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, found, strict=True)
        ]
        return loss, output, gradients, probe.readings()


def count(inputs: Example) -> int:
    """Number of samples in an example: the first axis of its first tensor."""
    return next((leaf.shape[0] for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor) and leaf.ndim), 0)


class ShapeObserver(Observer):
    """Notes of each module whether its output has the shape of its input."""

    def start(self) -> None:
        self.kept: dict[str, bool] = {}
        self.shapes: dict[str, torch.Size | None] = {}

    def module_input(self, name: str, value: Any) -> None:
        self.shapes[name] = value.shape if isinstance(value, Tensor) else None

    def module_output(self, name: str, value: Any) -> None:
        self.kept[name] = isinstance(value, Tensor) and value.shape == self.shapes[name]


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The same random numbers in every pass, and the caller's random state put back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
