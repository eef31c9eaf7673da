"""Folding: norms with fixed statistics, gains and constants multiplied into the weights in front of them."""

from __future__ import annotations

import copy as copying
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
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
    ScaledStandardConv2d,
    ScaledStandardLinear,
)

__all__ = ["Folding", "fold", "folding"]

M = TypeVar("M", bound=nn.Module)

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MAPS = (*CONVOLUTIONS, nn.Linear)
AXES = (
    *((nn.Conv1d, -2), (nn.Conv2d, -3), (nn.Conv3d, -4), (nn.Linear, -1)),
    *((LayerNorm2d, -3), (nn.LayerNorm, -1), (nn.BatchNorm2d, -3)),
)
NORMS = (nn.LayerNorm, LayerNorm2d, nn.GroupNorm, _BatchNorm)
IDLE = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath)
"""What changes nothing in eval."""

LINEAR = ("in_features", "out_features")
CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
"""What makes a map, by the names of its constructor."""


@dataclass(frozen=True)
class Folding(Generic[M]):
    """A network for inference, and what was done to it.

    Args:
        model: the folded network, in eval mode.
        folded: path of a module that is gone → where its effect is now.
        kept: path of a BatchNorm, gain, constant or bias of its own that is still there → why.
    """

    model: M
    folded: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        gone = [f"  {name} → {home}" for name, home in self.folded.items()]
        kept = [f"  {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join([f"{len(gone)} folded:", *gone, f"{len(kept)} kept:", *kept])


@dataclass(frozen=True)
class Affine:
    """y = scale ⊙ x + shift, over channels; computed in float64 on the CPU.

    Args:
        scale: of shape () or (C,).
        shift: of shape () or (C,), None for none.
        axis: of the channels from the end, where that is known; None for one number, too.
        norm: whether it is a BatchNorm's, which goes into convolutions only.
    """

    scale: Tensor
    shift: Tensor | None = None
    axis: int | None = None
    norm: bool = False


def fold(model: M, *, copy: bool = True) -> M:
    """The network for inference: BatchNorm, LayerScale, SkipInit and other gains multiplied into neighbouring weights.

    | gone | into | equation |
    |---|---|---|
    | BatchNorm right behind a convolution | the convolution | W' = s W, b' = s (b - μ) + β, s = γ / √(σ² + ε) |
    | a gain or constant g on the branch | its last map, or its closing norm's affine | W' = g W, b' = g b |
    | a scalar bias right behind a map | the map | b' = b + β |
    | standardised weights | plain weights | W' = g (W - μ) / √max(σ²·fan_in, ε) |
    | stochastic depth | nothing: the identity in eval | |

    Outputs are equal in eval to rounding: 1e-5 of the largest in float32. What stands behind an addition, an
    activation or a gate stays; `folding(model)` tells what and why. The folded network holds no norm that keeps
    training stable, so it is for inference: fine-tune the original. A module that is an `nn.Sequential` is taken to be
    called as a whole.

    Args:
        model: any module, in any mode; what is known of residual connections is used where it holds ours.
        copy: False folds the model itself, in place.

    Returns:
        the folded network, in eval mode, of the same type; what is gone is an `nn.Identity`.

    Raises:
        SkipwayError: the model is on the meta device, without values to fold.

    Source: BatchNorm as in Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", sec. 3.2.

    >>> import skipway as sw
    >>> block = sw.build("resnet20", scheme="skipinit").stages[0][0]
    >>> fold(block).branch
    ConvBranch(
      (conv1): Conv2d(16, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
      (norm1): Identity()
      (act1): ReLU(...)
      (conv2): Conv2d(16, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
      (norm2): Identity()
    )
    >>> fold(block).scale
    Identity()
    """
    return folding(model, copy=copy).model


@torch.no_grad()
def folding(model: M, *, copy: bool = True) -> Folding[M]:
    """`fold`, with a word about every module that is gone and every one that had to stay.

    >>> import skipway as sw
    >>> done = folding(sw.build("resnet20", scheme="preactivation"))
    >>> done.folded["stages.0.0.branch.norm1"], done.kept["stages.0.0.pre.norm"]
    ('stages.0.0.branch.conv1', 'no map or norm right before it')
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise SkipwayError(
            f"{type(model).__name__} is on the meta device: there are no values to fold; load them first"
        )
    model = (copying.deepcopy(model) if copy else model).eval()
    bench = Bench(model, Folding(model))
    bench.standardise()
    for find in (sequence_row, branch_row):
        for module in list(model.modules()):
            bench.shorten(find(module))
    bench.clear()
    bench.explain()
    return bench.done


@dataclass(frozen=True)
class Row:
    """Modules that stand right behind one another: each sees the output of the one before, and nothing else does.

    Args:
        modules: in order.
        fills: whether the output of the first is all that the others see; False where zeros are put beside it.
        told: whether a branch vouches for the row, with the channels of its stream wherever they are.
    """

    modules: Sequence[nn.Module]
    fills: bool = True
    told: bool = False


def sequence_row(module: nn.Module) -> Row:
    """What a sequence calls."""
    return Row(parts(module) if in_order(module) else [])


def branch_row(module: nn.Module) -> Row:
    """What a connection calls from its branch's last map to the addition."""
    if not isinstance(module, Residual) or type(module).forward is not Residual.forward or hooked(module.scale):
        return Row([])
    branch, scale = module.branch, parts(module.scale)
    if in_order(branch) or not isinstance(branch, Branch):
        return Row([*parts(branch), *scale])
    closing = branch.closing()
    if closing is None or branch.path()[-1].rows is not None or hooked(branch):
        return Row([])
    tail = [part for each in closing for part in parts(each)]
    return Row([branch.path()[-1].module, *tail, *scale], fills=branch.fills, told=True)


def in_order(module: nn.Module) -> bool:
    """Whether a module is a sequence that calls its children one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not hooked(module)


def parts(module: nn.Module) -> list[nn.Module]:
    """The modules that a sequence calls, sequences in it resolved; another module is its own only part."""
    return [part for child in module for part in parts(child)] if in_order(module) else [module]  # type: ignore[union-attr]


def hooked(module: nn.Module) -> bool:
    """Whether somebody looks at what passes the module, or computes its weights on the way."""
    return bool(module._forward_hooks or module._forward_pre_hooks or is_parametrized(module))


def computes(module: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether a module computes what one of the kinds does, and is no subclass that computes something else."""
    kind = type(module)
    return any(
        isinstance(module, known)
        and kind.forward is known.forward
        and getattr(kind, "_conv_forward", None) is getattr(known, "_conv_forward", None)
        for known in kinds
    )


class Bench:
    """Where a network is folded, in place.

    Args:
        model: the network.
        done: the report, filled on the way.
    """

    def __init__(self, model: nn.Module, done: Folding) -> None:
        self.model, self.done = model, done
        everywhere = list(model.named_modules(remove_duplicate=False))
        self.names = {module: name for name, module in reversed(everywhere)}
        self.places = Counter(module for _, module in everywhere)
        self.owners = Counter(id(p) for module in self.names for p in module._parameters.values() if p is not None)

    def standardise(self) -> None:
        """Put plain maps in the place of those that standardise their weight in every forward."""
        for module, name in list(self.names.items()):
            if isinstance(module, ScaledStandardConv2d | ScaledStandardLinear) and self.unfit(module) is None:
                self.replace(module, plain(module))
                self.done.folded[name] = "its own weight, standardised once"

    def shorten(self, row: Row) -> None:
        """Fold what can be folded of a row, from its start to its end."""
        host: nn.Module | None = None
        for module in row.modules:
            if isinstance(module, IDLE):
                continue
            affine = None if host is None or self.unfit(module) else affine_of(module)
            if host is None or affine is None:
                host = module
            elif obstacle := self.obstacle(host, affine, row):
                self.done.kept[self.names[module]] = obstacle
                host = module
            else:
                absorb(host, affine)
                self.done.kept.pop(self.names[module], None)
                self.done.folded[self.names[module]] = self.names[host]
                self.replace(module, nn.Identity())

    def obstacle(self, host: Any, affine: Affine, row: Row) -> str | None:
        """Why `host` cannot do what stands behind it; None where it can."""
        name = self.names[host]
        if not computes(host, CONVOLUTIONS if affine.norm else (*MAPS, *NORMS)):
            return f"behind {name} ({type(host).__name__})"
        if unfit := self.unfit(host):
            return f"behind {name}: {unfit}"
        if affine.shift is not None and not row.fills:
            return f"the branch puts zeros beside what {name} makes"
        weight, bias = host.weight, host.bias
        if weight is None or (affine.shift is not None and bias is None and isinstance(host, NORMS)):
            return f"{name} has no affine that could take it"
        if affine.axis is not None and affine.scale.shape != weight.shape[:1]:
            return f"{len(affine.scale)} channels behind the {len(weight)} of {name}"
        if affine.axis is not None and not row.told and affine.axis != axis_of(host):
            return f"its channels are on another axis than those of {name}"
        return None

    def unfit(self, module: nn.Module) -> str | None:
        """Why a module may not be touched; None where it may."""
        if self.places[module] > 1:
            return "it stands in several places"
        if hooked(module):
            return "it has hooks, or its weight is computed anew in every forward"
        if any(self.owners[id(parameter)] > 1 for parameter in module._parameters.values()):
            return "it shares a parameter with another module"
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            return "it has no running statistics"
        return None if self.names[module] else "it is the whole model"

    def replace(self, module: nn.Module, by: nn.Module) -> None:
        """Put another module in a module's place."""
        name = self.names.pop(module)
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, by.eval())
        self.names[by], self.places[by] = name, 1

    def clear(self) -> None:
        """Put identities in the place of stochastic depth, and of slots that hold nothing else any more."""
        for module, name in list(self.names.items()):
            if isinstance(module, DropPath) and self.unfit(module) is None:
                self.replace(module, nn.Identity())
                self.done.folded[name] = "nothing: the identity in eval"
        slots = [slot for module in self.names if isinstance(module, Residual | Branch) for slot in module.children()]
        for slot in slots:
            idle = in_order(slot) and all(type(part) is nn.Identity for part in parts(slot))
            if idle and self.unfit(slot) is None:
                self.replace(slot, nn.Identity())

    def explain(self) -> None:
        """Say why what is still there could not go."""
        for module, name in self.names.items():
            if isinstance(module, (_BatchNorm, Gain, Multiply, Bias, ScaledStandardConv2d, ScaledStandardLinear)):
                self.done.kept.setdefault(name, self.unfit(module) or "no map or norm right before it")


