"""The record of an operation on a network, and the journal that takes the operation back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError, counted
from skipway.surgery.parameter_values import ParameterValues
from skipway.tracing.paths import parents
from skipway.tracing.restoration import run_to_end
from skipway.validation import check_call, check_flag, check_rule

__all__ = ["Journal", "Operation", "abbreviate", "names_by_reason", "undo"]

Placement = torch.device | torch.dtype
"""What `Module.to` changes."""
Flags = dict[str, bool]
LINES, GROUPS = 8, 4
"""Numbers, and groups of names with one reason, that are printed of one operation."""


@dataclass(eq=False)
class HistoryEntry:
    """An operation in the history of a model, which holds nothing of the model itself."""

    title: str
    number: int = field(default_factory=count().__next__)
    undone: bool = False


HISTORY: WeakKeyDictionary[nn.Module, list[HistoryEntry]] = WeakKeyDictionary()
"""The committed operations of each model, in order."""


class Journal:
    """Undo steps, each recorded before its change is made, run last one first.

    A step restores a known state, so that running it twice, or without its change having been made, does no harm. For
    the same reason operations are undone in reverse order. What a step puts back is its `value`, if it has one. Steps
    hold the tables of the very modules that were changed, so that a copy of a journal has none.
    """

    copied = False

    def __init__(self, model: nn.Module | None = None) -> None:
        self.steps: list[Callable[[], None]] = []
        self.entry = HistoryEntry("")
        self.before = {} if model is None else dict(model.named_parameters())
        self.values = ParameterValues()
        self.placement = dict[str, set[Placement]]()
        self.flags = (Flags(), Flags())

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds."""
        nothing = {"steps": [], "before": {}, "values": ParameterValues(), "placement": {}, "flags": ({}, {})}
        return {**nothing, "entry": self.entry, "copied": True}

    @property
    def undone(self) -> bool:
        """Whether all steps were run."""
        return self.entry.undone

    def undo(self) -> None:
        """Run all steps, for good."""
        self.values = ParameterValues()  # the next call finishes an interrupted one
        self.roll_back()
        self.entry.undone = True

    def commit(self, model: nn.Module, title: str) -> None:
        """Enter the operation into the history of its model."""
        self.entry = HistoryEntry(title)
        arguments = [step.args[0] for step in self.all_steps() if isinstance(step, partial) and step.args]
        written = [each for each in arguments if isinstance(each, nn.Parameter)]
        self.values, self.before = ParameterValues.of(model, self.before, written), {}
        self.placement, self.flags = placements(model), flags_of(model)
        HISTORY.setdefault(model, []).append(self.entry)

    def follow(self, model: nn.Module) -> None:
        """Let what the steps put back take the training mode and the `requires_grad` that its place was given since
        the operation, which did not reach it; see `changed_flags`.
        """
        modes, trained = (changed_flags(*each) for each in zip(self.flags, flags_of(model), strict=True))
        if modes or trained:
            kept, places = {*model.modules(), *model.parameters()}, dict(model.named_modules())
            self.steps.insert(0, partial(set_flags, model, kept, places, modes, trained))  # run last

    def all_steps(self) -> Iterator[Callable[[], None]]:
        """The undo steps, with those of the transactions within this one."""
        for step in self.steps:
            inner = getattr(step, "__self__", None)
            yield from inner.all_steps() if isinstance(inner, Journal) else (step,)

    def left_behind(self, model: nn.Module) -> tuple[set[Placement], set[Placement]]:
        """The devices and floating-point types of what the steps put back, from which tensors of the model were moved
        since the operation or which none has now; and those that they were moved to.
        """
        now, nothing = placements(model), set[Placement]()
        moved = [(old, now[name]) for name, old in self.placement.items() if now.get(name, old) != old]
        left = nothing.union(*(old - new for old, new in moved))
        taken = nothing.union(*(new - old for old, new in moved))
        kinds, present = set(map(type, taken)), nothing.union(*now.values())
        values = (getattr(step, "value", None) for step in self.all_steps() if moved)
        back = {each for value in values for each in placement_of(value) if type(each) in kinds}
        return back & left | back - present, taken

    def later(self, model: nn.Module) -> list[str]:
        """Titles of the operations on the model, a part of it or a whole that it is part of, that were committed later
        and not undone.
        """
        parts = set(model.modules())
        related = (other for other in HISTORY if other in parts or any(part is model for part in other.modules()))
        entries = sorted((entry for other in related for entry in HISTORY[other]), key=lambda entry: entry.number)
        return [entry.title for entry in entries if entry.number > self.entry.number and not entry.undone]

    def roll_back(self, mark: int = 0) -> None:
        """Run and drop the steps recorded after the first `mark`, all of them, whatever is raised on the way.

        An interrupted step is run again. The last exception is raised when all steps are done.
        """
        run_to_end(self.steps, mark)


