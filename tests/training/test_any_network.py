"""Networks of other libraries and of people's own files in the training loop: train, resume, predict, export."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.training.test_loop import StopAfter, assert_same

import skipway as sw
from skipway.errors import CheckpointError, SkipwayError
from skipway.inference.network import build_classifier, is_ours
from skipway.inference.predict import Predictor
from skipway.inference.publish import write_hub_folder, write_onnx
from skipway.inference.run_evaluation import evaluate_images, evaluate_run
from skipway.training.reporter import SilentReporter

FILE = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        return x + self.branch(x)

def network():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))
    return nn.Sequential(nn.Conv2d(3, 8, 3), Block(), Block(), *head)

def trunk():
    return nn.Sequential(nn.Conv2d(3, 8, 3), Block())
"""


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def message(self, label: str, text: str) -> None:
        self.notes.append(f"{label} {text}")


def write_images(root):
    """Three classes of twelve images that differ in brightness."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("dark", "middle", "bright")):
        (root / name).mkdir()
        for count in range(12):
            pixels = rng.normal(40 + 85 * number, 12, (32, 32, 3)).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{count}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "net.py"
    path.write_text(FILE)
    return path


def require(name):
    try:
        build_classifier({"name": name, "classes": 3, "channels": 3, "image": 32})
    except SkipwayError as error:
        if "not installed" in str(error):
            pytest.skip(str(error))
        raise


def recipe_for(images, name, **options):
    base = sw.Recipe(images, model=name, epochs=2, batch_size=8, lr=0.02, device="cpu", precision="float32", ema=0.9)
    return replace(base, **options)


NAMES = ["timm:test_resnet", "timm:test_vit", "FILE:network", "FILE:trunk"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_exactly_and_is_used_everywhere(tmp_path, images, file, name):
    name = name.replace("FILE", str(file))
    require(name)
    trusted = {"trust_code": True} if name.startswith(str(file)) else {}
    recipe = recipe_for(images, name)
    whole = sw.train(recipe, tmp_path / "whole")
    assert not sw.train(recipe, tmp_path / "stopped", stop=StopAfter(2)).finished
    assert_same(whole, sw.train(None, tmp_path / "stopped", resume=True))
    run = tmp_path / "whole"
    assert (run / "report.html").exists()
    model = sw.from_pretrained(run, **trusted)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert evaluate_run(run, **trusted).evaluation.correct == whole.evaluation.correct
    every = evaluate_images(run, images, **trusted).evaluation
    files = sorted(images.rglob("*.png"))
    labels = [each.label for each in Predictor(model).predict(files)]
    assert every.correct == sum(label == each.parent.name for label, each in zip(labels, files, strict=True))
    write_hub_folder(run, tmp_path / "hub", **trusted)
    again = sw.from_pretrained(tmp_path / "hub", **trusted)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_onnx(tmp_path, images, file):
    pytest.importorskip("onnxscript")
    sw.train(recipe_for(images, f"{file}:network", epochs=1), tmp_path / "run")
    difference = write_onnx(tmp_path / "run", tmp_path / "net.onnx", trust_code=True)
    assert difference is None or difference < 1e-4


def test_code_is_not_run_unasked(tmp_path, images, file):
    sw.train(recipe_for(images, f"{file}:network", epochs=1), tmp_path / "run")
    with pytest.raises(CheckpointError, match="made by the Python file .*trust_code=True"):
        sw.from_pretrained(tmp_path / "run")


def test_schemes_are_put_in_by_surgery_and_travel(tmp_path, images, file):
    outcome = sw.train(recipe_for(images, f"{file}:network", epochs=1, scheme="skipinit"), tmp_path / "run")
    assert json.loads(outcome.folder.config.read_text())["model"]["scheme"] == "skipinit"
    model = sw.from_pretrained(tmp_path / "run", trust_code=True)
    assert sum("residual_scale" in key for key in model.state_dict()) == 2


def test_layer_decay_and_freezing_follow_the_watched_chain(tmp_path, images, file):
    from skipway.optim.groups import layer_indices

    model = build_classifier({"name": f"{file}:network", "classes": 3, "channels": 3, "image": 32})
    layers = layer_indices(model, torch.zeros(2, 3, 32, 32))
    assert [layers[key] for key in ("0.weight", "1.branch.0.weight", "2.branch.0.weight", "5.weight")] == [0, 1, 2, 3]
    recipe = recipe_for(images, f"{file}:network", epochs=2, freeze="2", ema=None)
    before = sw.train(replace(recipe, lr=1e-12), tmp_path / "still")
    after = sw.train(recipe, tmp_path / "frozen")
    first, second = (sw.from_pretrained(run.folder.last, trust_code=True).state_dict() for run in (before, after))
    assert torch.allclose(first["0.weight"], second["0.weight"])
    assert not torch.allclose(first["5.weight"], second["5.weight"])


def test_initial_weights_fit_by_the_names_of_the_network(tmp_path, images, file):
    from safetensors.torch import save_file

    torch.manual_seed(1)
    source = build_classifier({"name": f"{file}:network", "classes": 1000, "channels": 3, "image": 32})
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    notes = Notes()
    recipe = recipe_for(images, f"{file}:network", epochs=1, lr=1e-12, ema=None, start=tmp_path / "weights.safetensors")
    outcome = sw.train(recipe, tmp_path / "run", reporter=notes)
    state = sw.from_pretrained(outcome.folder.last, trust_code=True).state_dict()
    assert torch.allclose(state["0.weight"], source.state_dict()["0.weight"])
    assert state["5.weight"].shape == (3, 8)
    assert any("newly initialised: 5.weight, 5.bias" in note for note in notes.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 20}, r"depth=20: a choice for Skipway's own networks"),
        ({"width": 8}, r"width=8: a choice for Skipway's own networks"),
        ({"grow_from": 1}, r"does not take images of 1x1, one of the sizes between"),
        ({"scheme": "nothing"}, r"unknown scheme 'nothing'"),
    ],
)
def test_options_of_ours_are_refused(tmp_path, images, file, options, message):
    with pytest.raises(SkipwayError, match=message):
        sw.train(recipe_for(images, f"{file}:network", **options), tmp_path / "run")


def test_a_network_that_takes_no_such_images_is_named(tmp_path, images, file):
    (file.parent / "narrow.py").write_text("from torch import nn\ndef net(): return nn.Linear(7, 2)\n")
    with pytest.raises(SkipwayError, match=r"does not run on images of 3x32x32"):
        sw.train(recipe_for(images, f"{file.parent / 'narrow.py'}:net"), tmp_path / "run")


def test_names():
    assert [is_ours(name) for name in ("resnet20", "vit_small_patch16_224", "timm:resnet18", "a.py:b", "hf:X")] == [
        *(True, True),
        *(False,) * 3,
    ]


ODD = """
import torch
from torch import nn
from net import Block

