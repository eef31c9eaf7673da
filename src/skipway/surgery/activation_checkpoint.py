"""`checkpointed(model, example, segments)`: blocks of anybody's network computed again in the backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skipway.errors import SkipwayError
from skipway.registry import Registry, parse_spec
from skipway.surgery.block_rows import Chained, plain, rows_of
from skipway.surgery.operation import Operation
from skipway.surgery.preconditions import admitted
from skipway.surgery.recompute import Draws, Parts, replaying, statistics_kept
from skipway.surgery.saved_tensors import Costs, costs_of, saved_bytes
from skipway.surgery.verification import difference, outputs
from skipway.tracing import Example, watch

__all__ = ["Budget", "Every", "Segments", "SquareRoot", "checkpointed"]

Row = Sequence[Costs]

SEGMENTS: Registry[type[Segments]] = Registry("segments")


class Segments:
    """Which blocks are computed again, and which of them together."""

    def cut(self, rows: Sequence[Row], rest: float) -> list[list[str]]:
        """The segments, each the names of blocks that follow one another; a block in none keeps what it computes.

        Args:
            rows: what each block keeps, in rows that follow one another directly, in the order of the signal.
            rest: bytes that are kept outside of the blocks.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Every(Segments):
    """Each `blocks` blocks are a segment: L/blocks inputs are kept, and the inside of one segment at a time.

    >>> Every(2).cut([[Costs("a", 8, 1), Costs("b", 8, 1), Costs("c", 8, 1)]], 0)
    [['a', 'b'], ['c']]
    """

    blocks: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, int) or self.blocks < 1:
            raise SkipwayError(f"blocks={self.blocks!r}: a segment holds a whole number of blocks, 1 at least")

    def cut(self, rows: Sequence[Row], rest: float) -> list[list[str]]:
        return [names(piece) for row in rows for piece in pieces(row, self.blocks)]


@dataclass(frozen=True)
class SquareRoot(Segments):
    """Segments of √(L g/a) blocks in a row of L, which keep g bytes of input and a bytes inside: what is kept at most,
    (L/n) g + n a for segments of n, is then least, 2 √(L g a) (Chen et al. 2016, https://arxiv.org/abs/1604.06174,
    sec. 4.1). The last segment, which the backward pass meets first, keeps what it computes: that costs no byte.

    >>> row = [Costs(str(number), 4, 4) for number in range(9)]
    >>> SquareRoot().cut([row], 0)
    [['0', '1', '2'], ['3', '4', '5']]
    """

    def cut(self, rows: Sequence[Row], rest: float) -> list[list[str]]:
        return [names(piece) for row in rows for piece in pieces(row, self.length(row))][:-1]

    def length(self, row: Row) -> int:
        given, inside = sum(block.given for block in row), sum(block.inside for block in row)
        return min(len(row), max(1, round(math.sqrt(len(row) * given / max(inside, 1)))))


@dataclass(frozen=True)
class Budget(Segments):
    """As few blocks as possible are computed again, so that no more than `bytes` are kept at any time of a pass over
    the example: at the end of the forward pass, and while a segment is computed again.

    The first blocks are, in segments, and the last ones keep what they compute: the backward pass has freed that when
    it comes to the first segment, so that the room is used twice.

    Args:
        bytes: what autograd may keep, parameters not counted; of the whole model, on a batch as large as the example.

    >>> row = [Costs(str(number), 10, 1) for number in range(4)]
    >>> Budget(40).cut([row], 0), Budget(22).cut([row], 0), Budget(13).cut([row], 0)
    ([], [['0', '1']], [['0'], ['1'], ['2']])
    """

    bytes: float

    def __post_init__(self) -> None:
        if not self.bytes > 0:
            raise SkipwayError(f"bytes={self.bytes!r}: a budget has to be above 0")

    def cut(self, rows: Sequence[Row], rest: float) -> list[list[str]]:
        blocks = [block for row in rows for block in row]
        room = self.bytes - rest
        if sum(block.inside for block in blocks) <= room:
            return []
        plans = [plan(rows, room, most) for most in caps(blocks)]
        found = [each for each in plans if each.peak <= room]
        if not found:
            least = min(each.peak for each in plans) + rest
            raise SkipwayError(
                f"bytes={self.bytes:.4g}: with any choice of segments {least:.4g} bytes are kept at some time of a "
                "pass over this example; give that much, or a smaller batch"
            )
        best = min(found, key=lambda each: (sum(map(len, each.segments)), each.peak))
        return [names(segment) for segment in best.segments]


