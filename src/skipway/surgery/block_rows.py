"""Blocks that follow one another, in anybody's network, run as one: what `checkpointed` and `reversible` share.

The first block of a chain holds the object that runs all of them in its slot `chained`, and the others pass on what
they are given. Modules, names and keys stay what they were, so any container that calls its blocks one after the other,
a `Sequential` or a loop in somebody's forward, runs the chain without knowing of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from skipway.errors import SkipwayError
from skipway.surgery.depth import blocks_of
from skipway.surgery.preconditions import SEALED
from skipway.tracing import Example, Program, preserved_state
from skipway.tracing.example import call_model

__all__ = ["Chained", "changed", "plain", "present", "rows_of"]


def present(model: nn.Module, example: Example, program: Program | None = None) -> list[str]:
    """The blocks that carry x itself, of which there has to be one."""
    blocks = blocks_of(model, example, program)
    if not blocks:
        raise SkipwayError(
            f"{type(model).__name__} has no block that adds to x itself and puts out what is shaped like it"
        )
    return blocks


@dataclass
class Visit:
    """One call of a block. Tensors are held as long as the call lasts, so that many visits take no memory.

    Args:
        given: x, while the block runs.
        version: how often x had been written into before.
        others: what it was given beside x.
        before: the block whose very output x is, if one ran before.
        out: what it put out, as long as somebody holds it.
        wrote: whether it wrote into x.
    """

    given: Tensor | None
    version: int
    others: tuple[list[Any], TreeSpec]
    before: str | None
    out: Callable[[], Any] = field(default=lambda: None)
    wrote: bool = False


def rows_of(model: nn.Module, example: Example, program: Program) -> tuple[list[list[str]], dict[str, str]]:
    """Blocks in rows that follow one another directly, a block alone in a row of its own; and why a row ends, or why a
    block is in none, by the block's name.
    """
    blocks = present(model, example, program)
    visits, put_out = visit(model, example, blocks)
    readers: dict[str, set[str]] = {name: set() for name in blocks}
    for number, makers in program.makers.items():
        for name in makers:
            if name in readers:
                readers[name] |= {program[user].owner for user in program.users[number] if program[user].signal}
    rows: list[list[str]] = []
    reasons: dict[str, str] = {}
    last: str | None = None
    for name in visits:
        if own := objection(model.get_submodule(name), visits[name]):
            reasons[name], last = own, None
            continue
        breaks = None if last is None else break_between(visits, last, name, readers[last], put_out)
        if last is None or breaks is not None:
            rows.append([])
        if last is not None and breaks is not None:
            reasons[last] = breaks
        rows[-1].append(name)
        last = name
    return rows, reasons


def visit(model: nn.Module, example: Example, blocks: Sequence[str]) -> tuple[dict[str, Visit], set[str]]:
    """Each block's call in a pass in evaluation mode, in order, and whose output the model puts out as it is."""
    visits: dict[str, Visit] = {}
    left: list[str] = []

    def enter(name: str, module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        follows = left[-1] if left and visits[left[-1]].out() is given[0] else None
        visits[name] = Visit(given[0], given[0]._version, tree_flatten((given[1:], dict(named))), follows)

    def leave(name: str, module: nn.Module, given: Any, named: Any, out: Any) -> None:
        own = visits[name]
        own.wrote, own.given, own.out = own.given._version != own.version, None, weakref.ref(out)  # type: ignore[union-attr]
        left.append(name)

    handles: list[Any] = []
    for name in blocks:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(leave, name), with_kwargs=True))
    try:
        with preserved_state(model), torch.no_grad():
            leaves = tree_flatten(call_model(model.eval(), example))[0]
    finally:
        for handle in handles:
            handle.remove()
    return visits, {
        name for name, own in visits.items() if any(isinstance(leaf, Tensor) and leaf is own.out() for leaf in leaves)
    }


def objection(block: nn.Module, seen: Visit) -> str | None:
    """Why a block can be part of no chain."""
    if "forward" in block.__dict__:
        return f"the forward of this {type(block).__name__} was replaced on the instance"
    return "it writes into what it is given, which is needed again" if seen.wrote else None


