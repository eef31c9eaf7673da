"""Measures of a signal: functions of tensors, and the `Measure` objects that say where a probe takes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from skipway.errors import SkipwayError
from skipway.hardware.precision import widest

__all__ = ["MEASURES", "SIGNALS", "Measure", "cosine", "dead_share", "distinctness", "rms", "std", "variance"]

SMALL, LARGE = 1e-12, 1e15  # between them squares neither vanish nor overflow in float32


def rms(x: Tensor) -> Tensor:
    """Root mean square √(mean |x|²) over all elements, ≥ 0, computed in float32 at least; nan of none.

    >>> rms(torch.tensor([3.0, 4.0, 0.0, 0.0])).item()
    2.5
    """
    return rescaled(lambda x: squares(x).mean().sqrt(), x)


def std(x: Tensor) -> Tensor:
    """Standard deviation √(mean |x − mean x|²) over all elements, ≥ 0; nan of none.

    >>> std(torch.tensor([1.0, 3.0])).item()
    1.0
    """
    return rescaled(lambda x: squares(x - x.mean()).mean().sqrt(), x)


def variance(x: Tensor) -> Tensor:
    """Variance mean |x − mean x|² over all elements, ≥ 0, in float64 where the device has it.

    >>> variance(torch.tensor([1e30, 3e30])).item()  # doctest: +ELLIPSIS
    9.99...e+59
    """
    return widest(std(x)).square()


def largest_magnitude(x: Tensor) -> Tensor:
    """max |x| over all elements, ≥ 0; 0 of none.

    >>> largest_magnitude(torch.tensor([1.0, -3.0])).item()
    3.0
    """
    x = wide(x).abs() if x.is_complex() else wide(x)
    if not x.numel():
        return x.new_zeros(())
    low, high = x.aminmax()
    return torch.maximum(-low, high)


def is_finite(x: Tensor) -> Tensor:
    """1 where every element is a finite number, else 0.

    >>> is_finite(torch.tensor([1.0, torch.inf])).item()
    0.0
    """
    return torch.isfinite(x).all().float()


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩ / (|x| |y|) over all elements, in [−1, 1], of complex ones with Re ⟨x, y⟩; 0 where one of them is 0, nan
    where the shapes differ or an element is not finite.

    >>> cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])).item()  # doctest: +ELLIPSIS
    0.7071...
    """
    if x.shape != y.shape:
        return torch.tensor(math.nan, device=x.device)
    x, y = (wide(each) / largest_magnitude(each).clamp_min(1e-30) for each in real_parts(x, y))
    size = x.norm() * y.norm()
    return torch.where(size == 0, 0.0, (x * y).sum() / size.clamp_min(1e-38))


def distinctness(x: Tensor) -> Tensor:
    """1 − the mean cosine between the vectors of different samples, x of shape (N, …), in [0, N/(N−1)].

    0: all samples have the same direction; about 1: they have nothing in common. Computed from the spread around the
    mean direction, which keeps its precision where the cosine is 1 − 10⁻¹⁰. 1 for a single sample.

    >>> distinctness(torch.eye(4)).item(), distinctness(torch.ones(4, 3)).item()
    (1.0, 0.0)
    """
    if x.ndim < 2:
        return torch.ones((), device=x.device)
    (x,) = real_parts(x)
    return distinct_rows(wide(x).flatten(1)[None])


def token_distinctness(x: Tensor, channel: int | None = None) -> Tensor:
    """1 − the mean cosine between different positions of one sample, x of shape (N, …) with channels on an axis.

    Goes to 0 in rank collapse (Dong et al. 2021, https://arxiv.org/abs/2103.03404). 1 where there are no positions.

    Args:
        x: the signal.
        channel: the axis of its channels; None: 1 of maps (N, C, H, W), else the last one, as of what looks like
            (N, H, H, C).

    >>> token_distinctness(torch.ones(2, 5, 3)).item()
    0.0
    """
    if x.ndim < 3:
        return torch.ones((), device=x.device)
    guess = 1 if x.ndim == 4 and not x.shape[1] == x.shape[2] != x.shape[3] else -1
    (tokens,) = real_parts(x.movedim(guess if channel is None else channel, -1).flatten(1, -2))
    return distinct_rows(wide(tokens.flatten(2))) if tokens.shape[1] > 1 else torch.ones((), device=x.device)


def distinct_rows(rows: Tensor) -> Tensor:
    """1 − mean pairwise cosine of rows (groups, N, D): n/(n−1) · mean |x̂ − mean x̂|²."""
    count = rows.shape[1]
    if count < 2:
        return torch.ones((), device=rows.device)
    rows = rows / rows.abs().amax(-1, keepdim=True).clamp_min(1e-30)  # the squares of large values are infinite
    unit = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    spread = (unit - unit.mean(1, keepdim=True)).square().sum(-1).mean()
    return spread * count / (count - 1)


def dead_share(x: Tensor, channel: int | None = None) -> Tensor:
    """Share of channels, in [0, 1], that are 0 for every sample at every position.

    Args:
        x: the output of a rectifier.
        channel: the axis of its channels; None: 1 of maps (N, C, H, W), else the last one.

    >>> dead_share(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).item()
    0.5
    """
    guess = 1 if x.ndim == 4 else -1
    live = (x != 0).movedim(guess if channel is None else channel, 0).flatten(1).any(1)
    return 1 - live.float().mean()


