"""The coordinate check over depth: how large signals are at the start, and by how much a few steps change them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skipway.data.randomness import draw_key
from skipway.depth_transfer.regression import Estimate, fit_line
from skipway.depth_transfer.runs import Trainings
from skipway.probes.measures import rms
from skipway.probes.objective import output_heads
from skipway.probes.observer import Observer
from skipway.tracing import preserved_state
from skipway.tracing.chain import WatchedConnection, chain
from skipway.tracing.example import call_model, copy_example
from skipway.tracing.restoration import generator_devices, own_tensors, seed_generators

__all__ = [
    "COORDINATES",
    "Coordinate",
    "CoordinateRow",
    "Growth",
    "check_coordinates",
    "measure_coordinates",
    "read_signals",
]

COORDINATES = {
    "stream": "the last stream, at the start",
    "sum": "all branches together, at the start",
    "branch": "one branch, at the start",
    "stream change": "change of the last stream",
    "branch change": "change of one branch",
    "output change": "change of the output",
}
"""Sizes that are measured, root mean squares, by their keys."""
FLAT, SURE = 0.1, 0.3
"""A power is none whose interval lies within ±0.3, where that holds 0 or the value is within ±0.1."""
Growth = Literal["flat", "grows", "falls", "cannot be told"]


@dataclass(frozen=True)
class CoordinateRow:
    """What was measured of one network.

    Args:
        scheme, depth, seed: which network.
        branches: its residual connections.
        sizes: by the keys of `COORDINATES`; those that a network has not are left out.
    """

    scheme: str
    depth: int
    branches: int
    seed: int
    sizes: dict[str, float]


@dataclass(frozen=True)
class Coordinate:
    """How a size goes with the depth, as L^p.

    Args:
        scheme: of the networks.
        name: a key of `COORDINATES`.
        power: p with its 95 % interval.
    """

    scheme: str
    name: str
    power: Estimate

    @property
    def growth(self) -> Growth:
        """What the interval of the power allows to say.

        >>> Coordinate("own", "stream", Estimate(0.5, 0.4, 0.6)).growth
        'grows'
        """
        power = self.power
        if max(-power.low, power.high) <= SURE and (power.holds(0) or abs(power.value) <= FLAT):
            return "flat"
        if power.holds(0):
            return "cannot be told"
        return "grows" if power.value > 0 else "falls"

    def __str__(self) -> str:
        power, low, high = (round(each, 2) + 0.0 for each in (self.power.value, self.power.low, self.power.high))
        between = f"L^{power:.2f} ({low:.2f} to {high:.2f})"
        return (
            f"{self.growth}, {between}" if self.growth in ("flat", "cannot be told") else f"{self.growth} as {between}"
        )


class StreamReader(Observer):
    """Keeps the branches and the last stream of a forward pass.

    Args:
        model: the network.
        connections: of `chain(model, example)`.
    """

    def __init__(self, model: nn.Module, connections: Sequence[WatchedConnection]) -> None:
        super().__init__(model, connections)
        self.start()

    def start(self) -> None:
        self.branches: dict[str, Tensor] = {}
        self.first: Tensor | None = None
        self.last: Tensor | None = None

    def operands(self, connection: WatchedConnection, skip: Tensor, branch: Tensor) -> None:
        self.branches[connection.name] = branch.detach().clone()
        if self.first is None or self.first.shape != skip.shape:  # a map between stages begins another stream
            self.first = skip.detach().clone()

    def stream(self, connection: WatchedConnection, stream: Tensor) -> None:
        self.last = stream.detach().clone()


@dataclass(frozen=True)
class PassSignals:
    """The signals of one forward pass: see `StreamReader`; the output is that of the first head."""

    branches: dict[str, Tensor]
    first: Tensor | None
    last: Tensor | None
    output: Tensor


def read_signals(model: nn.Module, connections: Sequence[WatchedConnection], example: Any, seed: int) -> PassSignals:
    """The signals of a forward pass in the model's mode, with the dropout of a seed; the model is left as it is."""
    reader = StreamReader(model, connections)
    with preserved_state(model), torch.no_grad(), reader:
        seed_generators(generator_devices(own_tensors(model)), seed)
        output = call_model(model, copy_example(example))
    (head, *_) = output_heads(output)[0].values()
    return PassSignals(reader.branches, reader.first, reader.last, head.detach().clone())


def measure_coordinates(
    model: nn.Module, connections: Sequence[WatchedConnection], example: Any, before: PassSignals, seed: int
) -> dict[str, float]:
    """Sizes before, and changes since then, of a network that has taken its steps."""
    after = read_signals(model, connections, example, seed)
    sizes: dict[str, float] = {"output change": size(after.output - before.output)}
    if before.branches and before.last is not None and after.last is not None:
        sizes |= {
            "stream": size(before.last),
            "stream change": size(after.last - before.last),
            "branch": mean_size(list(before.branches.values())),
            "branch change": mean_size([after.branches[name] - each for name, each in before.branches.items()]),
        }
        if before.first is not None and before.first.shape == before.last.shape:
            sizes["sum"] = size(before.last - before.first)
    return sizes


def size(tensor: Tensor) -> float:
    """Root mean square."""
    return float(rms(tensor))


def mean_size(tensors: Sequence[Tensor]) -> float:
    """Root mean square over several tensors, each with the same weight."""
    return math.sqrt(sum(size(each) ** 2 for each in tensors) / len(tensors))


def check_coordinates(
    trainings: Trainings, branches: dict[int, int], scheme: str, lr: float, steps: int
) -> tuple[list[CoordinateRow], list[Coordinate]]:
    """Measure the networks of all depths and seeds before and after a few steps at one rate, on the first batch.

    Args:
        trainings: how steps are taken.
        branches: residual connections by depth.
        scheme: a key of `trainings.schemes`.
        lr: the rate, the same at every depth.
        steps: that are taken.
    """
    rows: list[CoordinateRow] = []
    plan = replace(trainings.plan, warmup=0, schedule="constant")
    for depth, count in branches.items():
        for seed in range(trainings.plan.seeds):
            network = trainings.network(scheme, depth, seed)
            network.reset()
            example = trainings.batches.at(seed, 0)[0]
            connections = tuple(chain(network.model, example))
            draw = draw_key(seed, "coordinates")
            before = read_signals(network.model, connections, example, draw)
            trainings.train(scheme, depth, lr, seed, steps, plan)
            sizes = measure_coordinates(network.model, connections, example, before, draw)
            rows.append(CoordinateRow(scheme, depth, count, seed, sizes))
    return rows, [each for name in COORDINATES if (each := coordinate_of(rows, scheme, name)) is not None]


def coordinate_of(rows: Sequence[CoordinateRow], scheme: str, name: str) -> Coordinate | None:
    """The power of the depth that a size goes with; None where it was not measured at two depths."""
    points = [
        (math.log(row.branches), math.log(value))
        for row in rows
        if (value := row.sizes.get(name, math.nan)) > 0 and math.isfinite(value)
    ]
    if len({x for x, _ in points}) < 2:
        return None
    return Coordinate(scheme, name, fit_line([x for x, _ in points], [y for _, y in points]).slope)
