"""Multinomial logistic regression on the features of a frozen trunk: the classifier trained to convergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError

__all__ = ["PENALTIES", "LinearHead", "fit_linear_head", "select_linear_head"]

PENALTIES = tuple(10.0**exponent for exponent in (0, -0.5, -1, -1.5, -2, -2.5, -3, -3.5, -4))
"""Penalties λ that are compared, strongest first; features are standardised, so they mean the same for any trunk."""

MAX_ITERATIONS = 200
CHUNK = 65_536
"""Rows whose scores are computed at a time."""


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier of features, z = W h + b.

    Args:
        weight: W, float32 (K, D).
        bias: b, float32 (K).
        penalty: λ that it was fitted with.
        loss: mean cross-entropy on the features that selected λ; nan where λ was given.
        accuracy: accuracy on them.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    loss: float = float("nan")
    accuracy: float = float("nan")

    def scores(self, features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        return torch.cat([nn.functional.linear(part.float(), self.weight, self.bias) for part in features.split(CHUNK)])


def fit_linear_head(
    features: Tensor, labels: Tensor, classes: int, penalty: float, *, start: LinearHead | None = None
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

    Raises:
        SkipwayError: no features, one that is not finite, or a penalty that is not above 0.

    >>> features = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> head = fit_linear_head(features, torch.tensor([0, 0, 1, 1]), 2, penalty=0.01)
    >>> head.scores(features).argmax(1)
    tensor([0, 0, 1, 1])
    """
    if not penalty > 0:
        raise SkipwayError(f"penalty={penalty!r}: the rule is penalty > 0")
    mean, deviation = moments(features)
    weight = torch.zeros(classes, features.shape[1]) if start is None else start.weight * deviation
    bias = torch.zeros(classes) if start is None else start.bias + start.weight @ mean
    weight, bias = weight.requires_grad_(), bias.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_ITERATIONS, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        total = torch.zeros(())
        for rows, own in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
            scores = nn.functional.linear((rows.float() - mean) / deviation, weight, bias)
            part = nn.functional.cross_entropy(scores, own, reduction="sum") / len(labels)
            part.backward()
            total += part.detach()
        size = penalty / 2 * weight.square().sum()
        size.backward()
        return total + size.detach()

    solver.step(closure)
    with torch.no_grad():
        scaled = weight / deviation
        return LinearHead(scaled.detach(), (bias - scaled @ mean).detach(), penalty)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature; a constant feature has deviation 1."""
    if not len(features):
        raise SkipwayError("there are no features to fit a classifier to")
    sums = torch.zeros(2, features.shape[1], dtype=torch.float64)
    for rows in features.split(CHUNK):
        sums += torch.stack([rows.double().sum(0), rows.double().square().sum(0)])
    mean, square = sums / len(features)
    if not bool(sums.isfinite().all()):
        raise SkipwayError("the trunk puts out features that are not finite, so that no classifier can be fitted")
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    small = deviation < 1e-6 * (1 + mean.abs())
    return mean.float(), torch.where(small, 1.0, deviation).float()


def select_linear_head(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
    report: Callable[[LinearHead], object] = lambda head: None,
) -> LinearHead:
    """Fit a head for each penalty, and return the one of the highest accuracy on the validation features, ties by the
    lower loss.

    Args:
        train: features (N, D) and labels (N).
        validation: the same of images that chose nothing else.
        penalties: λ, strongest first; each fit starts from the one before.
        report: called with each head.

    Raises:
        SkipwayError: there are no validation features.
    """
    if not len(validation[0]):
        raise SkipwayError("there are no validation images, which select the penalty of the classifier")
    best = head = None
    for penalty in penalties:
        head = fit_linear_head(*train, classes, penalty, start=head)
        scores = head.scores(validation[0])
        loss = float(nn.functional.cross_entropy(scores, validation[1]))
        accuracy = float((scores.argmax(1) == validation[1]).float().mean())
        head = LinearHead(head.weight, head.bias, penalty, loss, accuracy)
        report(head)
        if best is None or (head.accuracy, -head.loss) > (best.accuracy, -best.loss):
            best = head
    assert best is not None
    return best
