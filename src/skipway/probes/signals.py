"""`probe(model, example)`: the signal and the gradient at every residual connection of any network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError, suggest
from skipway.hardware.precision import widest
from skipway.nn import Residual
from skipway.probes.measures import MEASURES, SIGNALS, Measure, is_inexact
from skipway.probes.objective import Loss, compute_loss
from skipway.probes.observer import Observer
from skipway.tracing import Example, as_batch, call_model, preserved_state
from skipway.tracing.chain import WatchedConnection, chain
from skipway.tracing.example import copy_example
from skipway.tracing.residual_adds import StreamAxis

__all__ = ["Probe", "Signals", "probe"]

SHOWN = 12  # rows at either end of a printed table
Readings = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Signals:
    """The readings of a probe; `print` shows a table that fits on one screen at any depth.

    Args:
        connections: by name of the connection, in order, the value of each measure.
        modules: the same for the modules that were measured.
        loss: of the pass; nan where none was computed.
    """

    connections: dict[str, dict[str, float]] = field(default_factory=dict)
    modules: dict[str, dict[str, float]] = field(default_factory=dict)
    loss: float = math.nan

    def __getitem__(self, name: str) -> dict[str, float]:
        """The row of a connection or module.

        Raises:
            SkipwayError: neither has that name.
        """
        row = self.connections.get(name, self.modules.get(name))
        if row is None:
            raise SkipwayError(suggest("connection", name, [*self.connections, *self.modules]))
        return row

    def __len__(self) -> int:
        return len(self.connections)

    def __str__(self) -> str:
        rows = self.connections or self.modules
        if not rows:
            return "no connections"
        columns = list(dict.fromkeys(measure for row in rows.values() for measure in row))
        labels = {name: name if len(name) <= 40 else f"…{name[-39:]}" for name in rows}
        width = max(len("connection"), *map(len, labels.values()))
        lines = [f"{'connection':{width}}" + "".join(f"  {column:>9}" for column in columns)]
        for name, row in rows.items():
            cells = (f"  {row.get(column, math.nan):{max(9, len(column))}.3g}" for column in columns)
            lines.append(f"{labels[name]:{width}}{''.join(cells)}")
        hidden = len(rows) - 2 * SHOWN
        return "\n".join(lines if hidden <= 0 else [*lines[: SHOWN + 1], f"… {hidden} more", *lines[-SHOWN:]])


FEWEST = 4
"""Samples or positions, below which zeros of a rectifier say nothing about its channels."""


class Probe(Observer):
    """Measures what passes the connections of a network in the passes that run inside the context.

    For a training loop of one's own: put the forward and the backward pass of a step inside, then ask for `readings()`.
    The step computes what it computes without a probe, bit for bit, and on exit no hook and no reference to the graph
    is left. Where the model runs several times, the last forward pass counts. Under a loss scaler the gradients are
    those of the scaled loss.

    Args:
        model: any network; `torch.compile` and `DistributedDataParallel` wrappers are looked through.
        connections: its `chain(model, example)`, which is made once.
        measures: names out of `skipway.probes.MEASURES`, or `Measure` objects.
        modules: paths of modules at whose outputs the measures of "stream" and "gradient_after" are taken too.
        channels: the axes of the channels in what those put out, from the end, where they are known.

    Raises:
        SkipwayError: an unknown measure; on leaving the forward pass, additions that are not those of the chain.

    >>> import skipway as sw
    >>> model, x = sw.build("resnet8"), torch.randn(4, 3, 8, 8)
    >>> connections = sw.chain(model, x)
    >>> with Probe(model, connections, ["branch", "gradient_after"]) as probe:
    ...     model(x).square().mean().backward()
    >>> list(probe.readings()["stages.0.0"])
    ['branch', 'gradient_after']
    """

    def __init__(
        self,
        model: nn.Module,
        connections: Iterable[WatchedConnection],
        measures: Iterable[str | Measure] = SIGNALS,
        modules: Iterable[str] = (),
        channels: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        connections = tuple(connections)
        super().__init__(model, connections, modules)
        self.names = [connection.name for connection in connections]
        self.module_channels = channels
        self.channels = [channel_from_the_end(connection) for connection in connections]
        self.measures = [find_measure(each) if isinstance(each, str) else each for each in measures]
        self.points = {point for measure in self.measures for point in measure.points}
        self.rows: Readings = {}
        self.module_rows: Readings = {}
        self.after: dict[str, Tensor] | None = None
        self.passed = 0
        self.arrange: Callable[[Tensor], Tensor] = lambda tensor: tensor
        """Brings the axis of the samples to the front, where it is another one."""

    @property
    def backward(self) -> bool:
        """Whether a measure needs the backward pass."""
        return not self.points.isdisjoint({"gradient_before", "gradient_after"})

    def readings(self) -> Signals:
        """What the last forward pass and its backward pass read, fetched from the device at once.

        Raises:
            SkipwayError: the model was not called inside the context.
        """
        if not self.passes:
            raise SkipwayError(
                f"the probe has read nothing: {type(self.model).__name__} was not called inside `with Probe(…)`; call "
                "the model itself there, not its forward() or parts of it"
            )
        tables = (self.rows, self.module_rows)
        values = iter(to_floats([value for rows in tables for row in rows.values() for value in row.values()]))
        connections, modules = (
            {name: {key: next(values) for key in row} for name, row in rows.items()} for rows in tables
        )
        return Signals(connections, modules)

    def start(self) -> None:
        self.rows, self.module_rows, self.passed = {name: {} for name in self.names}, {}, 0

    def operands(self, connection: WatchedConnection, skip: Tensor, branch: Tensor) -> None:
        row, self.after = self.rows[connection.name], None
        self.take(row, skip=skip, branch=branch)
        numbers = connection.seen.numbers
        if connection.seen.skip == "read" and self.backward:  # nothing is added: the gradient of the newest output
            self.listen(branch, partial(self.receive_after, row, None))
        elif "gradient_before" in self.points and numbers[0] == numbers[3]:  # the branch reads the tensor that is added
            self.after = {}
            self.listen(skip, partial(self.receive_before, row, self.after))

    def stream(self, connection: WatchedConnection, stream: Tensor) -> None:
        self.passed += 1
        row, channel, streams = self.rows[connection.name], channel_from_the_end(connection)[1], stream_axis(connection)
        if streams is not None:
            self.take(row, channel, stream=by_sample(stream, streams))
        self.take_output(row, stream, self.after, channel)

    def rectified(self, output: Tensor) -> None:
        if "rectified" in self.points and self.names and output.ndim > 1:
            place = min(self.passed, len(self.names) - 1)
            row = self.rows[self.names[place]]  # of the connection that adds next
            now: dict[str, Tensor] = {}
            ndim, channel = self.channels[place]
            channel = channel if output.ndim == ndim else None
            width = output.shape[(1 if output.ndim == 4 else -1) if channel is None else channel]
            if output.numel() < FEWEST * width:
                return  # an expert that few tokens came to
            self.take(now, channel, rectified=output)
            row.update({key: torch.maximum(row.get(key, value), value) for key, value in now.items()})

    def module_output(self, name: str, value: Any) -> None:
        first = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(first, Tensor) and is_inexact(first) and first.numel():
            self.module_rows[name] = {}
            channel = self.module_channels.get(name)
            known = channel is not None and -channel <= first.ndim
            self.take_output(self.module_rows[name], first, None, channel if known else None)

    def take_output(
        self, row: dict[str, Tensor], stream: Tensor, after: dict[str, Tensor] | None, channel: int | None = None
    ) -> None:
        """Measure a sum or output, and its gradient when it comes."""
        self.take(row, channel, stream=stream)
        if self.backward:
            self.listen(stream, partial(self.receive_after, row, after))

    def receive_after(self, row: dict[str, Tensor], after: dict[str, Tensor] | None, gradient: Tensor) -> None:
        self.take(row, gradient_after=gradient)
        if after is not None:
            after["gradient_after"] = gradient.detach()

    def receive_before(self, row: dict[str, Tensor], after: dict[str, Tensor], gradient: Tensor) -> None:
        self.take(row, gradient_before=gradient, **after)
        after.clear()

    def take(self, row: dict[str, Tensor], channel: int | None = None, /, **tensors: Tensor) -> None:
        """Compute the measures of these points that are not in the row yet."""
        for measure in self.measures:
            if measure.name not in row and tensors.keys() >= set(measure.points):
                taken = [self.arrange(tensors[point].detach()) for point in measure.points]
                axis = {"channel": channel} if measure.by_channel else {}
                row[measure.name] = measure.function(*taken, **axis).detach()


def probe(
    model: nn.Module,
    example: Example,
    targets: Any = None,
    loss: Loss | None = None,
    measures: Iterable[str | Measure] = SIGNALS,
    *,
    modules: Iterable[str] | None = None,
    connections: Iterable[WatchedConnection] | None = None,
) -> Signals:
    """Measure the signal and the gradient at every residual connection of any network, and leave the model alone.

    Costs one forward and one backward pass in the mode that the model is in; the forward pass alone, without
    gradients, where no measure needs the backward one. Buffers, gradients and the random state are put back.

    Args:
        model: any `torch.nn.Module`.
        example: what it is called with, see `skipway.tracing.call_model`.
        targets: what the loss compares the output with; a loader's batch brings its own.
        loss: (output, targets) → a number; None: see `skipway.probes.compute_loss`.
        measures: names out of `skipway.probes.MEASURES`, or `Measure` objects.
        modules: paths of modules at whose outputs the measures of "stream" and "gradient_after" are taken too; None:
            none, or in a network of ours whose skips were cut the blocks that had them.
        connections: `chain(model, example)`, where it is known already.

    Raises:
        SkipwayError: an unknown measure; the model fails on the example, or does something else in each pass.

    >>> layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    >>> model = nn.TransformerEncoder(layer, 20, enable_nested_tensor=False)
    >>> signals = probe(model, torch.randn(2, 5, 16), measures=["branch", "stream", "gradient_after"])
    >>> len(signals), len(str(signals).splitlines()), signals.loss > 0
    (40, 26, True)
    """
    example, targets = as_batch(example, targets)
    watched = tuple(chain(model, example) if connections is None else connections)
    if modules is None:
        own = model.named_modules() if not watched else ()
        modules = [name for name, module in own if isinstance(module, Residual)]
    value: Tensor | None = None
    with preserved_state(model), Probe(model, watched, measures, modules) as watcher:
        with torch.set_grad_enabled(watcher.backward):
            output = call_model(watcher.model, copy_example(example, gradients=True))
            if watcher.backward:
                value = compute_loss(output, targets, loss, example)
                if watcher.edges and value.requires_grad:
                    torch.autograd.grad(value, watcher.edges, allow_unused=True)
                value = value.detach()
        del output
    readings = watcher.readings()
    return readings if value is None else replace(readings, loss=float(value))


def by_sample(s: Tensor, streams: StreamAxis) -> Tensor:
    """Streams in front of the samples or in one axis with them, for each sample: (n, N, …) or (n·N, …) → (N, n, …)."""
    if len(s) == streams.count and streams.stride:
        return s.transpose(0, 1) if s.ndim > 2 else s
    if streams.stride == 1:
        return s.unflatten(0, (-1, streams.count))
    return s.unflatten(0, (streams.count, -1)).transpose(0, 1)


def channel_from_the_end(connection: WatchedConnection) -> tuple[int, int | None]:
    """Axes of a connection's stream, and the one with the channels counted from the end, so that moving the samples to
    the front leaves it where it is.
    """
    ndim, channel = len(connection.seen.shape), connection.seen.channel
    return ndim, None if channel is None else channel - ndim


def stream_axis(connection: WatchedConnection) -> StreamAxis | None:
    """Where several streams lie on the first axis; None where none do."""
    seen, residual = connection.seen, connection.residual
    if seen.slots and residual is not None and residual.streams is not None and residual.streams.count > 1:
        return StreamAxis(residual.streams.count, 0, 0)  # one after the other, in a batch of any size
    return seen.streams.axis if seen.streams is not None and seen.streams.axis.axis == 0 else None


def find_measure(name: str) -> Measure:
    """The measure of that name."""
    if name not in MEASURES:
        raise SkipwayError(suggest("measure", name, MEASURES))
    return MEASURES[name]


def to_floats(values: list[Tensor]) -> list[float]:
    """Numbers as floats, fetched from each device at once."""
    found = [math.nan] * len(values)
    for device in {value.device for value in values}:
        places = [place for place, value in enumerate(values) if value.device == device]
        for place, number in zip(places, torch.stack([widest(values[p]) for p in places]).tolist(), strict=True):
            found[place] = number
    return found
