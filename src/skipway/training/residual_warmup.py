"""The residual warm-up of a run: its clock follows the optimizer's steps, over all sessions."""

from __future__ import annotations

from collections.abc import Iterator

from skipway.errors import spell
from skipway.nn.warmup import find_warmups, set_step, warmup_state
from skipway.training.run import Run

__all__ = ["continue_warmup", "move_warmup", "start_warmup", "unfinished_warmup", "warmup_lines"]


def start_warmup(run: Run) -> None:
    """Start the clock of a fresh run at step 0, in place, or go on from the step that its initial weights hold."""
    if run.recipe.initial_weights is None:
        set_step(run.model, 0, run.progress.plan.end)
    continue_warmup(run)


def continue_warmup(run: Run) -> None:
    """Go on from the step that the network holds, in place; a warm-up that is over stays so."""
    state = warmup_state(run.model)
    run.warmup_offset = None if state is None or not state.running else state.step - run.global_step


def move_warmup(run: Run) -> None:
    """Tell the branches how many steps are done, in place, until all have their full size."""
    if run.warmup_offset is None:
        return
    step, total = run.warmup_offset + run.global_step, planned_total(run)
    set_step(run.model, step, total)
    if step >= warmup_end(run, total):
        run.warmup_offset = None


def planned_total(run: Run) -> int:
    """Steps of a run of which the same part is done as of this one, whose plan may have changed."""
    plan, step = run.progress.plan, run.global_step
    return max(1, round(step * plan.end / plan.virtual_step(step))) if step and plan.virtual_step(step) else plan.end


def warmup_end(run: Run, total: int) -> int:
    """The step at which the last branch has its full size."""
    lengths = [warmup.length for warmup in find_warmups(run.model)]
    return max(length if isinstance(length, int) else round(length * total) for length in lengths)


def warmup_lines(run: Run) -> Iterator[tuple[str, str]]:
    """What is said about the warm-up before the training: its length, and whether the run reaches its end."""
    state = warmup_state(run.model)
    if state is None:
        return
    if run.warmup_offset is None:
        if run.recipe.initial_weights is not None and run.global_step == 0:
            yield "note", "the residual warm-up is over in the initial weights: all branches have their full size"
        return
    total = run.progress.plan.end
    end, last = warmup_end(run, total), run.warmup_offset + total
    planned = run.recipe.time is None or run.progress.planned
    until = (
        f"at step {end:,} of {last:,}" if planned else f"after {end / total:.3g} of the steps that fit into the time"
    )
    if not planned and isinstance(next(find_warmups(run.model)).length, int):
        until = f"at step {end:,}"
    at = f", from step {state.step:,} on, which the initial weights hold" if state.step > run.global_step else ""
    yield "branches", f"warmed up one block after the other, the last one {until}{at}"
    if planned and end > last:
        yield (
            "note",
            f"the residual warm-up ends at step {end:,} and the run at step {last:,}: the last branches never have "
            f"their full size; a share of the run fits any length, {spell('scheme', 'prores(0.25)')}",
        )


def unfinished_warmup(run: Run) -> str | None:
    """The sentence about a network whose training ended before its warm-up."""
    state = warmup_state(run.model)
    if state is None or not state.running:
        return None
    return f"the training ended before the residual warm-up: the network stands at {state}, and computes with these"
