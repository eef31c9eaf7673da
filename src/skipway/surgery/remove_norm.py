"""`remove_norm(model, example)`: a trained network freed of its BatchNorms, so that training can go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from skipway.errors import SkipwayError
from skipway.surgery.operation import Operation
from skipway.surgery.preconditions import admitted, refuse_branching
from skipway.surgery.rescheme import rescheme
from skipway.surgery.verification import difference, outputs
from skipway.tracing import Example, Program, preserved_state, watch
from skipway.tracing.example import call_model
from skipway.validation import check_choice

__all__ = ["remove_norm"]

How = Literal["fold", "skipinit", "normfree"]


def remove_norm(
    model: nn.Module, example: Example, how: How = "skipinit", *, calibrate: bool = False, tolerance: float = 1e-4
) -> Operation:
    """Take the BatchNorms out of a trained network, in place, without changing what it computes in evaluation mode.

    A norm right behind a convolution or linear map that nothing else reads goes into that map: W ← W γ/√(σ² + ε),
    b ← β + (b − μ) γ/√(σ² + ε), channel by channel (P17). A norm elsewhere (in front of a map, as in pre-activation)
    becomes the same factor and shift with learned values. Folded networks fine-tune badly, since nothing holds the
    stream's size any more; "skipinit" therefore puts a learned scalar of 1 behind every branch, whose small steps set
    the branches' sizes (De & Smith 2020). "normfree" dresses the folded network in `NormFree` instead (Brock et al.
    2021, https://arxiv.org/abs/2101.08692): the branches' weights are standardised in every pass,
    Ŵ = g (W − μ)/(σ√fan_in) + m, 1/β stands in front of a branch and α g behind it, with g and m such that nothing
    changes. A trained kernel's mean m is kept as a parameter: it multiplies the sum of the map's input, which no bias
    can take on. The activations' constants γ are within g. What the paper's theory says of sizes at the start does not
    hold for trained weights.

    Args:
        model: a trained module with running statistics; it is put into evaluation mode for checking only.
        example: what it is called with; with `calibrate` a representative batch.
        how: "fold"; "skipinit": fold, then SkipInit at 1; "normfree": fold, then NormFree with what was trained.
        calibrate: first set the running statistics to those of `example`.
        tolerance: by how much the output may differ, relative to its largest value.

    Returns:
        the operation; `touched` says for each norm where it went.

    Raises:
        SkipwayError: no BatchNorm with running statistics, or the output changes; the model is as before.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> operation = remove_norm(model, torch.randn(2, 3, 8, 8), how="fold")
    >>> operation.touched
    {'1': 'into 0'}
    >>> model[1]
    Identity()
    """
    model = admitted(model)
    check_choice("how", how, get_args(How))
    names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    norms = [name for name in names if model.get_submodule(name).running_mean is not None]
    if not norms:
        raise SkipwayError(
            f"{type(model).__name__} holds {len(names)} BatchNorms, none with running statistics: nothing to fold"
        )
    refuse_branching(model, example, "remove_norm")
    operation = Operation(model, f"{type(model).__name__} freed of {len(norms)} BatchNorms ({how})", {}, {}, {})
    touched: dict[str, str] = {}
    try:
        if calibrate:
            operation.steps.append(recalibrate(model, norms, example))
        before, program = outputs(model, example), watch(model, example)
        for name in norms:
            target = map_in_front(model, program, name)
            operation.steps += replace_norm(model, name, target)
            touched[name] = "a factor and a shift in its place" if target is None else f"into {target}"
        if how != "fold":
            dressing = rescheme(model, how, example, tolerance=tolerance)
            operation.steps.append(taking_back(dressing))
            operation.refused = dressing.refused
        report = {"difference": difference(before, outputs(model, example))}
        if not report["difference"] <= tolerance:
            raise SkipwayError(f"without norms the output changes by {report['difference']:.3g} of its largest value")
    except Exception:
        operation.undo()
        raise
    operation.touched, operation.report = touched, report
    return operation


def taking_back(operation: Operation) -> Callable[[], None]:
    """What undoes an inner operation."""

    def undo() -> None:
        operation.undo()

    return undo


def map_in_front(model: nn.Module, program: Program, norm: str) -> str | None:
    """The module whose map a norm stands right behind, where neither is used for anything else."""
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
    plain = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) or type(module).forward is nn.Conv2d.forward
    shared = sum(1 for other in model.modules() if other is not module and has(other, module.weight))
    return owner if plain and not shared and not hasattr(module, "parametrizations") else None


def has(module: nn.Module, weight: object) -> bool:
    return any(parameter is weight for parameter in module._parameters.values())


@torch.no_grad()
def replace_norm(model: nn.Module, name: str, target: str | None) -> list[Callable[[], None]]:
    """Fold one norm, or put a factor and a shift in its place; what takes it back."""
    norm = model.get_submodule(name)
    assert isinstance(norm, _BatchNorm)
    factor, shift = affine(norm)
    rest = remainder(norm)
    if target is None:
        rest = nn.Sequential(FactorShift(factor, shift, norm), *([] if isinstance(rest, nn.Identity) else [rest]))
        model.set_submodule(name, rest.train(norm.training))
        return [lambda: model.set_submodule(name, norm)]
    module = model.get_submodule(target)
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    folded = weight.detach() * factor.view(-1, *(1,) * (weight.ndim - 1)).to(weight.dtype)
    old = shift if bias is None else shift + bias.detach() * factor  # type: ignore[operator]
    module.weight = nn.Parameter(folded, requires_grad=weight.requires_grad)
    module.bias = nn.Parameter(old.to(weight.dtype), requires_grad=weight.requires_grad)

    def put_back() -> None:
        module.weight, module.bias = weight, bias

    model.set_submodule(name, rest.train(norm.training))
    return [put_back, lambda: model.set_submodule(name, norm)]


def affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """γ/√(σ² + ε) and β − μγ/√(σ² + ε)."""
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    factor = (variance + norm.eps).rsqrt()
    if norm.affine:
        factor = factor * norm.weight
    shift = -mean * factor
    return factor.detach(), (shift + norm.bias if norm.affine else shift).detach()


def remainder(norm: _BatchNorm) -> nn.Module:
    """What a norm's class does beside norming: timm's hold dropout and activation."""
    rest = [module for module in norm.children() if not isinstance(module, nn.Identity)]
    return nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest)


class FactorShift(nn.Module):
    """y = factor · x + shift, both learned, one of each per channel (axis 1)."""

    def __init__(self, factor: Tensor, shift: Tensor, norm: _BatchNorm) -> None:
        super().__init__()
        trained = norm.weight.requires_grad if norm.affine else True
        self.weight = nn.Parameter(factor.clone(), requires_grad=trained)
        self.bias = nn.Parameter(shift.clone(), requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *(1,) * (x.ndim - 2))
        return x * self.weight.view(shape) + self.bias.view(shape)


def recalibrate(model: nn.Module, norms: list[str], example: Example) -> Callable[[], None]:
    """Set the running statistics to those of a batch; what takes it back."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modules = [model.get_submodule(name) for name in norms]
    momenta = [module.momentum for module in modules]
    statistics: list[tuple[Tensor, Tensor]] = []
    for module in modules:
        module.momentum = 1.0  # type: ignore[assignment]
    with preserved_state(model), torch.no_grad():
        model.train()
        call_model(model, example)
        statistics = [(m.running_mean.clone(), m.running_var.clone()) for m in modules]  # type: ignore[operator, union-attr]
    for module, momentum, (mean, variance) in zip(modules, momenta, statistics, strict=True):
        module.momentum = momentum
        module.running_mean.copy_(mean)  # type: ignore[operator, union-attr]
        module.running_var.copy_(variance)  # type: ignore[operator, union-attr]

    def put_back() -> None:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in kept:
                    buffer.copy_(kept[name])

    return put_back
