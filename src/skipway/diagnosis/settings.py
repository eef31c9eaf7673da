"""The training that a diagnosis is asked about: optimizer, learning rate, warm-up, steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from skipway.errors import SkipwayError
from skipway.optim.groups import param_groups

__all__ = ["OPTIMIZERS", "Settings", "settings_of"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups, **options: torch.optim.SGD(groups, momentum=0.9, **options),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
USUAL_RATES = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3, "adagrad": 1e-2}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The training that a diagnosis is asked about.

    Args:
        optimizer: "sgd" (momentum 0.9), "adam", "adamw", "rmsprop" or "adagrad".
        lr: learning rate of the weights after warm-up; None: the usual one of the optimizer.
        weight_decay: of the weights; other roles as `skipway.param_groups` has it.
        warmup: steps over which the learning rate rises from 0.
        steps: planned; a learning rate that gets nowhere in them is too low.
        exact: makes the optimizer of a model at a learning rate, instead of the name and `param_groups`.
    """

    optimizer: str = "sgd"
    lr: float | None = None
    weight_decay: float = 0.0
    warmup: int = 0
    steps: int = 1000
    exact: Callable[[nn.Module, float], torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS and self.exact is None:
            raise SkipwayError(
                f"optimizer={self.optimizer!r}: the rule is one of {', '.join(OPTIMIZERS)}, or a torch optimizer"
            )
        if self.lr is not None and not self.lr > 0:
            raise SkipwayError(f"lr={self.lr}: the rule is lr > 0")

    @property
    def rate(self) -> float:
        """The learning rate of the weights."""
        return USUAL_RATES.get(self.optimizer, 1e-3) if self.lr is None else self.lr

    @property
    def adaptive(self) -> bool:
        """Whether the size of a step hardly depends on the size of the gradient."""
        return "sgd" not in self.optimizer.lower()

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make a fresh optimizer over the parameters of `model`."""
        if self.exact is not None:
            return self.exact(model, self.rate)
        groups = param_groups(model, lr=self.rate, weight_decay=self.weight_decay)
        return OPTIMIZERS[self.optimizer](groups, lr=self.rate)

    def at(self, lr: float) -> Settings:
        """The same settings with another learning rate."""
        return replace(self, lr=lr)

    def __str__(self) -> str:
        warm = f", warm-up over {self.warmup} steps" if self.warmup else ""
        return f"{self.optimizer} at {self.rate:.3g}{warm}"


def settings_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> Settings:
    """Read the settings of a torch optimizer made for `model`; the optimizer is left alone."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    members = [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
    if any(name is None for group in members for name in group):
        raise SkipwayError(
            f"optimizer={type(optimizer).__name__}: it holds parameters that {type(model).__name__} does not have; "
            "make it from model.parameters()"
        )
    highest = max(float(group["lr"]) for group in options)

    def make(other: nn.Module, lr: float) -> torch.optim.Optimizer:
        parameters = dict(other.named_parameters())
        groups: list[dict[str, Any]] = []
        for chosen, own in zip(members, options, strict=True):
            present = [parameters[name] for name in chosen if name in parameters]
            groups.append({**own, "params": present, "lr": float(own["lr"]) * lr / highest})
        known = {name for chosen in members for name in chosen}
        new = [parameter for name, parameter in parameters.items() if name not in known and parameter.requires_grad]
        if new:
            groups.append({**options[0], "params": new, "lr": lr, "weight_decay": 0.0})
        kind: Any = type(optimizer)
        return kind([group for group in groups if group["params"]])

    return Settings(optimizer=type(optimizer).__name__.lower(), lr=highest, exact=make)
