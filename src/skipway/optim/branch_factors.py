"""Which parameters stand in front of a constant factor on a branch, and so get what that asks of an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from operator import mul

from torch import nn

from skipway.errors import SkipwayError
from skipway.nn import BranchFactors, Multiply, Residual
from skipway.nn.shortcut import reads_prepared
from skipway.optim.roles import stated_example
from skipway.tracing import Example, Program, watch

__all__ = ["branch_factors"]


def branch_factors(model: nn.Module, example: Example | Program | None = None) -> dict[str, BranchFactors]:
    """What the constants on a network's branches ask for each parameter in front of them, by the parameter's name.

    In a `Residual` these are the parameters of its branch, its scale and, unless the shortcut reads what `pre` makes,
    of `pre`. In other networks (`skipway.rescheme`) they are those whose whole effect on the output passes the
    factor, as one watched forward pass shows. Parameters without factors are left out; the model is left unchanged.

    Raises:
        SkipwayError: factors stand outside of Skipway's connections, and there is neither an example nor one that the
            model states about itself.
    """
    constants = dict(constants_of(model))
    found: dict[str, BranchFactors] = {}
    for path, residual in model.named_modules() if constants else ():
        if not isinstance(residual, Residual):
            continue
        inside = f"{path}.scale".removeprefix(".")
        own = [name for name, _ in residual.scale.named_modules(prefix=inside) if name in constants]
        factors = reduce(mul, (constants.pop(name) for name in own), BranchFactors())
        if factors != BranchFactors():
            found |= {f"{path}.{name}".removeprefix("."): factors for name in names_in_branch(residual)}
    if constants:
        watched = watched_factors(model, example, constants)
        found |= {name: found.get(name, BranchFactors()) * factors for name, factors in watched.items()}
    return found


def constants_of(model: nn.Module) -> Iterator[tuple[str, BranchFactors]]:
    """The constants of a model that ask something of an optimizer, by their paths."""
    for name, module in model.named_modules():
        if isinstance(module, Multiply) and module.branch_factors is not None:
            yield name, module.branch_factors


def names_in_branch(residual: Residual) -> Iterator[str]:
    """The parameters of a connection whose whole effect passes its scale."""
    slots = ["branch", "scale", *([] if reads_prepared(residual.shortcut) else ["pre"])]
    for slot in slots:
        for name, _ in residual.get_submodule(slot).named_parameters():
            yield f"{slot}.{name}"


def watched_factors(
    model: nn.Module, example: Example | Program | None, constants: dict[str, BranchFactors]
) -> dict[str, BranchFactors]:
    """The factors of each parameter whose every way to the output passes constants, in one forward pass."""
    given = stated_example(model) if example is None else example
    if given is None:
        raise SkipwayError(
            f"{type(model).__name__} has branches whose parameters learn at rates of their own, and which these are is "
            "found by watching; give an example of what it is called with, param_groups(model, example, …)"
        )
    program = given if isinstance(given, Program) else watch(model, given)
    found: dict[str, BranchFactors] = {}
    passed = constants_passed(program, constants)
    for value, names in zip(program.values, passed, strict=True):
        if value.operator == "parameter" and len(value.parameters) == 1 and names:
            (name,) = value.parameters
            found[name] = reduce(mul, (constants[each] for each in sorted(names)), BranchFactors())
    return found


def constants_passed(program: Program, constants: Iterable[str]) -> list[frozenset[str]]:
    """For each value the modules among `constants` that every way from it to the output passes."""
    outputs = set(program.returned.get("", {}).values())
    made = {number: name for name in constants for number in program.returned.get(name, {}).values()}
    passed: list[frozenset[str] | None] = [None] * len(program)
    for value in reversed(program.values):
        ways = [frozenset[str]()] if value.number in outputs else []
        ways += [each for user in program.users[value.number] if (each := passed[user]) is not None]
        if ways:
            own = frozenset({made[value.number]} if value.number in made else ())
            passed[value.number] = frozenset.intersection(*ways) | own
    return [each or frozenset() for each in passed]
