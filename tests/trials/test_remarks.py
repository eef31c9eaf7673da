"""Kind: training works, and keeps silent about what hurts it. Every remark is measured.

| trial | input | right value |
|---|---|---|
| | images whose values lie in a small part of the range | a remark with the range |
| | mirrored images of one class that are another class, by name or by content | a remark that names both, and `flip` |
| | the same classes without a direction | no remark |
| | mixup and CutMix | training accuracy is that of mixed images; a batch of one mixes nothing |
| | a training loss that stays that of a constant output, the entropy of the mean target | a remark, in the report too |
| | `holdout` beside a test split, `weights_adapt` without weights, `freeze` of all epochs | no effect, said |
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.trials.pictures import write_images
from tests.trials.reporting import Notes

import skipway as sw
from skipway.report.summary import chance_loss
from skipway.training.image_task import ImageClassification
from skipway.training.run import Run

SMALL = {"model": "resnet8", "width": 4, "device": "cpu", "workers": 0, "epochs": 1, "health": 0.0}


def notes_of(data, folder, **options) -> Notes:
    """What a short training says."""
    notes = Notes()
    sw.train(sw.Recipe(data, **{**SMALL, **options}), folder / "run", reporter=notes, overwrite=True)
    return notes


def write_arrows(root, names, turned):
    """Bright triangles with noise; those of the second class are mirrored if `turned`."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for image in range(12):
            pixels = rng.normal(60, 20, (16, 16)) + 120 * np.tri(16)
            pixels = pixels[:, ::-1] if turned and number else pixels
            Image.fromarray((pixels + 20 * (number and not turned)).clip(0, 255).astype("uint8")).save(
                root / name / f"{image}.png"
            )
    return root


@pytest.mark.parametrize("options", [{}, {"augment": "mixup(0.2)"}])
def test_a_loss_that_stays_at_chance_is_remarked_upon(tmp_path, monkeypatch, options):

    monkeypatch.setattr("skipway.report.summary.CHANCE_STEPS", 4)
    monkeypatch.setattr("skipway.training.records.CHANCE_STEPS", 4)
    folder = write_images(tmp_path / "alike", {"cat": 40, "emu": 20})
    stuck = {"lr": 1e-12, "batch_size": 8, "health": 0.0, **options}
    said = notes_of(folder, tmp_path, **stuck).said("an output that is the same")
    assert len(said) == 1
    assert "lr=1e-12" in said[0]
    assert "an output that is the same" in (tmp_path / "run" / "report.html").read_text()
    folder = write_images(tmp_path / "apart", {"cat": 40, "dog": 20})
    learns = notes_of(folder, tmp_path, **{**stuck, "lr": 0.05, "epochs": 2})
    assert not learns.said("an output that is the same")


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_loss_of_the_best_constant_output(smoothing, balanced):
    """Against the constant output that is found by optimisation, with the loss of the run itself."""
    labels = torch.tensor([0] * 7 + [1] * 2 + [2])
    weights = len(labels) / (3 * labels.bincount().float()) if balanced else None
    options, task = SimpleNamespace(label_smoothing=smoothing), ImageClassification()
    run = SimpleNamespace(recipe=options, class_weights=weights, task=task)
    output = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([output], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = Run.loss(run, output.expand(10, 3), labels)  # type: ignore[arg-type]
        value.backward()
        return value

    optimizer.step(loss)
    found = chance_loss(labels, 3, smoothing=smoothing, balanced=balanced)
    assert found == pytest.approx(float(loss().detach()), rel=1e-5)


def test_a_narrow_range_is_remarked_upon(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for number in range(8):
            values = rng.normal(2000, 50, (16, 16)).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / "d" / name / f"{number}.png")
    # 1850 to 2150 of 65,535 are 7.2 to 8.4 of 255
    assert notes_of(tmp_path / "d", tmp_path).said("lie between 7 and 8 of 255; for 16-bit images grey16='minmax'")
    assert not notes_of(tmp_path / "d", tmp_path, grey16="minmax").said("lie between")


@pytest.mark.parametrize(
    ("names", "turned", "words"),
    [
        (("p", "q"), True, "mirrored images of 'p' look like those of 'q'"),
        (("turn_left", "turn-right"), True, "the class 'turn-right' names a side"),
        (("p", "q"), False, ""),
        (("bright", "leftovers"), False, ""),
    ],
)
def test_directions(tmp_path, names, turned, words):
    data = write_arrows(tmp_path / "d", names, turned)
    said = notes_of(data, tmp_path).said("training images are mirrored")
    assert bool(said) == bool(words)
    assert words in "".join(said)
    if words:
        assert not notes_of(data, tmp_path, flip=False).said("training images are mirrored")


@pytest.fixture(scope="module")
def split_images(tmp_path_factory):
    """Images of all splits."""
    counts = {f"{part}/{name}": 4 for part in ("train", "val", "test") for name in ("cat", "dog")}
    return write_images(tmp_path_factory.mktemp("split"), counts, side=(16, 16))


@pytest.fixture(scope="module")
def without_options(split_images, tmp_path_factory) -> Notes:
    """What a training on them says."""
    return notes_of(split_images, tmp_path_factory.mktemp("without"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"augment": "mixup"}, "training loss and accuracy are those of mixed images"),
        ({"augment": "cutmix", "batch_size": 1}, "nothing is mixed"),
        ({"holdout": 0.4}, "holdout=0.4 has no effect: the data have a test split"),
        ({"validation": 0.4}, "validation=0.4 has no effect: the data have a validation split"),
        ({"weights_adapt": "depth"}, "weights_adapt='depth' has no effect: there are no initial weights"),
        ({"freeze": "1"}, "freeze='1' of 1 epoch: only the classifier is trained"),
        (
            {"freeze": "all", "lr": 0.3, "augment": "mixup"},
            "lr=0.3, augment='mixup': without effect, since freeze='all'",
        ),
        ({"freeze": "all(views=1)", "augment": "trivial+mixup"}, "augmented and not mixed"),
        ({"flip_test": True, "flip": False}, "flip_test=True evaluates mirrored images, and none was mirrored"),
        ({"steps": 3, "freeze": "5"}, "freeze='5' of 3 epochs: only the classifier is trained"),
        ({"steps": 3, "time": "1s"}, "steps=3 has no effect: time='1s' sets the length"),
    ],
)
def test_options_that_act_on_each_other(split_images, without_options, tmp_path, options, words):
    assert notes_of(split_images, tmp_path, **options).said(words)
    assert not without_options.said(words)


def test_few_steps_are_remarked_upon(split_images, without_options, tmp_path):
    said = notes_of(split_images, tmp_path, steps=3)
    for words in (
        "only 3 steps in all: more --steps gives more",
        "after 3 steps the running mean and variance of",
        "epochs=1 has no effect: steps=3 sets the length",
    ):
        assert said.said(words)
        assert not without_options.said(words)
