"""Networks of people's own files: how they are made, what is said where that fails, and how they are published."""

from __future__ import annotations

import json
import os
import zipfile

import pytest
import torch
from tests.training.test_any_network import FILE, Notes, recipe_for, write_images

import skipway as sw
from skipway.cli import main
from skipway.errors import SkipwayError
from skipway.inference.network import build_classifier
from skipway.inference.publish import write_hub_folder, write_onnx, write_program
from skipway.training.loop import train
from skipway.zoo.sources import ModelRequest, load_model

MADE = """
import sys
from torch import nn

def helper(x):
    return x

def net(width, num_classes, *, depth=1):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

def sized(num_classes):
    return net(4, num_classes)

class Labelled(nn.Sequential):
    def __init__(self, n_classes):
        super().__init__(*net(4, n_classes))

def ends():
    sys.exit(0)

def grey():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

def large():
    return nn.Sequential(nn.Conv2d(3, 2, 16, 16), nn.Flatten(), nn.Linear(2 * 6 * 6, 5))

def strided():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 8, 8), nn.Linear(4, 5)

        def forward(self, x):
            assert x.shape[-1] % 8 == 0, f"{x.shape[-1]} is no multiple of 8"
            return self.fc(self.conv(x).mean((2, 3)))
    return Net()
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "made.py"
    path.write_text(MADE)
    return path


def described(made, name, channels=3):
    return {"name": f"{made}:{name}", "classes": 3, "channels": channels, "image": 32}


@pytest.mark.parametrize(("name", "argument"), [("sized", "num_classes"), ("Labelled", "n_classes")])
def test_what_has_to_be_given_the_number_of_classes_is_given_it(made, name, argument):
    notes = []
    model = build_classifier(described(made, name), remark=notes.append)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert notes == [f"{made}:{name} is called with {argument}=3"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net", r"net needs arguments: width; give a function without any"),
        ("ends", r"made.py, line \d+: SystemExit: 0"),
        ("grey", r"does not run on images of 3x32x32: .*; it runs with channels=1"),
        ("large", r"does not run on images of 3x32x32: .*; it runs with size=96"),
        ("", r"made.py:helper, .*made.py:sized, .*made.py:Labelled$"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_the_way_out(made, name, message):
    with pytest.raises(SkipwayError, match=message):
        build_classifier({**described(made, name), "name": f"{made}:{name}" if name else str(made)})


def test_the_command_line_says_it_in_its_spelling(made, images, tmp_path, capsys):
    for name, text in (("grey", "--channels 1"), ("ends", "SystemExit")):
        assert main(["train", str(images), "--model", f"{made}:{name}", "--out", str(tmp_path / name)]) == 2
        assert text in capsys.readouterr().err


@pytest.mark.parametrize(("start", "refused"), [(16, "20x20"), (24, "28x28")])
def test_all_sizes_that_grow_are_checked_before_the_first_step(made, images, tmp_path, start, refused):
    recipe = recipe_for(images, f"{made}:strided", grow_from=start, epochs=6)
    with pytest.raises(SkipwayError, match=rf"does not take images of {refused}, .*is no multiple of 8"):
        train(recipe, tmp_path / "run")
    jumps = recipe_for(images, f"{made}:strided", grow_from=24, epochs=1)
    assert train(jumps, tmp_path / "run").finished  # 24, and then all 32
    with pytest.raises(SkipwayError, match="does not take images of 28x28"):
        train(recipe_for(images, f"{made}:strided", grow_from=24, epochs=1, steps=6), tmp_path / "steps")


def test_a_hub_folder_has_the_file_and_says_how_to_load_it(images, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    (private / "block.py").write_text(FILE)
    (private / "net.py").write_text("from block import network\ndef make(): return network()\n")
    (private / "alone.py").write_text(FILE)
    notes = []
    for file, call in (("net", "make"), ("alone", "network")):
        train(recipe_for(images, f"{private / file}.py:{call}", epochs=1), tmp_path / file)
        write_hub_folder(tmp_path / file, tmp_path / f"hub-{file}", remark=notes.append, trust_code=True)
    assert notes == ["net.py imports block from its folder, not written: put the code into one file"]
    private.rename(tmp_path / "gone")
    hub = tmp_path / "hub-alone"
    card = (hub / "README.md").read_text()
    assert "# alone.py:network" in card
    assert "trust_code=True" in card
    assert "--trust-code" in card
    assert "imports `block`" in (tmp_path / "hub-net" / "README.md").read_text()
    assert (hub / "alone.py").read_text() == FILE
    for each in hub.iterdir():
        assert str(tmp_path).encode() not in each.read_bytes(), each.name
    assert json.loads((hub / "config.json").read_text())["model"]["name"] == "alone.py:network"
    model = sw.from_pretrained(hub, trust_code=True)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    write_hub_folder(hub, tmp_path / "again", trust_code=True)  # from a hub folder, elsewhere
    (hub / "__pycache__").mkdir()  # as Python leaves it
    write_hub_folder(tmp_path / "again", hub, trust_code=True)  # over one that was written before
    (hub / "alone.py").write_text(FILE.replace("nn.ReLU()", "nn.GELU()"))
    with pytest.raises(SkipwayError, match="computes something else"):
        sw.from_pretrained(hub, trust_code=True)


def test_exported_files_hold_no_folders_of_this_machine(images, tmp_path):
    pytest.importorskip("onnxscript")
    (tmp_path / "net.py").write_text(FILE)
    train(recipe_for(images, f"{tmp_path / 'net.py'}:network", epochs=1), tmp_path / "run")
    write_onnx(tmp_path / "run", tmp_path / "net.onnx", trust_code=True)
    write_program(tmp_path / "run", tmp_path / "net.pt2", trust_code=True)
    with zipfile.ZipFile(tmp_path / "net.pt2") as archive:
        parts = [archive.read(name) for name in archive.namelist()]
    for content in ((tmp_path / "net.onnx").read_bytes(), *parts):
        assert str(tmp_path).encode() not in content
        assert torch.__path__[0].encode() not in content


def test_notes_of_a_run_name_the_number_of_classes(made, images, tmp_path):
    notes = Notes()
    train(recipe_for(images, f"{made}:sized", epochs=1), tmp_path / "run", reporter=notes)
    assert any("sized is called with num_classes=3" in note for note in notes.notes)


def test_a_file_is_compiled_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    file = tmp_path / "net.py"
    for side in (2, 3):  # as many bytes, within a second
        file.write_text(f"from torch import nn\nnet = nn.Linear({side}, 1)\n")
        os.utime(file, (0, 0))
        assert load_model(f"{file}:net", ModelRequest()).model.in_features == side
    assert list(tmp_path.iterdir()) == [file]
