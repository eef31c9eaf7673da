"""Earlier outputs in place of one stream: how a connection reads what came before it, and what it leaves behind.

The state is a tuple of tensors of one shape; a tensor alone is the state that has just begun. Sources are held, never
copied, so depth L keeps L tensors, as a stream of that many branches keeps for its gradient.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.nn.gain import Gain
from skipway.nn.initial import FanInNormal, Zeros
from skipway.nn.maps import Linear
from skipway.nn.role import Role
from skipway.nn.shortcut import Carry, Pad, Projection
from skipway.nn.stream_algebra import without_autocast
from skipway.nn.streams import StreamExit, Streams

__all__ = [
    "AttentionExit",
    "AttentionRead",
    "AttentionResidual",
    "DenseResidual",
    "DynamicDenseResidual",
    "History",
    "LastExit",
    "StemResidual",
    "ValueResidual",
]

State = Tensor | tuple[Tensor, ...]


def as_sources(s: State) -> tuple[Tensor, ...]:
    """The tensors of a state."""
    return (s,) if isinstance(s, Tensor) else tuple(s)


class History(Streams):
    """Abstract base: a connection that reads one tensor x of a state of earlier outputs, and carries x."""

    carries = True
    """Whether the branch is added to x; otherwise x is read again of what was left behind."""

    def __init__(self, spatial: int = 0) -> None:
        super().__init__(1, spatial)

    def start_neutral_(self, reads: int) -> None:
        """Nothing is changed: how a history starts is the scheme's choice, by default as a network with one stream."""

    def join(self, carried: Tensor, write: Any, f: Tensor) -> Any:
        return carried + f

    def sum_of(self, state: Any) -> Tensor:
        """The stream in what `join` returned."""
        return as_sources(state)[-1]


class AttentionRead(nn.Module):
    """x = Σᵢ aᵢ vᵢ, a = softmaxᵢ(wᵀ vᵢ / rms(vᵢ)), for each token or pixel over k sources (Kimi Team 2026, eq. 2-4).

    Args:
        dim: channels.
        spatial: axes after the channel axis.
        rescale: multiply by k, so that w = 0 gives the sum of the sources and not their mean.

    Decay and learning rate: w is not decayed, and starts at 0.

    Shapes: k times (N, …) → (N, …).

    >>> AttentionRead(1, spatial=0)((torch.tensor([[1.0]]), torch.tensor([[3.0]])))
    tensor([[4.]], grad_fn=<MulBackward0>)
    """

    role = Role("gain")
    epsilon = 1e-6

    def __init__(self, dim: int, *, spatial: int, rescale: bool = True) -> None:
        super().__init__()
        self.channel, self.rescale = -1 - spatial, rescale
        self.query = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        """w = 0: all sources weigh the same."""
        nn.init.zeros_(self.query)

    def forward(self, sources: tuple[Tensor, ...]) -> Tensor:
        if len(sources) == 1:
            return sources[0]
        weights = torch.stack([self.logit(source) for source in sources]).softmax(0).to(sources[0].dtype)
        x = weights[0] * sources[0]
        for weight, source in zip(weights[1:], sources[1:], strict=True):
            x = torch.addcmul(x, weight, source)
        return len(sources) * x if self.rescale else x

    def logit(self, source: Tensor) -> Tensor:
        """wᵀ v / rms(v), in float32 at least, with 1 in place of the channels; wᵀ v in the type of v."""
        wide = torch.promote_types(source.dtype, torch.float32)
        size = torch.linalg.vector_norm(source, dim=self.channel, keepdim=True, dtype=wide)
        rms = (size.square() / source.shape[self.channel] + self.epsilon).sqrt()
        product = without_autocast(torch.matmul, source.movedim(self.channel, -1), self.query.to(source.dtype))
        return product.unsqueeze(self.channel) / rms

    def extra_repr(self) -> str:
        return f"{len(self.query)}"


