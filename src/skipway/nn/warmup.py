"""The residual warm-up: a factor on each branch that follows the step of the training, and the call that moves it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError, counted
from skipway.validation import check_whole

__all__ = ["ResidualWarmup", "WarmupState", "find_warmups", "set_step", "warmup_state"]


class ResidualWarmup(nn.Module):
    """y = a(t) x, a(t) = m + (1 − m) clamp(1 − (until − t/W) / span, 0, 1)^power, t the step of the training.

    t and W are two whole numbers in buffers of the state dict: they survive saving, loading, casts to other types and
    compilation, averages of weights copy them, and nothing is computed anew where they change.

    Args:
        end: W, the step at which the warm-up of the whole network ends; as a float the share of the training, whose
            length `set_step` is then told.
        until: where this branch has its full size, as a share of W; from W on all have exactly 1.
        span: how long it rises until then, as a share of W.
        lowest: m, its value until then.
        power: exponent.

    >>> warmup = ResidualWarmup(100, until=0.5, span=0.5)
    >>> set_step(warmup, 10), float(warmup(torch.ones(())))
    (1, 0.2...)
    """

    step: Tensor
    end: Tensor
    neutral_note = "at the end of its warm-up, which set_step(model, 0, total) begins: with the shortcuts alone"

    def __init__(
        self, end: int | float, *, until: float = 1.0, span: float = 1.0, lowest: float = 0.0, power: float = 1.0
    ) -> None:
        super().__init__()
        self.length, self.until, self.span, self.lowest, self.power = end, until, span, lowest, power
        for name in ("step", "end"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to step 0; an end that depends on the length of the training is unknown then, and 1."""
        self.step.zero_()
        self.end.fill_(self.length if isinstance(self.length, int) else 1)

    def start_neutral_(self) -> None:
        """Let the warm-up be over, in place: a = 1, so that a trained branch stays as it is."""
        self.step.copy_(self.end)

    @property
    def running(self) -> bool:
        """Whether the factor is not 1 yet."""
        return bool(self.factor() < 1)

    def factor(self) -> Tensor:
        """a(t)."""
        factor = self.step / self.end
        if self.until != self.span:
            factor = 1 - (self.until - factor) / self.span
        elif self.span != 1:
            factor = factor / self.span
        factor = factor.clamp(0, 1)
        if self.power != 1:
            factor = factor**self.power
        return 1 - (1 - self.lowest) * (1 - factor) if self.lowest else factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor()

    def extra_repr(self) -> str:
        steps = counted(self.length, "step") if isinstance(self.length, int) else f"{self.length:g} of the training"
        return f"{steps}, {max(0.0, self.until - self.span):.3g} to {self.until:.3g}"


def find_warmups(model: nn.Module) -> Iterator[ResidualWarmup]:
    """The residual warm-ups of a network, ours or one that `rescheme` has dressed."""
    return (module for module in model.modules() if isinstance(module, ResidualWarmup))


@torch.no_grad()
def set_step(model: nn.Module, step: int, total: int | None = None) -> int:
    """Tell the residual warm-ups of a network, in place, how many steps the optimizer has taken: 0 before the first.

    A loop calls it after every `optimizer.step()`; accumulated gradients are one step. A network without a warm-up is
    left alone, so that a loop may call it always. Networks in `torch.compile`, `DistributedDataParallel` or FSDP are
    reached, and not compiled anew.

    Args:
        model: any network.
        step: optimizer steps taken so far, at least 0.
        total: steps of the whole training, where the warm-up is a share of it, `prores(0.25)`.

    Returns:
        the number of branches whose factor follows the step.

    Raises:
        SkipwayError: a step below 0, or a warm-up that is a share of a training of unknown length.

    Source: Chen et al. 2026, "Progressive Residual Warmup for Language Model Pretraining".

    >>> import skipway as sw
    >>> network = sw.build("resnet20", scheme="prores(10)")
    >>> set_step(network, 45)
    9
    >>> round(float(network.stages[2][2].scale.factor()), 6)
    0.5
    """
    check_whole("step", step, 0, of="optimizer steps")
    if total is not None:
        check_whole("total", total, 1, of="optimizer steps")
    warmups = list(find_warmups(model))
    share = next((warmup.length for warmup in warmups if not isinstance(warmup.length, int)), None)
    if share is not None and total is None:
        raise SkipwayError(
            f"total=None: the residual warm-up takes {share:g} of the training, whose length is not known; call "
            "set_step(model, step, total), or build the network with a whole number of steps, prores(1000)"
        )
    for warmup in warmups:
        warmup.step.fill_(step)
        if total is not None and not isinstance(warmup.length, int):
            warmup.end.fill_(max(1, round(warmup.length * total)))
    return len(warmups)


@dataclass(frozen=True)
class WarmupState:
    """Where the residual warm-ups of a network stand.

    Args:
        step: optimizer steps, the fewest of all branches.
        end: step at which all branches are at their full size; None if it follows from a length that is not known.
        factors: the factor of each branch, in order.
    """

    step: int
    end: int | None
    factors: tuple[float, ...]

    @property
    def running(self) -> bool:
        """Whether a factor has not reached 1."""
        return min(self.factors) < 1

    def __str__(self) -> str:
        """
        >>> str(WarmupState(120, 24000, (0.12, 0.005)))
        'step 120 of 24,000, where the factors are 0.005 to 0.12'
        """
        of = "" if self.end is None else f" of {self.end:,}"
        low, high = min(self.factors), max(self.factors)
        return f"step {self.step:,}{of}, where the factors are {low:.3g}" + (f" to {high:.3g}" if low != high else "")


def warmup_state(model: nn.Module) -> WarmupState | None:
    """Where the residual warm-ups of a network stand; None for a network without."""
    found = list(find_warmups(model))
    if not found:
        return None
    factors = torch.stack([warmup.factor().float() for warmup in found]).tolist()
    shares = any(not isinstance(warmup.length, int) for warmup in found)
    step, end = min(int(warmup.step) for warmup in found), max(int(warmup.end) for warmup in found)
    return WarmupState(step, None if shares and step == 0 and end == 1 else end, tuple(factors))
