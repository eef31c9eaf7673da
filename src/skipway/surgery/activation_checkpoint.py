"""`checkpointed(model, example, segments)`: activation checkpointing of anybody's blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from skipway.errors import SkipwayError, counted
from skipway.registry import Registry, parse_spec
from skipway.surgery.block_rows import BlockRow, find_block_rows, run_alone
from skipway.surgery.checks import EQUAL
from skipway.surgery.operation import Operation, abbreviate
from skipway.surgery.padded_batch import padded_example
from skipway.surgery.preconditions import require_values
from skipway.surgery.recompute import BlockParts, KeptBuffer, RandomState, buffers_kept, replaying
from skipway.surgery.saved_tensors import Costs, costs_of, saved_bytes
from skipway.surgery.side_effects import attributes_kept, copy_state
from skipway.surgery.training_pass import training_gradients
from skipway.surgery.transaction import transaction
from skipway.surgery.verification import difference
from skipway.tracing import Example, as_example, watch
from skipway.tracing.arguments import item_at
from skipway.validation import check_call, check_rule, check_whole, is_real, is_whole

__all__ = ["Budget", "Every", "Segments", "SquareRoot", "checkpointed"]

ROUNDING = 1e-3
"""Difference between two computations of a block, relative to its largest value, that rounding may make."""
RowCosts = Sequence[Costs]

TOLERANCE = 1e-5
"""Bound on the relative difference of outputs: in some modes torch computes a part of a block by another kernel."""

SEGMENTS: Registry[type[Segments]] = Registry("segments")


class Segments:
    """A choice of the blocks that are recomputed, and of those that are recomputed together."""

    def cut(self, rows: Sequence[RowCosts], rest: float) -> list[list[str]]:
        """Return segments, each the names of blocks that follow one another; a block in none keeps what it computes.

        Args:
            rows: the costs of each block, in rows that follow one another directly, in the order of the signal.
            rest: bytes that are kept outside of the blocks.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Every(Segments):
    """Segments of `blocks` blocks: L/blocks inputs are kept, and the inside of one segment at a time.

    >>> Every(2).cut([[Costs("a", 8, 1), Costs("b", 8, 1), Costs("c", 8, 1)]], 0)
    [['a', 'b'], ['c']]
    """

    blocks: int = 1

    def __post_init__(self) -> None:
        check_whole("blocks", self.blocks, 1, of="blocks per segment")

    def cut(self, rows: Sequence[RowCosts], rest: float) -> list[list[str]]:
        return [names(piece) for row in rows for piece in pieces(row, self.blocks)]


@dataclass(frozen=True)
class SquareRoot(Segments):
    """Segments of √(L g/a) blocks in a row of L, where each block keeps g bytes of input and a bytes inside: the peak,
    (L/n) g + n a for segments of n, is then smallest, 2 √(L g a) (Chen et al. 2016, https://arxiv.org/abs/1604.06174,
    sec. 4.1). The last segment, which the backward pass meets first, keeps what it computes: that costs no byte.

    >>> row = [Costs(str(number), 4, 4) for number in range(9)]
    >>> SquareRoot().cut([row], 0)
    [['0', '1', '2'], ['3', '4', '5']]
    """

    def cut(self, rows: Sequence[RowCosts], rest: float) -> list[list[str]]:
        return [names(piece) for row in rows for piece in pieces(row, self.length(row))][:-1]

    def length(self, row: RowCosts) -> int:
        given, inside = sum(block.given for block in row), sum(block.inside for block in row)
        return min(len(row), max(1, round(math.sqrt(len(row) * given / max(inside, 1)))))


