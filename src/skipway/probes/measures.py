"""What is measured of a signal: sizes, similarities, dead units, what low precision would do to it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cosine", "dead_share", "distinctness", "overflow", "rms", "swallowed_share", "token_distinctness"]


def rms(x: Tensor) -> Tensor:
    """√(mean x²) over all elements, in float32 at least.

    >>> rms(torch.tensor([3.0, 4.0, 0.0, 0.0])).item()
    2.5
    """
    largest = wide(x).abs().amax().clamp_min(1e-30)
    return (wide(x) / largest).square().mean().sqrt() * largest


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩ / (|x| |y|) over all elements; 0 where one of them is 0.

    >>> cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])).item()  # doctest: +ELLIPSIS
    0.7071...
    """
    x, y = wide(x).flatten(), wide(y).flatten()
    size = x.norm() * y.norm()
    return torch.where(size > 0, torch.dot(x, y) / size.clamp_min(1e-38), 0.0)


def distinctness(x: Tensor) -> Tensor:
    """1 − the mean cosine between the vectors of different samples, x of shape (N, …).

    0 says that all samples have become the same direction; about 1 that they have nothing in common. Computed from
    the spread around the mean direction, which keeps its precision where the cosine is 1 − 10⁻¹⁰.

    >>> distinctness(torch.eye(4)).item(), distinctness(torch.ones(4, 3)).item()
    (1.0, 0.0)
    """
    return distinct_rows(wide(x).flatten(1)[None])


def token_distinctness(x: Tensor) -> Tensor:
    """1 − the mean cosine between different positions of the same sample, x of shape (N, T, C) or (N, C, H, W).

    Goes to 0 in rank collapse (Dong et al. 2021, https://arxiv.org/abs/2103.03404). 1 where there are no positions.

    >>> token_distinctness(torch.ones(2, 5, 3)).item()
    0.0
    """
    if x.ndim < 3:
        return torch.ones((), device=x.device)
    tokens = x.flatten(2).transpose(1, 2) if x.ndim == 4 and x.shape[1] != x.shape[2] else x.flatten(1, -2)
    return distinct_rows(wide(tokens)) if tokens.shape[1] > 1 else torch.ones((), device=x.device)


def distinct_rows(rows: Tensor) -> Tensor:
    """1 − mean pairwise cosine of rows (groups, N, D): n/(n−1) · mean |x̂ − mean x̂|²."""
    count = rows.shape[1]
    if count < 2:
        return torch.ones((), device=rows.device)
    rows = rows / rows.abs().amax(-1, keepdim=True).clamp_min(1e-30)  # the squares of large values are infinite
    unit = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    spread = (unit - unit.mean(1, keepdim=True)).square().sum(-1).mean()
    return spread * count / (count - 1)


def dead_share(x: Tensor) -> Tensor:
    """Share of channels that are exactly 0 for every sample at every position, x of shape (N, C, H, W) or (N, …, C).

    >>> dead_share(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).item()
    0.5
    """
    channel = 1 if x.ndim == 4 else -1
    live = (x != 0).movedim(channel, 0).flatten(1).any(1)
    return 1 - live.float().mean()


def overflow(x: Tensor, largest: float = 65504.0) -> Tensor:
    """The largest magnitude in units of what a type can hold, by default float16's 65504; above 1 it overflows."""
    return wide(x).abs().amax() / largest


def swallowed_share(stream: Tensor, branch: Tensor) -> Tensor:
    """Share of elements at which bfloat16 loses the branch: x + F(x) = x after rounding, though F(x) ≠ 0.

    >>> swallowed_share(torch.ones(4), torch.tensor([1e-3, 1e-3, 0.5, 0.0])).item()
    0.5
    """
    low = stream.to(torch.bfloat16)
    return ((low + branch.to(torch.bfloat16) == low) & (branch != 0)).float().mean()


def wide(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.dtype == torch.float64 else x.float()
