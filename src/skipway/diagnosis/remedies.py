"""Remedies: objects that change a model, or the settings of its training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from skipway.diagnosis.settings import Settings
from skipway.errors import SkipwayError
from skipway.nn import Gain
from skipway.nn.computed_weights import computed_weight, set_weight, stored_weight
from skipway.nn.maps import LinearMap
from skipway.optim.clip import ClipNorm
from skipway.schemes.initialisation import initialise_
from skipway.schemes.scheme import Scheme
from skipway.schemes.scheme import parse_scheme as read_scheme
from skipway.surgery.block_call import BlockCall, parameter_names
from skipway.surgery.insertion import BRANCH, Around, disable_fused_path, insert_into_branch
from skipway.surgery.operation import Operation
from skipway.surgery.transaction import Restore, transaction
from skipway.tracing import Example, Program, preserved_state, watch
from skipway.tracing.chain import Chain, WatchedConnection, chain
from skipway.tracing.example import call_model, copy_example
from skipway.tracing.paths import condense_paths

__all__ = [
    "AddSkips",
    "Case",
    "Clip",
    "Damp",
    "FullPrecision",
    "LearningRate",
    "NormFirst",
    "Remedy",
    "Rescheme",
    "Revive",
    "Shrink",
    "Together",
    "UnitVariance",
    "WarmUp",
]


@dataclass(frozen=True)
class Case:
    """A model under treatment.

    Args:
        model: changed in place by a remedy, or replaced by another one.
        settings: of its training.
        example: what the model is called with.
        chain: its connections.
        operation: by which a remedy changed the model in place; what has none cannot be taken back.
    """

    model: nn.Module
    settings: Settings
    example: Example
    chain: Chain[WatchedConnection]
    operation: Operation | None = None


@runtime_checkable
class Remedy(Protocol):
    """A way to mend a model or the settings of its training. `str(remedy)` is the instruction in words."""

    def apply(self, case: Case) -> Case:
        """Apply the remedy, and return the case: with its model changed in place, another model, or other settings."""
        ...


@dataclass(frozen=True)
class LearningRate:
    """Train at another learning rate."""

    value: float

    def apply(self, case: Case) -> Case:
        return replace(case, settings=case.settings.at(self.value))

    def __str__(self) -> str:
        return f"set the learning rate to {self.value:.2g}"


@dataclass(frozen=True)
class WarmUp:
    """Let the learning rate rise linearly from 0 over the first steps."""

    steps: int

    def apply(self, case: Case) -> Case:
        return replace(case, settings=replace(case.settings, warmup=self.steps))

    def __str__(self) -> str:
        return f"warm the learning rate up over {self.steps} steps"


@dataclass(frozen=True)
class Clip:
    """Clip the gradients, all together, to a norm before every step (Pascanu et al. 2013,
    https://arxiv.org/abs/1211.5063).
    """

    norm: float = 1.0

    def apply(self, case: Case) -> Case:
        return replace(case, settings=replace(case.settings, clip=ClipNorm(self.norm)))

    def __str__(self) -> str:
        return f"clip the norm of all gradients together to {self.norm:.2g}"


@dataclass(frozen=True)
class Together:
    """Several remedies, one after the other, as one operation: where one raises, the model is as before the first.

    Where one builds another model, as `Rescheme` does, those after it are an operation on that one, and the old one is
    as before the first, unless it is a part of the new one.
    """

    remedies: tuple[Any, ...]

    def __post_init__(self) -> None:
        parts = (each.remedies if isinstance(each, Together) else (each,) for each in self.remedies)
        object.__setattr__(self, "remedies", tuple(part for several in parts for part in several))

    def apply(self, case: Case) -> Case:
        with transaction(case.model, title=str(self)) as change:
            for number, remedy in enumerate(self.remedies, start=1):
                case, rest = remedy.apply(replace(case, operation=None)), self.remedies[number:]
                if rest:
                    case = replace(case, chain=chain(case.model, case.example))  # a remedy changes connections, too
                if case.model is not change.model:
                    if change.mark and change.model in set(case.model.modules()):
                        change.commit()
                    return Together(rest).apply(case) if rest else case
            return replace(case, operation=change.commit() if change.mark else None)

    def __str__(self) -> str:
        return "; and ".join(map(str, self.remedies))


@dataclass(frozen=True)
class Damp:
    """Multiply the output of every branch, in place at its last map or closing norm: y = x + λ F(x). A map that several
    connections share is multiplied once; where one cannot be multiplied, none is.

    λ = 1/√L keeps the stream's variance below e times its start over L branches (Hayou et al. 2021, "Stable ResNet",
    https://arxiv.org/abs/2010.12859); λ = 0 makes the network the identity (De & Smith 2020; Zhang et al. 2019).

    Args:
        factor: λ; None: 1/√L.
    """

    factor: float | None = None

    def apply(self, case: Case) -> Case:
        factor = len(case.chain) ** -0.5 if self.factor is None else self.factor
        with transaction(case.model, title=str(self)) as change:
            for module in dict.fromkeys(module for connection in case.chain for module in connection.end_modules):
                change.keep_module(module)
            case.chain.multiply_(factor)
            operation = change.commit()
        return replace(case, operation=operation)

    def __str__(self) -> str:
        factor = "1/√L" if self.factor is None else f"{self.factor:.2g}"
        return f"multiply the last weights of every branch by {factor}"


@dataclass(frozen=True)
class Shrink:
    """Multiply one parameter, in place.

    Args:
        parameter: its name, as in `named_parameters`.
        factor: that it is multiplied by.
    """

    parameter: str
    factor: float

    def apply(self, case: Case) -> Case:
        parameter = case.model.get_parameter(self.parameter)
        with transaction(case.model, title=str(self)) as change, torch.no_grad():
            change.keep_values([parameter])
            parameter.mul_(self.factor)
            operation = change.commit()
        return replace(case, operation=operation)

    def __str__(self) -> str:
        return f"multiply {self.parameter} by {self.factor:.2g}"


@dataclass(frozen=True)
class FullPrecision:
    """Hold the weights in float32, in place; `torch.autocast` computes in half precision all the same."""

    def apply(self, case: Case) -> Case:
        with transaction(case.model, title=str(self)) as change:
            for module in case.model.modules():
                for name in module._buffers:
                    change.record(Restore.of(module._buffers, name))
            for parameter in case.model.parameters():
                for tensor in (parameter, parameter.grad):
                    if tensor is not None:
                        change.record(partial(set_data, tensor, tensor.data))
            case.model.float()
            operation = change.commit()
        return replace(case, operation=operation)

    def __str__(self) -> str:
        return "hold the weights in float32 (model.float()), and compute in half precision by torch.autocast"


def set_data(tensor: Tensor, values: Tensor) -> None:
    """Let a parameter hold these values, of their type."""
    tensor.data = values.to(tensor.device)


@dataclass(frozen=True)
class Rescheme:
    """Rebuild a network of `skipway.build` with another scheme and fresh weights; the old one is left alone.

    Args:
        scheme: a scheme or its spec string.
    """

    scheme: str | Scheme

    def apply(self, case: Case) -> Case:
        config: Any = getattr(case.model, "config", None)
        if config is None or not hasattr(config, "scheme"):
            raise SkipwayError(
                f"model={type(case.model).__name__}: Rescheme rebuilds networks of skipway.build only; "
                "AddSkips and Damp change any network"
            )
        device = next(case.model.parameters()).device
        with torch.device("meta"):
            network = type(case.model)(replace(config, scheme=read_scheme(self.scheme)))
        return replace(case, model=initialise_(network, device=device))

    def __str__(self) -> str:
        return f"rebuild the network with scheme {self.scheme}"


@dataclass(frozen=True)
class NormFirst:
    """Move the norms to the start of the branches, in place, by the switch `norm_first` of torch's own layers."""

    def apply(self, case: Case) -> Case:
        with transaction(case.model, title=str(self)) as change:
            for module in layers_with_switch(case.model):
                change.record(partial(setattr, module, "norm_first", module.norm_first))
                module.norm_first = True  # type: ignore[assignment]
            operation = change.commit()
        return replace(case, operation=operation)

    def __str__(self) -> str:
        return "move the norms to the start of the branches (norm_first=True)"


def layers_with_switch(model: nn.Module) -> list[nn.Module]:
    """The layers whose norms can be moved by their own `norm_first`."""
    return [module for module in model.modules() if isinstance(getattr(module, "norm_first", None), bool)]


@dataclass(frozen=True)
class UnitVariance:
    """Draw orthogonal weights and scale them, first to last, so that each map's output has unit variance; in place.

    LSUV, "All you need is a good init" (Mishkin & Matas 2016, https://arxiv.org/abs/1511.06422, algorithm 1). Maps
    that are 0 stay 0, and weights stay as they are that are computed from others which do not give them such values
    (spectral norm does not scale them).

    Args:
        maps: paths of the modules, in the order in which the signal meets them.

    Raises:
        SkipwayError: there are such weights, and none that can be scaled; the model is as before.
    """

    maps: tuple[str, ...]

    def apply(self, case: Case) -> Case:
        modules = [case.model.get_submodule(name) for name in self.maps]
        with transaction(case.model, title=str(self)) as change, torch.no_grad():
            for module in modules:
                change.keep_module(module)
                weight = module.weight
                if isinstance(weight, Tensor) and weight.ndim > 1 and bool(weight.any()):
                    dtype = torch.promote_types(weight.dtype, torch.float32)  # of 16 bits there is no QR everywhere
                    drawn = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
                    set_weight(module, "weight", nn.init.orthogonal_(drawn))
            scaled = [self.normalise(case, module) for module in modules]
            if False in scaled and True not in scaled:
                raise computed_weight(f"the weight of {self.maps[scaled.index(False)]}")
            operation = change.commit()
        return replace(case, operation=operation)

    def normalise(self, case: Case, module: nn.Module) -> bool | None:
        """Divide the weight of one map by the standard deviation of its output; returns whether that was possible, None
        where there is none to divide by.
        """
        found: list[Tensor] = []
        handle = module.register_forward_hook(lambda _, given, out: found.append(out.detach()))
        try:
            with preserved_state(case.model):
                case.model.train()
                call_model(case.model, copy_example(case.example))
        finally:
            handle.remove()
        deviation = found[0].float().std(correction=0) if found else torch.tensor(0.0)
        if not (bool(deviation > 0) and bool(deviation.isfinite())):
            return None
        scale = LinearMap(module)  # of a standardised weight it is the gain
        return set_weight(module, scale.name, scale.weight / deviation)

    def __str__(self) -> str:
        return f"draw orthogonal weights of unit output variance, layer by layer: {condense_paths(self.maps)}"


@dataclass(frozen=True)
class Revive:
    """Re-initialise, in place, zero last maps of branches that another zero silences already.

    Args:
        modules: paths of the maps.

    Raises:
        SkipwayError: a weight is computed from others which do not give it other values; the model is as before.
    """

    modules: tuple[str, ...]

    def apply(self, case: Case) -> Case:
        with transaction(case.model, title=str(self)) as change:
            for name in self.modules:
                module = case.model.get_submodule(name)
                change.keep_values(module.buffers())
                change.keep_module(module)
                restart = getattr(module, "reset_parameters", None)
                if callable(restart):
                    restart()
                computed = stored_weight(module, "weight") is None  # anew in the next pass, so that it is no evidence
                if computed or not bool(module.weight.any()):  # type: ignore[union-attr]
                    drawn = nn.init.kaiming_normal_(torch.empty_like(module.weight), nonlinearity="linear")  # type: ignore[arg-type]
                    if not set_weight(module, "weight", drawn):
                        raise computed_weight(f"the weight of {name}")
            operation = change.commit()
        return replace(case, operation=operation)

    def __str__(self) -> str:
        return f"re-initialise {condense_paths(self.modules)}, so that one zero per branch is left"


@dataclass(frozen=True)
class AddSkips:
    """Add a skip around each of these modules, in place: y = x + α F(x). Their outputs are shaped like their inputs.

    Each module stays what it is, with its attributes and arguments, which the module around it may read and give.

    Args:
        modules: paths of the modules, in order.
        gain: α at the start, a learnable factor (De & Smith 2020, sec. 4); None: 1/√L.
    """

    modules: tuple[str, ...]
    gain: float | None = None

    def apply(self, case: Case) -> Case:
        gain = len(self.modules) ** -0.5 if self.gain is None else self.gain
        program = watch(case.model, case.example)
        with transaction(case.model, title=str(self)) as change:
            for name in self.modules:
                branch = case.model.get_submodule(name)
                like = next(branch.parameters())
                scale = Gain(init=gain).to(like.device, like.dtype).train(branch.training)
                insert_into_branch(change, branch, scale, Around(call_of(program, name, branch), bare=True))
                disable_fused_path(change, f"{name}.{BRANCH}")
            operation = change.commit()
        return replace(case, operation=operation)

    def __str__(self) -> str:
        count, names = len(self.modules), self.modules
        shown = ", ".join(names if count <= 3 else [names[0], names[1], "…", names[-1]])
        where = f"each of {count:,} layers ({shown})" if count > 1 else shown
        branch = f"layer(x) / √{count}" if self.gain is None else f"{self.gain:.2g} · layer(x)"
        return f"add a skip around {where}: x = x + {branch}"


def call_of(program: Program, name: str, module: nn.Module) -> BlockCall:
    """Where the input and the output of a module that are of one shape are in its arguments and what it returns."""
    given, returned = program.given.get(name, {}), program.returned.get(name, {})
    for output, after in returned.items():
        for path, before in given.items():
            if program[before].shape == program[after].shape and program[before].floating:
                writes = any(program.writes_into(value, before) for value in program.between(before, after))
                return BlockCall(path, output, parameter_names(module), writes_stream=writes)
    raise SkipwayError(f"{name} returns no tensor of the shape of one that it is given, so no skip fits around it")