@dataclass(frozen=True)
class Budget(Segments):
    """As few blocks as possible are recomputed, so that no more than `bytes` are kept at any time of a pass over the
    example: at the end of the forward pass, and while a segment is recomputed.

    The first blocks are recomputed, in segments, and the last ones keep what they compute: the backward pass has freed
    that when it comes to the first segment, so that the room is used twice.

    Args:
        bytes: bytes that autograd may keep, parameters not counted; of the whole model, on a batch as large as the
            example.

    >>> row = [Costs(str(number), 10, 1) for number in range(4)]
    >>> Budget(40).cut([row], 0), Budget(22).cut([row], 0), Budget(13).cut([row], 0)
    ([], [['0', '1']], [['0'], ['1'], ['2']])
    """

    bytes: float

    def __post_init__(self) -> None:
        fits = is_real(self.bytes, 0) and self.bytes != 0
        check_rule("bytes", self.bytes, fits, "a number above 0")

    def cut(self, rows: Sequence[RowCosts], rest: float) -> list[list[str]]:
        blocks = [block for row in rows for block in row]
        room = self.bytes - rest
        if sum(block.inside for block in blocks) <= room:
            return []
        plans = [plan_segments(rows, room, most) for most in caps(blocks)]
        fitting = [each for each in plans if each.peak <= room]
        if not fitting:
            least = min(each.peak for each in plans) + rest
            raise SkipwayError(
                f"bytes={self.bytes:.4g}: with any choice of segments {least:.4g} bytes are kept at some time of a "
                "pass over this example; give that much, or a smaller batch"
            )
        best = min(fitting, key=lambda each: (sum(map(len, each.segments)), each.peak))
        return [names(segment) for segment in best.segments]


for kind in (Every, SquareRoot, Budget):
    SEGMENTS.add(kind.__name__.lower(), kind)


@dataclass(frozen=True)
class SegmentPlan:
    """Segments and the most bytes that are kept with them."""

    segments: list[RowCosts]
    peak: float


def caps(blocks: RowCosts) -> list[float]:
    """Bounds on the bytes inside of a segment that are tried, in steps of a twelfth from one block to all."""
    least, most = max(block.inside for block in blocks), sum(block.inside for block in blocks)
    steps = max(1, math.ceil(math.log(max(most / max(least, 1), 1)) / math.log(13 / 12)))
    return [least * (most / max(least, 1)) ** (step / steps) for step in range(steps + 1)]


def plan_segments(rows: Sequence[RowCosts], room: float, most: float) -> SegmentPlan:
    """Segments of at most `most` bytes inside; the last blocks are not recomputed as far as there is room."""
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
    return SegmentPlan(segments, inputs + max(kept, widest))


def filled(row: RowCosts, most: float) -> Iterator[RowCosts]:
    """A row cut where the blocks' insides fill `most` bytes."""
    start, held = 0, 0.0
    for number, block in enumerate(row):
        if number > start and held + block.inside > most:
            yield row[start:number]
            start, held = number, 0.0
        held += block.inside
    yield row[start:]


def pieces(row: RowCosts, length: int) -> Iterator[RowCosts]:
    """A row cut into pieces of a length."""
    return (row[start : start + length] for start in range(0, len(row), length))


def names(blocks: RowCosts) -> list[str]:
    """Paths of blocks."""
    return [block.name for block in blocks]


def read_segments(given: Segments | str | int) -> Segments:
    """The object itself, its spec string, or a number of blocks.

    >>> read_segments(8), read_segments("squareroot"), read_segments("budget(1e9)")
    (Every(blocks=8), SquareRoot(), Budget(bytes=1000000000.0))
    """
    if isinstance(given, Segments):
        return given
    rule = 'a number of blocks, Every(n), SquareRoot(), Budget(bytes), or a spec string, "every(2)" for example'
    check_rule("segments", given, isinstance(given, str) or is_whole(given, 1), rule)
    return parse_spec(given, SEGMENTS.__getitem__) if isinstance(given, str) else Every(int(given))


