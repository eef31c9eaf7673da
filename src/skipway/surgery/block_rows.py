"""Rows of blocks in anybody's network that are run as one, for `checkpointed` and `reversible`.

The first block of a row holds the object that runs all of them as its attribute `block_row`, and the others return
what they are given. Modules, names and keys stay what they were, so any container that calls its blocks one after the
other, a `Sequential` or a loop in somebody's forward, runs the row without knowing of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from skipway.errors import SkipwayError
from skipway.surgery.block_call import BlockCall
from skipway.surgery.block_survey import BlockSurvey, mixing_connections, require_blocks
from skipway.surgery.call_recorder import CallRecorder
from skipway.surgery.class_factory import class_factory
from skipway.surgery.padded_batch import padded_example
from skipway.surgery.preconditions import SEALED
from skipway.surgery.transaction import Transaction
from skipway.tracing import Example, Program
from skipway.tracing.arguments import item_at, path_text

R = TypeVar("R", bound="BlockRow")

__all__ = ["BlockRow", "block_readers", "direct_row_end", "find_block_rows", "run_alone"]


RECOMPUTED = (
    "torch.utils.checkpoint.checkpoint, called in the network's own forward, recomputes the activations of such blocks"
)


def find_block_rows(
    model: nn.Module, example: Example, program: Program
) -> tuple[list[list[str]], dict[str, str], BlockSurvey]:
    """Return blocks in rows that follow one another directly, a lone block in a row of its own; why a row ends, or why
    a block is in none, by the block's name; and all blocks.
    """
    try:
        survey = require_blocks(model, example, program)
    except SkipwayError as problem:
        if mixing_connections(model):
            raise SkipwayError(f"{problem}; {RECOMPUTED}") from problem
        raise
    passes = [survey.others]
    if (padded := padded_example(model, example)) is not None:
        recorder = CallRecorder(survey.calls)
        recorder.watch(model, padded)
        passes.append(recorder.others)
    calls, readers = survey.calls, block_readers(survey, program)
    rows: list[list[str]] = []
    reasons: dict[str, str] = {}
    last: str | None = None
    for name in calls:
        if obstacle := row_obstacle(model.get_submodule(name), calls[name]):
            reasons[name], last = obstacle, None
            continue
        end = None if last is None else row_end(survey, last, name, readers[last], passes)
        if last is None or end is not None:
            rows.append([])
        if last is not None and end is not None:
            reasons[last] = end
        rows[-1].append(name)
        last = name
    reasons.update((name, reason) for name, reason in survey.refused.items() if name)
    return rows, reasons, survey


def block_readers(survey: BlockSurvey, program: Program) -> dict[str, set[str]]:
    """The modules that read what each block puts out, by the block's name."""
    readers: dict[str, set[str]] = {name: set() for name in survey.calls}
    for number, makers in program.makers.items():
        for name in makers:
            if name in readers:
                readers[name] |= {program[user].owner for user in program.users[number] if program[user].signal}
    return readers


def row_obstacle(block: nn.Module, call: BlockCall) -> str | None:
    """Why a block can be part of no row."""
    if "forward" in vars(block):
        return f"the forward of this {type(block).__name__} was replaced on the instance"
    return "it writes into what it is given, which is needed again" if call.writes_stream else None


Arguments = Mapping[str, Mapping[int | str, Any]]


def row_end(survey: BlockSurvey, name: str, other: str, readers: set[str], passes: Sequence[Arguments]) -> str | None:
    """Why two blocks that run one after the other are not run as one; `passes` hold what each block is given beside x,
    with and without padding.
    """
    if (end := direct_row_end(survey, name, other, readers)) is not None:
        return end
    if beside := survey.calls[name].computed:
        return f"{path_text(beside[0], what='output')} is computed by it beside x"
    same = all(same_arguments(others[name], others[other]) for others in passes)
    return None if same else f"{other} is given other arguments than {name}"


def direct_row_end(survey: BlockSurvey, name: str, other: str, readers: set[str]) -> str | None:
    """Why what one block puts out does not go to another one, and to nothing else."""
    before, after = survey.calls[name], survey.calls[other]
    if after.before != name:
        return f"its output is not what {other} is given: something is done with it in between"
    if before.returned:
        return "its output is returned by the model too"
    if strangers := sorted(reader for reader in readers if not f"{reader}.".startswith(f"{other}.")):
        return f"its output is read by {strangers[0] or 'the model'}, not by {other} alone"
    return None


