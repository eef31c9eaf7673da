"""A pass through a model with a probe at every residual connection and every linear map; nothing stays behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from skipway.errors import SkipwayError
from skipway.probes.measures import (
    dead_share,
    distinctness,
    overflow,
    rms,
    swallowed_share,
    token_distinctness,
)
from skipway.tracing.chain import Chain, WatchedConnection
from skipway.tracing.watch import ADDITIONS

__all__ = ["Edges", "Probe", "Readings", "seeded"]

RECTIFIERS = frozenset({"relu", "relu_", "relu6", "threshold", "threshold_"})


class Edges(NamedTuple):
    """Where a connection's stream enters and leaves, as places in the graph of gradients."""

    before: GradientEdge
    after: GradientEdge
    shape: torch.Size


@dataclass
class Readings:
    """What a pass has read, by name of connection or module; 0-dimensional tensors until `numbers` is called."""

    connections: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    edges: dict[str, Edges] = field(default_factory=dict)

    def numbers(self) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
        """All readings as floats, fetched from the device at once."""
        flat = [
            value.double().cpu() if value.device.type != "cpu" else value.double()
            for table in (self.connections, self.layers)
            for row in table.values()
            for value in row.values()
        ]
        fetched: Iterator[float] = iter(torch.stack(flat).tolist() if flat else [])
        first, second = (
            {name: {key: next(fetched) for key in row} for name, row in table.items()}
            for table in (self.connections, self.layers)
        )
        return first, second


