"""A transaction on a network: changes are recorded before they are made, verified at the end, and taken back on any
exception.

    with transaction(model, example, title="…", tolerance=1e-5) as change:
        change.set_submodule("norm", nn.Identity())
        change.touched["norm"] = "left out"
        return change.commit()

The model is as before if the block raises anything, `KeyboardInterrupt` included, if outputs differ by more than the
tolerance, or if the block ends without `commit`, so that a trial is a transaction that is never committed. Nothing else
writes into somebody's network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.surgery.operation import Journal, Operation
from skipway.surgery.verification import difference, outputs
from skipway.tracing import Example

__all__ = ["Transaction", "transaction"]

MISSING = object()
OPEN: ContextVar[Transaction | None] = ContextVar("open transaction", default=None)


class Transaction:
    """Changes of a model, with the way back; see `transaction`.

    Attributes:
        touched: what was done, by name; becomes `Operation.touched`.
        refused: why something was left alone, by name.
        report: numbers measured beside the difference of the outputs.
    """

    def __init__(
        self, model: nn.Module, example: Example | None, *, title: str, tolerance: float | None, hint: str
    ) -> None:
        self.model, self.example, self.title, self.tolerance, self.hint = model, example, title, tolerance, hint
        self.touched: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.report: dict[str, float] = {}
        self.journal = Journal()
        self.committed = False
        self.compare_from_here()

    def set_class(self, module: nn.Module, kind: type[nn.Module]) -> None:
        """Give a module another class.

        Raises:
            SkipwayError: the module's forward is an attribute of the instance, which a class does not reach.
        """
        if "forward" in vars(module):
            raise SkipwayError(f"the forward of this {type(module).__name__} was replaced on the instance")
        self.record(partial(setattr, module, "__class__", type(module)))
        module.__class__ = kind

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        """Set an attribute of a module that is no parameter, buffer or module."""
        self.record(Restore.of(vars(module), name))
        setattr(module, name, value)

    def set_parameter(self, module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        """Exchange a parameter."""
        self.record(Restore.of(module._parameters, name))
        module._parameters[name] = value

    def set_submodule(self, path: str, value: nn.Module) -> None:
        """Exchange or add the module at a path."""
        parent, _, name = path.rpartition(".")
        table = self.model.get_submodule(parent)._modules
        self.record(Restore.of(table, name))
        table[name] = value

    def add_module(self, parent: nn.Module, name: str, value: nn.Module) -> None:
        """Register a module in another one."""
        self.record(Restore.of(parent._modules, name))
        parent.add_module(name, value)

    def remove_module(self, parent: nn.Module, name: str) -> None:
        """Take a module out of the one that it is registered in."""
        self.record(Restore.of(parent._modules, name))
        parent._modules.pop(name)

    def keep_values(self, tensors: Iterable[Tensor]) -> None:
        """Keep a copy of parameters or buffers that are going to be written into."""
        for tensor in tensors:
            self.record(partial(write, tensor, tensor.detach().clone()))

    def record(self, step: Callable[[], None]) -> None:
        """Record an undo step; it has to restore a known state, so that it can run twice."""
        self.gap: float | None = None
        self.journal.steps.append(step)

    @property
    def finished(self) -> bool:
        """Whether the changes were committed or taken back."""
        return self.committed or self.journal.undone

    @property
    def mark(self) -> int:
        """The place in the journal to `roll_back` to."""
        return len(self.journal.steps)

    def roll_back(self, mark: int = 0) -> None:
        """Take back all changes since a mark."""
        self.gap = None
        self.journal.roll_back(mark)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Take back the changes within if they raise."""
        mark = self.mark
        try:
            yield
        except Exception:
            self.roll_back(mark)
            raise

    def compare_from_here(self) -> None:
        """Compare outputs with those of the model as it is now."""
        self.gap = None
        self.before = None if self.example is None else outputs(self.model, self.example)

    def compare(self) -> float:
        """Largest difference of the outputs from those before, over their largest magnitude; 0 without an example."""
        if self.gap is None and self.before is not None and self.example is not None:
            self.gap = difference(self.before, outputs(self.model, self.example))
        return self.gap or 0.0

    def commit(self) -> Operation:
        """Compare outputs and keep the changes; the last statement of a transaction.

        Raises:
            SkipwayError: outputs differ by more than the tolerance.
        """
        gap = self.compare()
        if self.tolerance is not None and not gap <= self.tolerance:
            raise SkipwayError(
                f"{self.title}: the output changed by {gap:.3g} of its largest value, more than "
                f"tolerance={self.tolerance:g}, so that the model was put back{self.hint and '; '}{self.hint}"
            )
        report = self.report if self.before is None else {"difference": gap, **self.report}
        operation = Operation(
            self.model,
            self.title,
            MappingProxyType(dict(self.touched)),
            MappingProxyType(dict(self.refused)),
            MappingProxyType(dict(report)),
            self.journal,
        )
        self.journal.commit(self.model, self.title)
        self.committed = True
        return operation


