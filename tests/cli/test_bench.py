"""`skipway bench`: one table of every backend and precision. Nothing here asserts on a time."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.cli import main
from skipway.cli.bench import python_line
from skipway.inference.backend_selection import BackendResult
from skipway.inference.backends import BACKENDS, Backend, Choice
from skipway.inference.speed import time_inference, time_training

NETWORK = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
"""


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A small network in a file; backends that are ready at once, and one that is not installed."""
    eager = BACKENDS["eager"]
    absent = Backend(eager.build, ("no_such_package",), "onnx")
    # another table, since entries that are taken out and put back are the last ones in the tests that follow
    monkeypatch.setattr(BACKENDS, "entries", {"eager": eager, "absent": absent})
    monkeypatch.setitem(BACKENDS._names, "absent", "absent")
    monkeypatch.setattr("skipway.inference.speed.native_precisions", lambda device: ["float32", "bfloat16"])
    (tmp_path / "net.py").write_text(NETWORK)
    return [f"{tmp_path / 'net.py'}:Net", "--input", "3,8,8", "--batch", "2", "--seconds", "0.01", "--device", "cpu"]


def test_a_table_of_every_backend_and_precision(network, capsys):
    assert main(["bench", *network]) == 0
    text = capsys.readouterr().out
    assert "845 parameters, input 2x3x8x8" in text
    rows = [line.split("\t") for line in text.splitlines() if "\t" in line]
    columns, rows = rows[0], rows[1:]
    assert {tuple(row[:3]) for row in rows} == {
        (work, backend, precision)
        for work, backends in (
            ("inference", ("original", "eager", "absent")),
            ("training step", ("original", "accelerate")),
        )
        for precision in ("float32", "bfloat16")
        for backend in backends
    }
    cells = [dict(zip(columns, row, strict=True)) for row in rows]
    assert sum(row["note"] == "fastest" for row in cells) == 2
    for row in cells:
        assert (row["backend"] == "absent") == (not row["ms"]) == ("pip install 'skipway[onnx]'" in row["note"])
    assert cells[0]["speed"] == "1.00"
    differences = {(row["backend"], row["precision"]): float(row["difference"]) for row in cells if row["difference"]}
    assert differences["eager", "float32"] < 1e-5 < differences["eager", "bfloat16"]
    assert [line.split("  ")[0] for line in text.splitlines()[-2:]] == ["inference", "training step"]


def test_json_and_no_training(network, capsys):
    assert main(["bench", *network, "--json", "--no-training"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["input"] == [2, 3, 8, 8]
    assert {row["work"] for row in found["results"]} == {"inference"} == set(found["fastest"])
    absent = next(row for row in found["results"] if row["backend"] == "absent")
    assert (absent["seconds"], absent["speedup"]) == (None, None)
    timed = next(row for row in found["results"] if row["backend"] == "eager")
    assert timed["samples_per_second"] == pytest.approx(2 / timed["seconds"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("work", "backend"), [("inference", "eager"), ("training step", "accelerate")])
def test_the_line_of_python_runs(work, backend, precision):
    line = python_line(work, BackendResult(Choice(backend, precision)), "cpu").replace("…", "model(example)")
    model, example = nn.Linear(4, 4), torch.randn(2, 4)
    scope = {"sw": sw, "torch": torch, "model": model, "example": example}
    exec("\n".join(line.split("; ")), scope)
    if work == "inference":
        assert (scope["fast"].backend, scope["fast"].precision) == (backend, precision)
    else:
        assert type(model) is not nn.Linear


def test_the_model_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    time_training(model, torch.randn(3, 4), seconds=0.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_does_not_train_is_a_note():
    class Frozen(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    results = time_training(Frozen(2, 2), torch.randn(3, 2), seconds=0.0)
    assert all("element 0 of tensors does not require grad" in each.note for each in results)


def test_a_backend_that_differs_is_a_note(monkeypatch):
    for name in list(BACKENDS):
        monkeypatch.setitem(BACKENDS.entries, name, Backend(lambda model, example, choice: lambda x: model(x) + 1))
    first, *others = time_inference(nn.Linear(2, 2), torch.randn(3, 2), seconds=0.0)
    assert not first.note
    assert others
    assert all("of the largest output, more than" in each.note for each in others if each.backend in BACKENDS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["resnet20x"], "unknown model 'resnet20x'"),
        (["resnet20", "--batch", "0"], "--batch 0: the rule is a whole number from 1 on"),
        (["resnet20", "--seconds", "0"], "--seconds 0: the rule is more than 0"),
        (["resnet20", "--input", "3;32"], "the rule is whole numbers with commas"),
    ],
)
def test_errors_name_the_rule(given, message, capsys):
    assert main(["bench", *given]) == 2
    assert message in capsys.readouterr().err
