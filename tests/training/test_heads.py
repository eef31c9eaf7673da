"""The classifier on features of a frozen trunk: agrees with scikit-learn, and selects its penalty on validation."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from skipway.errors import SkipwayError
from skipway.training.head import cross_entropy, moments, select_head
from skipway.training.image_task import ImageClassification
from skipway.training.linear_head import fit_linear_head, linear_heads
from skipway.training.mlp_head import fit_mlp_head, mlp_heads


def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    features, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


@pytest.mark.parametrize("penalty", [0.1, 0.001])
def test_probabilities_are_those_of_scikit_learn(penalty):
    features, labels = digits()
    mean, deviation = moments(features)
    linear_model = pytest.importorskip("sklearn.linear_model")
    other = linear_model.LogisticRegression(C=1 / (penalty * len(labels)), max_iter=5000, tol=1e-8)
    other.fit(((features - mean) / deviation).numpy(), labels.numpy())
    expected = torch.tensor(other.predict_proba(((features - mean) / deviation).numpy()), dtype=torch.float32)
    head = fit_linear_head(features, labels, 10, penalty)
    assert (head.scores(features).softmax(1) - expected).abs().max() < 2e-3


def test_the_gradient_is_zero_at_the_minimum():
    torch.manual_seed(0)
    features, labels, penalty = 5 + 3 * torch.randn(60, 4), torch.arange(60) % 3, 0.05
    head = fit_linear_head(features, labels, 3, penalty)
    _, deviation = moments(features)
    weight, bias = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    loss = nn.functional.cross_entropy(nn.functional.linear(features, weight, bias), labels)
    (loss + penalty / 2 * (weight * deviation).square().sum()).backward()
    assert weight.grad.abs().max() < 1e-3 * 5
    assert bias.grad.abs().max() < 1e-3


def test_scale_and_shift_of_features_change_nothing():
    torch.manual_seed(0)
    features, labels = torch.randn(60, 4), torch.arange(60) % 3
    first = fit_linear_head(features, labels, 3, 0.01).scores(features)
    second = fit_linear_head(features * 100 + 7, labels, 3, 0.01).scores(features * 100 + 7)
    assert (first - second).abs().max() < 1e-2


def test_the_penalty_of_the_lowest_validation_loss_is_selected():
    features, labels = digits()
    validation = (features[300:600], labels[300:600])
    heads = list(linear_heads(features[:300], labels[:300], 10))
    losses = [float(nn.functional.cross_entropy(head.scores(validation[0]), validation[1])) for head in heads]
    best = select_head(heads, validation)
    assert best is not None
    assert best.loss == pytest.approx(min(losses))
    assert best.penalty == heads[losses.index(min(losses))].penalty
    assert best.accuracy in [right / 300 for right in range(301)]  # as an evaluation computes it
    assert heads[0].penalty > best.penalty > heads[-1].penalty


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_a_training_with_class_weights(smoothing):
    """A class of weight 3 counts like three copies of its images."""
    features, labels = digits()
    features, labels = features[:120, 10:30], labels[:120] % 3
    weights = torch.tensor([3.0, 1.0, 1.0])
    weighted = fit_linear_head(features, labels, 3, 0.02, loss=partial(cross_entropy, weights=weights))
    more = torch.cat([features, *[features[labels == 0]] * 2]), torch.cat([labels, *[labels[labels == 0]] * 2])
    _, deviation = moments(features)
    module, copies = weighted.module().requires_grad_(), len(more[0]) / len(features)
    loss = nn.functional.cross_entropy(module(more[0]), more[1]) * copies
    (loss + 0.02 / 2 * (module.weight * deviation).square().sum()).backward()
    assert module.weight.grad.abs().max() < 2e-3
    run: Any = SimpleNamespace(recipe=SimpleNamespace(label_smoothing=smoothing), class_weights=weights)
    scores = weighted.scores(features)
    own = cross_entropy(scores, labels, weights, smoothing) / len(labels)
    assert float(own) == pytest.approx(float(ImageClassification().loss(run, scores, labels)), rel=1e-6)


def test_constant_features_and_those_not_finite():
    features, labels = torch.ones(6, 2), torch.arange(6) % 2
    assert fit_linear_head(features, labels, 2, 0.1).weight.isfinite().all()
    features[0, 0] = float("nan")
    with pytest.raises(SkipwayError, match="features that are not finite"):
        fit_linear_head(features, labels, 2, 0.1)
    with pytest.raises(SkipwayError, match="no features"):
        fit_linear_head(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 2, 0.1)
    with pytest.raises(SkipwayError, match="penalty=0"):
        fit_linear_head(torch.ones(2, 1), torch.tensor([0, 1]), 2, 0)
    with pytest.raises(SkipwayError, match="no validation images"):
        select_head(iter(()), (torch.zeros(0, 1), torch.zeros(0).long()))


def test_a_hidden_layer_separates_what_no_linear_map_does():
    torch.manual_seed(0)
    features = torch.randn(600, 2) * 50 + 7
    labels = (features[:, 0] > 7).long() ^ (features[:, 1] > 7).long()
    train, rest = (features[:400], labels[:400]), (features[400:], labels[400:])
    line = select_head(linear_heads(*train, 2), rest)
    curve = select_head(mlp_heads(*train, 2, seed=1, widths=(4, 16)), rest)
    assert line is not None
    assert curve is not None
    assert line.accuracy < 0.75 < 0.93 < curve.accuracy
    again = fit_mlp_head(*train, 2, width=curve.width, penalty=curve.penalty, seed=1)
    assert torch.equal(curve.scores(rest[0]), again.scores(rest[0]))


def test_the_gradient_of_a_hidden_layer_is_small_at_its_minimum():
    features, labels = digits()
    features, labels, penalty = features[:200, 2:6], labels[:200] % 3, 0.05
    head = fit_mlp_head(features, labels, 3, width=5, penalty=penalty, seed=0)
    _, deviation = moments(features)
    module = head.module().requires_grad_()
    loss = nn.functional.cross_entropy(module(features), labels)
    first, second = module[0].weight, module[2].weight
    (loss + penalty / 2 * ((first * deviation).square().sum() + second.square().sum())).backward()
    assert (first.grad / deviation).abs().max() < 2e-3
    assert second.grad.abs().max() < 2e-3


def test_told_to_stop_nothing_is_selected():
    features, labels = digits()
    assert select_head(linear_heads(features[:50], labels[:50], 10), (features, labels), stop=lambda: True) is None
