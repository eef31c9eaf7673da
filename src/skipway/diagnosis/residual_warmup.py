"""Where the clock of a residual warm-up stands, and the step of the planned training at which a network is judged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from skipway.nn.warmup import WarmupState, set_step, warmup_state
from skipway.tracing import preserved_state

__all__ = ["JudgedWarmup", "judged_warmup"]


@dataclass(frozen=True)
class JudgedWarmup:
    """A residual warm-up that has not ended.

    Args:
        now: where it stands.
        planned: where it stands after the planned steps.
        judged: where it stands in the passes of the diagnosis: as planned, or at its end if a factor is still 0 then.
        total: planned steps.
    """

    now: WarmupState
    planned: WarmupState
    judged: WarmupState
    total: int


def judged_warmup(model: nn.Module, steps: int) -> JudgedWarmup | None:
    """Where the warm-up of a model is judged in a training of so many steps; None without one, or at its end."""
    now = warmup_state(model)
    if now is None or not now.running:
        return None
    planned = judged = state_at(model, now.step + steps, steps)
    if not min(planned.factors) > 0:
        assert planned.end is not None
        judged = state_at(model, planned.end, steps)
    return JudgedWarmup(now, planned, judged, steps)


def state_at(model: nn.Module, step: int, total: int) -> WarmupState:
    """The state of a model's warm-up at another step; the model is left alone."""
    with preserved_state(model):
        set_step(model, step, total)
        state = warmup_state(model)
    assert state is not None
    return state
