"""Kind: outputs are compared by their number, though both sides know what they mean.

| trial | input | right value |
|---|---|---|
| C7 | weights of cat, dog; folders ant, cat | cat's row is cat's, ant's is new, and it is said |
| C7 | weights of cat, dog; folders dog, emu, cat (more, other order) | rows by name |
| C7 | none of the names shared (a_dog, b_cat) | the classifier is new, and it is said |
| | the same classes | all rows, without a remark |
| | `weights_adapt` without "classes", other classes | refused, with the names |
| | weights without names, as many classes | the classifier is new, and it is said; without "classes" rows in order |
| | `id2label` of transformers, `label_names` of timm, beside the file | the same as our own header |
| | names in another Unicode form | the same class |
"""

from __future__ import annotations

import json
import unicodedata
from shutil import copyfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.trials.pictures import write_images
from tests.trials.reporting import Notes

import skipway as sw
from skipway.errors import CheckpointError
from skipway.weights import hub

OPTIONS = {"model": "resnet8", "width": 4, "device": "cpu", "workers": 0, "precision": "float32", "health": 0.0}
FROZEN = {**OPTIONS, "epochs": 1, "lr": 1e-9, "weight_decay": 0.0, "seed": 3, "freeze": "none"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a run whose classes are cat and dog, with rows that are easy to tell."""
    root = tmp_path_factory.mktemp("weights")
    write_images(root / "data", {"cat": 4, "dog": 4})
    file = sw.train(sw.Recipe(root / "data", **{**FROZEN, "seed": 0}), root / "run").folder.last
    tensors = load_file(file)
    tensors["head.classifier.bias"] = torch.tensor([10.0, 20.0])
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        save_file(tensors, root / "w.safetensors", content.metadata())
    return root / "w.safetensors"


def biases(folder, weights, classes, **options):
    """The classifier's bias of each class after no training, and what was said."""
    write_images(folder / "data", dict.fromkeys(classes, 4))
    notes = Notes()
    outcome = sw.train(
        sw.Recipe(folder / "data", start=weights, **{**FROZEN, **options}), folder / "run", reporter=notes
    )
    bias = load_file(outcome.folder.last)["head.classifier.bias"]
    return dict(zip(outcome.classes, (round(float(value), 2) for value in bias), strict=True)), notes


@pytest.mark.parametrize(
    ("classes", "expected", "said"),
    [
        (
            ("ant", "cat"),
            {"ant": 0.0, "cat": 10.0},
            "1 of 2 classes taken by name, new for 'ant', those of 'dog' left out",
        ),
        (("emu", "dog", "cat"), {"cat": 10.0, "dog": 20.0, "emu": 0.0}, "2 of 3 classes taken by name, new for 'emu'"),
        (("a_dog", "b_cat"), {"a_dog": 0.0, "b_cat": 0.0}, "it knows 'cat', 'dog', none of which is here"),
        (("cat", "dog"), {"cat": 10.0, "dog": 20.0}, ""),
    ],
)
def test_rows_are_taken_by_name(tmp_path, weights, classes, expected, said):
    found, notes = biases(tmp_path, weights, classes)
    assert found == expected
    assert notes.said(said) if said else not notes.said("rows of the classifier")


def test_rows_are_taken_by_name_from_the_hub(tmp_path, weights, monkeypatch):
    (tmp_path / "net").mkdir()
    copyfile(weights, tmp_path / "net/model.safetensors")
    monkeypatch.setattr(hub, "download", lambda name, others=(): {"hf:me/net": tmp_path / "net"}[name])
    found, _ = biases(tmp_path, "hf:me/net", ("ant", "cat"))
    assert found == {"ant": 0.0, "cat": 10.0}


def test_other_classes_are_refused_where_they_are_not_allowed(tmp_path, weights):
    with pytest.raises(
        CheckpointError, match=r"know the classes 'cat', 'dog', the images have 'ant', 'cat'; weights_ad"
    ):
        biases(tmp_path, weights, ("ant", "cat"), weights_adapt="size")


@pytest.mark.parametrize(
    ("adapt", "expected"), [("classes,size", {"cat": 0.0, "dog": 0.0}), ("size", {"cat": 10.0, "dog": 20.0})]
)
def test_rows_without_names(tmp_path, weights, adapt, expected):
    save_file(load_file(weights), tmp_path / "bare.safetensors")
    found, notes = biases(tmp_path, tmp_path / "bare.safetensors", ("cat", "dog"), weights_adapt=adapt)
    assert found == expected
    assert bool(notes.said("the names of its classes are not known")) == ("classes" in adapt)


@pytest.mark.parametrize("config", [{"id2label": {"0": "dog", "1": "cat"}}, {"label_names": ["dog", "cat"]}])
def test_names_beside_the_file(tmp_path, weights, config):
    save_file(load_file(weights), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, _ = biases(tmp_path, tmp_path / "model.safetensors", ("cat", "dog"))
    assert found == {"cat": 20.0, "dog": 10.0}


def test_names_in_another_unicode_form(tmp_path, weights):
    composed, taken_apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    save_file(load_file(weights), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"label_names": [taken_apart, "a"]}))
    found, _ = biases(tmp_path, tmp_path / "model.safetensors", (composed, "b"))
    assert found == {composed: 10.0, "b": 0.0}
