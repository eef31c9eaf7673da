"""A perceptron with one hidden layer on the features of a frozen trunk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipway.inference.network import hidden_layer
from skipway.training.head import Head, HeadLoss, cross_entropy, minimise, moments

__all__ = ["MLPHead", "fit_mlp_head", "mlp_heads"]

WIDTHS = (64, 256)
PENALTIES = (1e-1, 1e-2, 1e-3)
"""Widths and penalties λ that are compared."""

ITERATIONS = 100


@dataclass(frozen=True, kw_only=True)
class MLPHead(Head):
    """z = W₂ gelu(W₁ h + b₁) + b₂.

    Args:
        weights: W₁ (H, D), b₁ (H), W₂ (K, H) and b₂ (K), float32.
    """

    weights: tuple[Tensor, Tensor, Tensor, Tensor]

    @property
    def width(self) -> int:
        """H, the number of hidden units."""
        return len(self.weights[1])

    def module(self) -> nn.Sequential:
        first, _, second, _ = self.weights
        mlp = hidden_layer(first.shape[1], self.width, len(second))
        mlp.load_state_dict(dict(zip(mlp.state_dict(), self.weights, strict=True)))
        return mlp

    def describe(self) -> str:
        return f"{self.width} hidden units, fitted with penalty {self.penalty:.2g}"


def fit_mlp_head(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    width: int,
    penalty: float,
    seed: int,
    loss: HeadLoss = cross_entropy,
) -> MLPHead:
    """Fit a perceptron to features.

    Minimises (1/N) Σ −log p(yᵢ | hᵢ) + (λ/2) (‖W₁′‖² + ‖W₂‖²), where W₁′ multiplies features of mean 0 and deviation 1,
    by L-BFGS from random weights.

    Args:
        features: (N, D), any floating type.
        labels: int64 (N), from 0 to `classes` − 1.
        classes: K.
        width: H, the number of hidden units.
        penalty: λ > 0.
        seed: of the first weights.
        loss: −log p, or another one, summed over rows.

    Raises:
        SkipwayError: as `fit_linear_head`.

    >>> features = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> head = fit_mlp_head(features, torch.tensor([0, 1, 1, 0]), 2, width=8, penalty=1e-4, seed=0)
    >>> head.scores(features).argmax(1)  # exclusive or, which no linear classifier computes
    tensor([0, 1, 1, 0])
    """
    mean, deviation = moments(features)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(width, features.shape[1], generator=generator) / math.sqrt(features.shape[1])
    second = torch.randn(classes, width, generator=generator) / math.sqrt(width)
    low, high = torch.zeros(width), torch.zeros(classes)

    def scores(rows: Tensor) -> Tensor:
        hidden = nn.functional.gelu(nn.functional.linear((rows - mean) / deviation, first, low))
        return nn.functional.linear(hidden, second, high)

    parameters = [first, low, second, high]
    minimise(parameters, scores, features, labels, penalty=penalty, iterations=ITERATIONS, loss=loss)
    scaled = first / deviation
    return MLPHead(weights=(scaled, low - scaled @ mean, second, high), penalty=penalty)


def mlp_heads(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    seed: int,
    widths: Sequence[int] = WIDTHS,
    penalties: Sequence[float] = PENALTIES,
    loss: HeadLoss = cross_entropy,
) -> Iterator[MLPHead]:
    """Fit a head for each width and penalty. Arguments as of `fit_mlp_head`."""
    for width in widths:
        for penalty in penalties:
            yield fit_mlp_head(features, labels, classes, width=width, penalty=penalty, seed=seed, loss=loss)