class Net(nn.Module):
    def __init__(self, form=None):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc, self.form = nn.Linear(8, 2), form

    def forward(self, x):
        features = self.trunk(x)
        logits = self.fc(features)
        if self.form == "named":
            return {"aux": logits[:, :1], "logits": logits}
        return (features, logits) if self.form == "tuple" else logits

def named(): return Net("named")
def pair(): return Net("tuple")
def probabilities(): return nn.Sequential(Net(), nn.Softmax(1))
def log_probabilities(): return nn.Sequential(Net(), nn.LogSoftmax(1))
def wrapped(): return nn.DataParallel(Net())
def frozen():
    net = Net()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return net
"""


@pytest.fixture(scope="module")
def odd(file):
    path = file.parent / "odd.py"
    path.write_text(ODD)
    return path


def description(odd, name, classes=3):
    return {"name": f"{odd}:{name}", "classes": classes, "channels": 3, "image": 32}


def test_the_output_that_is_named_logits_is_taken(odd):
    model = build_classifier(description(odd, "named"))
    assert model.fc.out_features == 3
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pair", r"returns 2 tensors in a tuple, none of them named 'logits'"),
        ("probabilities", "returns probabilities, and the loss expects logits"),
        ("log_probabilities", "returns probabilities"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(odd, name, message):
    with pytest.raises(SkipwayError, match=message):
        build_classifier(description(odd, name))


def test_wrappers_are_taken_off_and_frozen_networks_get_a_classifier_that_learns(odd):
    assert not any(key.startswith("module.") for key in build_classifier(description(odd, "wrapped")).state_dict())
    model = build_classifier(description(odd, "frozen"))
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["fc.weight", "fc.bias"]


def test_a_network_without_anything_to_train_is_refused(tmp_path, images, odd):
    (odd.parent / "still.py").write_text(ODD.replace("nn.Linear(8, 2)", "nn.Linear(8, 3)"))
    with pytest.raises(SkipwayError, match="requires_grad=False, so there is nothing to train"):
        sw.train(recipe_for(images, f"{odd.parent / 'still.py'}:frozen", ema=None), tmp_path / "run")


def test_a_new_classifier_on_a_trunk_is_remarked_upon(tmp_path, images, file):
    notes = Notes()
    sw.train(recipe_for(images, f"{file}:trunk", epochs=1), tmp_path / "run", reporter=notes)
    assert any("a new one is put on its 8 features" in note for note in notes.notes)
