"""Cutting what branches add from the graph of a running network, so that what is carried depends on them alone."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
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


@torch.enable_grad()
def copy_in_graph(tensor: Tensor) -> Tensor:
    """A copy through which gradients reach the tensor, also in an `autograd.Function`, where they are off."""
    return tensor.clone()


class BranchCut(NamedTuple):
    """What a branch puts out, cut from the graph.

    Args:
        branch: a copy of it, in the graph of the branch.
        source: what is differentiated for in its place.
        given: what the network goes on with.
    """

    branch: Tensor
    source: MixedSource
    given: Tensor

    @classmethod
    def of(cls, branch: Tensor) -> BranchCut:
        """The tensor as it is now."""
        leaf = branch.detach().clone().requires_grad_()
        return cls(copy_in_graph(branch), MixedSource.of(leaf), copy_in_graph(leaf))  # a leaf is not written into


class PassRecord:
    """What a cutter keeps of a pass: copies, since the network may write into what it hands over; abstract.

    `sources` are differentiated for, `carried` holds what each connection carries, `branches` what each branch puts
    out, and `last` is the stream after all connections.
    """

    sources: list[MixedSource]
    carried: list[Tensor]
    branches: list[Tensor]
    last: Tensor | None

    def forget(self) -> None:
        """Keep nothing of the pass before."""
        self.sources, self.carried, self.branches, self.last = [], [], [], None

    def keep_first(self, stream: Tensor) -> None:
        """Take what the first connection is given for the first source, unless there is one."""
        if not self.sources:
            self.sources.append(MixedSource.of(stream))

    def keep_carried(self, carried: Tensor) -> Tensor:
        """Keep what a connection carries; returns the copy."""
        self.carried.append(copy_in_graph(carried))
        return self.carried[-1]

    def keep_cut(self, cut: BranchCut) -> Tensor:
        """Keep what a branch puts out; returns what the network goes on with."""
        self.branches.append(cut.branch)
        self.sources.append(cut.source)
        return cut.given

    def keep_last(self, stream: Tensor) -> None:
        """Keep the stream after all connections, or after those so far."""
        self.last = copy_in_graph(stream)


class SourceCutter(PassRecord, Observer):
    """Replaces what each branch adds by a tensor that is differentiated for, as the first stream is.

    Args:
        model: the network.
        connections: of `chain(model, example)`.
    """

    def __init__(self, model: nn.Module, connections: Iterable[WatchedConnection]) -> None:
        super().__init__(model, connections)
        self.forget()

    def start(self) -> None:
        self.forget()

    def operands(self, connection: WatchedConnection, skip: Tensor, branch: Tensor) -> tuple[Tensor, Tensor] | None:
        self.keep_first(skip)
        return self.keep_carried(skip), self.keep_cut(BranchCut.of(branch))

    def stream(self, connection: WatchedConnection, stream: Tensor) -> None:
        self.keep_last(stream)


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
        self.reads: dict[str, Tensor] = {}
        self.cuts: dict[str, BranchCut] = {}

    def __enter__(self) -> WatchedStreamCutter:
        super().__enter__()
        for name, tap in self.taps.reads.items():
            self.cleanup.callback(tap.hook(self.model, partial(self.keep_read, name)))
        for name, tap in self.taps.branches.items():
            self.cleanup.callback(tap.hook(self.model, partial(self.cut, name)))
        for tap, keep in ((self.taps.stem, self.keep_first), (self.taps.last, self.keep_last)):
            if tap is not None:
                self.cleanup.callback(tap.hook(self.model, keep))
        return self

    def keep_read(self, name: str, tensor: Tensor) -> None:
        self.reads[name] = copy_in_graph(tensor)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        self.cuts[name] = BranchCut.of(tensor)
        return self.cuts[name].given

    def operands(self, connection: WatchedConnection, skip: Tensor, branch: Tensor) -> tuple[Tensor, Tensor] | None:
        if connection.name not in self.taps.reads:
            return super().operands(connection, skip, branch)
        self.keep_first(skip)
        self.carried.append(self.reads[connection.name])
        self.keep_cut(self.cuts[connection.name])
        return None


class StreamCutter(PassRecord):
    """The same for connections of ours that carry several streams; what is carried is what a branch reads of them.

    Args:
        model: the network.
        connections: of `chain(model)`.
    """

    def __init__(self, model: nn.Module, connections: Iterable[Connection]) -> None:
        self.model, self.connections = unwrap(model), tuple(connections)
        self.hooks = ExitStack()
        self.forget()

    def __enter__(self) -> StreamCutter:
        self.forget()
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
        self.keep_carried(output[0])

    def cut(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.keep_cut(BranchCut.of(output))

    def leave(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.keep_last(output)


class JoinCutter(StreamCutter):
    """The same for connections of ours whose join is no addition; what is carried is the skip that it is given."""

    def __enter__(self) -> JoinCutter:
        self.forget()
        for connection in self.connections:
            join = connection.residual.join
            assert join is not None
            self.hooks.callback(join.register_forward_pre_hook(self.cut_branch).remove)
            self.hooks.callback(join.register_forward_hook(self.leave).remove)
        return self

    def cut_branch(self, module: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        skip, branch = args
        self.keep_first(skip)
        self.keep_carried(skip)
        return skip, self.keep_cut(BranchCut.of(branch))
