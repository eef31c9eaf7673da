"""What can be done: objects that change a model or the settings of its training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from skipway.diagnosis.settings import Settings
from skipway.errors import SkipwayError
from skipway.nn import Gain, Residual
from skipway.schemes.initialisation import initialise_
from skipway.schemes.scheme import Scheme
from skipway.schemes.scheme import parse_scheme as read_scheme
from skipway.tracing import Example, preserved_state
from skipway.tracing.chain import Chain, WatchedConnection
from skipway.tracing.example import call_model

__all__ = [
    "AddSkips",
    "Case",
    "Damp",
    "LearningRate",
    "NormFirst",
    "Remedy",
    "Rescheme",
    "Revive",
    "UnitVariance",
    "WarmUp",
]


@dataclass(frozen=True)
class Case:
    """What a remedy works on.

    Args:
        model: changed in place, or replaced in what the remedy returns.
        settings: of its training.
        example: what the model is called with.
        chain: its connections.
    """

    model: nn.Module
    settings: Settings
    example: Example
    chain: Chain[WatchedConnection]


@runtime_checkable
class Remedy(Protocol):
    """Something that can be done. `str(remedy)` says it as an instruction."""

    def apply(self, case: Case) -> Case:
        """The case with it done: the model changed in place or another one, or other settings."""
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
    """Let the learning rate rise from 0 over the first steps."""

    steps: int

    def apply(self, case: Case) -> Case:
        return replace(case, settings=replace(case.settings, warmup=self.steps))

    def __str__(self) -> str:
        return f"warm up over {self.steps} steps"


@dataclass(frozen=True)
class Damp:
    """Multiply what every branch puts out, at its last map or closing norm: y = x + λ F(x) at the start.

    λ = 1/√L keeps the stream's variance below e times its start over L branches (Hayou et al. 2021, "Stable ResNet",
    https://arxiv.org/abs/2010.12859); λ = 0 makes the network the identity (De & Smith 2020; Zhang et al. 2019).

    Args:
        factor: λ; None: 1/√L.
    """

    factor: float | None = None

    def apply(self, case: Case) -> Case:
        factor = len(case.chain) ** -0.5 if self.factor is None else self.factor
        for connection in case.chain:
            connection.multiply_(factor)
        return case

    def __str__(self) -> str:
        factor = "1/√L" if self.factor is None else f"{self.factor:.2g}"
        return f"multiply every branch's last weights by {factor}"


@dataclass(frozen=True)
class Rescheme:
    """Build the same network anew in another scheme, with fresh weights; for networks of ours.

    Args:
        scheme: a scheme or its spec string.
    """

    scheme: str | Scheme

    def apply(self, case: Case) -> Case:
        config: Any = getattr(case.model, "config", None)
        if config is None or not hasattr(config, "scheme"):
            raise SkipwayError(
                f"{type(case.model).__name__} was not built by skipway.build, so it has no scheme to change"
            )
        device = next(case.model.parameters()).device
        with torch.device("meta"):
            network = type(case.model)(replace(config, scheme=read_scheme(self.scheme)))
        return replace(case, model=initialise_(network, device=device))

    def __str__(self) -> str:
        return f"build it with scheme {str(self.scheme)!r}"


@dataclass(frozen=True)
class NormFirst:
    """Move the norms in front of the branches, where a layer has a switch for it (`norm_first` of torch's own)."""

    def apply(self, case: Case) -> Case:
        for module in layers_with_switch(case.model):
            module.norm_first = True  # type: ignore[assignment]
        return case

    def __str__(self) -> str:
        return "put the norms in front of the branches (norm_first=True)"


def layers_with_switch(model: nn.Module) -> list[nn.Module]:
    """The layers whose norms can be moved by their own `norm_first`."""
    return [module for module in model.modules() if isinstance(getattr(module, "norm_first", None), bool)]


@dataclass(frozen=True)
class UnitVariance:
    """Orthogonal weights, then each map divided by the deviation of what it puts out on this batch, first to last.

    LSUV, "All you need is a good init" (Mishkin & Matas 2016, https://arxiv.org/abs/1511.06422, algorithm 1). Maps
    that are 0 on purpose stay so.

    Args:
        maps: paths of the modules, in the order in which the signal meets them.
    """

    maps: tuple[str, ...]

    def apply(self, case: Case) -> Case:
        was = [module.training for module in case.model.modules()]
        with torch.no_grad():
            for name in self.maps:
                weight = case.model.get_submodule(name).weight
                if isinstance(weight, Tensor) and weight.ndim > 1 and bool(weight.any()):
                    nn.init.orthogonal_(weight.flatten(1) if weight.is_contiguous() else weight)
            with preserved_state(case.model):
                case.model.train()
                for name in self.maps:
                    self.normalise(case, case.model.get_submodule(name))
        for module, mode in zip(case.model.modules(), was, strict=True):
            module.training = mode
        return case

    def normalise(self, case: Case, module: nn.Module) -> None:
        found: list[Tensor] = []
        handle = module.register_forward_hook(lambda _, given, out: found.append(out.detach()))
        try:
            call_model(case.model, case.example)
        finally:
            handle.remove()
        deviation = found[0].float().std(correction=0) if found else torch.tensor(0.0)
        if bool(deviation > 0) and bool(deviation.isfinite()):
            module.weight.div_(deviation)  # type: ignore[operator]

    def __str__(self) -> str:
        return f"orthogonal weights at unit variance, layer by layer ({len(self.maps)} maps)"


@dataclass(frozen=True)
class Revive:
    """Draw the zero last map of a branch anew, where something else silences the branch already.

    Args:
        modules: paths of the maps.
    """

    modules: tuple[str, ...]

    def apply(self, case: Case) -> Case:
        for name in self.modules:
            module = case.model.get_submodule(name)
            restart = getattr(module, "reset_parameters", None)
            if callable(restart):
                restart()
            if not bool(module.weight.any()):  # type: ignore[union-attr]
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")  # type: ignore[arg-type]
        return case

    def __str__(self) -> str:
        return (
            f"draw {', '.join(self.modules[:2])}{' …' if len(self.modules) > 2 else ''} anew, so that one zero is left"
        )


@dataclass(frozen=True)
class AddSkips:
    """Put a skip around each of these modules, y = x + α F(x), where what they put out is shaped like what they take.

    Args:
        modules: paths of the modules, in order.
        gain: α at the start, a learnable factor (De & Smith 2020, sec. 4); None: 1/√L.
    """

    modules: tuple[str, ...]
    gain: float | None = None

    def apply(self, case: Case) -> Case:
        gain = len(self.modules) ** -0.5 if self.gain is None else self.gain
        for name in self.modules:
            branch = case.model.get_submodule(name)
            like = next(branch.parameters())
            scale = Gain(init=gain).to(like.device, like.dtype)
            case.model.set_submodule(name, Residual(branch, scale=scale))
        return case

    def __str__(self) -> str:
        return f"put a skip around {self.modules[0]} … {self.modules[-1]} ({len(self.modules)} modules)"
