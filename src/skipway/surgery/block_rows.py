"""Rows of blocks in anybody's network that are run as one, for `checkpointed` and `reversible`.

The first block of a row holds the object that runs all of them as its attribute `block_row`, and the others return
what they are given. Modules, names and keys stay what they were, so any container that calls its blocks one after the
other, a `Sequential` or a loop in somebody's forward, runs the row without knowing of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from skipway.errors import SkipwayError
from skipway.surgery.block_call import BlockCall
from skipway.surgery.block_survey import BlockSurvey, require_blocks
from skipway.surgery.class_factory import class_factory
from skipway.surgery.preconditions import SEALED
from skipway.surgery.transaction import Transaction
from skipway.tracing import Example, Program

__all__ = ["BlockRow", "block_readers", "direct_row_end", "find_block_rows", "run_alone"]


def find_block_rows(model: nn.Module, example: Example, program: Program) -> tuple[list[list[str]], dict[str, str]]:
    """Return blocks in rows that follow one another directly, a lone block in a row of its own; and why a row ends, or
    why a block is in none, by the block's name.
    """
    survey = require_blocks(model, example, program)
    calls, readers = survey.calls, block_readers(survey, program)
    rows: list[list[str]] = []
    reasons: dict[str, str] = {}
    last: str | None = None
    for name in calls:
        if obstacle := row_obstacle(model.get_submodule(name), calls[name]):
            reasons[name], last = obstacle, None
            continue
        end = None if last is None else row_end(survey, last, name, readers[last])
        if last is None or end is not None:
            rows.append([])
        if last is not None and end is not None:
            reasons[last] = end
        rows[-1].append(name)
        last = name
    reasons.update((name, reason) for name, reason in survey.refused.items() if name)
    return rows, reasons


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
    if call.stream != (0,) or call.output:
        return "x is not its first argument and its output, alone"
    return "it writes into what it is given, which is needed again" if call.writes_stream else None


def row_end(survey: BlockSurvey, name: str, other: str, readers: set[str]) -> str | None:
    """Why two blocks that run one after the other are not run as one."""
    if (end := direct_row_end(survey, name, other, readers)) is not None:
        return end
    one, two = survey.others[name], survey.others[other]
    same = one.keys() == two.keys() and all(same_argument(one[key], two[key]) for key in one)
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
    """

    operation = "run as one"
    """What was done to the blocks, in error messages."""

    blocks: list[nn.Module] = field(repr=False)
    output: Callable[[], Any] = field(default=no_output, repr=False, init=False)

    def active(self) -> bool:
        """Whether the row is run as one in this pass; if not, each block computes what it always did."""
        return True

    def run(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """Run all blocks on x."""
        raise NotImplementedError

    def __call__(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        output = self.run(x, *others, **named)
        if not torch.compiler.is_compiling():
            self.output = weakref.ref(output)
        return output

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "output": no_output}  # a weak reference, which no file or copy can hold

    def check(self, x: Tensor) -> None:
        """Refuse to return an x that is not the output of the row: a block that is called alone would do nothing.

        Raises:
            SkipwayError: x is something else.
        """
        if not torch.compiler.is_compiling() and self.output() is not x:
            raise SkipwayError(
                f"a block that was made {self.operation} together with those before it was given something else than "
                "their output (it was called alone, or a hook exchanged the tensor); undo the operation first"
            )

    def install(self, change: Transaction) -> None:
        """Let the first block run the row, and the others return what they are given, in place."""
        for block in self.blocks:
            if earlier := getattr(block, "block_row", None):
                raise SkipwayError(f"this {type(block).__name__} was made {earlier.operation} already; undo that first")
            kind = row_head if block is self.blocks[0] else row_member
            change.set_class(block, kind(type(block), self.sealed()))
            change.set_attribute(block, "block_row", self)

    def sealed(self) -> str | None:
        """The reason that other operations give if they cannot follow; None if they can."""
        return self.operation


def run_alone(block: nn.Module, x: Tensor, others: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    """The output of a block of a row, computed by itself."""
    return type(block).outside_row.forward(block, x, *others, **named)  # type: ignore[attr-defined]


@class_factory
def row_head(kind: type[nn.Module], sealed: str | None) -> tuple[str, dict[str, Any]]:
    """A subclass of `kind` that runs its whole row."""

    def forward(self: Any, x: Tensor, *others: Any, **named: Any) -> Tensor:
        return self.block_row(x, *others, **named) if self.block_row.active() else run_alone(self, x, others, named)

    return described(kind, "RowHead", forward, sealed)


@class_factory
def row_member(kind: type[nn.Module], sealed: str | None) -> tuple[str, dict[str, Any]]:
    """A subclass of `kind` that was run by the first block of its row, and returns what it is given."""

    def forward(self: Any, x: Tensor, *others: Any, **named: Any) -> Tensor:
        if not self.block_row.active():
            return run_alone(self, x, others, named)
        self.block_row.check(x)
        return x

    return described(kind, "RowMember", forward, sealed)


def described(
    kind: type[nn.Module], suffix: str, forward: Callable[..., Tensor], sealed: str | None
) -> tuple[str, dict[str, Any]]:
    """Name and body of a subclass of `kind` with another forward."""
    body: dict[str, Any] = {"forward": forward, "outside_row": kind}
    return f"{kind.__name__}{suffix}", body if sealed is None else {**body, SEALED: sealed}
