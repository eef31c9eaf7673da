"""Residual adds, the additions that are residual connections, and the reasons why others are none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from skipway.tracing.walks import Skip

__all__ = [
    "REASONS",
    "BranchScale",
    "NormPosition",
    "Reason",
    "Refusal",
    "ResidualAdd",
    "Skip",
    "StreamAxis",
    "StreamJoin",
]

NormPosition = Literal["pre", "inside", "end", "post"]
Reason = Literal[
    "constant",
    "attention",
    "activation",
    "difference",
    "broadcast",
    "hierarchical",
    "pyramid",
    "parallel",
    "rotary",
    "gated",
    "selected",
    "joined",
    "mixing",
    "scalar",
    "unrelated",
    "unknown",
]

REASONS: dict[Reason, str] = {
    "constant": "one side does not depend on the input, or only on which tokens are padding: a position embedding, a "
    "bias or a mask",
    "attention": "the sum goes into a softmax: a bias of attention scores",
    "activation": "the sides differ by elementwise operators alone: an activation that is written out, as GELU by tanh",
    "difference": "the carried side is subtracted: F(x) − x",
    "broadcast": "one side has fewer elements and is repeated, as a vector that is spread over positions",
    "hierarchical": "the sides read different channels or tokens of one tensor, as in Res2Net",
    "pyramid": "a sum across resolutions: the sides come from maps of different sizes",
    "parallel": "both sides do the same kind of work: parallel branches, neither of which carries the stream",
    "rotary": "neither side holds a map or a non-linearity, as in a rotary embedding, a token shift, or a step of a "
    "linear recurrence",
    "gated": "the carried side is multiplied by a gate that depends on the input, as in a Highway network or a GRU",
    "selected": "one side replaces the other at some positions, and nothing is added",
    "joined": "tensors that were stacked are summed, and with which weights cannot be told",
    "mixing": "both sides are the same streams, of which one is weighed: a part of what a connection over several "
    "streams carries",
    "scalar": "a sum of two numbers, such as parts of a loss",
    "unrelated": "neither side carries a tensor that the other was computed from",
    "unknown": "joins two signals of one shape, and whether it adds them is not known",
}


@dataclass(frozen=True)
class BranchScale:
    """A learned factor on the output of a branch, as in LayerScale or SkipInit.

    Args:
        parameters: the names of the parameters it is made of.
        per_channel: whether there is one factor for each channel, instead of one for all.
    """

    parameters: tuple[str, ...]
    per_channel: bool


@dataclass(frozen=True)
class StreamAxis:
    """Several streams in one tensor.

    Args:
        count: n.
        axis: that holds them, alone or together with something else; None where that could not be told.
        stride: positions along that axis from one stream to the next: 1 where they lie side by side, the size of what
            else the axis holds where they lie one after the other.
    """

    count: int
    axis: int | None
    stride: int


@dataclass(frozen=True)
class StreamJoin:
    """How a connection over several streams s'ⱼ = Σₖ Aⱼₖ sₖ + wⱼ F(x) reads, mixes and writes them.

    Args:
        axis: where the streams lie in the sum.
        channel: the axis of the sum that holds the channels of F; None where that could not be told.
        state: number of the value s in the program.
        read: of x, of which alone the branch is computed; the first of several equal ones.
        branch: of F(x), before it is written.
        normed: whether s passes a norm on the way to x.
    """

    axis: StreamAxis
    channel: int | None
    state: int
    read: int
    branch: int
    normed: bool


@dataclass(frozen=True)
class ResidualAdd:
    """An addition that is a residual connection: y = x + F(x), or with numbers a, b: y = a x + b F(x).

    Args:
        name: path of the module whose forward adds, with ":2" for its second connection.
        owner: that path alone.
        call: running number of the addition among those that Python calls; None where none did.
        term: the term of that addition that it adds, from 0: 1 unless more than two are added.
        skip_first: whether the skip is the first operand of the addition.
        weights: the numbers a and b; of a branch that is subtracted b = −1.
        skip: "identity" (x itself), "pooled" (x on fewer positions), "upsampled" (on more of
            them), "projection" (through linear maps or norms),
            "mixed" (streams, or fractions of one, weighed with each other), "read" (x is a sum of earlier outputs, and
            it is those that are carried on).
        carry: names of parameters that multiply the skip.
        shortcut: modules that own the linear maps and norms of the skip, in order.
        maps: modules that own the linear maps of the branch, in order; attention's queries and keys among them.
        path: those of the maps that follow one another from the skip to the sum, without the maps of gates that are
            smaller than what they multiply; none in attention, and where branches are added or joined.
        signal_maps: the same maps, also where branches are added or joined.
        modules: all modules that the branch runs in, in order.
        norms: positions of norms: "pre", "inside" or "end" of the branch, "post" after the sum.
        closing: the norm at the end of the branch, None where there is none or several are joined.
        last: the linear map that makes what the branch puts out, None where there is none or several are joined.
        ends: the closing norms or last maps of what is added: several where the branch is a sum of branches.
        scale: what multiplies the branch, None where nothing does.
        shape: of the sum.
        channel: the axis of the sum that holds its channels, as the weights say; None where none does.
        kind: what the branch does: "attention", "conv" or "mlp".
        inner: numbers of the sums of other connections within the branch.
        numbers: of the values skip, branch and sum in the program, and of the x that both were computed from.
        slots: whether a `Residual` of ours joins by more than an addition; skip, branch and sum are then what its slots
            shortcut, drop and post hand over, and no addition is numbered.
        streams: how several streams are read and written; None of one stream. The branch is then what stands between
            `streams.read` and `streams.branch`, and `numbers` tells of the sum itself.
    """

    name: str
    owner: str
    call: int | None
    term: int
    skip_first: bool
    weights: tuple[float, float]
    skip: Skip
    carry: tuple[str, ...]
    shortcut: tuple[str, ...]
    maps: tuple[str, ...]
    path: tuple[str, ...]
    signal_maps: tuple[str, ...]
    modules: tuple[str, ...]
    norms: tuple[NormPosition, ...]
    closing: str | None
    last: str | None
    ends: tuple[str, ...]
    scale: BranchScale | None
    shape: tuple[int, ...]
    channel: int | None
    kind: Literal["attention", "conv", "mlp"]
    inner: tuple[int, ...]
    numbers: tuple[int, int, int, int]
    streams: StreamJoin | None = None
    slots: bool = False

    @property
    def several(self) -> str:
        """The number of several streams, as it follows the kind of the skip."""
        return "" if self.streams is None else f" of {self.streams.axis.count} streams"

    @property
    def sign(self) -> int:
        """−1 where the branch is subtracted, else 1."""
        return -1 if self.weights[1] < 0 else 1


@dataclass(frozen=True)
class Refusal:
    """An addition, or what may be one, that is no residual connection.

    Args:
        owner: path of the module whose forward adds.
        reason: a key of `REASONS`, which says it in words.
        shape: of the sum.
        operator: the name of an operator that is not known.
    """

    owner: str
    reason: Reason
    shape: tuple[int, ...]
    operator: str = ""

    def __str__(self) -> str:
        operator = f"unknown operator {self.operator}: " if self.operator else ""
        return f"{self.owner or 'the model'}: {operator}{REASONS[self.reason]}"
