"""Choices that a recipe leaves open: what they are for each case, what is said, and that printed options repeat them.

| trial | what Skipway does |
|---|---|
| photos, no weights at hand | says so, and trains a small network at 64 pixels |
| photos, weights in a cache | takes them, fits the classifier first, 128 pixels on a CPU |
| images up to 64 pixels | as He 2015 for CIFAR, from random weights |
| the printed options, pasted | the same recipe |
| a run whose initial weights are gone | resumes: the checkpoint has its own |
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.training.test_loop import TINY, changed

from skipway.cli.app import app
from skipway.cli.option_names import option_spelling
from skipway.data.source_reader import SourceSummary
from skipway.errors import CheckpointError, SkipwayError
from skipway.inference.weight_search import WeightSearch
from skipway.recipe import Recipe, ResolvedRecipe
from skipway.training import defaults, initial_weights
from skipway.training.defaults import TrainingCase, TrunkSpeed, choices_text, decide
from skipway.training.distributed import Ranks
from skipway.training.image_task import ImageClassification
from skipway.training.loop import train
from skipway.training.reporter import SilentReporter
from skipway.zoo import import_library

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PHOTOS = SourceSummary(
    classes=("cat", "dog"), images=3000, training=3000, has_validation=False, has_test=False, side=300, channels=3
)
SMALL = dataclasses.replace(PHOTOS, side=32)
CACHED = WeightSearch("timm:test_resnet", "timm's weights, licence apache-2.0")
NOTHING = WeightSearch(None, "there are none")


class Heard(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def message(self, label: str, text: str) -> None:
        self.lines.append((label, text))

    def text(self, label: str) -> str:
        return " ".join(text for found, text in self.lines if found == label)


@pytest.fixture
def at_hand(monkeypatch):
    """Choose what a search for weights finds; what it is asked for is kept."""
    asked: list[str | None] = []

    def set_result(result: WeightSearch) -> list[str | None]:
        monkeypatch.setattr(defaults, "search_weights", lambda model: asked.append(model) or result)
        monkeypatch.setattr(defaults, "measure_trunk", lambda model, device, timed: TrunkSpeed(224, True, None))
        monkeypatch.setattr(defaults, "adopt_data_config", lambda recipe, remark: recipe)
        return asked

    set_result(NOTHING)
    return set_result


def decided(recipe: Recipe = Recipe(), summary=PHOTOS, device=CPU, world=1):  # noqa: B008 - frozen
    heard = Heard()
    return decide(recipe, summary, device, world, heard.message), heard.text("start")


def test_photos_without_weights_train_a_small_network(at_hand):
    recipe, said = decided()
    assert (recipe.start, recipe.model, recipe.size, recipe.batch_size) == ("random", "resnet20", 64, 32)
    assert (recipe.augment, recipe.label_smoothing, recipe.freeze) == ("trivial", 0.1, None)
    assert said.startswith("random weights: there are none; a small network is trained; start='FILE' takes others")


def test_photos_with_weights_fit_the_classifier_first(at_hand):
    asked = at_hand(CACHED)
    recipe, said = decided()
    assert asked == [None]
    assert (recipe.start, recipe.model, recipe.size) == ("pretrained", "timm:test_resnet", 128)
    assert (recipe.freeze, recipe.optimizer, recipe.layer_decay) == ("first", "adamw", 0.8)
    assert recipe.crop_share == 1  # features see no random crops
    assert recipe.lr == ResolvedRecipe(optimizer="adamw").peak_lr / 4
    for part in ("timm:test_resnet", "apache-2.0", "model='timm:NAME' or start='random' takes another"):
        assert part in said


def test_small_images_keep_their_size_and_get_a_batch_for_their_number(at_hand):
    asked = at_hand(CACHED)
    recipe, said = decided(summary=SMALL)
    assert asked == []
    assert said.endswith("for images up to 64 pixels; start='auto' takes published ones where there are any")
    assert recipe == Recipe(start="random", batch_size=128)
    few, heard = dataclasses.replace(SMALL, images=300, training=300), Heard()
    assert decide(Recipe(), few, CPU, 1, heard.message).batch_size == 32  # 128 would be one or two steps an epoch
    assert heard.text("batch") == (
        "32, since with 128 an epoch of about 216 images would be 1 step; batch_size='N' takes another"
    )
    assert decided(summary=dataclasses.replace(SMALL, channels=1))[1] == ""


def test_a_misspelt_start_is_no_file(at_hand, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SkipwayError, match="start='Whitened': there is no such file; did you mean 'whitened'"):
        decided(Recipe(start="Whitened", model="resnet8"))
    (tmp_path / "Whitened").touch()
    assert decided(Recipe(start="Whitened", model="resnet8"))[0].start == "Whitened"


@pytest.mark.parametrize(
    "name", ["epochs", "batch_size", "optimizer", "lr", "layer_decay", "augment", "freeze", "size"]
)
def test_what_the_user_gives_stays(at_hand, name):
    at_hand(CACHED)
    values = {"epochs": 30, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "layer_decay": 1.0}
    values |= {"augment": "none", "freeze": "none", "size": 72}
    assert getattr(decided(Recipe(**{name: values[name]}))[0], name) == values[name]


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"start": "random"}, []),
        ({"start": "auto", "model": "timm:resnet18"}, ["timm:resnet18"]),
        ({"model": "resnet50"}, ["resnet50"]),
        ({"start": "w.pth"}, []),
        ({"depth": 8}, []),
        ({"size": 64}, []),
        ({"start": "pretrained", "model": "timm:resnet18"}, []),
    ],
)
def test_what_is_searched(at_hand, fields, asked):
    assert at_hand(NOTHING) == []
    recipe, _ = decided(Recipe(**fields))
    assert at_hand(NOTHING) == asked
    assert recipe.start == (fields.get("start", "auto") if fields.get("start", "auto") != "auto" else "random")


def test_weights_that_are_asked_for_and_not_there(at_hand):
    with pytest.raises(CheckpointError, match="start='pretrained': there are none; start='FILE' takes others"):
        decided(Recipe(start="pretrained"))
    with pytest.raises(SkipwayError, match="start='auto': the rule is one process"):
        decided(Recipe(start="auto"), world=2)
    recipe, said = decided(world=2)
    assert (recipe.start, "there are several processes" in said) == ("random", True)


def test_a_gpu_gets_more(at_hand):
    assert decided(device=GPU)[0].model == "resnet18"
    many = dataclasses.replace(PHOTOS, images=30_000, training=30_000)
    recipe, _ = decided(summary=many, device=GPU)
    assert (recipe.model, recipe.size, recipe.batch_size) == ("resnet50", 224, 128)
    at_hand(CACHED)
    assert decided(device=GPU)[0].size == 224


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, 128),
        ({"seconds": 240.0}, 160),
        ({"seconds": 240.0, "takes_steps": False}, 224),
        ({"seconds": 240.0, "views": 1}, 128),
        ({"seconds": 1.0}, 96),
        ({"gpu": True}, 224),
        ({"seconds": 240.0, "trunk": TrunkSpeed(224, False, 0.03)}, 224),
        ({"seconds": 240.0, "trunk": TrunkSpeed(160, True, 1e-9)}, 160),
    ],
)
def test_the_size_for_published_weights(fields, size):
    """1,000 images of 128 pixels take 30 s; a quarter of 240 s is enough for (160/128)² of that, not for (192/128)²."""
    values = {"images": 900, "all_images": 1000, "trunk": TrunkSpeed(224, True, 0.03), **fields}
    assert TrainingCase(classes=2, side=300, pretrained=True, **values).defaults()["size"] == size


def test_few_images_still_take_enough_steps():
    for images in (20, 200, 2000, 20_000):
        found = TrainingCase(images=images, all_images=images, classes=2, side=300, pretrained=True).defaults()
        assert found["epochs"] * max(1, images // found["batch_size"]) >= (50 if images < 32 else 100)


def test_the_default_batch_is_divisible(at_hand):
    assert decided(Recipe(accumulate=3))[0].batch_size == 33
    assert decided(Recipe(accumulate=3), summary=SMALL)[0].batch_size == 129


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, name in enumerate(("dark", "bright")):
        (root / name).mkdir()
        for count in range(12):
            pixels = rng.normal(80 + 90 * number, 20, (70, 80, 3)).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{count}.png")
    return root


def resolved_of(arguments: list[str]) -> tuple[Recipe, ResolvedRecipe]:
    """The recipe of a command line, as given and as a run resolves it."""
    _, bound, _ = app.parse_args(["train", *arguments], exit_on_error=False, print_error=False)
    given = bound.arguments["recipe"]
    task = ImageClassification()
    chosen, data = task.load(given, SilentReporter(), Ranks(), CPU)
    return given, task.resolve(chosen, data, "float32", 1)


@pytest.mark.parametrize(
    "options", [[], ["--epochs", "3", "--seed", "2"], ["--time", "1m"], ["--start", "random"], ["--start", "auto"]]
)
@pytest.mark.parametrize("case", ["photos", "photos with weights", "digits"])
def test_pasted_options_repeat_the_recipe(photos, monkeypatch, case, options):
    try:
        import_library("timm")
    except SkipwayError as error:
        pytest.skip(str(error))
    found = CACHED if case == "photos with weights" else NOTHING
    monkeypatch.setattr(defaults, "search_weights", lambda model: found)
    monkeypatch.setattr(initial_weights, "find_published_weights", lambda model: FakeWeights)
    arguments = [*([] if case == "digits" else [str(photos)]), "--workers", "0", *options]
    given, resolved = resolved_of(arguments)
    pasted = shlex.split(option_spelling(choices_text(given, resolved)))
    assert {"--model", "--lr"} <= {*pasted}
    assert "--start" in pasted or options == ["--start", "random"]
    monkeypatch.setattr(defaults, "search_weights", lambda model: pytest.fail("everything is chosen"))
    assert resolved_of([*arguments, *pasted])[1] == resolved


class FakeWeights:
    config = None


def test_a_network_without_a_linear_classifier_is_trained_without_fitting_one(tmp_path, photos, monkeypatch):
    code = (
        "from torch import nn\n\ndef net():\n"
        "    head = [nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *head)\n"
    )
    (tmp_path / "net.py").write_text(code)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(code, names)
    torch.save(names["net"]().state_dict(), tmp_path / "w.pth")
    heard = Heard()
    recipe = Recipe(photos, model=f"{tmp_path / 'net.py'}:net", start=tmp_path / "w.pth", size=16, epochs=1, workers=0)
    outcome = train(changed(recipe, device="cpu"), tmp_path / "run", reporter=heard)
    assert (outcome.finished, outcome.recipe.freeze) == (True, "none")
    assert "the classifier is not fitted first" in heard.text("note")
    assert "layer_decay=0.8 has no effect" in heard.text("note")


@pytest.mark.usefixtures("few_digits")
def test_a_run_resumes_without_its_initial_weights(tmp_path):
    first = train(changed(TINY, epochs=1), tmp_path / "first")
    recipe = changed(TINY, epochs=1, start=first.folder.last)
    train(recipe, tmp_path / "run")
    Path(first.folder.last).unlink()
    again = train(changed(recipe, epochs=2), tmp_path / "run", resume=True)
    assert again.epoch == 2
    assert str(again.recipe.start).endswith("last.safetensors")
