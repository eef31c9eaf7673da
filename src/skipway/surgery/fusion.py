"""Fusion: norms with fixed statistics, gains and constants multiplied into the preceding weights of a new network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from skipway.errors import SkipwayError
from skipway.nn import (
    Bias,
    Branch,
    DropPath,
    Gain,
    LayerNorm2d,
    Multiply,
    Residual,
    ResidualWarmup,
    ScaledStandardConv2d,
    ScaledStandardLinear,
)
from skipway.tracing.module_state import copy_module
from skipway.tracing.watch import require_module
from skipway.validation import check_call

__all__ = ["Fusion", "fuse", "fuse_with_report"]

M = TypeVar("M", bound=nn.Module)

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MAPS = (*CONVOLUTIONS, nn.Linear)
AXES = (
    *((nn.Conv1d, -2), (nn.Conv2d, -3), (nn.Conv3d, -4), (nn.Linear, -1)),
    *((LayerNorm2d, -3), (nn.LayerNorm, -1), (nn.BatchNorm2d, -3)),
)
HOOKS_OF_ALL = (modules._global_forward_hooks, modules._global_forward_pre_hooks)
"""Hooks that torch calls for every module."""
LINES = 8
"""Fused and kept modules that are printed."""
NORMS = (nn.LayerNorm, LayerNorm2d, nn.GroupNorm, _BatchNorm)
IDLE = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath)
"""Modules that are the identity in evaluation mode."""

METHODS = ("forward", "_conv_forward", "mask")
"""Methods that decide what a module computes."""

LINEAR = ("in_features", "out_features")
CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
"""Arguments of the constructors of maps."""


@dataclass(frozen=True)
class Fusion(Generic[M]):
    """A fused network, and what became of its modules. Printed, it fits on one screen at any depth.

    Args:
        model: the fused network, in evaluation mode.
        fused: path of a module that is gone → where its effect is now.
        kept: path of a BatchNorm, gain, constant or bias of its own that is still there → why.
    """

    model: M = field(repr=False)
    fused: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        gone = [f"  {name} → {home}" for name, home in self.fused.items()]
        kept = [f"  {name}: {reason}" for name, reason in self.kept.items()]
        lines = [f"{len(gone)} fused", *gone[:LINES], *["…"][: len(gone) > LINES]]
        lines += [f"{len(kept)} kept", *kept[:LINES], *["…"][: len(kept) > LINES]]
        return "\n".join(lines)


@dataclass(frozen=True)
class Affine:
    """y = scale ⊙ x + shift, over channels; computed in float64 on the CPU.

    Args:
        scale: of shape () or (C,).
        shift: of shape () or (C,), None for none.
        axis: of the channels from the end, if it is known; None for one number, too.
        norm: whether it is a BatchNorm's, which is fused into convolutions only.
        trained: whether the shift is; None where it is no parameter.
    """

    scale: Tensor
    shift: Tensor | None = None
    axis: int | None = None
    norm: bool = False
    trained: bool | None = None


@check_call
def fuse(model: M) -> M:
    """Return a new network for inference: BatchNorm, LayerScale, SkipInit and other gains multiplied into neighbouring
    weights. The model itself is left alone.

    | module | fused into | equation |
    |---|---|---|
    | BatchNorm right after a convolution | the convolution | W' = s W, b' = s (b - μ) + β, s = γ / √(σ² + ε) |
    | a gain or constant g on the branch | its last map, or its closing norm's affine | W' = g W, b' = g b |
    | a scalar bias right after a map | the map | b' = b + β |
    | standardised weights | fixed weights | W' = g (W - μ) / √max(σ²·fan_in, ε) |
    | stochastic depth | nothing: the identity in eval | |
    | a residual warm-up at its end | nothing: its factor is 1; one that runs stays, since it follows the training | |

    Outputs in evaluation mode are equal up to rounding: 1e-5 of the largest in float32. A norm or gain after an
    addition, an activation or a gate stays; `fuse_with_report` lists them with the reason. The fused network has no
    norms that keep training stable, so it is for inference: fine-tune the original. A module that is an `nn.Sequential`
    is assumed to be called as a whole.

    Args:
        model: any module, in any mode; residual connections of ours are fused along their branches.

    Returns:
        a copy in evaluation mode, of the same type; fused modules are replaced by `nn.Identity`.

    Raises:
        SkipwayError: the model is on the meta device, without values to fuse.

    Source: BatchNorm as in Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", sec. 3.2.

    >>> import skipway as sw
    >>> block = sw.build("resnet20", scheme="skipinit").stages[0][0]
    >>> fuse(block).branch
    ConvBranch(
      (conv1): Conv2d(16, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
      (norm1): Identity()
      (act1): ReLU(...)
      (conv2): Conv2d(16, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
      (norm2): Identity()
    )
    >>> fuse(block).scale
    Identity()
    """
    return fuse_with_report(model).model


@torch.no_grad()
def fuse_with_report(model: M) -> Fusion[M]:
    """Return a fused copy of a model, with a report of every module that was fused and every one that was kept.

    >>> import skipway as sw
    >>> done = fuse_with_report(sw.build("resnet20", scheme="preactivation"))
    >>> done.fused["stages.0.0.branch.norm1"], done.kept["stages.0.0.pre.norm"]
    ('stages.0.0.branch.conv1', 'no map or norm right before it')
    """
    require_module(model)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise SkipwayError(
            f"{type(model).__name__} is on the meta device: there are no values to fuse; load weights first"
        )
    model = copy_module(model).eval()
    fuser = Fuser(model, Fusion(model))
    fuser.fix_standardised_weights()
    for find in (sequence_row, branch_row):
        for module in list(model.modules()):
            fuser.fuse_row(find(module))
    fuser.remove_idle()
    fuser.explain_kept()
    return fuser.report


@dataclass(frozen=True)
class FusionRow:
    """Modules in sequence: each reads the output of the one before, and nothing else does.

    Args:
        modules: in order.
        fills: whether the others read the output of the first alone; False if zeros are concatenated to it.
        same_channels: whether the row is a branch of ours, in which all have the channels of the stream.
    """

    modules: Sequence[nn.Module]
    fills: bool = True
    same_channels: bool = False


def sequence_row(module: nn.Module) -> FusionRow:
    """The modules that a sequence calls."""
    return FusionRow(parts(module) if in_order(module) else [])


def branch_row(module: nn.Module) -> FusionRow:
    """The modules that a connection calls from its branch's last map to the addition."""
    if not isinstance(module, Residual) or type(module).forward is not Residual.forward:
        return FusionRow([])
    if "forward" in module.__dict__ or hooked(module.scale):
        return FusionRow([])
    branch, scale = module.branch, parts(module.scale)
    if in_order(branch) or not isinstance(branch, Branch):
        return FusionRow([*parts(branch), *scale])
    closing = branch.closing()
    if closing is None or branch.path()[-1].rows is not None or hooked(branch):
        return FusionRow([])
    tail = [part for each in closing for part in parts(each)]
    return FusionRow([branch.path()[-1].module, *tail, *scale], fills=branch.fills, same_channels=True)


def in_order(module: nn.Module) -> bool:
    """Whether a module is a sequence that calls its children one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not hooked(module)


def parts(module: nn.Module) -> list[nn.Module]:
    """The modules that a sequence calls, sequences in it resolved; another module is its own only part."""
    return [part for child in module for part in parts(child)] if in_order(module) else [module]  # type: ignore[union-attr]


def hooked(module: nn.Module) -> bool:
    """Whether a module has forward hooks, of its own or as every module, a forward of its instance alone, or
    parametrised weights.
    """
    tables = module._forward_hooks, module._forward_pre_hooks, *HOOKS_OF_ALL
    return any(tables) or any(method in module.__dict__ for method in METHODS) or is_parametrized(module)


def has_own_weights(module: nn.Module) -> bool:
    """Whether weight and bias of a map or norm are its own parameters, and not computed from others in every pass, as
    by weight norm, spectral norm, pruning and other parametrizations.
    """
    return isinstance(module._parameters.get("weight"), nn.Parameter) and "bias" in module._parameters


def computes(module: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether a module computes what one of the kinds does, and is no subclass that computes something else."""
    kind = type(module)
    return any(
        isinstance(module, known)
        and all(getattr(kind, method, None) is getattr(known, method, None) for method in METHODS)
        for known in kinds
    )


def is_idle(module: nn.Module) -> bool:
    """Whether a module is the identity in evaluation mode, and nothing hooked to it makes it another function."""
    return computes(module, IDLE) and not hooked(module)


class Fuser:
    """Fuses the modules of a network, in place.

    Args:
        model: the network, a copy of the user's.
        report: filled on the way.
    """

    def __init__(self, model: nn.Module, report: Fusion) -> None:
        self.model, self.report = model, report
        everywhere = list(model.named_modules(remove_duplicate=False))
        self.names = {module: name for name, module in reversed(everywhere)}
        self.occurrences = Counter(module for _, module in everywhere)
        self.owners = Counter(id(p) for module in self.names for p in module._parameters.values() if p is not None)

    def fix_standardised_weights(self) -> None:
        """Replace maps that standardise their weight in every forward by maps with the standardised weight."""
        for module, name in list(self.names.items()):
            if not isinstance(module, ScaledStandardConv2d | ScaledStandardLinear):
                continue
            if computes(module, (ScaledStandardConv2d, ScaledStandardLinear)) and self.unfit(module) is None:
                self.replace(module, with_fixed_weight(module))
                self.report.fused[name] = "its own weight, standardised once"

    def fuse_row(self, row: FusionRow) -> None:
        """Fuse the modules of a row, from its start to its end, as far as possible."""
        host: nn.Module | None = None
        for module in row.modules:
            if is_idle(module) and not module.training:
                continue
            affine = None if host is None or self.unfit(module) else affine_of(module)
            if host is None or affine is None:
                host = module
            elif obstacle := self.obstacle(host, affine, row):
                self.report.kept[self.names[module]] = obstacle
                host = module
            else:
                absorb(host, affine)
                self.report.kept.pop(self.names[module], None)
                self.report.fused[self.names[module]] = self.names[host]
                self.replace(module, nn.Identity())

    def obstacle(self, host: Any, affine: Affine, row: FusionRow) -> str | None:
        """Why `host` cannot absorb the module after it; None if it can."""
        name = self.names[host]
        if not computes(host, CONVOLUTIONS if affine.norm else (*MAPS, *NORMS)):
            return f"after {name} ({type(host).__name__})"
        if unfit := self.unfit(host):
            return f"after {name}: {unfit}"
        if affine.shift is not None and not row.fills:
            return f"the branch concatenates zeros to the output of {name}"
        weight, bias = host.weight, host.bias
        if weight is None or (affine.shift is not None and bias is None and isinstance(host, NORMS)):
            return f"{name} has no affine that could take it"
        if affine.axis is not None and affine.scale.shape != weight.shape[:1]:
            return f"{len(affine.scale)} channels after the {len(weight)} of {name}"
        if affine.axis is not None and not row.same_channels and affine.axis != axis_of(host):
            return f"its channels are on another axis than those of {name}"
        return None

    def unfit(self, module: nn.Module) -> str | None:
        """Why a module may not be changed; None if it may."""
        if self.occurrences[module] > 1:
            return "it is registered in several places"
        if hooked(module):
            return "it has hooks, another forward than its class, or its weight is computed anew in every forward"
        if module.training:
            return "it stays in training mode after eval()"
        if any(self.owners[id(parameter)] > 1 for parameter in module._parameters.values()):
            return "it shares a parameter with another module"
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            return "it has no running statistics"
        return None if self.names[module] else "it is the whole model"

    def replace(self, module: nn.Module, by: nn.Module) -> None:
        """Replace a module by another one."""
        name = self.names.pop(module)
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, by.eval())
        self.names[by], self.occurrences[by] = name, 1

    def remove_idle(self) -> None:
        """Replace stochastic depth, and slots that hold identities only, by an identity."""
        for module, name in list(self.names.items()):
            idle = isinstance(module, ResidualWarmup) and affine_of(module) is not None
            if (computes(module, (DropPath,)) or idle) and self.unfit(module) is None:
                self.replace(module, nn.Identity())
                self.report.fused[name] = "nothing: the identity" + (" after its end" if idle else " in eval")
        slots = [slot for module in self.names if isinstance(module, Residual | Branch) for slot in module.children()]
        for slot in slots:
            idle = in_order(slot) and all(type(part) is nn.Identity and not hooked(part) for part in parts(slot))
            if idle and self.unfit(slot) is None:
                self.replace(slot, nn.Identity())

    def explain_kept(self) -> None:
        """Note why the norms, gains and constants that are left could not be fused."""
        for module, name in self.names.items():
            if isinstance(module, ResidualWarmup):
                self.report.kept.setdefault(name, self.unfit(module) or describe_running(module))
            if isinstance(module, (_BatchNorm, Gain, Multiply, Bias, ScaledStandardConv2d, ScaledStandardLinear)):
                self.report.kept.setdefault(name, self.unfit(module) or "no map or norm right before it")


def describe_running(warmup: ResidualWarmup) -> str:
    """Why a residual warm-up stays a module of its own."""
    return (
        f"its factor is {float(warmup.factor()):.3g} at step {int(warmup.step):,} of {int(warmup.end):,} and would not "
        "rise any more; an export freezes it"
    )


def affine_of(module: nn.Module) -> Affine | None:
    """The factor and shift of a module on every channel in evaluation mode; None if it does anything else."""
    if hooked(module):
        return None
    if isinstance(module, _BatchNorm) and computes(module, (_BatchNorm, nn.SyncBatchNorm)):
        assert module.running_mean is not None
        assert module.running_var is not None
        scale = (exact(module.running_var) + module.eps).rsqrt()
        scale = scale if module.weight is None else scale * exact(module.weight)
        shift = -exact(module.running_mean) * scale
        if module.bias is None:
            return Affine(scale, shift, norm=True)
        return Affine(scale, exact(module.bias) + shift, norm=True, trained=module.bias.requires_grad)
    if isinstance(module, Gain) and computes(module, (Gain,)):
        return Affine(module.factor * exact(module.gain), axis=-len(module.shape) or None)
    if isinstance(module, Multiply) and computes(module, (Multiply,)):
        return Affine(torch.tensor(module.factor, dtype=torch.float64))
    if isinstance(module, ResidualWarmup) and computes(module, (ResidualWarmup,)) and not module.running:
        return Affine(torch.ones((), dtype=torch.float64))
    if isinstance(module, Bias) and computes(module, (Bias,)):
        one = torch.ones((), dtype=torch.float64)
        return Affine(one, exact(module.bias), trained=module.bias.requires_grad)
    return None


def exact(tensor: Tensor) -> Tensor:
    """Values in float64, on the CPU, since not every device has that type."""
    return tensor.detach().cpu().to(torch.float64)


def axis_of(host: nn.Module) -> int | None:
    """The axis of a map's or norm's channels, from the end; None if it depends on the input."""
    return next((axis for kind, axis in AXES if isinstance(host, kind)), None)


def absorb(host: Any, affine: Affine) -> None:
    """Let a map or the affine of a norm do what the module after it does, in place: W' = s W, b' = s b + t."""
    weight, bias = host.weight, host.bias
    scale = affine.scale.expand(len(weight))
    if affine.shift is not None or bias is not None:
        shifted = torch.zeros(len(weight), dtype=torch.float64) if bias is None else scale * exact(bias)
        shifted = shifted if affine.shift is None else shifted + affine.shift
        write_bias(host, shifted.to(weight.dtype).to(weight.device), affine.trained)
    weight.copy_((exact(weight) * scale.view(-1, *(1,) * (weight.ndim - 1))).to(weight.dtype))


def write_bias(host: Any, values: Tensor, trained: bool | None) -> None:
    """Write the bias of a map or norm, in place, or give it one, which is trained as the shift was that becomes it; an
    existing one is trained if it or the shift was.
    """
    if host.bias is None:
        host.bias = nn.Parameter(values, requires_grad=host.weight.requires_grad if trained is None else trained)
        return
    host.bias.copy_(values)
    host.bias.requires_grad_(host.bias.requires_grad or bool(trained))


def with_fixed_weight(module: ScaledStandardConv2d | ScaledStandardLinear) -> nn.Module:
    """A map with the standardised weight and the same bias."""
    kind, names = (nn.Linear, LINEAR) if isinstance(module, ScaledStandardLinear) else (nn.Conv2d, CONV)
    arguments: dict[str, Any] = {name: getattr(module, name) for name in names}
    twin: Any = kind(**arguments, device="meta", dtype=module.weight.dtype)
    twin.weight = nn.Parameter(module.standardised(), requires_grad=module.weight.requires_grad)
    twin.bias = module.bias
    return twin