@check_call
def checkpointed(model: nn.Module, example: Example, segments: Segments | str | int = 1) -> Operation:
    """Recompute the inside of segments of blocks in the backward pass, of which only the inputs are kept (Chen et al.
    2016, https://arxiv.org/abs/1604.06174), for anybody's blocks, in place. The network computes what it did.

    Random numbers are the same in both computations, running statistics are updated once (P22), autocast is what it
    was. What blocks write into, caches and their own attributes, is written into once: the second computation gets
    copies of them as they were before the first. Without gradients, in evaluation for example, every block runs by
    itself as before. With gradients a segment runs within its first block: forward hooks of the blocks themselves see
    the segment's input and output, those of their parts see both computations, and a block of a longer segment cannot
    be called alone.

    Args:
        model: any module that `chain` can read.
        example: what the model is called with; bytes are measured on it, in training mode.
        segments: which blocks are recomputed, and together: `Every(n)` or n; `SquareRoot()`, `"squareroot"`;
            `Budget(bytes)`, `"budget(2e9)"`.

    Shapes: as the blocks', whatever they are given and return beside x; a block that computes more than x, attention
    weights say, ends a segment.

    Returns:
        the operation: `touched` holds the segments by their first blocks, `refused` the blocks that could not be
        taken; the report the bytes that one training pass keeps for the backward pass, before and after, and the most
        that are kept at any time, when the largest segment is recomputed.

    Raises:
        SkipwayError: the model has no block that carries x itself, no choice of segments fits into the budget, or a
            block does not compute the same again; the model is as before.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    >>> operation = checkpointed(model, torch.randn(2, 3, 8), segments=3)
    >>> dict(operation.touched)
    {'layers.0': 'computed again with layers.1, layers.2', 'layers.3': 'computed again with layers.4, layers.5'}
    >>> operation.report["bytes after"] < 0.1 * operation.report["bytes before"]
    True
    """
    model, example = require_values(model, "checkpointed"), as_example(example)
    choice = read_segments(segments)
    rows, reasons, survey = find_block_rows(model, example, watch(model, example))
    members = {name for row in rows for name in row}
    if not members:
        raise SkipwayError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    kept, costs = costs_of(model, example, {name: survey.calls[name] for name in members})
    if skipped := sorted(members - costs.keys()):
        raise SkipwayError(
            f"{abbreviate(skipped)} did not run in a training pass: the network skips blocks at random, and "
            "blocks that are computed again have to run in every pass; set the rate of its LayerDrop to 0"
        )
    cut = choice.cut([[costs[name] for name in row] for row in rows], kept - sum(c.inside for c in costs.values()))
    again = counted(sum(map(len, cut)), "block")
    title = f"{type(model).__name__} computes {again} again, in {counted(len(cut), 'segment')}"
    with transaction(model, example, title=title, tolerance=TOLERANCE, checks=EQUAL) as change:
        change.refused.update((name, reason) for name, reason in reasons.items() if name not in members)
        random_state = LastRandomState()
        installed = []
        for first, *others in cut:
            installed.append(CheckpointedRow.of(model, (first, *others), survey, random_state=random_state))
            installed[-1].install(change)
            change.touched[first] = "computed again" + (f" with {abbreviate(others)}" if others else "")
        check_recomputation(model, example, installed)
        after = saved_bytes(model, example)
        change.report = {
            "bytes before": kept,
            "bytes after": after,
            "bytes at most": peak_bytes(cut, costs, after),
        }
        return change.commit()


def check_recomputation(model: nn.Module, example: Example, rows: Sequence[CheckpointedRow]) -> None:
    """Run training passes, with and without padding, in which each segment compares what it computes again with what
    it computed.

    Raises:
        SkipwayError: they differ, or the pass fails; says with what.
    """
    for row in rows:
        row.compares = True
    try:
        with set_checkpoint_early_stop(False):  # it would stop before the output
            padded = padded_example(model, example)
            for each in [example] if padded is None else [example, padded]:
                training_gradients(model, each, "in which blocks are computed again")
    finally:
        for row in rows:
            row.compares, row.first_outputs = False, []


def peak_bytes(cut: Sequence[Sequence[str]], costs: dict[str, Costs], after: float) -> float:
    """The most bytes that are kept at any time: when the backward pass comes to a segment, all that was kept after the
    segment is free.
    """
    segment_of = {name: segment for segment in cut for name in segment}
    kept_after = freed = 0.0
    peak = after
    for name in reversed(costs):
        segment = segment_of.get(name)
        if segment is None:
            kept_after += costs[name].inside
        elif name == segment[0]:
            peak = max(peak, after - kept_after - freed + sum(costs[each].inside for each in segment))
            freed += costs[name].given
    return peak