class Probe(TorchFunctionMode):
    """Reads the stream at the additions of a watched chain while the model runs.

    Use as a context around the forward pass; gradients are read by tensor hooks when the backward pass comes, and go
    away with the graph. The layers' forward hooks are removed on leaving.

    Args:
        model: the network.
        chain: its connections, watched in the mode that the model is run in.
        backward: read gradients too.
        edges: keep the places in the graph where streams enter and leave, for Jacobians.
        forward: read the forward signal.
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Chain[WatchedConnection],
        layers: Sequence[str] = (),
        *,
        forward: bool = True,
        backward: bool = True,
        edges: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.forward, self.backward, self.edges = model, forward, backward, edges
        self.wanted = {connection.seen.call: connection for connection in chain if connection.seen.call is not None}
        self.names = [connection.name for connection in chain]
        self.layers = layers
        self.readings = Readings()
        self.calls = self.passed = 0
        self.handles: list[Any] = []
        self.nodes: list[GradientEdge] = []

    def __enter__(self):
        for name in self.layers if self.forward else ():
            self.handles.append(self.model.get_submodule(name).register_forward_hook(self.layer(name)))
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        super().__exit__(exc_type, exc_val, exc_tb)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ADDITIONS:
            connection = self.wanted.get(self.calls)
            self.calls += 1
            if connection is not None:
                return self.at_sum(connection, func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if self.forward and name in RECTIFIERS and isinstance(result, Tensor) and result.ndim > 1:
            self.at_rectifier(result)
        return result

    def at_rectifier(self, result: Tensor) -> None:
        """Dead units count for the connection whose sum comes next."""
        name = self.names[min(self.passed, len(self.names) - 1)] if self.names else ""
        row = self.readings.connections.setdefault(name, {})
        share = dead_share(result.detach())
        row["dead"] = torch.maximum(row["dead"], share) if "dead" in row else share

    def at_sum(
        self, connection: WatchedConnection, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        seen = connection.seen
        operands = [*args, *kwargs.values()][:2]
        if func.__name__ == "__radd__":
            operands.reverse()
        skip, branch = operands if seen.skip_first else operands[::-1]
        if not (isinstance(skip, Tensor) and isinstance(branch, Tensor)):
            raise changed(connection)
        row = self.readings.connections.setdefault(connection.name, {})
        self.passed += 1
        before = get_gradient_edge(skip) if self.edges and skip.requires_grad else None
        if self.forward:
            read_operands(row, skip, branch)
        after: dict[str, Tensor] = {}
        if self.backward:
            raw = seen.numbers[0] == seen.numbers[3]  # else the branch does not read this tensor
            listen(skip, row, "gradient_before", lambda gradient: split(row, gradient, after.pop("", None)), when=raw)
        result = func(*args, **kwargs)
        if tuple(result.shape) != seen.shape:
            raise changed(connection)
        if self.forward:
            read_stream(row, result)
        if result.requires_grad:
            self.nodes.append(get_gradient_edge(result))
        if self.backward:
            listen(result, row, "gradient_after", lambda gradient: after.update({"": gradient.detach()}))
        if before is not None and result.requires_grad:
            self.readings.edges[connection.name] = Edges(before, get_gradient_edge(result), result.shape)
        return result

    def release(self) -> None:
        """Let go of the graph from its end on, one connection after the other, when nothing else holds it any more.

        A graph with hooks that is dropped as a whole is taken apart by one call within the other, which at some
        thousands of connections overflows the stack.
        """
        while self.readings.edges:
            self.readings.edges.popitem()
        while self.nodes:
            self.nodes.pop()

    def layer(self, name: str) -> Callable[..., None]:
        def read(module: nn.Module, given: Any, out: Any) -> None:
            values = out[0] if isinstance(out, tuple | list) and out else out
            if not isinstance(values, Tensor) or not values.is_floating_point():
                return
            row = self.readings.layers.setdefault(name, {})
            row["std"] = values.detach().float().std(correction=0)
            row["distinct"] = distinctness(values) if values.ndim > 1 else torch.ones(())
            row["tokens_distinct"] = token_distinctness(values)
            if self.backward:
                listen(values, row, "gradient")

        return read


def changed(connection: WatchedConnection) -> SkipwayError:
    return SkipwayError(
        f"the additions of this pass are not those that were watched (at connection {connection.name!r}): the model "
        "does something else each time it runs, so its connections cannot be measured; make its forward depend on "
        "shapes only, or diagnose it in evaluation mode: diagnose(..., training=False)"
    )


@torch.no_grad()
def read_operands(row: dict[str, Tensor], skip: Tensor, branch: Tensor) -> None:
    row["skip"], row["variance_before"] = moments(skip)
    row["branch"], row["variance_branch"] = moments(branch)
    row["overflow"] = torch.maximum(overflow(skip), overflow(branch))
    if skip.shape == branch.shape:
        row["cosine"] = torch.dot(skip.flatten().float(), branch.flatten().float()) / (
            row["skip"] * row["branch"] * skip.numel()
        ).clamp_min(1e-38)
        row["swallowed"] = swallowed_share(skip.detach(), branch.detach())


@torch.no_grad()
def read_stream(row: dict[str, Tensor], stream: Tensor) -> None:
    row["stream"], row["variance_after"] = moments(stream)
    row["distinct"] = distinctness(stream) if stream.ndim > 1 else torch.ones((), device=stream.device)
    row["tokens_distinct"] = token_distinctness(stream)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square and variance, read in one go; of x over its largest magnitude, whose square may be infinite."""
    largest = x.detach().abs().amax().float().clamp_min(1e-30)
    variance, mean = torch.var_mean(x.detach().float() / largest, correction=0)
    return (variance + mean.square()).sqrt() * largest, variance.double() * largest.double().square()


def listen(
    values: Tensor,
    row: dict[str, Tensor],
    key: str,
    also: Callable[[Tensor], None] | None = None,
    *,
    when: bool = True,
) -> None:
    """Read the size of the gradient of `values` when it comes."""
    if not (when and values.requires_grad):
        return

    def read(gradient: Tensor) -> None:
        row[key] = rms(gradient)
        if also is not None:
            also(gradient)

    values.register_hook(read)


@torch.no_grad()
def split(row: dict[str, Tensor], before: Tensor, after: Tensor | None) -> None:
    """The gradient in front of a connection is what came through the skip plus what came through the branch."""
    if after is not None and after.shape == before.shape:
        row["gradient_branch"] = rms(before - after)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The same random numbers in every pass, and the caller's random state put back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