def break_between(
    visits: Mapping[str, Visit], name: str, other: str, readers: set[str], put_out: set[str]
) -> str | None:
    """Why two blocks that run one after the other are not run as one."""
    before, after = visits[name], visits[other]
    if after.before != name:
        return f"what it puts out is not what {other} is given: something is done with it in between"
    if name in put_out:
        return "what it puts out is put out by the model too"
    if strangers := sorted(reader for reader in readers if not f"{reader}.".startswith(f"{other}.")):
        return f"what it puts out is read by {strangers[0] or 'the model'}, not by {other} alone"
    same = before.others[1] == after.others[1] and all(map(alike, before.others[0], after.others[0]))
    return None if same else f"{other} is given other arguments than {name}"


def alike(one: Any, other: Any) -> bool:
    """Whether two arguments are the same object, or equal values that are no tensors."""
    return one is other or (not (isinstance(one, Tensor) or isinstance(other, Tensor)) and bool(one == other))


@dataclass
class Chained:
    """Blocks that are run as one; a subclass says how.

    Args:
        blocks: in order, each given what the one before put out, and all the same beside it.
    """

    word = "chained"
    """What was done to the blocks, in error messages."""

    blocks: list[nn.Module] = field(repr=False)
    out: Callable[[], Any] = field(default=lambda: None, repr=False, init=False)

    def now(self) -> bool:
        """Whether they are run as one in this pass; if not, each block computes what it always did."""
        return True

    def run(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """All blocks on x."""
        raise NotImplementedError

    def __call__(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        out = self.run(x, *others, **named)
        if not torch.compiler.is_compiling():
            self.out = weakref.ref(out)
        return out

    def check(self, x: Tensor) -> None:
        """Refuse to pass on what the chain did not put out: a block that is called alone would do nothing.

        Raises:
            SkipwayError: x is something else.
        """
        if not torch.compiler.is_compiling() and self.out() is not x:
            raise SkipwayError(
                f"a block that was made {self.word} together with those in front of it was given something else than "
                "they put out (it was called alone, or a hook exchanged the tensor); undo the operation first"
            )

    def install(self) -> list[Callable[[], None]]:
        """Let the first block run all, and the others pass on what they are given; what takes it back."""
        steps: list[Callable[[], None]] = []
        for block in self.blocks:
            kind = leading if block is self.blocks[0] else passing
            steps.append(changed(block, kind(type(block), self.sealed())))
            block.chained = self  # type: ignore[assignment]
            steps.append(partial(delattr, block, "chained"))
        return steps

    def sealed(self) -> str | None:
        """What the classes say to other operations that cannot follow; None where they can."""
        return self.word


def plain(block: nn.Module, x: Tensor, others: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    """What a block of a chain computes by itself."""
    return type(block).plain.forward(block, x, *others, **named)  # type: ignore[attr-defined]


@cache
def leading(kind: type[nn.Module], sealed: str | None) -> type[nn.Module]:
    """A subclass of `kind` that runs its whole chain."""

    def forward(self: Any, x: Tensor, *others: Any, **named: Any) -> Tensor:
        return self.chained(x, *others, **named) if self.chained.now() else plain(self, x, others, named)

    return derived(kind, "Leading", forward, sealed)


@cache
def passing(kind: type[nn.Module], sealed: str | None) -> type[nn.Module]:
    """A subclass of `kind` that was run already, and passes on what it is given."""

    def forward(self: Any, x: Tensor, *others: Any, **named: Any) -> Tensor:
        if not self.chained.now():
            return plain(self, x, others, named)
        self.chained.check(x)
        return x

    return derived(kind, "Passing", forward, sealed)


def derived(kind: type[nn.Module], suffix: str, forward: Callable[..., Tensor], sealed: str | None) -> type[nn.Module]:
    body: dict[str, Any] = {"forward": forward, "__module__": kind.__module__, "plain": kind}
    if sealed is not None:
        body[SEALED] = sealed
    return type(f"{kind.__name__}{suffix}", (kind,), body)


def changed(module: nn.Module, kind: type[nn.Module]) -> Callable[[], None]:
    """Give a module another class; what gives it back its own.

    Raises:
        SkipwayError: the module's forward is an attribute of the instance, which a class does not reach.
    """
    if "forward" in module.__dict__:
        raise SkipwayError(f"the forward of this {type(module).__name__} was replaced on the instance")
    own = type(module)
    module.__class__ = kind

    def put_back() -> None:
        module.__class__ = own

    return put_back