def same_arguments(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    """Whether two blocks are given the same beside x."""
    return one.keys() == other.keys() and all(same_argument(one[key], other[key]) for key in one)


def same_argument(one: Any, other: Any) -> bool:
    """Whether two arguments are the same object, or hold the same tensors and equal values."""
    if one is other:
        return True
    (leaves, tree), (others, other_tree) = tree_flatten(one), tree_flatten(other)
    pairs = zip(leaves, others, strict=False)
    return tree == other_tree and all(
        a is b or (not (isinstance(a, Tensor) or isinstance(b, Tensor)) and bool(a == b)) for a, b in pairs
    )


def no_output() -> None:
    """The output of a row that did not run yet."""


@dataclass
class BlockRow:
    """Blocks that are run as one; a subclass says how.

    Args:
        blocks: in order, each given the output of the one before, and all the same other arguments.
        calls: how the network calls each of them.
        forms: the output of each of them without its tensors.
    """

    operation = "run as one"
    """What was done to the blocks, in error messages."""

    blocks: list[nn.Module] = field(repr=False)
    calls: list[BlockCall] = field(repr=False)
    forms: list[Any] = field(repr=False)
    output: Callable[[], Any] = field(default=no_output, repr=False, init=False)
    given: dict[int | str, Any] = field(default_factory=dict, repr=False, init=False)

    def active(self) -> bool:
        """Whether the row is run as one in this pass; if not, each block computes what it always did."""
        return True

    @classmethod
    def of(cls: type[R], model: nn.Module, names: Sequence[str], survey: BlockSurvey, **options: Any) -> R:
        """The row of these blocks of a model."""
        blocks = [model.get_submodule(name) for name in names]
        return cls(blocks, [survey.calls[name] for name in names], [survey.forms[name] for name in names], **options)

    def run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run all blocks on x, with the arguments of the first, None in place of x; returns the last one's output."""
        raise NotImplementedError

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.calls[0]
        output = self.run(call.take(args, kwargs), *call.exchange(call.stream, args, kwargs, None))
        if not torch.compiler.is_compiling():
            self.given = self.calls[0].beside(args, kwargs) if len(self.blocks) > 1 else {}
            self.output = weakref.ref(item_at(output, self.calls[-1].output))
        return output

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "output": no_output, "given": {}}  # a weak reference, which no file or copy can hold

    def hand_on(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a block that the first one ran: the x that it is given, in the form of its own output.

        It is called alone if x is not what the row put out, and the row was run on other arguments than the network's
        if the block is given others than the first one was.

        Raises:
            SkipwayError: x is something else.
        """
        call = self.calls[place]
        if not torch.compiler.is_compiling() and self.output() is not call.take(args, kwargs):
            raise SkipwayError(
                f"a block that was made {self.operation} together with those before it was given something else than "
                "their output (it was called alone, or a hook exchanged the tensor); undo the operation first"
            )
        if not torch.compiler.is_compiling():
            if not same_arguments(self.given, call.beside(args, kwargs)):
                raise SkipwayError(
                    f"a block that was made {self.operation} together with those before it was given other arguments "
                    "than they (another mask, for example), which it was not on the example of the operation; undo "
                    "that, and give an example with these arguments"
                )
            if place == len(self.blocks) - 1:
                self.given = {}
        return call.skip(self.forms[place], args, kwargs)

    def install(self, change: Transaction) -> None:
        """Let the first block run the row, and the others return what they are given, in place."""
        for place, block in enumerate(self.blocks):
            if earlier := getattr(block, "block_row", None):
                raise SkipwayError(f"this {type(block).__name__} was made {earlier.operation} already; undo that first")
            kind = row_head if block is self.blocks[0] else row_member
            change.set_class(block, kind(type(block), self.sealed()))
            change.set_attribute(block, "block_row", self)
            change.set_attribute(block, "place_in_row", place)

    def sealed(self) -> str | None:
        """The reason that other operations give if they cannot follow; None if they can."""
        return self.operation


def run_alone(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The output of a block of a row, computed by itself."""
    return type(block).outside_row.forward(block, *args, **kwargs)  # type: ignore[attr-defined]


@class_factory
def row_head(kind: type[nn.Module], sealed: str | None) -> tuple[str, dict[str, Any]]:
    """A subclass of `kind` that runs its whole row."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.block_row(args, kwargs) if self.block_row.active() else run_alone(self, args, kwargs)

    return described(kind, "RowHead", forward, sealed)


@class_factory
def row_member(kind: type[nn.Module], sealed: str | None) -> tuple[str, dict[str, Any]]:
    """A subclass of `kind` that was run by the first block of its row, and hands on what it is given."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.block_row.active():
            return run_alone(self, args, kwargs)
        return self.block_row.hand_on(self.place_in_row, args, kwargs)

    return described(kind, "RowMember", forward, sealed)


def described(
    kind: type[nn.Module], suffix: str, forward: Callable[..., Any], sealed: str | None
) -> tuple[str, dict[str, Any]]:
    """Name and body of a subclass of `kind` with another forward."""
    body: dict[str, Any] = {"forward": forward, "outside_row": kind}
    return f"{kind.__name__}{suffix}", body if sealed is None else {**body, SEALED: sealed}
