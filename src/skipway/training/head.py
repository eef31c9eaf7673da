"""Classifiers of the features of a frozen trunk: what all kinds share, and which one is taken."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError

__all__ = ["Head", "HeadLoss", "cross_entropy", "minimise", "moments", "select_head"]

HeadLoss = Callable[[Tensor, Tensor], Tensor]
"""The sum of the losses of some rows, of logits (B, K) and labels (B)."""

CHUNK = 65_536
"""Rows whose scores are computed at a time."""


@dataclass(frozen=True, kw_only=True)
class Head(ABC):
    """A classifier of features (N, D).

    Args:
        penalty: λ that it was fitted with.
        loss: mean loss on the features that select among heads; nan before.
        accuracy: accuracy on them.
    """

    penalty: float
    loss: float = float("nan")
    accuracy: float = float("nan")

    @abstractmethod
    def module(self) -> nn.Module:
        """The classifier as a module, on the CPU."""

    @abstractmethod
    def describe(self) -> str:
        """How it was fitted, in words."""

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        module = self.module()
        return torch.cat([module(rows.float()) for rows in features.split(CHUNK)])


def cross_entropy(scores: Tensor, labels: Tensor, weights: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """The sum of the cross-entropies of rows, as `Run.loss` weighs them: each by the weight of its class."""
    losses = nn.functional.cross_entropy(scores, labels, label_smoothing=smoothing, reduction="none")
    return losses.sum() if weights is None else losses @ weights[labels]


def select_head(
    heads: Iterable[Head],
    validation: tuple[Tensor, Tensor],
    *,
    loss: HeadLoss = cross_entropy,
    stop: Callable[[], bool] = lambda: False,
) -> Head | None:
    """Return the head of the lowest loss on the validation features (N, D) and labels (N); None if told to stop.

    Few images give many heads nearly the same accuracy. On digits, with 20 to 200 validation images, the head of the
    lowest loss is right for as many test images as that of the highest accuracy, or more, and its probabilities fit
    better.

    Args:
        heads: fitted ones, each of which is made when it is asked for.
        validation: features and labels of images that chose nothing else.
        loss: that decides.
        stop: asked after each head.

    Raises:
        SkipwayError: there are no validation features.
    """
    features, labels = validation
    if not len(features):
        raise SkipwayError("there are no validation images, which select the penalty of the classifier")
    best: Head | None = None
    for head in heads:
        scores = head.scores(features)
        right = int((scores.argmax(1) == labels).sum())
        mean = float(loss(scores, labels)) / len(labels)
        judged = dataclasses.replace(head, loss=mean, accuracy=right / len(labels))
        if best is None or judged.loss < best.loss:
            best = judged
        if stop():
            return None
    return best


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


def minimise(
    parameters: Sequence[Tensor],
    scores: Callable[[Tensor], Tensor],
    features: Tensor,
    labels: Tensor,
    *,
    penalty: float,
    iterations: int,
    loss: HeadLoss,
) -> None:
    """Minimise (1/N) Σ loss(hᵢ, yᵢ) + (λ/2) Σ ‖W‖² over the parameters, in place, by L-BFGS on all rows at once.

    Args:
        parameters: matrices W, which are penalised, and vectors, which are not.
        scores: logits of rows of features, made of the parameters.
        features: (N, D), any floating type.
        labels: int64 (N).
        penalty: λ > 0.
        iterations: of L-BFGS at most.
        loss: sum over rows.

    Raises:
        SkipwayError: λ is not above 0: separable classes have no minimum then.
    """
    if not penalty > 0:
        raise SkipwayError(f"penalty={penalty!r}: the rule is penalty > 0")
    for parameter in parameters:
        parameter.requires_grad_()
    solver = torch.optim.LBFGS(
        list(parameters), max_iter=iterations, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        total = torch.zeros(())
        for rows, own in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
            part = loss(scores(rows.float()), own) / len(labels)
            part.backward()
            total += part.detach()
        size = penalty / 2 * torch.stack([each.square().sum() for each in parameters if each.ndim > 1]).sum()
        size.backward()
        return total + size.detach()

    with torch.enable_grad():
        solver.step(closure)
    for parameter in parameters:
        parameter.requires_grad_(False)