@dataclass
class LastRandomState:
    """The random state that was kept last: segments between which nothing is drawn share it."""

    state: RandomState | None = None

    def now(self, x: Tensor) -> RandomState:
        """The state as it is now."""
        self.state = RandomState.now(x, self.state)
        return self.state


@dataclass
class Before:
    """What a segment finds in a forward pass, and has to find again when it is computed again.

    Args:
        computed: whether the segment was computed already. A forward pass may run within a backward pass, where the
            network is computed again as a whole, so that this alone tells a first computation from a later one.
    """

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    random: RandomState
    buffers: list[KeptBuffer]
    computed: bool = False


@dataclass
class CheckpointedRow(BlockRow):
    """Blocks whose inside is recomputed in the backward pass, all of them together.

    Args:
        random_state: shared by all segments of a model.
        compares: whether what is computed again is compared with what was computed first, `first_outputs`.
        writes: the buffers that blocks write into in training, known after the first pass: running statistics, the
            vectors of a spectral norm.
    """

    operation = "part of a segment that is computed again"

    random_state: LastRandomState = field(default_factory=LastRandomState, repr=False)
    compares: bool = False
    first_outputs: list[Tensor] = field(default_factory=list, repr=False)
    writes: list[tuple[nn.Module, str]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.parts = [BlockParts(block) for block in self.blocks]

    def active(self) -> bool:
        return torch.is_grad_enabled()

    def sealed(self) -> str | None:
        return None  # every other operation sees the blocks one by one: they are looked at without gradients

    def run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():  # the compiler replays random numbers, and writes into a buffer once
            return checkpoint(self.compute, x, args, kwargs, None, use_reentrant=False)
        before = Before(copy_state((args, kwargs)), self.random_state.now(x), self.written_buffers())
        output = checkpoint(self.compute, x, args, kwargs, before, use_reentrant=False, preserve_rng_state=False)
        if self.writes is None:
            self.writes = [(each.module, each.name) for each in before.buffers if each.changed()]
        return output

    def written_buffers(self) -> list[KeptBuffer]:
        """The buffers that blocks write into in training, as they are; all of them before the first pass."""
        if self.writes is None:
            modules = [module for parts in self.parts for module in parts.modules if module.training]
            return [KeptBuffer.of(module, name) for module in modules for name in module._buffers]
        return [KeptBuffer.of(module, name) for module, name in self.writes if module.training]

    def compute(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], before: Before | None) -> Any:
        """Run all blocks, the second time as they ran before: on what was there before they wrote into it."""
        if before is None or not before.computed:
            if before is not None:
                before.computed = True
            output = self.run_each(x, args, kwargs)
            if self.compares:
                self.first_outputs.append(self.stream_of(output))
            return output
        for parts in self.parts:
            parts.refresh()
        args, kwargs = copy_state(before.arguments)
        modules = [module for parts in self.parts for module in parts.modules]
        writers = [module for parts in self.parts for module in parts.writers()]
        with replaying(before.random), buffers_kept(writers), attributes_kept(modules):
            for buffer in before.buffers:
                buffer.put_back()
            output = self.run_each(x, args, kwargs)
        if self.compares and not any(same_values(self.stream_of(output), first) for first in self.first_outputs):
            raise SkipwayError("a block computes something else when it is computed again")
        return output

    def run_each(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one block after the other; the output of the last one."""
        output: Any = None
        for block, call in zip(self.blocks, self.calls, strict=True):
            output = run_alone(block, *call.given(args, kwargs, x))
            x = item_at(output, call.output)
        return output

    def stream_of(self, output: Any) -> Tensor:
        """What x became, in the output of the last block."""
        return item_at(output, self.calls[-1].output).detach()


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    return one.shape == other.shape and difference([other], [one]) <= ROUNDING