@dataclass(frozen=True, eq=False, repr=False)
class Operation:
    """An operation that was carried out on a model, in place. Printed, it fits on one screen at any depth.

    Args:
        model: the network.
        title: the operation in words.
        touched: what was done, by the name of a connection, block or module.
        refused: why something was left alone, by its name.
        report: numbers measured on the example; "difference" is the largest change of the output over its largest
            magnitude.
        journal: undo steps.
        verified: what was compared with before and holds, in words, or why it could not be compared.

    It can be pickled and copied, with its model. The copy says what was done, and cannot be undone.
    """

    model: nn.Module
    title: str
    touched: Mapping[str, str]
    refused: Mapping[str, str]
    report: Mapping[str, float]
    journal: Journal = field(default_factory=Journal)
    verified: Mapping[str, str] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        """How pickle and copy take an operation apart; they have no form for read-only mappings."""
        texts = (dict(self.touched), dict(self.refused), dict(self.report))
        return Operation, (self.model, self.title, *texts, self.journal, dict(self.verified))

    @property
    def undone(self) -> bool:
        """Whether the model was put back."""
        return self.journal.undone

    def undo(self, *, force: bool = False) -> nn.Module:
        """Put the model back, in place: outputs, classes, keys and order of the state dict are exactly as before.

        An interrupted `undo` finishes first and raises then. After training, parameters that the operation neither put
        in nor wrote into keep what they learned; where others were trained since, the network would become a mixture of
        what it was and what it learned, which is refused. Where the training mode or `requires_grad` was changed since
        in all of the network (or all but its last part, a classifier), or of the part of it that something is put back
        into, this takes them too.

        Args:
            force: put the model back even so: parameters that the operation put in are dropped, those that it wrote
                into or took out are as before it, and all others as they are now.

        Raises:
            SkipwayError: the operation is a copy, was undone already, another one came later and has to be undone
                first, the network, or a part of it, was moved to another device or floating-point type than what it
                left out has, or parameters were trained since that would be lost or no longer go together.
        """
        check_flag("force", force)
        if self.journal.copied:
            raise SkipwayError(
                f"{self.title!r}: this is a copy of an operation, by pickle or copy, which holds no way back; undo the "
                "operation that the call returned, on its own model, and copy that model then"
            )
        if self.undone:
            raise SkipwayError(f"{self.title!r} was undone already; repeat the operation to have it again")
        if later := self.journal.later(self.model):
            raise SkipwayError(f"{self.title!r}: a later operation builds on it; undo {later[-1]!r} first")
        self.refuse_moved()
        if not force:
            self.refuse_mixture()
        self.journal.follow(self.model)
        self.journal.undo()
        return self.model

    def refuse_moved(self) -> None:
        """Refuse if parts that are put back would be on another device, or of another type, than the model is now."""
        left, taken = self.journal.left_behind(self.model)
        if not left:
            return
        kinds, had = set(map(type, left)), set[Placement]().union(*self.journal.placement.values())
        old, new, before = (
            sorted((each for each in placement if type(each) in kinds), key=devices_first)
            for placement in (left, taken, left | had)
        )
        part = "a part of " if left & placement_of(self.model) else ""
        back = "give each part the device and type that it had"
        if len(before) == len(kinds):
            given = ", ".join(repr(str(each)) if isinstance(each, torch.device) else str(each) for each in old)
            back = f"move the network back, model.to({given})"
        where = f"{'on' if torch.device in kinds else 'in'} {', '.join(map(str, old))}"
        raise SkipwayError(
            f"{self.title!r}: {part}the network was moved to {', '.join(map(str, new))} since, and undo would put back "
            f"what stayed {where}; {back}, undo, and move it again"
        )

    def refuse_mixture(self) -> None:
        """Refuse if the model would be neither what it was before the operation nor what it learned since."""
        own, others = self.journal.values.changed_in(self.model)
        if own:
            problem = f"{abbreviate(own)} changed since (by training, for example), and undo would discard that"
        elif others:
            back = abbreviate(self.journal.values.put_back)
            problem = f"{abbreviate(others)} changed since (by training, for example), and undo would put {back} back"
        else:
            return
        raise SkipwayError(
            f"{self.title!r}: {problem}, so that the network would be neither the one before nor the one that was "
            "trained; load the state dict from before the training first, or undo(force=True) puts back what the "
            "operation changed and leaves all other parameters as they are"
        )

    def __str__(self) -> str:
        numbers = [f"{name} {value:.3g}" for name, value in islice(self.report.items(), LINES)]
        numbers += [f"{counted(len(self.report) - LINES, 'more number')} in report"] * (len(self.report) > LINES)
        head = f"{self.title}: {len(self.touched)} changed" + (f"; {', '.join(numbers)}" if numbers else "")
        checked = [f"  checked: {name}: {words}" for name, words in self.verified.items()]
        back = "undo: operation.undo() puts the model back"
        if self.undone or self.journal.copied:
            back = "it was undone" if self.undone else "a copy, which cannot be undone"
        changed, left = grouped("changed", self.touched, "touched"), grouped("left alone", self.refused, "refused")
        return "\n".join([head, *changed, *left, *checked, f"  {back}"])

    __repr__ = __str__


