"""One forward pass in training mode before the first step: does the network run on parts of a batch of this size?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError, counted, first_line, printable, spell
from skipway.tracing import preserved_state
from skipway.training.run import Run

__all__ = [
    "check_forward",
    "forward_fault",
    "keeps_statistics",
    "normalisers",
    "stale_statistics",
    "statistics_remarks",
]

# values per channel from which a mean and a variance are estimates rather than noise
FEW_VALUES = 16
# share of the initial running statistics that is left at the end, from which it is remarked
STALE = 0.05


def check_forward(run: Run) -> None:
    """Send as many items through the network, in training mode, as one part of a batch has, two at most.

    Raises:
        SkipwayError: it fails; named are the larger batch, the fewer parts and the larger items with which it runs.
    """
    ranks, parts = run.ranks.world, run.progress.accumulation
    items, side = run.recipe.batch_size // (ranks * parts), run.side or run.task.side(run.data)
    reason = forward_fault(run, min(items, 2), side)
    if not reason:
        return
    shares = [number for number in range(1, parts) if run.recipe.batch_size % (ranks * number) == 0]
    fewer = next((number for number in reversed(shares) if run.recipe.batch_size // (ranks * number) >= 2), None)
    runs_in_pairs = items < 2 and not forward_fault(run, 2, side)
    ways = [
        spell(name, value)
        for name, value, runs in (
            ("batch_size", 2 * ranks * parts, runs_in_pairs and 2 * ranks * parts <= run.task.count(run.data, "train")),
            ("accumulate", fewer, runs_in_pairs and fewer is not None),
            (run.task.side_field, 2 * side, run.recipe.grow_from is None and not forward_fault(run, items, 2 * side)),
        )
        if runs
    ]
    passes = f"{counted(items, run.task.item)} of {run.task.side_text(side)} in a forward pass"
    rule = f" ({spell('batch_size', run.recipe.batch_size)}, {spell('accumulate', parts)})" if runs_in_pairs else ""
    out = f"; it runs with {' or '.join(ways)}" if ways else f"; take another model or {run.task.side_field}"
    raise SkipwayError(f"{run.recipe.model} cannot be trained on {passes}{rule}: {printable(reason)}{out}")


def forward_fault(run: Run, items: int, side: int) -> str:
    """Why a forward pass in training mode fails; "": it does not. The network stays as it is."""
    inputs = run.task.blank(run.data, items, side).to(run.device)
    try:
        with preserved_state(run.model), torch.no_grad(), run.autocast():
            run.model.train()(inputs)
    except Exception as error:  # whatever a layer raises
        return first_line(error).rstrip(".")
    return ""


def statistics_remarks(run: Run) -> Iterator[str]:
    """Remarks about statistics over a batch: of too few values, or whose running means stay near their start."""
    if not run.recipe.freeze_plan.takes_steps or keeps_statistics(run):  # nothing is normalised by a batch
        return
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        for name, module in normalisers(run.model):
            hook = module.register_forward_pre_hook(CountValues(counts, name))
            stack.callback(hook.remove)
        images = max(1, run.recipe.batch_size // (run.ranks.world * run.progress.accumulation))
        forward_fault(run, min(images, 2), run.side or run.task.side(run.data))
    if not counts:
        return
    name = min(counts, key=counts.__getitem__)
    values = counts[name] * images // min(images, 2)
    if values < FEW_VALUES:
        parts = f" / {spell('accumulate', run.progress.accumulation)}" if run.progress.accumulation > 1 else ""
        yield (
            f"{name} normalises with the mean and variance of {counted(values, 'value')}, those of "
            f"{counted(images, 'image')} ({spell('batch_size', run.recipe.batch_size)}{parts}): they are mostly noise; "
            "a larger batch or larger images give more"
        )
    if run.recipe.time is None:
        yield from stale_statistics(run.model, run.progress.plan.end)


def stale_statistics(model: nn.Module, steps: int) -> Iterator[str]:
    """A remark about running statistics that so many steps leave near their start."""
    left = {name: (1 - module.momentum) ** steps for name, module in normalisers(model) if module.momentum}
    if left and max(left.values()) > STALE:
        name = max(left, key=left.__getitem__)
        yield (
            f"after {counted(steps, 'step')} the running mean and variance of {name} are still {100 * left[name]:.0f} "
            "% their initial values, so the network computes something else in evaluation than in training; more steps "
            "mend it"
        )


def keeps_statistics(run: Run) -> bool:
    """Whether the running statistics of the initial weights normalise in training, too."""
    return run.recipe.freeze_plan.keeps_statistics and run.recipe.initial_weights is not None


def normalisers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that keep running statistics of their inputs."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "running_mean", None), Tensor) and hasattr(module, "momentum"):
            yield name, module


class CountValues:
    """A hook that notes how many values a channel of a module's input has.

    Args:
        counts: name of a module → the number, which is entered here.
        name: of the module.
    """

    def __init__(self, counts: dict[str, int], name: str) -> None:
        self.counts = counts
        self.name = name

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        self.counts[self.name] = x.numel() // max(1, x.shape[1])
