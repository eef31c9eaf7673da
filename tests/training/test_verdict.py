"""The verdict before training: always given, cut to fit, or its cost; from pretrained weights what trial steps do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.trials.reporting import Notes

import skipway as sw
from skipway.errors import SkipwayError
from skipway.recipe import Recipe
from skipway.training import train, verdict
from skipway.training.verdict import piece_sizes

SMALL = Recipe(model="resnet20", depth=8, width=4, epochs=1, device="cpu", precision="float32", health=0)


def said(tmp_path, recipe: Recipe, name: str = "run") -> list[str]:
    """The verdicts that a run says."""
    notes = Notes()
    train(recipe, tmp_path / name, reporter=notes)
    return [text for label, text in notes.lines if label == "verdict"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a network that has learned the digits a little."""
    return train(replace(SMALL, epochs=3), tmp_path_factory.mktemp("first") / "run").folder.best


def test_pieces_are_fewer_images_then_smaller_ones():
    assert list(piece_sizes(32, 224)) == [(32, 224), (16, 224), (8, 224), (8, 96), (8, 32)]
    assert list(piece_sizes(9, 8)) == [(9, 8)]


@pytest.mark.parametrize(
    ("per_image", "words"),
    [
        (0.001, "; more: skipway diagnose --help"),
        (0.01, "(by 16 images of 8x8, for the sake of time)"),
        (1.0, "not computed: it takes about 5 min 20 s at least, more than the 10.0 s that it may take"),
    ],
)
def test_a_verdict_is_cut_to_its_time_or_says_its_cost(tmp_path, monkeypatch, per_image, words):
    """40 passes of each image: 32 images of 0.01 s take 12.8 s, 16 of them 6.4 s, and 8 of 1 s 320 s."""
    monkeypatch.setattr(verdict, "seconds_per_image", lambda run, sample: per_image)
    (line,) = said(tmp_path, SMALL)
    assert words in line


def test_a_verdict_is_of_as_many_steps_as_the_run_takes(tmp_path, monkeypatch):
    told: list[int] = []

    def noted(*_, steps, **options):
        told.append(steps)
        raise SkipwayError("enough")

    monkeypatch.setattr(verdict, "diagnose", noted)
    said(tmp_path, replace(SMALL, epochs=None, steps=7))
    assert told == [7]


@pytest.mark.parametrize(("lr", "warned"), [(1e-4, False), (30.0, True)])
def test_from_weights_trial_steps_tell_whether_they_are_destroyed(tmp_path, weights, lr, warned):
    (line,) = said(tmp_path, replace(SMALL, start=str(weights), freeze="none", optimizer="sgd", lr=lr, epochs=1))
    assert line.startswith("none, as the weights are pretrained; of")
    assert ("that overwrites what they know: lr=3.0 is gentler" in line) == warned


@pytest.mark.usefixtures("few_digits")
def test_trial_steps_are_taken_back(tmp_path, weights, monkeypatch):
    """The run has the weights of one that takes no trial steps."""
    recipe = replace(SMALL, start=str(weights), freeze="none", optimizer="adamw", lr=1e-3)
    (line,) = said(tmp_path, recipe, "tried")
    assert "trial steps" in line
    train(recipe, tmp_path / "quiet")
    tried, quiet = (sw.from_pretrained(tmp_path / name).state_dict() for name in ("tried", "quiet"))
    assert all(torch.equal(tensor, quiet[name]) for name, tensor in tried.items())


@pytest.mark.usefixtures("few_digits")
def test_a_classifier_that_is_fitted_first_has_no_steps_to_judge(tmp_path, weights):
    (line,) = said(tmp_path, replace(SMALL, start=str(weights), freeze="first", optimizer="adamw", lr=1e-4))
    assert "the classifier is fitted to their features first" in line
    assert said(tmp_path, replace(SMALL, start=str(weights), freeze="all"), "all") == []
