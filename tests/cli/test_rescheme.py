"""`skipway rescheme`, and `rebuild` of what it writes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import skipway as sw
from skipway.cli import main
from skipway.errors import CheckpointError
from skipway.nn import Gain
from skipway.surgery import rebuild
from skipway.zoo import ModelRequest, load_model

FILE = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())

def make():
    return nn.Sequential(Block(), Block())

def plain():
    return nn.Linear(6, 6)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gains(model):
    return [module.gain for module in model.modules() if isinstance(module, Gain)]


@pytest.mark.parametrize("start", ["identity", "divide", "scheme"])
def test_what_is_written_rebuilds_the_model(nets, monkeypatch, capsys, start):
    torch.manual_seed(3)
    model = load_model("nets.py:make", ModelRequest()).model
    save_file(model.state_dict(), "weights.safetensors")
    arguments = ["--scheme", "skipinit(init=0.5)", "-o", "out", "--input", "4,6", "--weights", "weights.safetensors"]
    assert main(["rescheme", "nets.py:make", *arguments, "--start", start]) == 0
    told = capsys.readouterr().out
    assert told.startswith("skipinit(init=0.5")
    assert "2 changed; difference" in told
    described = json.loads((nets / "out/rebuild.json").read_text())
    assert described["model"] == f"{nets / 'nets.py'}:make"
    assert (described["input"], described["skipway"]) == ([4, 6], sw.__version__)
    (nets / "elsewhere").mkdir()
    monkeypatch.chdir(nets / "elsewhere")
    again, x = rebuild("../out"), torch.randn(2, 4, 6)
    assert len(gains(again)) == 2
    assert all(gain.item() == (1.0 if start == "identity" else 0.5) for gain in gains(again))
    assert torch.allclose(again(x), model(x), atol=1e-6) is (start != "scheme")
    assert set(again.state_dict()) == set(load_file("../out/model.safetensors"))


def test_a_network_of_ours(tmp_path, capsys):
    arguments = ["--depth", "8", "--classes", "3", "--input", "3,16,16", "--scheme", "layerscale", "--out"]
    assert main(["rescheme", "resnet", *arguments, str(tmp_path / "out")]) == 0
    assert "3 changed; difference 0" in capsys.readouterr().out
    model = rebuild(tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 3)
    assert not model.training


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nets.py:plain", "--scheme", "layerscale"], 2, "has no residual connection"),
        (["nets.py:make", "--scheme", "fixup"], 2, "cannot be added to a network"),
        (["nets.py:make", "--scheme", "layerscal"], 2, "unknown scheme"),
        (["nets.py:make", "--scheme", "layerscale", "--input", "6;3"], 2, "the rule is whole numbers"),
        (["nets.py:make", "--scheme", "layerscale", "--weights", "w.safetensors"], 4, "there is no such file"),
        (["nets.py:make", "--scheme", "layerscale", "--start", "two"], 2, "start"),
        (["nets.py:make"], 2, "--scheme"),
    ],
)
def test_refusals_write_nothing(nets, capsys, arguments, status, message):
    shape = [] if "--input" in arguments else ["--input", "4,6"]
    assert main(["rescheme", *arguments, *shape, "-o", "out"]) == status
    assert message in capsys.readouterr().err
    assert not (nets / "out").exists()


def test_folders_that_cannot_be_rebuilt(nets):
    with pytest.raises(CheckpointError, match=r"holds no rebuild\.json"):
        rebuild(nets)
    (nets / "rebuild.json").write_text('{"model": "resnet20"}')
    with pytest.raises(CheckpointError, match="does not describe a network"):
        rebuild(nets)
    main(["rescheme", "nets.py:make", "--scheme", "layerscale", "--input", "4,6", "-o", "out"])
    stored = load_file("out/model.safetensors")
    del stored["0.down.residual_scale.gain"]
    save_file(stored, "out/model.safetensors")
    with pytest.raises(CheckpointError, match=r"do not fit this Sequential(.|\n)*0\.down\.residual_scale\.gain"):
        rebuild("out")
