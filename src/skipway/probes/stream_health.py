"""`stream_health(model, example)`: what several streams amplify, how fast they become one, and how alike they are."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError, counted
from skipway.hardware.precision import widest
from skipway.nn import StreamEntry
from skipway.probes.mixing_matrix import SHOWN, as_inputs, differentiable
from skipway.probes.observer import Observer
from skipway.tracing import Example, as_example, call_model, preserved_state, unwrap
from skipway.tracing.chain import Connection, WatchedConnection, chain

__all__ = ["StreamHealth", "stream_health"]


@dataclass(frozen=True)
class StreamHealth:
    """The streams of a network at each connection s'ₖ = Σⱼ A[k, j] sⱼ + wₖ F(x).

    The forward gain of stream k is the sum of row k, the backward gain of stream j that of column j: what a gradient of
    1 on all streams comes back as. Where weights depend on the input, A is the local Jacobian, averaged over tokens.

    Args:
        names: of the connections measured, in order.
        mixing: A of each, (L, n, n).
        similarity: mean cosine between two streams behind each, (L,).
    """

    names: tuple[str, ...]
    mixing: Tensor = field(repr=False)
    similarity: Tensor = field(repr=False)

    @property
    def composite(self) -> Tensor:
        """A_l … A_1 for each l, (L, n, n)."""
        products = [self.mixing[0]]
        for matrix in self.mixing[1:]:
            products.append(matrix @ products[-1])
        return torch.stack(products)

    @property
    def forward_gain(self) -> Tensor:
        """Largest and smallest sum of a row of the product so far, (L, 2)."""
        return limits(self.composite.sum(2))

    @property
    def backward_gain(self) -> Tensor:
        """Largest and smallest sum of a column of the product so far, (L, 2)."""
        return limits(self.composite.sum(1))

    @property
    def difference(self) -> Tensor:
        """|λ₂| of the product so far, (L,): what is left of what streams differed by at the entry."""
        return torch.linalg.eigvals(self.composite).abs().sort(descending=True).values[:, 1]

    @property
    def response(self) -> Tensor:
        """Mean a (1 − a) over that of equal weights, (L,): 1 for equal weights, near 0 where a softmax is saturated and
        hardly learns; nan where A is the identity, or not made of shares.
        """
        count = self.mixing.shape[-1]
        shares = (self.mixing >= -1e-3).all(-1).all(-1) & ((self.mixing.sum(1) - 1).abs().amax(-1) < 0.1)
        shares &= (self.mixing - torch.eye(count)).abs().amax((1, 2)) > 1e-5
        found = (self.mixing * (1 - self.mixing)).mean((1, 2)) * count**2 / (count - 1)
        return torch.where(shares, found, math.nan)

    def __str__(self) -> str:
        width = max(24, *map(len, self.names))
        connections = counted(len(self.names), "connection")
        head = f"{connections} over {self.mixing.shape[-1]} streams, products of the mixing so far"
        columns = {"|λ₂|": self.difference, "cosine": self.similarity, "response": self.response}
        columns = {title: values for title, values in columns.items() if not values.isnan().all()}
        lines = [
            head,
            f"{'':{width}}  {'forward':>13}  {'backward':>13}" + "".join(f"  {title:>8}" for title in columns),
        ]
        step = max(1, math.ceil(len(self.names) / SHOWN))
        numbers = zip(*columns.values(), strict=True)
        for row, (name, rest) in enumerate(zip(self.names, numbers, strict=True)):
            if row % step == 0 or row == len(self.names) - 1:
                gains = (self.forward_gain[row], self.backward_gain[row])
                shown = "".join(f"  {high:6.3f} {low:6.3f}" for high, low in gains)
                lines.append(f"{name:{width}}{shown}" + "".join(f"  {float(each):8.3f}" for each in rest))
        return "\n".join(lines)


def limits(sums: Tensor) -> Tensor:
    """The largest and the smallest of each row."""
    return torch.stack((sums.amax(1), sums.amin(1)), dim=1)


def mixing_matrix(state: Tensor, carried: Tensor, streams: Any) -> Tensor:
    """A[k, j], the mean over all numbers of the derivative of carried stream k by stream j of the state.

    Args:
        state, carried: of one shape, the second computed from the first.
        streams: (tensor) → its streams, (n, …).
    """
    apart = streams(carried)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, apart.shape[1:], generator=generator, device="cpu").to(apart) * 2 - 1
    rows = []
    for each in apart:
        (found,) = torch.autograd.grad(each, state, signs, retain_graph=True, allow_unused=True)
        parts = streams(torch.zeros_like(state) if found is None else found)
        rows.append(widest((parts * signs).flatten(1)).mean(1))
    return torch.stack(rows)


def similarity(streams: Tensor) -> float:
    """The mean cosine between two of n streams, (n, …); 0 with one that is 0."""
    unit = torch.nn.functional.normalize(widest(streams.detach().flatten(1)), dim=1)
    cosines, count = unit @ unit.T, len(unit)
    return float((cosines.sum() - cosines.trace()) / (count * (count - 1)))


class StreamTap:
    """Measures connections of ours, whose streams lie one after the other in the batch axis."""

    def __init__(self, connections: list[Connection]) -> None:
        self.connections = connections
        self.mixing: dict[str, Tensor] = {}
        self.similarity: dict[str, float] = {}
        self.states: dict[str, Tensor] = {}

    def register(self, stack: ExitStack) -> None:
        for each in self.connections:
            assert each.residual.streams is not None
            name, module = each.name, each.residual.streams
            stack.callback(module.register_forward_pre_hook(lambda _, args, name=name: self.cut(name, args)).remove)
            stack.callback(module.register_forward_hook(lambda m, _, out, name=name: self.read(name, m, out)).remove)
            stack.callback(each.residual.register_forward_hook(lambda m, _, y, name=name: self.end(name, m, y)).remove)

    def cut(self, name: str, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.states[name] = args[0].detach().requires_grad_()
        return self.states[name], *args[1:]

    def read(self, name: str, module: Any, output: Any) -> None:
        self.mixing[name] = mixing_matrix(self.states[name], output[1], lambda x: x.unflatten(0, (module.count, -1)))

    def end(self, name: str, residual: Any, y: Tensor) -> None:
        self.similarity[name] = similarity(y.unflatten(0, (residual.streams.count, -1)))


class StreamObserver(Observer):
    """Measures connections of others, from the state that the connection before left behind."""

    def __init__(self, model: nn.Module, connections: list[WatchedConnection]) -> None:
        super().__init__(model, connections)
        self.mixing: dict[str, Tensor] = {}
        self.similarity: dict[str, float] = {}
        self.state: Tensor | None = None

    def streams(self, connection: WatchedConnection, x: Tensor) -> Tensor:
        assert connection.seen.streams is not None
        held = connection.seen.streams.axis
        assert held.axis is not None
        return x.movedim(held.axis, 0).unflatten(0, (-1, held.count, held.stride)).movedim(1, 0)

    def operands(self, connection: WatchedConnection, skip: Tensor, branch: Tensor) -> None:
        if self.state is not None and self.state.shape == skip.shape and skip.requires_grad:
            with self.paused():
                self.mixing[connection.name] = mixing_matrix(self.state, skip, lambda x: self.streams(connection, x))

    def stream(self, connection: WatchedConnection, stream: Tensor) -> None:
        self.state = stream
        with self.paused():
            self.similarity[connection.name] = similarity(self.streams(connection, stream))


def stream_health(model: nn.Module, example: Example) -> StreamHealth:
    """Measure the streams of a network that carries several, ours or anybody's; the model is left unchanged.

    One forward pass, and n products with the Jacobian of each connection alone. In a network of others the first
    connection has no state that an earlier one left, and is not measured.

    Args:
        model: any module with connections over one number n > 1 of streams.
        example: what it is called with.

    Raises:
        SkipwayError: no connection carries several streams.

    Source: Xie et al. 2025, "mHC", sec. 3 and fig. 3, for the gains; Zhu et al. 2025, "Hyper-Connections".

    >>> import skipway as sw
    >>> model = sw.build("vit-tiny-16", scheme="mhc(n=2)", depth=1, dim=8, heads=2, patch=4, image=8, classes=2)
    >>> health = stream_health(model, torch.randn(2, 3, 8, 8))
    >>> health.forward_gain.round(decimals=2).tolist()[-1]
    [1.0, 1.0]
    """
    example = as_example(example)
    model = unwrap(model)
    with preserved_state(model), differentiable(model), torch.enable_grad(), ExitStack() as stack:
        model.eval()
        tap: StreamTap | StreamObserver
        ours = chain(model) if any(isinstance(each, StreamEntry) for each in model.modules()) else ()
        own = [each for each in ours if each.residual.streams is not None and each.residual.streams.count > 1]
        if own:
            tap = StreamTap(own)
            tap.register(stack)
        else:
            several = (each for each in chain(model, example) if each.seen.streams is not None)
            found = [each for each in several if each.seen.streams and each.seen.streams.axis.axis is not None]
            tap = stack.enter_context(StreamObserver(model, found))
        call_model(model, as_inputs(example))
    names = tuple(name for name in tap.mixing if tap.mixing[name].shape == next(iter(tap.mixing.values())).shape)
    if not names:
        raise SkipwayError(
            f"{type(model).__name__} has no connections that carry several streams from one to the next, so there is "
            "nothing to measure; probe(model, example) measures one stream"
        )
    matrices = torch.stack([tap.mixing[name] for name in names])
    return StreamHealth(names, matrices, torch.tensor([tap.similarity[name] for name in names]))