for kind in (Every, SquareRoot, Budget):
    SEGMENTS.add(kind.__name__.lower(), kind)


@dataclass(frozen=True)
class Plan:
    """Segments and the most bytes that are kept with them."""

    segments: list[Row]
    peak: float


def caps(blocks: Row) -> list[float]:
    """How much a segment may hold inside: tried in steps of a twelfth from one block to all."""
    least, most = max(block.inside for block in blocks), sum(block.inside for block in blocks)
    steps = max(1, math.ceil(math.log(max(most / max(least, 1), 1)) / math.log(13 / 12)))
    return [least * (most / max(least, 1)) ** (step / steps) for step in range(steps + 1)]


def plan(rows: Sequence[Row], room: float, most: float) -> Plan:
    """Segments of at most `most` bytes inside, of which the last blocks are let off as far as there is room."""
    segments = [piece for row in rows for piece in filled(row, most)]
    kept, let_off = 0.0, 0
    inputs = sum(segment[0].given for segment in segments)
    for segment in reversed(segments):
        inside = sum(block.inside for block in segment)
        if kept + inside + inputs - segment[0].given > room:
            break
        kept, inputs, let_off = kept + inside, inputs - segment[0].given, let_off + 1
    segments = segments[: len(segments) - let_off]
    if segments:  # of the segment where the room ends, the last blocks
        spare = room - kept - inputs
        inside = list(accumulate(block.inside for block in reversed(segments[-1][1:])))
        off = sum(total <= spare for total in inside)
        kept += inside[off - 1] if off else 0.0
        segments[-1] = segments[-1][: len(segments[-1]) - off]
    widest = max((sum(block.inside for block in segment) for segment in segments), default=0.0)
    return Plan(segments, inputs + max(kept, widest))


def filled(row: Row, most: float) -> Iterator[Row]:
    """A row cut where the blocks' insides fill `most` bytes."""
    start, held = 0, 0.0
    for number, block in enumerate(row):
        if number > start and held + block.inside > most:
            yield row[start:number]
            start, held = number, 0.0
        held += block.inside
    yield row[start:]


def pieces(row: Row, length: int) -> Iterator[Row]:
    return (row[start : start + length] for start in range(0, len(row), length))


def names(blocks: Row) -> list[str]:
    return [block.name for block in blocks]


def read_segments(given: Segments | str | int) -> Segments:
    """The object itself, its spec string, or a number of blocks.

    >>> read_segments(8), read_segments("squareroot"), read_segments("budget(1e9)")
    (Every(blocks=8), SquareRoot(), Budget(bytes=1000000000.0))
    """
    if isinstance(given, Segments):
        return given
    return Every(given) if isinstance(given, int) else parse_spec(given, SEGMENTS.__getitem__)


