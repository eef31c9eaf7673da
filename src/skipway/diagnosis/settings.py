"""The training that a diagnosis is asked about: optimizer, learning rate, warm-up, steps."""

from __future__ import annotations

import copy
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from skipway.errors import SkipwayError, did_you_mean
from skipway.optim.clip import Clipper
from skipway.optim.groups import param_groups
from skipway.optim.optimizers import part_of_group
from skipway.optim.schedules import ScheduleShape, lr_factor, parse_schedule
from skipway.tracing import Program
from skipway.validation import check_finite, check_least, check_positive, check_rule, check_whole

__all__ = ["OPTIMIZERS", "USUAL_RATES", "OptimizerParts", "Settings", "require_optimizers", "settings_of"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups, **options: torch.optim.SGD(groups, momentum=0.9, **options),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
CHOICES = f"one of {', '.join(OPTIMIZERS)}, a torch optimizer, or a list of torch optimizers for parts of the model"
USUAL_RATES = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3, "adagrad": 1e-2}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The training that a diagnosis is asked about.

    Args:
        optimizer: "sgd" (momentum 0.9), "adam", "adamw", "rmsprop" or "adagrad".
        lr: learning rate of the weights after warm-up; None: the usual one of the optimizer.
        weight_decay: of the weights; other roles as `skipway.param_groups` has it.
        warmup: steps over which the learning rate rises from 0.
        schedule: of the learning rate after warm-up: "constant", "cosine", "linear" (to 0) or another one of
            `skipway train`, such as "step(at=(0.5, 0.75))"; or a function of the step, counted from 0, that returns the
            factor on the learning rate, as `torch.optim.lr_scheduler.LambdaLR` takes it.
        clip: of the gradients before every step; None: they are taken as they are.
        steps: planned; a learning rate that gets nowhere in them is too low.
        exact: makes the optimizer of a model at a learning rate, instead of the name and `param_groups`.
        outside: names of trainable parameters that the optimizer does not hold; they stay as they are.
    """

    optimizer: str = "sgd"
    lr: float | None = None
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: str | Callable[[int], float] = "constant"
    clip: Clipper | None = None
    steps: int = 1000
    exact: Callable[[nn.Module, float], OptimizerParts] | None = None
    outside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.exact is None and (not isinstance(self.optimizer, str) or self.optimizer not in OPTIMIZERS):
            question = did_you_mean(self.optimizer, OPTIMIZERS) if isinstance(self.optimizer, str) else ""
            raise SkipwayError(f"optimizer={self.optimizer!r}: {question or f'the rule is {CHOICES}'}")
        for name, value in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            if value is not None:
                check_finite(name, value)
        if self.lr is not None:
            check_positive("lr", self.lr)
        check_least("weight_decay", self.weight_decay, 0)
        for name, least in (("warmup", 0), ("steps", 1)):
            check_whole(name, getattr(self, name), least, of="steps")
        if isinstance(self.schedule, str):
            parse_shape(self.schedule)
        elif not callable(self.schedule):
            raise SkipwayError(
                f'schedule={self.schedule!r}: the rule is "constant", "cosine", "linear" or step → factor'
            )

    @property
    def rate(self) -> float:
        """The learning rate of the weights."""
        return USUAL_RATES.get(self.optimizer, 1e-3) if self.lr is None else self.lr

    @property
    def adaptive(self) -> bool:
        """Whether the size of a step hardly depends on the size of the gradient."""
        return "sgd" not in self.optimizer.lower()

    def factor(self, step: int) -> float:
        """The factor on the learning rate at a step, counted from 0: the warm-up's, then the schedule's.

        >>> [round(Settings(warmup=2, schedule="linear", steps=6).factor(step), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        step = min(step, self.steps - 1)
        if isinstance(self.schedule, str):
            return lr_factor(step, self.steps, self.warmup / self.steps, parse_shape(self.schedule))
        return self.scheduled(step) * min(1.0, (step + 1) / max(self.warmup, 1))

    def scheduled(self, step: int) -> float:
        """The factor that the given function returns."""
        assert callable(self.schedule)
        try:
            factor = float(self.schedule(step))
        except Exception as error:  # anybody's function
            raise SkipwayError(
                f"schedule({step}) fails: {type(error).__name__}: {error}; the rule is a function that returns the "
                f"factor on the learning rate at every planned step, 0 to {self.steps - 1}"
            ) from error
        check_rule(f"schedule({step})", factor, 0 <= factor < math.inf, "a factor on the learning rate, 0 or more")
        return factor

    @cached_property
    def planned_distance(self) -> float:
        """Sum of the factors of all planned steps; of more than 2,000 of them, at as many places in equal distances."""
        places = min(self.steps, 2000)
        distance = sum(self.factor(self.steps * place // places) for place in range(places)) * self.steps / places
        if not distance:
            raise SkipwayError(f"schedule: its factor is 0 at all {self.steps} planned steps, so that no weight moves")
        return distance

    def make(self, model: nn.Module, program: Program | None = None) -> torch.optim.Optimizer | OptimizerParts:
        """Make a fresh optimizer over the parameters of `model`, whose roles are read from its program if given."""
        if self.exact is not None:
            return self.exact(model, self.rate)
        make = OPTIMIZERS[self.optimizer]
        eps = inspect.signature(make).parameters.get("eps")
        groups = param_groups(
            model,
            program,
            lr=self.rate,
            weight_decay=self.weight_decay,
            eps=None if eps is None else eps.default,
            adaptive=self.adaptive,
        )
        return make(groups, lr=self.rate)

    def at(self, lr: float) -> Settings:
        """The same settings with another learning rate."""
        return replace(self, lr=lr)

    def __str__(self) -> str:
        warm = f", warm-up over {self.warmup} steps" if self.warmup else ""
        shape = self.schedule if isinstance(self.schedule, str) else getattr(self.schedule, "__name__", "given")
        scheduled = "" if shape == "constant" else f", schedule {shape}"
        clipped = "" if self.clip is None else f", gradients clipped by {self.clip}"
        return f"{self.optimizer} at {self.rate:.3g}{warm}{scheduled}{clipped}"


def parse_shape(text: str) -> ScheduleShape:
    """The shape of a schedule after warm-up, by its name."""
    return (lambda t: 1 - t) if text == "linear" else parse_schedule(text)


def settings_of(optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], model: nn.Module) -> Settings:
    """Read the settings of torch optimizers made for parts of `model`; they are left alone.

    Parameters that none of them holds stay as they are. Those that a remedy adds go to the first that takes them.
    """
    given = require_optimizers(optimizers)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = [{id(each): each for group in one.param_groups for each in group["params"]} for one in given]
    title = "+".join(type(each).__name__ for each in given)
    if any(key not in names for held in members for key in held):
        raise SkipwayError(
            f"optimizer={title}: it holds parameters that {type(model).__name__} does not have; "
            "make it from model.parameters()"
        )
    if sum(map(len, members)) > len({key for held in members for key in held}):
        raise SkipwayError(f"optimizer={title}: two of them hold the same parameter; the rule is one for each")
    held = {names[key] for each in members for key in each}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    outside = tuple(name for name in trained if name not in held)
    highest = max(peak_rate(group) for one in given for group in one.param_groups)

    def make(other: nn.Module, lr: float) -> OptimizerParts:
        parameters = dict(other.named_parameters())
        parts = [fresh_copy(one, {key: parameters.get(names[key]) for key in names}, lr / highest) for one in given]
        new = [each for name, each in parameters.items() if name not in names.values() and each.requires_grad]
        return OptimizerParts([*parts, *taking(parts, new, lr)])

    return Settings(optimizer=title.lower(), lr=highest, exact=make, outside=outside)


def require_optimizers(given: Any) -> list[torch.optim.Optimizer]:
    """One or several torch optimizers as a list; anything else is refused."""
    several = list(given) if isinstance(given, list | tuple) else [given]
    if not several or not all(isinstance(each, torch.optim.Optimizer) for each in several):
        raise SkipwayError(
            f"optimizer={given if isinstance(given, str) else type(given).__name__}: the rule is {CHOICES}"
        )
    for each in several:
        closure = inspect.signature(type(each).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise SkipwayError(
                f"optimizer={type(each).__name__}: its steps evaluate the loss again through a closure, which a "
                "diagnosis does not; the rule is an optimizer that steps on given gradients, such as "
                f"{', '.join(OPTIMIZERS)}"
            )
        if any(group.get("maximize") for group in each.param_groups):
            raise SkipwayError(
                f"optimizer={type(each).__name__}: maximize=True raises the loss; the rule is one that lowers it: give "
                "loss=(output, targets) → the negative of what is maximised, and an optimizer without maximize"
            )
    return several


class OptimizerParts:
    """Several optimizers that step together, each on a part of a model."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            try:
                part.step()
            except Exception as error:  # anybody's optimizer
                raise SkipwayError(
                    f"optimizer={type(part).__name__}: its step fails: {type(error).__name__}: {error}; a diagnosis "
                    "calls step() after the backward pass, without a closure"
                ) from error


def fresh_copy(
    optimizer: torch.optim.Optimizer, parameters: Mapping[int, nn.Parameter | None], factor: float
) -> torch.optim.Optimizer:
    """A copy of an optimizer without state, over other parameters and with its rates times a factor.

    Its constructor is not called, since it may refuse parameters or have arguments of its own.
    """
    memo: dict[int, Any] = dict(parameters)
    copied: Any = object.__new__(type(optimizer))
    memo |= {id(optimizer): copied, id(optimizer.state): defaultdict(dict)}
    for name, value in vars(optimizer).items():
        if name != "step":  # a schedule has put its own there, which steps the optimizer that it was made for
            copied.__dict__[name] = copy.deepcopy(value, memo)
    for group in copied.param_groups:
        held = [place for place, parameter in enumerate(group["params"]) if parameter is not None]
        group.update(part_of_group(group, held))
        group["lr"] = peak_rate(group) * factor
        for name in PEAKS[1:]:
            group.pop(name, None)  # a schedule of the copy has its own
    return copied


PEAKS = ("lr", "initial_lr", "max_lr")
"""Entries of a parameter group that may hold its peak learning rate, where a schedule of torch has changed it."""


def peak_rate(group: Mapping[str, Any]) -> float:
    """The learning rate of a group now; where a schedule's warm-up starts at 0, its peak."""
    now = float(group["lr"])
    return now or max(float(group[name]) for name in PEAKS if group.get(name) is not None)


def taking(
    parts: Sequence[torch.optim.Optimizer], new: Sequence[nn.Parameter], lr: float
) -> list[torch.optim.Optimizer]:
    """Add new parameters, undecayed, to the first optimizer that takes them; else return one of their own, AdamW."""
    for part in parts if new else ():
        kind: Any = type(part)
        with suppress(TypeError):  # a constructor with arguments of its own
            try:
                kind([{**part.defaults, "params": list(new)}])
            except ValueError:  # Muon takes matrices only
                continue
        part.add_param_group({"params": list(new), "lr": lr, "weight_decay": 0.0})
        return []
    return [torch.optim.AdamW(new, lr=lr, weight_decay=0.0)] if new else []
