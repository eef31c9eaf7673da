"""Hooks around the steps of optimizers, one or several of which make one step of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.optim import Optimizer

from skipway.errors import SkipwayError

__all__ = ["StepHooks", "scaler_around", "unwrapped_optimizer"]


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


def scaler_around(optimizer: Any) -> Any:
    """The GradScaler that a wrapper of an optimizer, such as Accelerate's, steps with; None where there is none."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        if (scaler := getattr(optimizer, "scaler", None)) is not None:
            return scaler
        optimizer = optimizer.optimizer
    return None


class StepHook:
    """A hook of an optimizer whose copies and pickles do nothing, and that a compiled step passes over.

    Args:
        action: what is done with the optimizer.
        again: None, or what is done after each further call of the closure that the step is given: the action then
            follows the first one, which computes the gradients, and does not precede it.
    """

    def __init__(
        self, action: Callable[[Optimizer], None] | None = None, again: Callable[[], None] | None = None
    ) -> None:
        self.action, self.again = action, again

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if self.action is None or torch.compiler.is_compiling():
            return None
        if self.again is not None:
            if callable(kwargs.get("closure")):
                return args, {**kwargs, "closure": self.followed(optimizer, kwargs["closure"])}
            if len(args) > 1 and callable(args[1]):  # the first one is the optimizer
                return (args[0], self.followed(optimizer, args[1]), *args[2:]), kwargs
        self.action(optimizer)
        return None

    def followed(self, optimizer: Optimizer, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure of one step, followed by the action."""
        called = False

        @wraps(closure)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal called
            loss = closure(*args, **kwargs)
            first, called = not called, True
            if first and self.action is not None:
                self.action(optimizer)
            elif self.again is not None:
                self.again()
            return loss

        return call

    def __deepcopy__(self, memo: Any) -> StepHook:
        return StepHook()

    def __reduce__(self) -> Any:
        return StepHook, ()


class StepHooks:
    """Calls `before` when the first of some optimizers is about to step, and `after` when the last of them has stepped.

    Where one steps again before all have stepped, that begins a new step, and `after` is left out. An optimizer that is
    given a closure steps from the end of its first call on; `again` is called after each further one.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        before: Callable[[], None],
        after: Callable[[], None],
        again: Callable[[], None] = lambda: None,
    ) -> None:
        self.count, self.before, self.after = len(optimizers), before, after
        self.stepped: set[int] = set()
        self.begun = 0
        """Steps of single optimizers so far."""
        self.left_out: set[int] = set()
        """The optimizers that have stepped, and those that a GradScaler has not let step, since the last step's end."""
        self.handles: list[Any] = []
        for optimizer in optimizers:
            self.handles.append(optimizer.register_step_pre_hook(StepHook(self.begin, again)))
            self.handles.append(optimizer.register_step_post_hook(StepHook(self.end)))

    def begin(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step."""
        self.begun += 1
        self.left_out.discard(id(optimizer))
        if self.stepped and id(optimizer) not in self.stepped:
            self.stepped.add(id(optimizer))
            return
        self.stepped = {id(optimizer)}
        self.before()

    def end(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""
        if len(self.stepped | self.left_out) == self.count:
            self.stepped, self.left_out = set(), set()
            self.after()

    @contextmanager
    def watching(self, scaler: Any, optimizers: Sequence[Optimizer], skipped: Callable[[], None]) -> Iterator[None]:
        """Call `skipped` when a GradScaler, because of the gradients, has let none of the optimizers step."""
        original, own = scaler.step, vars(scaler).get("step")

        @wraps(original)
        def step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            begun = self.begun
            result = original(optimizer, *args, **kwargs)
            if self.begun == begun and unwrapped_optimizer(optimizer) in optimizers:
                self.left_out.add(id(unwrapped_optimizer(optimizer)))
                if len(self.stepped | self.left_out) == self.count:
                    ended = self.after if self.stepped else skipped
                    self.stepped, self.left_out = set(), set()
                    ended()
            return result

        scaler.step = step
        try:
            yield
        finally:
            if vars(scaler).get("step") is step:
                del scaler.step
                vars(scaler).update({} if own is None else {"step": own})

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
