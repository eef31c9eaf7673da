"""`skipway bench`."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from skipway.cli import main

needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
TINY = [
    *("bench", "vit@4", "--precision", "float32", "--batch", "2", "--size", "32", "--modes", "eager", "--rounds", "2"),
    *("--no-switches", "--no-ceilings"),
]


@needs_torchvision
def test_a_race_from_end_to_end(tmp_path, capsys):
    given = [*TINY, "--what", "infer", "train", "--peers", "torchvision", "--out", str(tmp_path)]
    assert main(given) == 0
    text = capsys.readouterr().out
    assert "infer vit@4 float32 2x32: 2 contenders" in text
    assert "ours / peer" in text
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sum(row["kind"] == "turn" for row in rows) == 8
    assert "torchvision eager" in (tmp_path / "speed.md").read_text()
    assert main(given) == 0
    assert "train vit@4 float32 2x32: measured already" in capsys.readouterr().out


@needs_torchvision
def test_memory_and_start_in_processes_of_their_own(tmp_path, capsys):
    given = [*TINY, "--what", "memory", "startup", "--peers", "torchvision", "--rounds", "1", "--out", str(tmp_path)]
    assert main(given) == 0
    text = (tmp_path / "speed.md").read_text()
    assert "Memory of a training step" in text
    assert "import and build" in text
    assert "Error" not in text


@needs_torchvision
def test_growth_races_chains(tmp_path, capsys):
    given = [*TINY, "--what", "growth", "--branches", "4", "6", "--peers", "torchvision", "--out", str(tmp_path)]
    assert main(given) == 0
    text = (tmp_path / "speed.md").read_text()
    assert "| train vit 4x32 | 4 |" in text
    assert "| train vit 4x32 | 6 |" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["bench", "resnet51x"], "unknown model 'resnet51x'"),
        (["bench", "vit@4", "--rounds", "0"], "rounds 0: the rule is at least 1"),
        (["bench", "vit@x"], "vit@x"),
    ],
)
def test_errors_say_what_is_wrong(given, message, tmp_path, capsys):
    assert main([*given, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
