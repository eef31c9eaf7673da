"""`remove_norm(model, example)`: a trained network freed of its BatchNorms, so that training can go on."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skipway.errors import SkipwayError
from skipway.surgery.fusion import has_own_weights
from skipway.surgery.operation import Operation
from skipway.surgery.preconditions import refuse_branching, require_operable
from skipway.surgery.rescheme import rescheme
from skipway.surgery.transaction import Transaction, transaction
from skipway.tracing import Example, Program, as_example, call_model, preserved_state, watch
from skipway.tracing.example import copy_example
from skipway.validation import check_call, check_choice, check_flag, check_tolerance

__all__ = ["remove_norm"]

How = Literal["fold", "skipinit", "normfree"]


@check_call
def remove_norm(
    model: nn.Module, example: Example, how: How = "skipinit", *, calibrate: bool = False, tolerance: float = 1e-4
) -> Operation:
    """Take the BatchNorms out of a trained network, in place, without changing what it computes in evaluation mode.

    A norm right after a convolution or linear map that nothing else reads goes into that map: W ← W γ/√(σ² + ε),
    b ← β + (b − μ) γ/√(σ² + ε), channel by channel (P17). A norm elsewhere (before a map, as in pre-activation)
    becomes the same factor and shift with learned values. Folded networks fine-tune badly, since nothing bounds the
    size of the stream any more; "skipinit" therefore inserts a learned scalar of 1 after every branch, whose small
    steps set the sizes of the branches (De & Smith 2020). "normfree" dresses the folded network in `NormFree` instead
    (Brock et al. 2021, https://arxiv.org/abs/2101.08692): the branches' weights are standardised in every pass,
    Ŵ = g (W − μ)/(σ√fan_in) + m, with 1/β before a branch and α g after it, where g and m are such that nothing
    changes. A trained kernel's mean m is kept as a parameter: it multiplies the sum of the map's input, which no bias
    can replace. The activations' constants γ are within g. The paper's theory about sizes at the start does not hold
    for trained weights.

    Args:
        model: a trained module with running statistics.
        example: what it is called with; with `calibrate` a representative batch.
        how: "fold"; "skipinit": fold, then SkipInit at 1; "normfree": fold, then NormFree with the trained weights.
        calibrate: first set the running statistics to those of `example`.
        tolerance: bound on the difference of the outputs, relative to their largest value.

    Returns:
        the operation; `touched` says for each norm where it went.

    Raises:
        SkipwayError: no BatchNorm with running statistics, or the output changed; the model is as before.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> operation = remove_norm(model, torch.randn(2, 3, 8, 8), how="fold")
    >>> dict(operation.touched)
    {'1': 'into 0'}
    >>> model[1]
    Identity()
    """
    wrapped, model, example = model, require_operable(model), as_example(example)
    check_choice("how", how, get_args(How))
    check_flag("calibrate", calibrate)
    check_tolerance("tolerance", tolerance)
    norms = norms_with_statistics(model)
    refuse_branching(model, example, "remove_norm")
    title = f"{type(model).__name__} freed of {len(norms)} BatchNorms ({how})"
    with transaction(model, example, title=title, tolerance=tolerance, wrapped=wrapped) as change:
        if calibrate:
            recalibrate(change, norms, example)
            change.compare_from_here()
        program = watch(model, example)
        for name in norms:
            change.touched[name] = replace_norm(change, name, preceding_map(model, program, name))
        if how != "fold":
            change.refused.update(rescheme(model, example, how, tolerance=math.inf).refused)  # compared below
        return change.commit()


def norms_with_statistics(model: nn.Module) -> list[str]:
    """Names of the BatchNorms that have running statistics, of which there has to be one."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    names = [name for name, norm in norms.items() if norm.running_mean is not None]
    if not names:
        raise SkipwayError(
            f"{type(model).__name__} holds {len(norms)} BatchNorms, none with running statistics: nothing to fold"
        )
    return names


def preceding_map(model: nn.Module, program: Program, norm: str) -> str | None:
    """The map whose output goes into a norm, if neither is used for anything else."""
    values = [value for value in program.values if value.norm == norm and value.part == "norm" and not value.output]
    if len(values) != 1 or program.runs.get(norm, 0) != 1:
        return None
    (given,) = program.signals(values[0])
    source = program[given]
    readers = {program[user].norm for user in program.users[given] if program[user].signal}
    owner = program.weight_owner(source)
    if source.part != "map" or readers != {norm} or program.runs.get(owner, 0) != 1 or not owner:
        return None
    module = model.get_submodule(owner)
    known = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) or type(module).forward is nn.Conv2d.forward
    if not known or not has_own_weights(module):
        return None
    shared = any(holds(other, module.weight) for other in model.modules() if other is not module)
    return None if shared else owner


