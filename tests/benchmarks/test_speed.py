"""`python -m benchmarks.speed`: the race from end to end at tiny sizes. Nothing here asserts on a time."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from tests.benchmarks.test_race import tiny_plan

from benchmarks.race.runner import run_plan
from benchmarks.speed import main
from skipway.errors import SkipwayError

needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
TINY = [
    *("--networks", "vit@4", "--precisions", "float32", "--batches", "2", "--sizes", "32", "--modes", "eager"),
    *("--rounds", "2", "--no-switches", "--no-ceilings"),
]


def given(folder, *arguments):
    return [*TINY, *arguments, "--out", str(folder), "--tables", str(folder)]


@needs_torchvision
def test_a_race_from_end_to_end(tmp_path, capsys):
    arguments = given(tmp_path, "--what", "infer", "train", "--peers", "torchvision")
    main(arguments)
    assert "infer vit@4 float32 2x32: 2 contenders" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sum("round" in row for row in rows) == 8
    text = (tmp_path / "speed.md").read_text()
    assert "torchvision eager" in text
    assert "ours / peer" in text
    main(arguments)
    assert "train vit@4 float32 2x32: measured already" in capsys.readouterr().out


@needs_torchvision
def test_memory_and_start_in_processes_of_their_own(tmp_path):
    run_plan(tiny_plan(what=["memory"]), tmp_path)  # a peer is prepared for it as for a race
    main(given(tmp_path, "--what", "startup", "--peers", "torchvision", "--rounds", "1"))
    text = (tmp_path / "speed.md").read_text()
    assert "Memory of a training step" in text
    assert "import and build" in text
    assert "Error" not in text


@needs_torchvision
def test_growth_races_chains(tmp_path):
    main(given(tmp_path, "--what", "growth", "--branches", "4", "6", "--peers", "torchvision"))
    text = (tmp_path / "speed.md").read_text()
    assert "| train vit 4x32 | 4 |" in text
    assert "| train vit 4x32 | 6 |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--networks", "resnet51x"), "unknown model 'resnet51x'"),
        (("--rounds", "0"), "rounds 0: the rule is at least 1"),
        (("--networks", "vit@x"), "vit@x"),
    ],
)
def test_errors_name_the_rule(arguments, message, tmp_path):
    with pytest.raises(SkipwayError, match=message):
        main(given(tmp_path, *arguments))