def placement_of(value: object) -> set[Placement]:
    """The devices and floating-point types of a tensor, or of the parameters and buffers of a module or of those in a
    table; none of anything else.
    """
    parts = value.values() if isinstance(value, dict) else (value,)
    modules = [part for part in parts if isinstance(part, nn.Module)]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    tensors += [each for module in modules for each in (*module.parameters(), *module.buffers())]
    return {each.device for each in tensors} | {each.dtype for each in tensors if each.is_floating_point()}


def placements(model: nn.Module) -> dict[str, set[Placement]]:
    """The device and floating-point type of each parameter and buffer of a model, by name."""
    return {name: placement_of(each) for name, each in (*model.named_parameters(), *model.named_buffers())}


def flags_of(model: nn.Module) -> tuple[Flags, Flags]:
    """The training mode of each module and the `requires_grad` of each parameter of a model, by name."""
    modes = {name: module.training for name, module in model.named_modules()}
    return modes, {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def changed_flags(then: Flags, now: Flags) -> dict[str, bool | None]:
    """The modules, and parameters, by name, in which a flag was changed, with the value that all flags in them have
    now; None where they differ. The network as a whole has that of all its parts but the last one, a classifier that
    alone learns; what is in that one follows it alone.

    >>> changed_flags({"a.b": True, "a.c": True, "d": True}, {"a.b": False, "a.c": True, "d": True})
    {'': None, 'a': None, 'a.b': False}
    >>> changed_flags({"a.b": True, "a.c": False, "d": True}, {"a.b": False, "a.c": False, "d": True})
    {'': False, 'a': False, 'a.b': False, 'd': None}
    """
    changed, values = set[str](), dict[str, set[bool]]()
    names = [name for name in now if name in then]
    for name in names:
        for scope in dict.fromkeys((name, *parents(name), "")):
            values.setdefault(scope, set()).add(now[name])
            changed.update([scope] * (then[name] != now[name]))
    flags = {scope: next(iter(values[scope])) if len(values[scope]) == 1 else None for scope in sorted(changed)}
    parts = list(dict.fromkeys(name.partition(".")[0] for name in names))
    trunk = set[bool]().union(*(values[part] for part in parts[:-1]))
    if flags.get("", True) is None and len(parts) > 1 and len(trunk) == 1:
        flags = {**flags, "": next(iter(trunk)), parts[-1]: flags.get(parts[-1])}
    return flags


def set_flags(
    model: nn.Module,
    kept: Collection[nn.Module | Tensor],
    places: Mapping[str, nn.Module],
    modes: Mapping[str, bool | None],
    trained: Mapping[str, bool | None],
) -> None:
    """Give the modules and parameters of a model, other than those `kept`, the flags of the smallest part around them
    in which these were changed, where all are equal there. A part that was in one of the `places` and now has another
    name, as where blocks are numbered anew, says nothing of what has that name now.
    """
    now = dict(model.named_modules())
    present = set(now.values())
    moved = {name for name, each in places.items() if each in present and now.get(name) is not each}

    def flag(flags: Mapping[str, bool | None], name: str) -> bool | None:
        around = sorted({name, *parents(name), ""}, key=len, reverse=True)
        known = (scope for scope in around if scope in flags and moved.isdisjoint((scope, *parents(scope))))
        return next((flags[scope] for scope in known), None)

    for name, module in model.named_modules():
        if module not in kept and (mode := flag(modes, name)) is not None:
            module.training = mode
    for name, parameter in model.named_parameters():
        learns = flag(trained, name)
        if parameter not in kept and learns is not None and (parameter.is_floating_point() or parameter.is_complex()):
            parameter.requires_grad_(learns)


def devices_first(placed: Placement) -> tuple[bool, str]:
    """Key by which devices and types are sorted, as `Module.to` takes them."""
    return isinstance(placed, torch.dtype), str(placed)


def grouped(what: str, names: Mapping[str, str], attribute: str) -> list[str]:
    """Lines with the names for each reason, however many there are; the rest is in an attribute of the operation."""
    groups = names_by_reason(names)
    lines = [f"  {what}: {abbreviate(groups[reason])}: {reason}" for reason in islice(groups, GROUPS)]
    return lines + [f"  {what}: and {len(groups) - GROUPS} more, in operation.{attribute}"] * (len(groups) > GROUPS)


def names_by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """The names that each reason was given for.

    >>> names_by_reason({"a": "too wide", "": "too deep", "b": "too wide"})
    {'too wide': ['a', 'b'], 'too deep': ['the model']}
    """
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name or "the model")
    return groups


@check_call
def undo(operation: Operation, *, force: bool = False) -> nn.Module:
    """Put a model back, in place, as it was before an operation; see `Operation.undo`."""
    rule = "the Operation that rescheme and the others return"
    check_rule("operation", operation, isinstance(operation, Operation), rule)
    return operation.undo(force=force)


def abbreviate(names: Sequence[str], most: int = 4, separator: str = ", ") -> str:
    """Names in one line, however many there are.

    >>> abbreviate(["a", "b", "c"]), abbreviate([f"layers.{number}" for number in range(1000)])
    ('a, b, c', 'layers.0, layers.1, layers.2, …, layers.999 (1000)')
    """
    if len(names) <= most:
        return separator.join(names)
    return separator.join((*names[: most - 1], "…", f"{names[-1]} ({len(names)})"))