class AttentionResidual(History):
    """A connection that reads an `AttentionRead` of all earlier outputs and adds its branch to them as one more.

    Where shapes change, the read is projected, and the history begins again with that and the branch.

    Args:
        read: what reads the sources; None for the first connection, which has one.
        opens: whether the branch begins a block; otherwise it is added to the newest source (eq. 5 and 6).
        spatial: see `Streams`.
    """

    carries = False

    def __init__(self, read: AttentionRead | None, *, opens: bool = True, spatial: int = 0) -> None:
        super().__init__(spatial)
        self.read, self.opens = read, opens
        if read is not None and not read.rescale:
            self.neutral_limit = (
                "their mean is the sum of earlier outputs only behind a norm, up to its ε: rescale=True"
            )

    def forward(self, s: State) -> tuple[Tensor, Tensor, tuple[tuple[Tensor, ...], Tensor]]:
        sources = as_sources(s)
        x = sources[-1] if self.read is None else self.read(sources)
        return x, x, (sources, x)

    def admit(self, branch: nn.Module, shortcut: nn.Module, post: nn.Module) -> None:
        if not isinstance(shortcut, Carry | Pad | Projection):
            raise SkipwayError(
                f"{type(shortcut).__name__} changes the skip, but where earlier outputs are read there is none; leave "
                "out the scheme that places it"
            )
        if not isinstance(post, nn.Identity):
            raise SkipwayError(
                f"{type(post).__name__} follows the addition, but here nothing is added: earlier outputs stay apart; "
                "place norm and activation before the branch"
            )

    @torch.no_grad()
    def sum_of(self, state: State) -> Tensor:
        """The sum of the sources, apart from the graph: it is computed nowhere in the network."""
        return torch.stack(as_sources(state)).sum(0)

    def join(self, carried: Tensor, write: tuple[tuple[Tensor, ...], Tensor], f: Tensor) -> State:
        sources, x = write
        if carried is not x:
            return carried, f
        if self.opens or len(sources) == 1:
            return *sources, f
        return *sources[:-1], sources[-1] + f


class AttentionExit(StreamExit):
    """Close the history by an `AttentionRead`. Shapes: k times (N, …) → (N, …)."""

    def __init__(self, dim: int, *, spatial: int, rescale: bool = True) -> None:
        super().__init__(1)
        self.read = AttentionRead(dim, spatial=spatial, rescale=rescale)

    def forward(self, x: State) -> Tensor:
        return self.read(as_sources(x))

    def stream(self, s: State) -> Tensor:
        return torch.stack(as_sources(s)).sum(0)