def checkpointed(model: nn.Module, example: Example, segments: Segments | str | int = 1) -> Operation:
    """Keep the inputs of segments of blocks and compute their inside again in the backward pass (Chen et al. 2016,
    https://arxiv.org/abs/1604.06174), for anybody's blocks, in place. The network computes what it did.

    Random numbers are the same in both computations, running statistics are updated once (P22), autocast is what it
    was. Without gradients, in evaluation say, every block runs by itself as before. With them a segment runs within its
    first block: forward hooks of the blocks themselves see the segment's input and output, those of their parts see
    both computations, and a block of a longer segment cannot be called alone.

    Args:
        model: any module that `chain` can read.
        example: what the model is called with; bytes are measured on it, in training mode.
        segments: which blocks are computed again, and together: `Every(n)` or n; `SquareRoot()`, `"squareroot"`;
            `Budget(bytes)`, `"budget(2e9)"`.

    Shapes: as the blocks': each takes and puts out one tensor of one shape.

    Returns:
        the operation: `touched` holds the segments by their first blocks, `refused` the blocks that could not be
        taken; the report the bytes that one training pass keeps for the backward pass, before and after, and the most
        that are kept at any time, when the largest segment is computed again.

    Raises:
        SkipwayError: the model has no block that carries x itself, or no choice of segments fits into the budget.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    >>> operation = checkpointed(model, torch.randn(2, 3, 8), 3)
    >>> operation.touched
    {'layers.0': 'computed again with layers.1, layers.2', 'layers.3': 'computed again with layers.4, layers.5'}
    >>> operation.report["bytes after"] < 0.1 * operation.report["bytes before"]
    True
    """
    chosen = read_segments(segments)
    model = admitted(model)
    rows, reasons = rows_of(model, example, watch(model, example))
    member = {name for row in rows for name in row}
    if not member:
        raise SkipwayError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    kept, costs = costs_of(model, example, member)
    before = outputs(model, example)
    cut = chosen.cut([[costs[name] for name in row] for row in rows], kept - sum(c.inside for c in costs.values()))
    title = f"{type(model).__name__} computes {sum(map(len, cut))} blocks again, in {len(cut)} segments"
    refused = {name: reason for name, reason in reasons.items() if name not in member}
    operation = Operation(model, title, {}, refused, {})
    try:
        recent = Recent()
        for segment in cut:
            operation.steps += Segment([model.get_submodule(name) for name in segment], recent).install()
        after = saved_bytes(model, example)
        operation.report = {
            "difference": difference(before, outputs(model, example)),
            "bytes before": kept,
            "bytes after": after,
            "bytes at most": most_bytes(cut, costs, after),
        }
    except BaseException:
        operation.undo()
        raise
    operation.touched = {
        first: "computed again" + (f" with {', '.join(others)}" if others else "") for first, *others in cut
    }
    return operation


def most_bytes(cut: Sequence[Sequence[str]], costs: dict[str, Costs], after: float) -> float:
    """The most that is kept at any time: as the backward pass comes to a segment, all that was kept behind is free."""
    again = {name for segment in cut for name in segment}
    behind = freed = 0.0
    peak = after
    number = {name: index for index, segment in enumerate(cut) for name in segment}
    for name in reversed(costs):
        if name not in again:
            behind += costs[name].inside
            continue
        segment = cut[number[name]]
        if name == segment[0]:
            peak = max(peak, after - behind - freed + sum(costs[each].inside for each in segment))
            freed += costs[name].given
    return peak


@dataclass
class Recent:
    """The last state of the random numbers that was kept: segments between which nothing is drawn share it."""

    draws: Draws | None = None

    def now(self, x: Tensor) -> Draws:
        self.draws = Draws.now(x, self.draws)
        return self.draws


@dataclass
class Segment(Chained):
    """Blocks whose inside is computed again in the backward pass, all of them together.

    Args:
        recent: shared by all segments of a model.
    """

    word = "part of a segment that is computed again"

    recent: Recent = field(default_factory=Recent, repr=False)

    def __post_init__(self) -> None:
        self.parts = [Parts(block) for block in self.blocks]

    def now(self) -> bool:
        return torch.is_grad_enabled()

    def sealed(self) -> str | None:
        return None  # every other operation sees the blocks one by one: they are looked at without gradients

    def run(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler replays what was drawn, and writes into a buffer once
            return checkpoint(self.inside, x, others, named, None, use_reentrant=False)
        draws = self.recent.now(x)
        return checkpoint(self.inside, x, others, named, draws, use_reentrant=False, preserve_rng_state=False)

    def inside(self, x: Tensor, others: Sequence[Any], named: dict[str, Any], draws: Draws | None) -> Tensor:
        if draws is None or torch._C._current_graph_task_id() == -1:  # not within a backward pass
            return self.all(x, others, named)
        for parts in self.parts:
            parts.refresh()
        with replaying(draws), statistics_kept([module for parts in self.parts for module in parts.writers()]):
            return self.all(x, others, named)

    def all(self, x: Tensor, others: Sequence[Any], named: dict[str, Any]) -> Tensor:
        for block in self.blocks:
            x = plain(block, x, others, named)
        return x
