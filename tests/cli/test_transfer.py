"""`skipway transfer` as people and scripts meet it."""

from __future__ import annotations

import json
import re

import pytest

from skipway.cli import main

FILE = """
import torch
from torch import nn

class Block(nn.Linear):
    def forward(self, x):
        return x + super().forward(x)

def make(width=4, layers=2):
    loader = [(x := torch.randn(16, width), x @ torch.ones(width, 1)) for _ in range(8)]
    return nn.Sequential(*(Block(width, width) for _ in range(layers)), nn.Linear(width, 1)), loader

def alone(n):
    return make(layers=n)[0]

def clueless(width=4, size=2):
    return make()[0]

net = alone(2)
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(FILE)
    return "nets.py:make"


def test_a_file_s_function_is_swept_and_everything_is_written(file, tmp_path, capsys):
    words = ["transfer", file, "--depths", "2,4", "--schemes", "own", "--steps", "8", "--seeds", "1"]
    status = main([*words, "--optimizer", "sgd", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == {"carries": 0, "does not carry": 1, "undecided": 4}[found["answer"]]
    assert [row["depth"] for row in found["schemes"][0]["table"]] == [2, 4, 8, 16]
    assert [row["measured"] for row in found["schemes"][0]["table"]] == [True, True, False, False]
    folder = tmp_path / "transfers"
    assert {path.suffix for path in folder.iterdir()} == {".html", ".json", ".jsonl"}
    lines = len((folder / "nets.py-make.jsonl").read_text().splitlines())
    assert main([*words, "--optimizer", "sgd", "--quiet"]) == status
    assert capsys.readouterr().out.strip() == found["sentence"]
    assert len((folder / "nets.py-make.jsonl").read_text().splitlines()) == lines
    assert "model = make(depth)" in found["schemes"][0]["code"]


def test_coordinates_only_trains_nothing_more(file, tmp_path, capsys):
    assert main(["transfer", file, "--depths", "2,4", "--coordinates-only", "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert "rates were not swept" in out
    assert "change of the last stream" in out
    assert not (tmp_path / "transfers" / "nets.py-make.jsonl").exists()
    # the command line on the page repeats it
    page = re.sub("<[^>]+>", "", (tmp_path / "transfers" / "nets.py-make.html").read_text())
    assert "--seeds 1 --samples 32 --coordinates-only" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nets.py:make", "--depths", "2"], "at least two different whole numbers"),
        (["nets.py:make", "--depths", "two,3"], "the rule is comma-separated integers"),
        (["nets.py:alone", "--depths", "2,4"], "gives a network without a batch"),
        (["nets.py:clueless", "--depths", "2,4"], "takes width, size, and none of them is known to be the depth"),
        (["nets.py:net", "--depths", "2,4"], "is a module, whose depth is fixed"),
        (["nets.py:make", "--depths", "2,4", "--steps", "3"], "--steps 3"),
        (["nets.py:make", "--depths", "2,4", "--schemes", "depthscald"], "did you mean"),
        (["nets.py:make", "--depths", "2,4", "--optimizer", "adamv"], "did you mean"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_trained(file, words, message, capsys):
    assert main(["transfer", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