class DenseResidual(History):
    """y = Σⱼ aⱼ Xⱼ after a block, X₀ the first stream, Xⱼ what block j made (Pagliardini et al. 2024, "DWA").

    The state is (X₀, …, X_l, y). At the start a is 1 for the newest and 0 for all others. Where shapes change, the
    state begins again with the projected stream.

    Args:
        reads: indices of the X that are mixed, the newest last; none where nothing is mixed.
        ends: whether a block ends here.
        spatial: see `Streams`.

    Decay and learning rate: not decayed, which would shrink the stream at every block.
    """

    role = Role("gain")

    def __init__(self, reads: tuple[int, ...], *, ends: bool = True, spatial: int = 0) -> None:
        super().__init__(spatial)
        self.reads, self.ends = reads, ends
        self.weights = nn.Parameter(torch.empty(len(reads))) if reads else None
        DenseResidual.reset_parameters(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """a = (0, …, 0, 1)."""
        if self.weights is not None:
            self.weights.zero_()[-1] = 1

    def forward(self, s: State) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        return (s, s, (s,)) if isinstance(s, Tensor) else (s[-1], s[-1], s[:-1])

    def keep(self, write: tuple[Tensor, ...], skip: Tensor, y: Tensor) -> State:
        if y.shape != write[0].shape:
            return skip, y, y
        if not self.ends:
            return *write, y
        return *write, y, self.mix((*write, y)) if self.reads else y

    def mix(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """Σⱼ aⱼ Xⱼ."""
        weights = self.weigh(outputs[-1])
        y = weights[0] * outputs[self.reads[0]]
        for weight, index in zip(weights[1:], self.reads[1:], strict=True):
            y = torch.addcmul(y, weight, outputs[index])
        return y

    def weigh(self, newest: Tensor) -> tuple[Tensor, ...]:
        """a, one number for each X that is read."""
        assert self.weights is not None
        return self.weights.to(newest.dtype).unbind()

    def extra_repr(self) -> str:
        return f"reads={self.reads}"


class DynamicDenseResidual(DenseResidual):
    """A `DenseResidual` whose weights depend on each token or pixel: A = gelu(rms(X_l) W₁) W₂ + a (Xiao et al. 2025,
    eq. 5 and 6). At the start W₂ = 0.

    Args:
        reads, ends, spatial: see `DenseResidual`.
        dim: channels.

    Decay and learning rate: W₁ and W₂ are decayed, a is not.
    """

    def __init__(self, reads: tuple[int, ...], *, dim: int, ends: bool = True, spatial: int = 0) -> None:
        super().__init__(reads, ends=ends, spatial=spatial)
        width = len(reads)
        self.hidden = Linear(dim, width, bias=False, initial=FanInNormal()) if reads else None
        self.out = Linear(width, width, bias=False, initial=Zeros()) if reads else None

    def weigh(self, newest: Tensor) -> tuple[Tensor, ...]:
        assert self.hidden is not None
        assert self.out is not None
        assert self.weights is not None
        x = newest.movedim(self.channel, -1)
        weights = self.out(F.gelu(self.hidden(F.rms_norm(x, x.shape[-1:])))) + self.weights
        return tuple(each.unsqueeze(self.channel) for each in weights.to(newest.dtype).unbind(-1))


class LastExit(StreamExit):
    """Close the history: its last tensor."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: State) -> Tensor:
        return x if isinstance(x, Tensor) else x[-1]

    def stream(self, s: State) -> Tensor:
        return self(s)


class StemResidual(History):
    """x = r x + m x₀ before a block, x₀ the first stream: two learned numbers. The state is (x₀, x).

    Args:
        carry: r at the start.
        stem: m at the start.
        mixes: whether a block begins here.
        spatial: see `Streams`.

    Decay and learning rate: none is decayed; r, which multiplies once a block, learns at a hundredth of the rate.
    """

    def __init__(self, carry: float, stem: float, *, mixes: bool = True, spatial: int = 0) -> None:
        super().__init__(spatial)
        self.carry = Gain(init=carry, role=Role("gain", rate=0.01)) if mixes else None
        self.stem = Gain(init=stem) if mixes else None

    def forward(self, s: State) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        first, x = (s, s) if isinstance(s, Tensor) else s
        if self.carry is not None and self.stem is not None:
            x = torch.addcmul(self.carry(x), self.stem.gain.to(x.dtype), first)
        return x, x, (first,)

    def keep(self, write: tuple[Tensor, ...], skip: Tensor, y: Tensor) -> State:
        return (*write, y) if y.shape == write[0].shape else y


class ValueResidual(History):
    """v = λ₁ v₁ + λ₂ v in every attention but the first, v₁ the values of the first. The state is (v₁, x).

    Args:
        first: λ₁ at the start; λ₂ starts at 1 - λ₁.
        mixes: whether the branch is an attention behind another.
        spatial: see `Streams`.

    Decay and learning rate: not decayed.
    """

    def __init__(self, first: float, *, attends: bool, mixes: bool, spatial: int = 0) -> None:
        super().__init__(spatial)
        self.attends = attends
        self.first = Gain(init=first) if mixes else None
        self.own = Gain(init=1 - first) if mixes else None

    def forward(self, s: State) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        return (s, s, ()) if isinstance(s, Tensor) else (s[-1], s[-1], s[:-1])

    def admit(self, branch: nn.Module, shortcut: nn.Module, post: nn.Module) -> None:
        if self.attends and "mixed" not in inspect.signature(branch.forward).parameters:
            raise SkipwayError(
                f"{type(branch).__name__} takes no values of another attention, whose windows hold other tokens; the "
                "attention of ViT and CaiT does"
            )

    def call(self, branch: nn.Module, h: Tensor, write: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not self.attends:
            return branch(h), write
        values: list[Tensor] = []

        def mixed(v: Tensor) -> Tensor:
            values.append(write[0] if write else v)
            return v if self.first is None or self.own is None else self.first(values[0]) + self.own(v)

        return branch(h, mixed), tuple(values)

    def keep(self, write: tuple[Tensor, ...], skip: Tensor, y: Tensor) -> State:
        return *write, y