def affine_of(module: nn.Module) -> Affine | None:
    """What a module does to every channel in eval; None where that is more than a factor and a shift."""
    if isinstance(module, _BatchNorm) and computes(module, (_BatchNorm, nn.SyncBatchNorm)):
        assert module.running_mean is not None
        assert module.running_var is not None
        scale = (exact(module.running_var) + module.eps).rsqrt()
        scale = scale if module.weight is None else scale * exact(module.weight)
        shift = -exact(module.running_mean) * scale
        return Affine(scale, shift if module.bias is None else exact(module.bias) + shift, norm=True)
    if isinstance(module, Gain) and computes(module, (Gain,)):
        return Affine(module.factor * exact(module.gain), axis=-len(module.shape) or None)
    if isinstance(module, Multiply) and computes(module, (Multiply,)):
        return Affine(torch.tensor(module.factor, dtype=torch.float64))
    if isinstance(module, Bias) and computes(module, (Bias,)):
        return Affine(torch.ones((), dtype=torch.float64), exact(module.bias))
    return None


def exact(tensor: Tensor) -> Tensor:
    """The values to compute with: float64, on the CPU since not every device has it."""
    return tensor.detach().to("cpu", torch.float64)


def axis_of(host: nn.Module) -> int | None:
    """The axis of a map's or norm's channels, from the end; None where it depends on the input."""
    return next((axis for kind, axis in AXES if isinstance(host, kind)), None)


