"""Code of networks that are not ours, changed or moved between training and use of the weights."""

from __future__ import annotations

import json

import pytest
import torch
from tests.training.test_any_network import FILE, recipe_for, write_images
from tests.training.test_loop import StopAfter, assert_same

import skipway as sw
from skipway.checkpoint.files import read_safetensors
from skipway.checkpoint.store import Checkpoints
from skipway.cli import main
from skipway.errors import CheckpointError
from skipway.inference.network import build_classifier
from skipway.inference.publish import write_hub_folder, write_onnx
from skipway.inference.reference_outputs import compute_outputs, describe_outputs, find_change
from skipway.inference.run_evaluation import evaluate_images, evaluate_run

CHANGES = {
    "another activation": ("nn.ReLU()", "nn.GELU()"),
    "a factor on the branch": ("x + self.branch(x)", "x + 0.9 * self.branch(x)"),
    "another pooling": ("nn.AdaptiveAvgPool2d(1)", "nn.AdaptiveMaxPool2d(1)"),
    "padding that only borders show": ("padding=1)", "padding=1, padding_mode='reflect')"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("changed")
    file = folder / "net.py"
    file.write_text(FILE)
    sw.train(recipe_for(images, f"{file}:network"), folder / "run")
    sw.train(recipe_for(images, f"{file}:network"), folder / "stopped", stop=StopAfter(2))
    return folder


@pytest.fixture
def changed(trained, request):
    file = trained / "net.py"
    assert request.param[0] in FILE
    file.write_text(FILE.replace(*request.param))
    yield trained
    file.write_text(FILE)


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES.keys(), indirect=True)
def test_a_change_that_the_weights_do_not_show_is_refused_wherever_the_network_is_built_again(
    changed, images, tmp_path
):
    readers = {
        "from_pretrained": lambda: sw.from_pretrained(changed / "run", trust_code=True),
        "last weights": lambda: sw.from_pretrained(changed / "run" / "last.safetensors", trust_code=True),
        "evaluate": lambda: evaluate_run(changed / "run", trust_code=True),
        "evaluate images": lambda: evaluate_images(changed / "run", images, trust_code=True),
        "onnx": lambda: write_onnx(changed / "run", tmp_path / "net.onnx", trust_code=True),
        "hub": lambda: write_hub_folder(changed / "run", tmp_path / "hub", trust_code=True),
        "resume": lambda: sw.train(None, changed / "stopped", resume=True),
    }
    for name, read in readers.items():
        with pytest.raises(
            CheckpointError, match=r"computes something else .* SHA-256 \w+ then, net.py with"
        ) as caught:
            read()
        assert ("start=" if name == "resume" else "allow_changed_outputs=True") in str(caught.value), name
    allowed = sw.from_pretrained(changed / "run", trust_code=True, allow_changed_outputs=True)
    assert allowed(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_every_file_of_weights_has_the_outputs_of_its_own_weights(trained):
    answers = []
    for name in ("best.safetensors", "last.safetensors"):
        model = sw.from_pretrained(trained / "run" / name, trust_code=True)
        answers.append(compute_outputs(model, 3, 32).tolist())
        _, header = read_safetensors(trained / "run" / name)
        torch.testing.assert_close(json.loads(header["reference"])["outputs"], answers[-1])
    live = Checkpoints(trained / "run" / "checkpoints").newest()[0].state["reference"]["outputs"]
    assert max(abs(one - other) for one, other in zip(live, answers[-1], strict=True)) > 1e-3  # not the averaged ones


def test_code_that_is_written_otherwise_and_computes_the_same_is_taken_with_a_warning(trained):
    file = trained / "net.py"
    file.write_text(FILE.replace("return x + self.branch(x)", "y = self.branch(x)\n        return y + x  # the same"))
    with pytest.warns(UserWarning, match="for a fixed image the network computes the same"):
        sw.from_pretrained(trained / "run", trust_code=True)
    file.write_text(FILE)


def test_a_moved_file_is_named_beside_the_run(trained, images, tmp_path, capsys):
    moved = tmp_path / "elsewhere" / "other.py"
    moved.parent.mkdir()
    (trained / "net.py").rename(moved)
    try:
        with pytest.raises(CheckpointError, match="no such file"):
            sw.from_pretrained(trained / "run", trust_code=True)
        model = sw.from_pretrained(trained / "run", trust_code=True, model=f"{moved}:network")
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
        options = ["--trust-code", "--model", f"{moved}:network"]
        assert main(["predict", str(trained / "run"), str(images), *options]) == 0
        assert main(["evaluate", str(trained / "run"), *options]) == 0
        with pytest.raises(CheckpointError, match="another place of a network that is not Skipway's own"):
            sw.from_pretrained(trained / "run", trust_code=True, model="resnet20")
        moved.write_text(FILE.replace("nn.ReLU()", "nn.SiLU()"))
        assert main(["predict", str(trained / "run"), str(images), *options]) == 4
        assert "--allow-changed-outputs" in capsys.readouterr().err
    finally:
        moved.rename(trained / "net.py")
        (trained / "net.py").write_text(FILE)


def test_a_run_whose_file_was_moved_is_resumed_exactly(tmp_path, images):
    for name in ("first.py", "second.py"):
        (tmp_path / name).write_text(FILE)
    recipe = recipe_for(images, f"{tmp_path / 'first.py'}:network")
    whole = sw.train(recipe, tmp_path / "whole")
    sw.train(recipe, tmp_path / "stopped", stop=StopAfter(2))
    (tmp_path / "first.py").unlink()
    moved = recipe_for(images, f"{tmp_path / 'second.py'}:network")
    assert_same(whole, sw.train(moved, tmp_path / "stopped", resume=True))
    sw.from_pretrained(tmp_path / "stopped", trust_code=True)


RANDOM = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.fc = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(nn.functional.dropout(self.trunk(x)))
"""


def test_outputs_that_are_random_in_evaluation_mode_are_not_compared(tmp_path):
    (tmp_path / "random_net.py").write_text(RANDOM)
    description = {"name": f"{tmp_path / 'random_net.py'}:Net", "classes": 3, "channels": 3, "image": 32}
    assert describe_outputs(build_classifier(description), description) is None


def test_outputs_do_not_depend_on_the_state_of_the_model_and_leave_it_alone(trained):
    description = {"name": f"{trained / 'net.py'}:network", "classes": 3, "channels": 3, "image": 32}
    model = build_classifier(description).train()
    stored, state = describe_outputs(model, description), torch.random.get_rng_state()
    assert stored is not None
    assert model.training
    assert find_change(model.to(memory_format=torch.channels_last), description, stored) == ""
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(compute_outputs(model, 3, 32).tolist(), stored["outputs"])
    with torch.no_grad():
        model[-1].weight.mul_(1.1)
    assert "both with net.py" in find_change(model, description, stored)
