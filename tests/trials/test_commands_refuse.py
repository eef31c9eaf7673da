"""Commands that wrote where they had nothing to write, or ended in somebody else's traceback.

| trial | input | right value |
|---|---|---|
| – | `skipway report` on a folder that holds no study | refused, nothing is written |
| – | `skipway bench` with an input that the network cannot take | our error with the shape |
| – | `optimize` on an example that the network cannot take | our error with the shape |
| – | `read_weights("hf:org/name")` | read as `load` does |
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.cli import main
from skipway.weights import hub, read_weights


def test_a_folder_without_a_study_gets_no_page(tmp_path, capsys):
    (tmp_path / "photo.txt").write_text("mine")
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no table of a study, so nothing is written there" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["photo.txt"]
    (tmp_path / "report.html").touch()  # of a training
    assert main(["report", str(tmp_path)]) == 2
    assert f"open {tmp_path / 'report.html'} in a browser" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["3,32", "1"])
def test_a_shape_that_does_not_fit_is_named(shape, capsys):
    assert main(["bench", "resnet20", "--input", shape, "--device", "cpu", "--seconds", "0.1"]) == 2
    text = capsys.readouterr().err
    assert "fails on its example of shape (" in text or "--input" in text
    assert "Traceback" not in text


def test_optimize_names_an_example_that_does_not_fit():
    with pytest.raises(sw.SkipwayError, match=r"this Linear fails on its example of shape \(2, 5\): RuntimeError"):
        sw.optimize(nn.Linear(4, 2), torch.zeros(2, 5), backends=["eager"])


def test_weights_by_a_name_on_the_hub(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(hub, "download", lambda name, others: {"hf:org/name": tmp_path}[name])
    assert read_weights("hf:org/name")["a"].tolist() == [1, 1]
