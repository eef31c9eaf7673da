"""Multinomial logistic regression on the features of a frozen trunk: the classifier trained to convergence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipway.training.head import Head, HeadLoss, cross_entropy, minimise, moments

__all__ = ["PENALTIES", "LinearHead", "fit_linear_head", "linear_heads"]

PENALTIES = tuple(10.0**exponent for exponent in (0, -0.5, -1, -1.5, -2, -2.5, -3, -3.5, -4))
"""Penalties λ that are compared, strongest first; features are standardised, so they mean the same for any trunk."""

ITERATIONS = 200


@dataclass(frozen=True, kw_only=True)
class LinearHead(Head):
    """A linear classifier of features, z = W h + b.

    Args:
        weight: W, float32 (K, D).
        bias: b, float32 (K).
    """

    weight: Tensor
    bias: Tensor

    def module(self) -> nn.Linear:
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0])
        linear.load_state_dict({"weight": self.weight, "bias": self.bias})
        return linear

    def describe(self) -> str:
        return f"fitted with penalty {self.penalty:.2g}"


def fit_linear_head(
    features: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    *,
    start: LinearHead | None = None,
    loss: HeadLoss = cross_entropy,
) -> LinearHead:
    """Fit multinomial logistic regression to features.

    Minimises (1/N) Σ −log p(yᵢ | hᵢ) + (λ/2) ‖W′‖², where W′ multiplies features of mean 0 and deviation 1, by L-BFGS.
    scikit-learn's `LogisticRegression(C=1/(λN))` on standardised features minimises the same; the bias is free.

    Args:
        features: (N, D), any floating type.
        labels: int64 (N), from 0 to `classes` − 1.
        classes: K.
        penalty: λ > 0: with λ = 0 separable classes have no minimum.
        start: a head to start from, that of a similar penalty.
        loss: −log p, or another one, summed over rows.

    Raises:
        SkipwayError: no features, one that is not finite, or a penalty that is not above 0.

    >>> features = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> head = fit_linear_head(features, torch.tensor([0, 0, 1, 1]), 2, penalty=0.01)
    >>> head.scores(features).argmax(1)
    tensor([0, 0, 1, 1])
    """
    mean, deviation = moments(features)
    weight = torch.zeros(classes, features.shape[1]) if start is None else start.weight * deviation
    bias = torch.zeros(classes) if start is None else start.bias + start.weight @ mean
    minimise(
        [weight, bias],
        lambda rows: nn.functional.linear((rows - mean) / deviation, weight, bias),
        features,
        labels,
        penalty=penalty,
        iterations=ITERATIONS,
        loss=loss,
    )
    scaled = weight / deviation
    return LinearHead(weight=scaled, bias=bias - scaled @ mean, penalty=penalty)


def linear_heads(
    features: Tensor,
    labels: Tensor,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
    *,
    loss: HeadLoss = cross_entropy,
) -> Iterator[LinearHead]:
    """Fit a head for each penalty λ, strongest first; each fit starts from the one before. Arguments as of
    `fit_linear_head`.
    """
    head = None
    for penalty in penalties:
        head = fit_linear_head(features, labels, classes, penalty, start=head, loss=loss)
        yield head
