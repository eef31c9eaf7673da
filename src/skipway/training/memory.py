"""What memory a run will take, measured before its first step on a few images, and the batch that fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from skipway.diagnosis.settings import fresh_copy
from skipway.errors import SkipwayError, spell
from skipway.hardware.limits import available_memory, resident_memory
from skipway.recipe import Recipe, ResolvedRecipe
from skipway.surgery.saved_tensors import saved_bytes
from skipway.training.run import Run

__all__ = ["MemoryNeed", "fit_batch", "measure_memory"]

# share of the free memory that a run may take
MEMORY_SHARE = 0.8
# gradients of activations and workspaces of a backward pass, over what autograd keeps
TRANSIENT_SHARE = 0.2


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a run takes on its device.

    Args:
        held: already taken: libraries, data, parameters, averaged weights.
        state: gradients, optimizer, and the copy that a checkpoint takes of weights and optimizer.
        per_image: for each item of a part of the batch: activations and the item itself.
        constant: activations that do not depend on the batch, such as weights in lower precision.
        free: what can still be taken; None where it is not known.

    >>> MemoryNeed(held=100, state=50, per_image=10, constant=0, free=1000).largest_batch(256, 1)
    64
    """

    held: float
    state: float
    per_image: float
    constant: float
    free: float | None

    def more(self, images: int) -> float:
        """Bytes that training on parts of so many images takes besides what is held."""
        return self.state + self.constant + self.per_image * images

    def fits(self, images: int) -> bool:
        """Whether parts of so many images fit into the free memory."""
        return self.free is None or self.more(images) <= MEMORY_SHARE * self.free

    def largest_batch(self, batch_size: int, parts: int) -> int:
        """The batch size, or the largest of its halves that fits in so many parts; the smallest one if none does."""
        while batch_size % (2 * parts) == 0 and batch_size // parts > 1 and not self.fits(batch_size // parts):
            batch_size //= 2
        return batch_size


def measure_memory(run: Run) -> MemoryNeed | None:
    """What a run will take, by what autograd keeps of 2 and of 4 images in training mode; None where that cannot be
    measured. The network stays as it is.
    """
    side = run.task.side(run.data)
    try:
        with run.autocast():
            two, four = (saved_bytes(run.model, run.task.blank(run.data, n, side).to(run.device)) for n in (2, 4))
    except (SkipwayError, RuntimeError):  # re-entrant checkpoints, or a network that takes no zeros
        return None
    activations = max(0.0, (four - two) / 2)
    learning = sum(parameter.nbytes for parameter in run.parameters)
    moments = optimizer_bytes(run.optimizer)
    on_gpu = run.device.type == "cuda"
    return MemoryNeed(
        held=torch.cuda.memory_allocated(run.device) if on_gpu else resident_memory(),
        state=learning + 2 * moments + sum(tensor.nbytes for tensor in run.model.state_dict().values()),
        per_image=(1 + TRANSIENT_SHARE) * activations + run.task.item_bytes(run),
        constant=max(0.0, two - 2 * activations),
        free=torch.cuda.mem_get_info(run.device)[0] if on_gpu else available_memory(),
    )


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of an optimizer's state after a step, by that of a copy over tiny parameters with as many axes."""
    pairs = [(parameter, tiny_like(parameter)) for group in optimizer.param_groups for parameter in group["params"]]
    tiny = fresh_copy(optimizer, {id(parameter): small for parameter, small in pairs}, 1.0)
    tiny.step()
    total = 0.0
    for parameter, small in pairs:
        kept = (tensor for tensor in tiny.state.get(small, {}).values() if isinstance(tensor, torch.Tensor))
        total += sum(tensor.nbytes for tensor in kept if tensor.numel() > 1) / small.nbytes * parameter.nbytes
    return total


def tiny_like(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of two entries along each axis, with a gradient."""
    found = nn.Parameter(torch.ones((2,) * parameter.ndim, dtype=parameter.dtype, device=parameter.device))
    found.grad = torch.ones_like(found)
    return found


def fit_batch(run: Run, *, is_fresh: bool) -> tuple[ResolvedRecipe, list[tuple[str, str]]]:
    """Measure what memory training will take, and put into words what there is to say about it, with labels.

    Returns the recipe, with a smaller batch where that of a fresh run is a default that does not fit; where it was
    given, the sizes that fit are named.
    """
    recipe = run.recipe
    if run.ranks.world > 1 or not recipe.freeze_plan.takes_steps:
        return recipe, []
    need = measure_memory(run)
    if need is None:
        return recipe, [("memory", f"not known: {recipe.model} cannot be measured")]
    batch_size, remark = batch_that_fits(need, run.given, recipe) if is_fresh else (recipe.batch_size, "")
    if batch_size != recipe.batch_size:
        recipe = with_batch_size(run.given, recipe, batch_size)
    return recipe, [("memory", memory_text(need, recipe)), *([("note", remark)] if remark else [])]


def memory_text(need: MemoryNeed, recipe: ResolvedRecipe) -> str:
    """In words, what a run takes."""
    images = recipe.batch_size // recipe.accumulate
    free = "" if need.free is None else f"; {need.free / 1e9:.1f} GB are free"
    return (
        f"about {(need.held + need.more(images)) / 1e9:.1f} GB with {spell('batch_size', recipe.batch_size)}: "
        f"{need.held / 1e9:.1f} GB that libraries, data and weights take already, "
        f"{need.per_image * images / 1e9:.2g} GB for the batch{free}"
    )


def batch_that_fits(need: MemoryNeed, given: Recipe, recipe: ResolvedRecipe) -> tuple[int, str]:
    """The batch size to train with, which is smaller than that of the recipe where that is a default that does not fit,
    and what there is to say about it.
    """
    images, fitting = recipe.batch_size // recipe.accumulate, need.largest_batch(recipe.batch_size, recipe.accumulate)
    if fitting == recipe.batch_size and need.fits(images):
        return recipe.batch_size, ""
    size, best = spell("batch_size", recipe.batch_size), spell("batch_size", fitting)
    if not need.fits(fitting // recipe.accumulate):
        return (
            recipe.batch_size,
            f"{size} will not fit into memory, nor will {best}; take smaller images or a smaller model",
        )
    if given.batch_size is None:
        return fitting, f"{size} would not fit into memory: {best} is taken"
    parts = spell("accumulate", recipe.accumulate * recipe.batch_size // fitting)
    return recipe.batch_size, f"{size} will not fit into memory: {best} does, and {parts} takes the same batch in parts"


def with_batch_size(given: Recipe, recipe: ResolvedRecipe, batch_size: int) -> ResolvedRecipe:
    """The recipe with another batch size, and the learning rate that belongs to it unless that was given."""
    factor = (batch_size / recipe.batch_size) ** recipe.optimizer_spec.lr_power
    lr = recipe.lr if given.lr is not None else recipe.peak_lr * factor
    return replace(recipe, batch_size=batch_size, lr=lr)
