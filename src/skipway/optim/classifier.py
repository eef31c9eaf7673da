"""The weights of a network's classifier, which some optimizers and clippers treat apart."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile

from torch import Tensor, nn

from skipway.nn import Classifier, Residual, Role
from skipway.optim.roles import WEIGHT, owner_of
from skipway.tracing import Program, Value

__all__ = ["classifier_weights"]

FOLLOWING = frozenset({"carry", "scale", "shift", "nonlinear", "softmax", "pool", "upsample", "mean", "drop", "slice"})
"""What may follow a classifier; no map and no norm. Scores of pixels may be resampled, with fixed weights."""


def classifier_weights(model: nn.Module, program: Program | None, roles: Mapping[str, Role]) -> list[Tensor]:
    """The matrices that the scores are computed with, frozen ones included; none of a trunk.

    A network may say which one it is (`classifier_weight()`). In others it is seen in the program that they run, and
    without one it is the last linear map outside of connections, in the order of registration; or each `Classifier`
    behind which no other map is registered.

    Args:
        model: any module.
        program: that it runs, where it is known.
        roles: of all parameters, see `parameter_roles`.
    """
    said = getattr(model, "classifier_weight", None)
    if callable(said) and isinstance(weight := said(), nn.Parameter):
        return [weight]
    named = dict(model.named_parameters(remove_duplicate=False))
    names = last_names(model, roles) if program is None else names_of_scores(program, named)
    return [named[name] for name in names if named[name].ndim > 1]


def names_of_scores(program: Program, named: Mapping[str, Tensor]) -> list[str]:
    """The weights, of those that are `named`, that the scores are mapped by: from the first output back to the first
    maps on every way; empty where one comes from other parts, as in a trunk.
    """
    outputs = (program[number] for number in program.returned.get("", {}).values())
    scores = next((value for value in outputs if value.floating and len(value.shape) > 1), None)
    waiting, names = [] if scores is None else [scores.number], dict[str, None]()
    while waiting:
        value = program[waiting.pop()]
        constants = [program[operand] for operand in value.operands if not program[operand].signal]
        own = [name for constant in constants for name in sorted(constant.parameters) if name in named]
        if value.norm is None and (value.part == "map" or (value.part == "upsample" and own)):
            names.update(dict.fromkeys(own))
        elif value.norm is None and (value.part in FOLLOWING or adds_scores(program, value)):
            waiting += program.signals(value)
        else:
            return []
    return list(names)


def adds_scores(program: Program, value: Value) -> bool:
    """Whether a sum adds scores of several ways, and not a branch to the stream that it was computed from."""
    if value.part != "sum" or len(value.shape) != 2:
        return False
    terms = program.signals(value)
    return not any(one != other and program.depends(one, other) for one in terms for other in terms)


def last_names(model: nn.Module, roles: Mapping[str, Role]) -> list[str]:
    """The last of `names_outside`, or several where they are `Classifier`s."""
    names = names_outside(model, roles)
    heads = list(takewhile(lambda name: isinstance(model.get_submodule(owner_of(name)), Classifier), reversed(names)))
    return heads or names[-1:]


def names_outside(model: nn.Module, roles: Mapping[str, Role]) -> list[str]:
    """Weights of linear maps outside of connections of ours, tied ones at every place that they are registered at."""
    modules = model.named_modules()
    connections = tuple(f"{path}.".removeprefix(".") for path, module in modules if isinstance(module, Residual))
    named = dict(model.named_parameters(remove_duplicate=False))
    return [
        name
        for name, parameter in named.items()
        if parameter.ndim > 1
        and (roles[name] == WEIGHT or isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear))
        and not name.startswith(connections)
    ]
