"""How a network is going to be trained: optimizer, learning rate, warm-up."""

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
CUSTOMARY = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3, "adagrad": 1e-2}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a network is going to be trained.

    Args:
        optimizer: "sgd" (momentum 0.9), "adam", "adamw", "rmsprop" or "adagrad".
        lr: learning rate of the weights after warm-up; None: the customary one of the optimizer.
        weight_decay: by role, as `skipway.param_groups` gives it.
        warmup: steps over which the learning rate rises from 0.
        steps: how many steps are planned; a learning rate that gets nowhere in them is too low.
        exact: an optimizer's class and its own groups, taken over instead of `param_groups`.
    """

    optimizer: str = "sgd"
    lr: float | None = None
    weight_decay: float = 0.0
    warmup: int = 0
    steps: int = 1000
    exact: Callable[[nn.Module, float], torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS and self.exact is None:
            raise SkipwayError(f"optimizer={self.optimizer!r}: one of {', '.join(OPTIMIZERS)}, or a torch optimizer")
        if self.lr is not None and not self.lr > 0:
            raise SkipwayError(f"lr={self.lr}: the learning rate has to be above 0")

    @property
    def rate(self) -> float:
        """The learning rate of the weights."""
        return CUSTOMARY.get(self.optimizer, 1e-3) if self.lr is None else self.lr

    @property
    def adaptive(self) -> bool:
        """Whether every step has about the size of the learning rate, whatever the gradient's is."""
        return "sgd" not in self.optimizer.lower()

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        """A fresh optimizer over the model's parameters."""
        if self.exact is not None:
            return self.exact(model, self.rate)
        groups = param_groups(model, lr=self.rate, weight_decay=self.weight_decay)
        return OPTIMIZERS[self.optimizer](groups, lr=self.rate)

    def at(self, lr: float) -> Settings:
        """The same with another learning rate."""
        return replace(self, lr=lr)

    def __str__(self) -> str:
        warm = f", warm-up over {self.warmup} steps" if self.warmup else ""
        return f"{self.optimizer} at {self.rate:.3g}{warm}"


def settings_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> Settings:
    """The settings of an optimizer that somebody has made for `model`; the optimizer itself is not touched."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    members = [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
    if any(name is None for group in members for name in group):
        raise SkipwayError("the optimizer holds parameters that are not the model's; make it from model.parameters()")
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
