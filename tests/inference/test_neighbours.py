"""Neighbours, wrong labels and outliers that were planted, and what is found where there are none."""

from __future__ import annotations

import pytest
import torch

from skipway.errors import SkipwayError
from skipway.inference.neighbours import (
    find_label_errors,
    find_outliers,
    label_votes,
    nearest_neighbours,
    principal_plane,
)

CLASSES, EACH, DIM = 5, 60, 32


def clusters(spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian clusters around orthogonal centres, and their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    centres = torch.eye(DIM)[:CLASSES] * 3
    return centres[labels] + spread * torch.randn(len(labels), DIM, generator=generator), labels


@pytest.mark.parametrize("most", [1, 7 * CLASSES * EACH, 2**24])
def test_neighbours_are_those_of_the_full_matrix(monkeypatch, most):
    monkeypatch.setattr("skipway.inference.neighbours.MOST_SIMILARITIES", most)
    features, _ = clusters()
    rows = torch.nn.functional.normalize(features - features.mean(0), dim=1)
    full = (rows @ rows.T).fill_diagonal_(-2)
    found = nearest_neighbours(features, k=4)
    torch.testing.assert_close(found.similarities, full.topk(4).values)
    assert bool((found.indices != torch.arange(len(features))[:, None]).all())


def test_planted_wrong_labels_are_found_and_no_others():
    features, labels = clusters()
    wrong = torch.tensor([3, 70, 71, 130, 200, 299])
    given = labels.clone()
    given[wrong] = (given[wrong] + 1) % CLASSES
    found = find_label_errors(nearest_neighbours(features), given, CLASSES)
    assert {each.index for each in found} == set(wrong.tolist())
    assert all(each.other == int(labels[each.index]) for each in found)
    assert find_label_errors(nearest_neighbours(features), labels, CLASSES) == []


def test_labels_without_structure_are_not_doubted():
    """Features that know nothing of the labels contradict none of them with four fifths of ten neighbours."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(400, DIM, generator=generator)
    labels = torch.randint(CLASSES, (400,), generator=generator)
    assert find_label_errors(nearest_neighbours(features), labels, CLASSES) == []


def test_votes_are_shares_of_the_ten_nearest():
    """Two groups of eleven: the ten nearest of each image are the others of its group."""
    features = torch.eye(2).repeat_interleave(11, 0) + 1e-3 * torch.arange(22)[:, None]
    labels = torch.tensor([0] * 8 + [1] * 3 + [1] * 11)
    votes = label_votes(nearest_neighbours(features, k=15), labels, 3)
    torch.testing.assert_close(votes[0], torch.tensor([0.7, 0.3, 0.0]))
    torch.testing.assert_close(votes[10], torch.tensor([0.8, 0.2, 0.0]))
    torch.testing.assert_close(votes[21], torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("labels", [torch.zeros(299, dtype=torch.long), torch.full((300,), CLASSES), -torch.ones(300)])
def test_labels_that_are_none_are_refused(labels):
    features, _ = clusters()
    with pytest.raises(SkipwayError, match="the rule is 300 class indices from 0 to 4"):
        find_label_errors(nearest_neighbours(features), labels.long(), CLASSES)


def test_a_class_of_few_images_is_not_judged():
    features, labels = clusters()
    labels[labels == 4] = 3
    labels[:3] = 4  # three images of a class of their own, within class 0
    assert not [each for each in find_label_errors(nearest_neighbours(features), labels, CLASSES) if each.label == 4]


def test_planted_outliers_are_found():
    features, labels = clusters()
    generator = torch.Generator().manual_seed(2)
    features[[10, 150]] = 3 * torch.nn.functional.normalize(torch.randn(2, DIM, generator=generator), dim=1)
    found = find_outliers(nearest_neighbours(features), labels)
    assert set(found[:2]) == {10, 150}
    assert len(found) <= 3


def test_a_class_that_is_spread_has_no_more_outliers_than_others():
    features, labels = clusters(spread=0.1)
    spread, _ = clusters(spread=0.6)
    features[labels == 2] = spread[labels == 2]
    together = torch.zeros_like(labels)
    assert len(find_outliers(nearest_neighbours(features), together)) > EACH / 2, "as one class"
    assert len(find_outliers(nearest_neighbours(features), labels)) <= 3


def test_the_plane_is_that_of_largest_variance():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(500, DIM, generator=generator)
    features[:, 4] *= 20
    features[:, 9] *= 10
    plane = principal_plane(features)
    for axis, column in enumerate((4, 9)):
        correlation = torch.corrcoef(torch.stack([plane[:, axis], features[:, column]]))[0, 1]
        assert abs(correlation) > 0.99
    assert torch.equal(plane, principal_plane(features))


@pytest.mark.parametrize("features", [torch.zeros(3), torch.zeros(1, 4), torch.full((3, 2), torch.nan)])
def test_wrong_features_are_refused(features):
    with pytest.raises(SkipwayError, match="features"):
        nearest_neighbours(features)
