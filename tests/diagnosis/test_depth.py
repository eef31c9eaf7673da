"""Results print on one screen at any depth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.diagnosis import Diagnosis, Finding, diagnose
from skipway.diagnosis.remedies import AddSkips, LearningRate
from skipway.diagnosis.rows import SignalRow, folded
from skipway.diagnosis.table import as_text, diagnosis_view

DEPTH = 10_000
NAMES = tuple(f"layers.{index}.{part}" for index in range(DEPTH // 2) for part in ("attention", "mlp"))


def finding(where: tuple[str, ...]) -> Finding:
    return Finding(rule="stream-grows", level="serious", what="what", why="why", source="source", where=where)


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2, enable_nested_tensor=False)
    return diagnose(model, torch.randn(8, 3, 8), remedies=0)


@pytest.mark.parametrize("marked", [NAMES, NAMES[::2], NAMES[::7]], ids=["all", "every other", "every seventh"])
def test_ten_thousand_connections_print_on_one_screen(diagnosis, marked):
    found = finding(marked)
    assert len(str(found)) < 100
    assert len(repr(found)) < 120
    rows = [SignalRow(name=name, form="mlp", marks=(1,) if name in set(marked) else ()) for name in NAMES[:1000]] * 10
    text = as_text(diagnosis_view(diagnosis.heading, "undecided", ("a",), diagnosis.key_numbers, rows, (found,)))
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 100
    assert sum(len(entry) if isinstance(entry, list) else 1 for entry in folded(rows)) == DEPTH
    assert len(repr(replace(diagnosis, findings=(found,) * 10))) < 2500
    assert len(str(diagnosis.measurement)) < 1500


def test_remedies_and_treatments_name_many_modules_by_a_pattern(diagnosis):
    remedy = AddSkips(tuple(f"blocks.{index}" for index in range(DEPTH)))
    assert (
        str(remedy)
        == "add a skip around each of 10,000 layers (blocks.0, blocks.1, …, blocks.9999): x = x + layer(x) / √10000"
    )
    treatment = replace(diagnosis.fix(LearningRate(0.01)), applied=(remedy,))
    assert len(str(treatment).splitlines()) < 40
    assert len(repr(treatment)) < 3000


@pytest.mark.parametrize("example", [None, torch.zeros(1, 3, 32, 32)], ids=["typed", "traced"])
def test_a_chain_prints_its_ends(example):
    model = sw.build("resnet-cifar", depth=62, width=4)
    chain = sw.chain(model) if example is None else sw.chain(model, example)
    lines = str(chain).splitlines()
    assert len(lines) == 1 + 8 + 1 + 3
    assert lines[9].strip() == f"⋮ {len(chain) - 11} more"
    assert lines[1].split()[0] == chain[0].name
    assert lines[-1].split()[0] == chain[-1].name


def test_remedies_of_several_findings_are_told_once():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(24)), nn.Linear(8, 3))
    diagnosis = diagnose(model, torch.randn(32, 8), targets=torch.arange(32) % 3)
    several = [finding for finding in diagnosis.findings if len(finding.remedies) > 1]
    assert len({finding.remedies for finding in several}) < len(several)
    offered = sum("add a skip around each of" in str(remedy) for remedy in diagnosis.remedies)
    for text in (str(diagnosis), diagnosis.table()):
        assert text.count("add a skip around each of") == len({f.remedies for f in several}) + offered
        assert f"as for {several[0].rule}" in text
