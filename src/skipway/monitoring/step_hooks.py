"""Hooks around the steps of optimizers, one or several of which make one step of a training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from skipway.errors import SkipwayError

__all__ = ["StepHooks", "unwrapped_optimizer"]


def unwrapped_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer of torch within a wrapper, such as those of Accelerate and Lightning.

    Raises:
        SkipwayError: there is none.
    """
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise SkipwayError(f"optimizer={type(optimizer).__name__}: the rule is a torch.optim.Optimizer")
    return optimizer


class StepHook:
    """A hook of an optimizer whose copies and pickles do nothing, and that a compiled step passes over."""

    def __init__(self, action: Callable[[Optimizer], None] | None = None) -> None:
        self.action = action

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.action is not None and not torch.compiler.is_compiling():
            self.action(optimizer)

    def __deepcopy__(self, memo: Any) -> StepHook:
        return StepHook()

    def __reduce__(self) -> Any:
        return StepHook, ()


class StepHooks:
    """Calls `before` when the first of some optimizers is about to step, and `after` when the last of them has stepped.

    Where one steps again before all have stepped, that begins a new step, and `after` is left out.
    """

    def __init__(self, optimizers: Sequence[Optimizer], before: Callable[[], None], after: Callable[[], None]) -> None:
        self.count, self.before, self.after = len(optimizers), before, after
        self.stepped: set[int] = set()
        self.handles: list[Any] = []
        for optimizer in optimizers:
            self.handles.append(optimizer.register_step_pre_hook(StepHook(self.begin)))
            self.handles.append(optimizer.register_step_post_hook(StepHook(self.end)))

    def begin(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step."""
        if self.stepped and id(optimizer) not in self.stepped:
            self.stepped.add(id(optimizer))
            return
        self.stepped = {id(optimizer)}
        self.before()

    def end(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""
        if len(self.stepped) == self.count:
            self.stepped = set()
            self.after()

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