def absorb(host: Any, affine: Affine) -> None:
    """Let a map or the affine of a norm do what stands behind it: W' = s W, b' = s b + t."""
    weight, bias = host.weight, host.bias
    scale = affine.scale.expand(len(weight))
    if affine.shift is not None or bias is not None:
        shifted = torch.zeros(len(weight), dtype=torch.float64) if bias is None else scale * exact(bias)
        shifted = shifted if affine.shift is None else shifted + affine.shift
        host.bias = nn.Parameter(shifted.to(weight.dtype).to(weight.device), requires_grad=weight.requires_grad)
    weight.copy_((exact(weight) * scale.view(-1, *(1,) * (weight.ndim - 1))).to(weight.dtype))


def plain(module: ScaledStandardConv2d | ScaledStandardLinear) -> nn.Module:
    """The plain map with the standardised weight and the same bias."""
    kind, names = (nn.Linear, LINEAR) if isinstance(module, ScaledStandardLinear) else (nn.Conv2d, CONV)
    arguments: dict[str, Any] = {name: getattr(module, name) for name in names}
    twin: Any = kind(**arguments, device="meta", dtype=module.weight.dtype)
    twin.weight = nn.Parameter(module.standardised(), requires_grad=module.weight.requires_grad)
    twin.bias = module.bias
    return twin
