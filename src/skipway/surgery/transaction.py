"""A transaction on a network: changes are recorded before they are made, verified at the end, and taken back on any
exception.

    with transaction(model, example, title="…", tolerance=1e-5) as change:
        change.set_submodule("norm", nn.Identity())
        change.touched["norm"] = "left out"
        return change.commit()

The model is as before if the block raises anything, `KeyboardInterrupt` included, if a check fails, or if the block
ends without `commit`, so that a trial is a transaction that is never committed. Nothing else writes into somebody's
network.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList

from skipway.errors import SkipwayError
from skipway.surgery.checks import CHECKS, Check, ComparisonRule, EvaluatedOutputs, NotComparedError
from skipway.surgery.operation import Journal, Operation, abbreviate
from skipway.surgery.side_effects import version_of
from skipway.surgery.verification import output_gap, outputs
from skipway.tracing import Example, as_example
from skipway.tracing.containers import tensors_in
from skipway.tracing.module_state import copy_module
from skipway.tracing.watch import require_module
from skipway.validation import check_tolerance

__all__ = ["Transaction", "transaction"]

MISSING = object()
SAME = 1e-3
"""Difference of outputs, relative to their largest value, that is rounding."""
OPEN: ContextVar[Transaction | None] = ContextVar("open transaction", default=None)


class Transaction:
    """Changes of a model, with the way back; see `transaction`.

    Attributes:
        touched: what was done, by name; becomes `Operation.touched`.
        refused: why something was left alone, by name.
        report: numbers measured beside the difference of the outputs.
        checks: what has to hold afterwards; an operation may exchange those that compare for weaker ones.
        recast: parameters that enter in another way than before, so that their gradients are others.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Example | None,
        *,
        title: str,
        tolerance: float | None,
        hint: str,
        checks: Sequence[Check],
        wrapped: nn.Module | None = None,
    ) -> None:
        self.model, self.example, self.title, self.tolerance, self.hint = model, example, title, tolerance, hint
        self.checks, self.recast = tuple(checks), set[nn.Parameter]()
        self.touched: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.report: dict[str, float] = {}
        self.journal = Journal(model)
        self.added, self.derived = list[nn.Module](), list[nn.Module]()
        self.committed = False
        self.averaged = averaged_parameters(model if wrapped is None else wrapped)
        self.compare_from_here()

    def set_class(self, module: nn.Module, kind: type[nn.Module]) -> None:
        """Give a module another class.

        Raises:
            SkipwayError: the module's forward is an attribute of the instance, which a class does not reach.
        """
        if "forward" in vars(module):
            raise SkipwayError(f"the forward of this {type(module).__name__} was replaced on the instance")
        self.record(partial(setattr, module, "__class__", type(module)))
        self.derived.append(module)
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
        """Exchange the module at a path, and under every other name that it has, or add one."""
        parent, _, name = path.rpartition(".")
        table = self.model.get_submodule(parent)._modules
        old, places = table.get(name), [(table, name)]
        if old is not None:
            tables = [module._modules for module in self.model.modules()]
            places = [(each, key) for each in tables for key, module in each.items() if module is old]
        for each, key in places:
            self.record(Restore.of(each, key))
            each[key] = value

    def add_module(self, parent: nn.Module, name: str, value: nn.Module) -> None:
        """Register a module in another one."""
        self.record(Restore.of(parent._modules, name))
        self.added.append(value)
        parent.add_module(name, value)

    def set_modules(self, parent: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        """Let a module hold these modules, in this order, and no others."""
        self.record(Refill(parent._modules, dict(parent._modules)))
        Refill(parent._modules, dict(modules))()

    def remove_module(self, parent: nn.Module, name: str) -> None:
        """Take a module out of the one that it is registered in."""
        self.record(Restore.of(parent._modules, name))
        parent._modules.pop(name)

    def keep_values(self, tensors: Iterable[Tensor]) -> None:
        """Keep a copy of parameters or buffers that are going to be written into."""
        for tensor in tensors:
            self.record(partial(write, tensor, tensor.detach().clone()))

    def keep_module(self, module: nn.Module) -> None:
        """Keep a copy of the parameters of a module, of weights that it holds as buffers, and of all that
        parametrizations in it hold, which their inverses may exchange, before a weight is read or written.
        """
        self.keep_values(module.parameters())
        held = (each._buffers.get(name) for each in module.modules() for name in ("weight", "bias"))
        self.keep_values(weight for weight in held if weight is not None)  # and no statistics, which passes write
        lists = [each for each in module.modules() if isinstance(each, ParametrizationList)]
        for each in dict.fromkeys(part for held in lists for part in held.modules()):
            self.keep_values(each.buffers(recurse=False))
            for table in (each._parameters, each._buffers):  # put back before the values are
                self.record(Refill(table, dict(table)))

    def record(self, step: Callable[[], None]) -> None:
        """Record an undo step; it has to restore a known state, so that it can run twice."""
        self.now.clear()
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
        self.now.clear()
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
        """Measure what is compared at the end on the model as it is now."""
        self.versions = {parameter: version_of(parameter) for parameter in self.model.parameters()}
        self.before: dict[Check, Any] = {}
        self.now: dict[Check, Any] = {}
        self.reason = why_not_compared(self.model, self.example)
        if self.reason is None and self.example is not None:
            for check in self.checks:
                try:
                    self.before[check] = check.measure(self.model, self.example)
                except NotComparedError as problem:
                    self.before[check] = problem

    def compare(self) -> float:
        """Largest difference of the outputs in evaluation mode from those before, over their largest magnitude; 0 where
        they are not compared.
        """
        now, check = self.current_outputs(), self.output_check
        return 0.0 if check is None else output_gap(self.before[check], now)

    def current_outputs(self) -> list[Tensor]:
        """Outputs in evaluation mode of the model as it is now; none without an example.

        Where they are compared, they are computed once, until something is changed.
        """
        if self.output_check is not None:
            return self.measure(self.output_check)
        return [] if self.example is None else outputs(self.model, self.example)

    @property
    def output_check(self) -> EvaluatedOutputs | None:
        """The check that compares outputs in evaluation mode, if there is one."""
        return next((check for check in self.before if isinstance(check, EvaluatedOutputs)), None)

    def measure(self, check: Check) -> Any:
        """What a check measures now; once, until something is changed."""
        if check not in self.now and self.example is not None:
            self.now[check] = check.measure(self.model, self.example, self.before.get(check))
        return self.now[check]

    def verify(self) -> dict[str, str]:
        """Compare with what was measured before, in words, by the names of the checks.

        Raises:
            SkipwayError: a check does not hold any more.
        """
        if self.reason is not None:
            return {"nothing": self.reason}
        verified: dict[str, str] = {}
        for check, before in self.before.items():
            try:
                if isinstance(before, NotComparedError):
                    raise before
                verified[check.name] = self.verify_one(check, before)
            except NotComparedError as problem:
                verified[check.name] = f"not compared: {problem}"
            except SkipwayError as problem:
                hint = f"; {self.hint}" if self.hint and not check.awake else ""  # it is about what is computed
                raise SkipwayError(f"{self.title}: {problem}, so that the model was put back{hint}") from problem
        return verified

    def verify_one(self, check: Check, before: Any) -> str:
        """Measure one check again and compare."""
        with self.random_values() if check.awake else nullcontext():
            try:
                after = self.measure(check)
            except NotComparedError as problem:
                raise SkipwayError(f"{check.name}: {problem}, and could be measured before") from problem
            rule = ComparisonRule(self.tolerance, self.recast, partial(self.measure_rounded, check))
            return check.compare(before, after, rule)

    def measure_rounded(self, check: Check) -> Any:
        """What a check measures of a copy of the model whose parameters are changed by a rounding each.

        Raises:
            NotComparedError: the model cannot be copied, or what is measured cannot be.
        """
        try:
            model = copy_module(self.model)
        except Exception as problem:  # somebody's object
            raise NotComparedError(f"it cannot be copied: {problem}") from problem
        for parameter in model.parameters():
            if parameter.is_floating_point():
                write_rounded(parameter)
        assert self.example is not None  # nothing is measured without one
        return check.measure(model, self.example, self.before[check])

    @contextmanager
    def random_values(self) -> Iterator[None]:
        """Within it, parameters that were added or written and are 0, or -1 as in gains of 1 + g, hold random values:
        what puts out 0 hides what it depends on.
        """
        mark = self.mark
        silent = [
            parameter
            for parameter in self.model.parameters()
            if self.versions.get(parameter) != version_of(parameter) and is_silent(parameter)
        ]
        try:
            self.keep_values(silent)
            for parameter in silent:
                draw(parameter, len(silent))
            yield
        finally:
            self.roll_back(mark)

    def refuse_unaveraged(self) -> None:
        """Refuse if the parameters are no longer those that DistributedDataParallel or FSDP averages the gradients of.

        Raises:
            SkipwayError: they are not.
        """
        if averaged_parameters(*self.averaged) != self.averaged:
            replicated = any(isinstance(each, DistributedDataParallel) for each in self.averaged)
            name, way = (
                ("DistributedDataParallel", "operate on the network in it, model.module, and wrap that again")
                if replicated
                else ("FSDP", "operate on the network before it is sharded")
            )
            raise SkipwayError(
                f"{self.title}: the parameters would be others than those that {name} was built with, whose gradients "
                f"alone it averages; {way}"
            )

    def commit(self) -> Operation:
        """Check what has to hold, and keep the changes; the last statement of a transaction.

        Raises:
            SkipwayError: outputs differ by more than the tolerance, another check fails, or DistributedDataParallel is
                or FSDP is around the network and was built with other parameters.
        """
        self.refuse_unaveraged()
        gap = self.compare()
        verified = self.verify()
        if lost := lost_by_saving(self.model, self.added, changed=bool(self.derived) and gap > SAME):
            verified["save_pretrained"] = lost
        report = self.report if self.output_check is None else {"difference": gap, **self.report}
        operation = Operation(
            self.model,
            self.title,
            MappingProxyType(dict(self.touched)),
            MappingProxyType(dict(self.refused)),
            MappingProxyType(dict(report)),
            self.journal,
            MappingProxyType(verified),
        )
        self.journal.commit(self.model, self.title)
        self.committed = True
        return operation


def averaged_parameters(*models: nn.Module) -> dict[nn.Module, set[nn.Parameter]]:
    """The parameters that are trained in each wrapper in some models, or around them, that averages gradients over
    ranks: DistributedDataParallel, FullyShardedDataParallel, and what `fully_shard` was applied to.
    """
    sharding = sys.modules.get("torch.distributed.fsdp")  # not imported here: nobody else may need it
    names = ("FSDPModule", "FullyShardedDataParallel")
    kinds = (DistributedDataParallel, *(getattr(sharding, name) for name in names if hasattr(sharding, name)))
    ranks = {each for model in models for each in model.modules() if isinstance(each, kinds)}
    for each in ranks:
        if callable(reshard := getattr(each, "reshard", None)):  # after a pass its parameters are others until then
            reshard()
    return {each: {parameter for parameter in each.parameters() if parameter.requires_grad} for each in ranks}


def lost_by_saving(model: nn.Module, added: Iterable[nn.Module], *, changed: bool) -> str:
    """What `from_pretrained` does not build again of a network that was changed: it goes by the config, and drops
    weights of other names with a remark at most. Empty where nothing is lost, or the network is not saved so.
    """
    if not any(callable(getattr(module, "save_pretrained", None)) for module in model.modules()):
        return ""
    inside = {id(module): name for name, module in model.named_modules()}
    names = [inside[id(module)] for module in added if id(module) in inside and module.state_dict()]
    again = "build the network, repeat the operation, and load the state dict"
    if names:
        return (
            f"not kept: the config does not describe {abbreviate(names)}, which from_pretrained leaves out; save after "
            f"fold_gains(model, example), where they are gains, or {again}"
        )
    return f"not kept: the config describes the network before the operation: {again}" if changed else ""


def why_not_compared(model: nn.Module, example: Example | None) -> str | None:
    """Why nothing can be compared before and after, if so."""
    if example is None:
        return "no example was given"
    tensors = (*model.parameters(), *model.buffers(), *tensors_in(example))
    return "the model is on the meta device" if any(tensor.is_meta for tensor in tensors) else None


def is_silent(parameter: nn.Parameter) -> bool:
    """Whether a parameter is 0, or -1 as in gains of 1 + g: what it makes puts out 0."""
    return parameter.numel() > 0 and bool((parameter == 0).all() or (parameter == -1).all())


@torch.no_grad()
def draw(parameter: nn.Parameter, count: int) -> None:
    """Write random values into one of so many parameters, so small that all together do not let the signal overflow."""
    fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
    generator = torch.Generator().manual_seed(parameter.numel())
    drawn = torch.randn(parameter.shape, generator=generator, device="cpu") / (fan_in * count) ** 0.5
    parameter.add_(drawn.to(parameter.device, parameter.dtype))


@torch.no_grad()
def write_rounded(parameter: nn.Parameter) -> None:
    """Change each value of a parameter by up to a rounding of its type, at random."""
    generator = torch.Generator().manual_seed(parameter.numel())
    drawn = torch.rand(parameter.shape, generator=generator, device="cpu").to(parameter.device, parameter.dtype) * 2 - 1
    parameter.addcmul_(parameter, drawn, value=torch.finfo(parameter.dtype).eps)


@contextmanager
def transaction(
    model: nn.Module,
    example: Example | None = None,
    *,
    title: str,
    tolerance: float | None = None,
    hint: str = "",
    checks: Sequence[Check] = CHECKS,
    wrapped: nn.Module | None = None,
) -> Iterator[Transaction]:
    """Change a model in place, completely or not at all.

    A transaction within another one on the same model, or on a part of it, is rolled back with the outer one.

    Args:
        model: any module.
        example: what the model is called with; what has to hold is checked on it.
        title: the operation in words.
        tolerance: bound on the difference of the outputs, relative to their largest value; None reports it only.
        hint: the way out, at the end of the error message if a check fails.
        checks: what has to hold afterwards: `CHECKS`, or `EQUAL` where the function stays in training mode, too.
        wrapped: the model in the wrappers that it was given in, if it was.

    Raises:
        SkipwayError: the tolerance is no number, or below 0.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> with transaction(model, title="without rectifier") as change:
    ...     change.set_submodule("1", nn.Identity())
    ...     operation = change.commit()
    >>> model[1], operation.undo()[1]
    (Identity(), ReLU())
    """
    model = require_module(model)
    if tolerance is not None:
        check_tolerance("tolerance", tolerance)
    example = None if example is None else as_example(example)
    # what was made in inference mode could never be trained
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        change = Transaction(
            model, example, title=title, tolerance=tolerance, hint=hint, checks=checks, wrapped=wrapped
        )
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


@dataclass
class Refill:
    """Undo step: all entries of a module's table as they were.

    Args:
        table: the modules, parameters or buffers of a module, by name.
        value: the old entries, in their order.
    """

    table: dict[str, Any]
    value: dict[str, Any]

    def __call__(self) -> None:
        self.table.clear()
        self.table.update(self.value)


@torch.no_grad()
def write(tensor: Tensor, values: Tensor) -> None:
    """Write values into a tensor."""
    tensor.copy_(values)
