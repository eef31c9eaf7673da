"""Cutting what branches add from the graph of a running network, so that what is carried depends on them alone."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from skipway.nn import StreamEntry, StreamExit
from skipway.probes.observer import Observer
from skipway.probes.stream_taps import StreamTaps
from skipway.tracing import unwrap
from skipway.tracing.chain import Connection, WatchedConnection

__all__ = ["JoinCutter", "MixedSource", "SourceCutter", "StreamCutter", "WatchedStreamCutter"]


class MixedSource(NamedTuple):
    """What is differentiated for: a tensor of a running network, which may write into it afterwards.

    Args:
        value: a copy.
        edge: its place in the graph.
    """

    value: Tensor
    edge: GradientEdge

    @classmethod
    def of(cls, tensor: Tensor) -> MixedSource:
        """The tensor as it is now."""
        return cls(tensor.detach().clone(), get_gradient_edge(tensor))


class SourceCutter(Observer):
    """Replaces what each branch adds by a tensor that is differentiated for, as the first stream is. What is kept are
    copies, since the network may write into what it adds.

    Args:
        model: the network.
        connections: of `chain(model, example)`.
    """

    def __init__(self, model: nn.Module, connections: Iterable[WatchedConnection]) -> None:
        super().__init__(model, connections)
        self.sources: list[MixedSource] = []
        self.carried: list[Tensor] = []
        self.branches: list[Tensor] = []
        self.last: Tensor | None = None

    def start(self) -> None:
        self.sources, self.carried, self.branches, self.last = [], [], [], None

    def operands(self, connection: WatchedConnection, skip: Tensor, branch: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.sources:
            self.sources.append(MixedSource.of(skip))
        self.carried.append(skip.clone())
        self.branches.append(branch.clone())
        cut = branch.detach().clone().requires_grad_()
        self.sources.append(MixedSource.of(cut))
        return self.carried[-1], cut

    def stream(self, connection: WatchedConnection, stream: Tensor) -> None:
        self.last = stream.clone()


class WatchedStreamCutter(SourceCutter):
    """The same for networks of others with several streams: of such a connection the output of the branch is the
    source, before it is written, and what the branch reads is carried.

    Args:
        model: the network.
        connections: of `chain(model, example)`.
        taps: where modules hand those over.
    """

    def __init__(self, model: nn.Module, connections: Iterable[WatchedConnection], taps: StreamTaps) -> None:
        super().__init__(model, connections)
        self.taps = taps
        self.held: dict[tuple[str, str], Tensor] = {}

    def __enter__(self) -> WatchedStreamCutter:
        super().__enter__()
        for name, tap in self.taps.reads.items():
            self.cleanup.callback(tap.hook(self.model, partial(self.keep, ("read", name))))
        for name, tap in self.taps.branches.items():
            self.cleanup.callback(tap.hook(self.model, partial(self.cut, name)))
        for place, tap in (("stem", self.taps.stem), ("last", self.taps.last)):
            if tap is not None:
                self.cleanup.callback(tap.hook(self.model, partial(self.keep, (place, ""))))
        return self

    def keep(self, key: tuple[str, str], tensor: Tensor) -> None:
        self.held[key] = tensor
        if key[0] == "last":
            self.last = tensor

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        self.held["branch", name] = tensor
        self.held["source", name] = tensor.detach().clone().requires_grad_()
        return self.held["source", name]

    def operands(self, connection: WatchedConnection, skip: Tensor, branch: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.sources and ("stem", "") in self.held:
            self.sources.append(MixedSource.of(self.held["stem", ""]))
        if connection.name not in self.taps.reads:
            return super().operands(connection, skip, branch)
        if not self.sources:
            self.sources.append(MixedSource.of(skip))
        self.carried.append(self.held["read", connection.name])
        self.branches.append(self.held["branch", connection.name])
        self.sources.append(MixedSource.of(self.held["source", connection.name]))
        return None


class StreamCutter:
    """The same for connections of ours that carry several streams; what is carried is what a branch reads of them.

    Args:
        model: the network.
        connections: of `chain(model)`.
    """

    def __init__(self, model: nn.Module, connections: Iterable[Connection]) -> None:
        self.model, self.connections = unwrap(model), tuple(connections)
        self.sources: list[MixedSource] = []
        self.carried: list[Tensor] = []
        self.branches: list[Tensor] = []
        self.last: Tensor | None = None
        self.hooks = ExitStack()

    def __enter__(self) -> StreamCutter:
        self.sources, self.carried, self.branches, self.last = [], [], [], None
        for module in self.model.modules():
            if isinstance(module, StreamExit):
                self.hooks.callback(module.register_forward_hook(self.leave).remove)
            elif isinstance(module, StreamEntry):
                self.hooks.callback(module.register_forward_pre_hook(self.enter).remove)
        if not any(type(module) is StreamEntry for module in self.model.modules()):  # a history needs none
            first = self.connections[0].residual
            self.hooks.callback(first.register_forward_pre_hook(self.enter).remove)
        for connection in self.connections:
            assert connection.residual.streams is not None
            self.hooks.callback(connection.residual.streams.register_forward_hook(self.read).remove)
            self.hooks.callback(connection.residual.drop.register_forward_hook(self.cut).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.hooks.close()

    def enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.sources.append(MixedSource.of(args[0]))

    def read(self, module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        self.carried.append(output[0])

    def cut(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.branches.append(output)
        cut = output.detach().clone().requires_grad_()
        self.sources.append(MixedSource.of(cut))
        return cut

    def leave(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.last = output


class JoinCutter(StreamCutter):
    """The same for connections of ours whose join is no addition; what is carried is the skip that it is given."""

    def __enter__(self) -> JoinCutter:
        self.sources, self.carried, self.branches, self.last = [], [], [], None
        for connection in self.connections:
            join = connection.residual.join
            assert join is not None
            self.hooks.callback(join.register_forward_pre_hook(self.cut_branch).remove)
            self.hooks.callback(join.register_forward_hook(self.keep_output).remove)
        return self

    def cut_branch(self, module: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        skip, branch = args
        if not self.sources:
            self.sources.append(MixedSource.of(skip))
        self.carried.append(skip)
        self.branches.append(branch)
        cut = branch.detach().clone().requires_grad_()
        self.sources.append(MixedSource.of(cut))
        return skip, cut

    def keep_output(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.last = output