@contextmanager
def transaction(
    model: nn.Module,
    example: Example | None = None,
    *,
    title: str,
    tolerance: float | None = None,
    hint: str = "",
) -> Iterator[Transaction]:
    """Change a model in place, completely or not at all.

    A transaction within another one on the same model, or on a part of it, is rolled back with the outer one.

    Args:
        model: any module.
        example: what the model is called with; outputs in evaluation mode are compared on it.
        title: the operation in words.
        tolerance: bound on the difference of the outputs, relative to their largest value; None reports it only.
        hint: the way out, at the end of the error message if outputs differ.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> with transaction(model, title="without rectifier") as change:
    ...     change.set_submodule("1", nn.Identity())
    ...     operation = change.commit()
    >>> model[1], operation.undo()[1]
    (Identity(), ReLU())
    """
    change = Transaction(model, example, title=title, tolerance=tolerance, hint=hint)
    outer = OPEN.get()
    if outer is not None and not outer.finished and any(module is model for module in outer.model.modules()):
        outer.record(change.journal.undo)
    # twice, for an exception that arrives while the first one is about to roll back
    with rolled_back(change), rolled_back(change), joinable(change):
        yield change


@contextmanager
def rolled_back(change: Transaction) -> Iterator[None]:
    """Take all changes back on any exception."""
    try:
        yield
    except BaseException:
        change.journal.undo()
        raise


@contextmanager
def joinable(change: Transaction) -> Iterator[None]:
    """Let transactions within join, and take back what was not committed."""
    token = OPEN.set(change)
    try:
        yield
        if not change.committed:
            change.journal.undo()
    finally:
        OPEN.reset(token)


@dataclass
class Restore:
    """Undo step: one entry of a module's table as it was, at its old position.

    Args:
        table: parameters, buffers, modules or attributes of a module, by name.
        name: of the entry.
        value: the old value, or MISSING.
        order: names in the table.
        whole: the table with the entry put back between the others, once that was needed.
    """

    table: dict[str, Any]
    name: str
    value: Any
    order: list[str]
    whole: dict[str, Any] | None = None

    @classmethod
    def of(cls, table: dict[str, Any], name: str) -> Restore:
        """The step for the entry as it is now."""
        return cls(table, name, table.get(name, MISSING), list(table))

    def __call__(self) -> None:
        if self.value is MISSING:
            self.table.pop(self.name, None)
        elif self.name in self.table:
            self.table[self.name] = self.value
        else:
            self.whole = self.whole or self.with_entry()
            self.table.clear()
            self.table.update(self.whole)

    def with_entry(self) -> dict[str, Any]:
        """The table with the entry at its old position; entries that were added since follow."""
        known = {name: number for number, name in enumerate(self.order)}
        entries = {**self.table, self.name: self.value}
        return {name: entries[name] for name in sorted(entries, key=lambda name: known.get(name, len(known)))}


@torch.no_grad()
def write(tensor: Tensor, values: Tensor) -> None:
    """Write values into a tensor."""
    tensor.copy_(values)