def overflow(*tensors: Tensor, largest: float = 65504.0) -> Tensor:
    """max |x| over what a type can hold, by default float16's 65504; above 1 the type overflows.

    >>> overflow(torch.tensor([131008.0])).item()
    2.0
    """
    return torch.stack([largest_magnitude(x) for x in tensors]).amax() / largest


def swallowed_share(stream: Tensor, branch: Tensor) -> Tensor:
    """Share of elements, in [0, 1], at which bfloat16 loses the branch: x + F(x) rounds to x, though F(x) ≠ 0. Real and
    imaginary parts are elements each.

    >>> swallowed_share(torch.ones(4), torch.tensor([1e-3, 1e-3, 0.5, 0.0])).item()
    0.5
    """
    if stream.shape != branch.shape:
        return torch.tensor(math.nan, device=stream.device)
    stream, branch = real_parts(stream, branch)
    low = stream.to(torch.bfloat16)
    return ((low + branch.to(torch.bfloat16) == low) & (branch != 0)).float().mean()


def branch_gradient(before: Tensor, after: Tensor) -> Tensor:
    """rms(∂L/∂x − ∂L/∂y), the part of the gradient that comes back through F where y = x + F(x)."""
    return rms(before - after) if before.shape == after.shape else torch.tensor(math.nan, device=before.device)


def wide(x: Tensor) -> Tensor:
    """`x` detached, in float32 or, where it is that already, float64; complex numbers in their types of that width."""
    x = x.detach()
    if x.is_complex():
        return x.to(torch.promote_types(x.dtype, torch.complex64))
    return x if x.dtype == torch.float64 else x.float()


def is_inexact(x: Tensor) -> bool:
    """Whether a tensor holds numbers with a fraction, real or complex: those that have gradients."""
    return x.is_floating_point() or x.is_complex()


def squares(x: Tensor) -> Tensor:
    """|x|² of each element."""
    return (x.abs() if x.is_complex() else x).square()


def real_parts(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors; where one is complex, the real and imaginary parts of all, along a last axis of two.

    >>> real_parts(torch.tensor([1 + 2j]), torch.ones(1))
    (tensor([[1., 2.]]), tensor([[1., 0.]]))
    """
    if not any(each.is_complex() for each in tensors):
        return tensors
    wanted = (each.to(torch.promote_types(each.dtype, torch.complex64)) for each in tensors)
    return tuple(torch.view_as_real(each.resolve_conj()) for each in wanted)


def rescaled(size: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """size(x) for a function with size(c·x) = c·size(x), without overflow or underflow of its squares."""
    x = wide(x)
    if x.device.type == "cpu" and SMALL < float(value := size(x)) < LARGE:
        return value
    largest = largest_magnitude(x).clamp(1e-30, torch.finfo(x.dtype).max)  # infinite elements stay infinite
    return size(x / largest) * largest


SIMULTANEOUS = (
    {"skip", "branch"},
    {"stream"},
    {"rectified"},
    {"gradient_before", "gradient_after"},
)
"""Points whose tensors exist at the same moment of a pass."""


@dataclass(frozen=True)
class Measure:
    """One quantity of a signal.

    Args:
        name: its column in the readings.
        function: of the tensors at `points`, with a 0-dimensional tensor as its result.
        points: where the tensors are taken. At a connection y = x + F(x): "skip" (x), "branch" (F(x)); "stream" (y);
            "rectified" (the output of each ReLU in the branch, of which the largest value counts); "gradient_before"
            (∂L/∂x, where the branch reads the tensor that is added), "gradient_after" (∂L/∂y). At a module, "stream" is
            its output.
        by_channel: whether the function takes the axis of the channels too, as `channel`; None where it is unknown.

    Raises:
        SkipwayError: the points do not exist at the same time.
    """

    name: str
    function: Callable[..., Tensor]
    points: tuple[str, ...]
    by_channel: bool = False

    def __post_init__(self) -> None:
        if not any(points.issuperset(self.points) for points in SIMULTANEOUS):
            groups = "; ".join(", ".join(sorted(points)) for points in SIMULTANEOUS)
            raise SkipwayError(
                f"measure {self.name!r}: points={self.points}: the rule is points that exist at one moment: {groups}"
            )


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("skip", rms, ("skip",)),
        Measure("branch", rms, ("branch",)),
        Measure("stream", rms, ("stream",)),
        Measure("variance_before", variance, ("skip",)),
        Measure("variance_branch", variance, ("branch",)),
        Measure("variance_after", variance, ("stream",)),
        Measure("largest", largest_magnitude, ("stream",)),
        Measure("finite", is_finite, ("stream",)),
        Measure("overflow", overflow, ("skip", "branch")),
        Measure("cosine", cosine, ("skip", "branch")),
        Measure("swallowed", swallowed_share, ("skip", "branch")),
        Measure("dead", dead_share, ("rectified",), by_channel=True),
        Measure("distinct", distinctness, ("stream",)),
        Measure("tokens_distinct", token_distinctness, ("stream",), by_channel=True),
        Measure("gradient_after", rms, ("gradient_after",)),
        Measure("gradient_before", rms, ("gradient_before",)),
        Measure("gradient_branch", branch_gradient, ("gradient_before", "gradient_after")),
    )
}
"""The measures at connections that can be asked for by name."""

SIGNALS = ("skip", "branch", "stream", "cosine", "gradient_after", "gradient_before", "gradient_branch")
"""The measures of `probe` by default: sizes forward and backward."""
