"""A residual warm-up whose clock stands still while the network is trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from skipway.nn.warmup import warmup_state

__all__ = ["WarmupClock"]


@dataclass
class WarmupClock:
    """Looks at the clock of a residual warm-up from time to time."""

    step: int | None = None
    warned: bool = False

    def warning(self, model: nn.Module, steps: int) -> str:
        """A sentence, once, about a warm-up that has not moved since the last look, or stands at 0 after some steps.

        Args:
            steps: of the optimizer that the network can have been told of.
        """
        state, before = warmup_state(model), self.step
        if state is None or not state.running:
            return ""
        self.step = state.step
        moved = state.step != before if before is not None else state.step > 0 or not steps
        if moved or self.warned:
            return ""
        self.warned = True
        return (
            f"the residual warm-up stands still at {state}: call skipway.set_step(model, step, total) after each "
            "optimizer step"
        )
