"""Branches that put out 0 and learn from the first step on, whatever computes their last weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.nn import Gain
from skipway.surgery.block_call import has_module
from skipway.surgery.fusion import NORMS
from skipway.surgery.insertion_point import find_insertion_points, insert_at
from skipway.surgery.transaction import Transaction
from skipway.tracing import Program
from skipway.tracing.chain import WatchedConnection
from skipway.tracing.operators import is_linear_map
from skipway.tracing.program import Value

__all__ = ["silence_branch"]

THROUGH = frozenset({"carry", "slice", "stride", "pad", "pool", "drop", "scale", "mean", "upsample"})
"""Parts of a program that make 0 of 0."""
ODD = frozenset({"relu", "gelu", "silu", "tanh", "hardswish", "leaky_relu", "elu", "mish", "prelu", "selu", "celu"})
"""Non-linearities that make 0 of 0."""


def silence_branch(
    change: Transaction, twin: nn.Module, name: str, program: Program, connection: WatchedConnection
) -> None:
    """Let a branch of a copied block put out 0, in place: the gain of its closing norm or its last maps become 0; a
    branch whose end holds neither, or whose weight is computed so that it cannot be 0, is multiplied by a learned gain
    that starts at 0.

    Args:
        change: the transaction.
        twin: the copy, which is not part of the model yet.
        name: of the block in the model.
        program: what the model runs.
        connection: of the block.

    Raises:
        SkipwayError: there is no place for such a gain either.
    """
    _, branch, _, start = connection.seen.numbers
    ends = list(dict.fromkeys(branch_ends(program, branch, start) or ()))
    prefix = f"{name}."
    old = {key: each.detach().clone().requires_grad_(each.requires_grad) for key, each in held(twin).items()}
    inside = [end.removeprefix(prefix) for end in ends if end.startswith(prefix)]
    if ends and len(inside) == len(ends) and all(silence_end(twin, end) for end in inside):
        return
    restore(twin, old)
    try:
        points = find_insertion_points(change.model, program, connection)
    except SkipwayError as problem:
        raise SkipwayError(
            f"a branch of {name!r} ends in no linear map and no norm with a gain, and cannot be multiplied: {problem}"
        ) from problem
    for point in points:
        if not f"{point.name}.".startswith(prefix):
            raise SkipwayError(f"a branch of {name!r} ends outside of it, in {point.name!r}")
        insert_at(change, twin.get_submodule(point.name[len(prefix) :]), point, Gain(init=0.0))


def held(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, by the keys of its state dict."""
    return {key: each for key, each in module.state_dict(keep_vars=True).items() if isinstance(each, Tensor)}


@torch.no_grad()
def restore(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Write values back, and whether they are trained."""
    for key, tensor in held(module).items():
        tensor.copy_(values[key])
        if tensor.is_leaf:
            tensor.requires_grad_(values[key].requires_grad)


def branch_ends(program: Program, number: int, start: int) -> list[str] | None:
    """The norms, maps and parameters that make a value 0 where they are 0; None if there are none."""
    ends: list[str] = []
    while True:
        value = program[number]
        if value.norm is not None:
            return [*ends, value.norm]
        if number == start or not value.signal:
            return None
        constants = [program[operand] for operand in value.operands if not program[operand].signal]
        learned = [constant for constant in constants if constant.parameters]
        if learned and (value.part in {"map", "upsample"} or is_linear_map(value.operator)):
            return [*ends, *(factor_name(program, constant) for constant in learned)]
        signals = program.signals(value)
        if value.part in {"sum", "join", "product"}:
            found = [branch_ends(program, signal, start) for signal in signals]
            if value.part == "product":
                factor = next((each for each in found if each is not None), None)
                return None if factor is None else [*ends, *factor]
            return None if None in found else [*ends, *(end for each in found if each is not None for end in each)]
        if value.part == "shift" and learned and len(learned) == len(constants):
            ends += [factor_name(program, constant) for constant in learned]
        elif not signals or not (value.part in THROUGH or value.operator.removesuffix("_") in ODD):
            return None
        number = signals[0]


def factor_name(program: Program, constant: Value) -> str:
    """The parameter that a constant is, or the module whose weight is computed from several."""
    while constant.part == "carry" and len(constant.operands) == 1 and constant.operator != "parameter":
        constant = program[constant.operands[0]]
    if len(constant.parameters) == 1 and constant.operator == "parameter":
        return next(iter(constant.parameters))
    longest = max(constant.parameters, key=len)
    module, _, rest = longest.partition(".parametrizations.")
    return module if rest else longest.rpartition(".")[0]


@torch.no_grad()
def silence_end(block: nn.Module, name: str) -> bool:
    """Set a parameter, or the weight and bias of a map or norm, so that it puts out 0 and is trained; False if that is
    not possible.

    A weight that is computed from several parameters becomes 0 where one of them is a factor of it (weight norm).
    """
    if name in (own := dict(block.named_parameters())):
        make_trainable(own[name].zero_())
        return True
    if not has_module(block, name):
        return False
    module = block.get_submodule(name)
    bias = getattr(module, "bias", None)
    if isinstance(bias, nn.Parameter):
        bias.zero_()
    elif isinstance(bias, Tensor):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.ndim == 1:
        return silence_gain(module, weight)
    return isinstance(weight, Tensor) and any(factor_silenced(module, factor) for factor in weight_factors(module))


def weight_factors(module: nn.Module) -> Iterator[nn.Parameter]:
    """The weight of a map, or the parameters that it is computed from: those of weight norm, old and new."""
    for name, parameter in module.named_parameters():
        if name == "weight" or name.startswith(("weight_", "parametrizations.weight.")):
            yield parameter


def factor_silenced(module: nn.Module, factor: nn.Parameter) -> bool:
    """Whether the weight is 0 where this parameter is, and moves with it; if not, the parameter stays what it was."""
    old, trained = factor.detach().clone(), factor.requires_grad
    make_trainable(factor.zero_())
    with torch.enable_grad():
        for hook in module._forward_pre_hooks.values():
            if hasattr(hook, "compute_weight"):  # weight norm and spectral norm in their older form
                hook(module, ())
        weight = module.weight
        assert isinstance(weight, Tensor)
        if not weight.any():  # not a number is true
            probe = torch.linspace(0.5, 1, weight.numel(), device=weight.device, dtype=weight.dtype).view_as(weight)
            if not factor.requires_grad:
                return True
            (slope,) = torch.autograd.grad((weight * probe).sum(), [factor], allow_unused=True)
            if slope is not None and slope.isfinite().all() and slope.any():
                return True
    factor.copy_(old)
    factor.requires_grad_(trained)
    return False


def make_trainable(parameter: Tensor) -> None:
    """Let a parameter be trained, in a frozen network too, if it is of a type that can be."""
    if parameter.is_floating_point() or parameter.is_complex():
        parameter.requires_grad_(True)


def silence_gain(norm: nn.Module, gain: nn.Parameter) -> bool:
    """Set the gain of a norm so that it puts out 0: to 0, or to -1 where the norm computes (1 + gain) ⊙ x̂ (Gemma)."""
    probe = torch.linspace(-1, 1, 2 * gain.numel(), device=gain.device, dtype=gain.dtype).view(2, -1)
    trained = gain.requires_grad
    make_trainable(gain)
    for value in (0.0, -1.0):
        gain.fill_(value)
        try:
            if isinstance(norm, NORMS) or not norm(probe).any():
                return True
        except (RuntimeError, ValueError, TypeError, IndexError):  # it takes inputs of another form
            return value == 0
    gain.requires_grad_(trained)
    return False