def holds(module: nn.Module, weight: object) -> bool:
    """Whether a tensor is a parameter of the module itself."""
    return any(parameter is weight for parameter in module._parameters.values())


@torch.no_grad()
def replace_norm(change: Transaction, name: str, host: str | None) -> str:
    """Fold a norm into a map, or put a factor and a shift in its place, in place; returns which."""
    norm = change.model.get_submodule(name)
    assert isinstance(norm, _BatchNorm)
    rest = remainder(norm)
    if host is None:
        rest = nn.Sequential(FactorShift(norm), *([] if isinstance(rest, nn.Identity) else [rest]))
        where = "a factor and a shift in its place"
    else:
        where = f"into {host}{fold_into(change, change.model.get_submodule(host), norm)}"
    change.set_submodule(name, rest.train(norm.training))
    return where


def fold_into(change: Transaction, host: nn.Module, norm: _BatchNorm) -> str:
    """W ← W · factor, b ← b · factor + shift, with new parameters, which are trained if one was that went into them;
    returns a remark.
    """
    weight, bias = host.weight, host.bias
    assert isinstance(weight, Tensor)
    factor, shift = affine(norm)
    scaled = weight.detach() * factor.view(-1, *(1,) * (weight.ndim - 1)).to(weight.dtype)
    shifted = shift + bias.detach() * factor if isinstance(bias, Tensor) else shift
    learns = any_trained(weight, norm.weight)
    shifts = any_trained(bias, norm.bias) if isinstance(bias, Tensor) or norm.bias is not None else learns
    change.set_parameter(host, "weight", nn.Parameter(scaled, requires_grad=learns))
    change.set_parameter(host, "bias", nn.Parameter(shifted.to(weight.dtype), requires_grad=shifts))
    return ", whose weight is trained from now on as the norm's was" if learns and not weight.requires_grad else ""


def any_trained(*parameters: object) -> bool:
    """Whether one of these is trained; what is absent is not."""
    return any(isinstance(each, Tensor) and each.requires_grad for each in parameters)


def affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """γ/√(σ² + ε) and β − μγ/√(σ² + ε)."""
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    factor = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -mean * factor
    return factor.detach(), (shift if norm.bias is None else shift + norm.bias).detach()


def remainder(norm: _BatchNorm) -> nn.Module:
    """The modules within a norm (timm's hold dropout and activation) without the norm."""
    rest = [module for module in norm.children() if not isinstance(module, nn.Identity)]
    return nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest)


class FactorShift(nn.Module):
    """y = factor · x + shift, both learned, one of each per channel (axis 1); y has the type of x, as a norm's does."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        factor, shift = affine(norm)
        self.weight = nn.Parameter(factor, requires_grad=norm.weight is None or norm.weight.requires_grad)
        self.bias = nn.Parameter(shift, requires_grad=norm.bias is None or norm.bias.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *(1,) * (x.ndim - 2))
        return (x * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


def recalibrate(change: Transaction, norms: list[str], example: Example) -> None:
    """Set the running statistics to those of the example, in place."""
    model, modules = change.model, [change.model.get_submodule(name) for name in norms]
    mark = change.mark
    for module in modules:
        change.set_attribute(module, "momentum", 1.0)
    with preserved_state(model), torch.no_grad():
        call_model(model.train(), copy_example(example))
        statistics = [(m.running_mean.clone(), m.running_var.clone()) for m in modules]  # type: ignore[operator, union-attr]
    change.roll_back(mark)
    for module, (mean, variance) in zip(modules, statistics, strict=True):
        change.keep_values([module.running_mean, module.running_var])  # type: ignore[list-item]
        module.running_mean.copy_(mean)  # type: ignore[operator, union-attr]
        module.running_var.copy_(variance)  # type: ignore[operator, union-attr]
