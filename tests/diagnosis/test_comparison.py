"""Several designs side by side: the same batches, the same cost, an order, and what cannot be told apart."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from types import SimpleNamespace
from typing import assert_type

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import skipway as sw
from skipway.diagnosis import Comparison, Diagnosis
from skipway.diagnosis.comparison import LossDifference, are_alike, equal_steps, look_equally, model_names
from skipway.errors import SkipwayError
from skipway.probes.objective import Objective
from skipway.report import save
from skipway.report.comparison import comparison_page

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(64, 12, generator=GENERATOR)
Y = (X @ torch.randn(12, 4, generator=GENERATOR)).argmax(1)


class Notes:
    """What a network notes; a diagnosis would put back lists that are its attributes."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.looked_at: list[float] = []


class Net(nn.Module):
    """Notes what it is called with in training."""

    def __init__(self, out: int = 4, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, out))
        self.notes = Notes()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and len(x) == 16:
            self.notes.seen.append(float(x.detach().sum()))
        return self.layers(x)


class Constant(Net):
    """Answers the same to every input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.ones_like(x))


def dead() -> nn.Module:
    """The loss is not a number before the first step."""
    model = Net()
    nn.init.constant_(model.layers[0].weight, math.nan)
    return model


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


SETTINGS = {"optimizer": "adamw", "lr": 1e-2, "steps": 200, "allowance": 0.3}


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    loader = DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True)
    models = {"constant": Constant(), "broken": Failing(), "dead": dead(), "good": Net()}
    return sw.diagnose(models, loader, **SETTINGS)


def test_the_one_that_trains_comes_first_and_one_that_fails_last(comparison):
    names = [row.name for row in comparison]
    assert names.index("good") < names.index("constant") < names.index("dead") < names.index("broken")
    assert comparison.best == ("good",)
    assert comparison.answer == "Train good."
    assert comparison["good"].trains
    assert not comparison["dead"].trains
    with pytest.raises(SkipwayError, match="broken could not be diagnosed.*13"):
        comparison["broken"]
    with pytest.raises(KeyError):
        comparison["other"]
    assert list(comparison.differences) == ["constant"]
    difference = comparison.differences["constant"]
    assert difference.told_apart
    assert difference.mean > 0


def test_the_table_and_the_page_name_every_design_and_why_one_failed(comparison, tmp_path):
    text = str(comparison)
    assert max(map(len, text.splitlines())) <= 100
    page = comparison_page(comparison, "skipway diagnose a b")
    for shown in (text, page):
        assert all(name in shown for name in ("good", "dead", "broken", "Train good."))
        assert "13" in shown
    assert "best constant answer" in page
    assert save(comparison, tmp_path / "seen.html").read_text().startswith("<!DOCTYPE html>")
    content = json.loads(save(comparison, tmp_path / "seen.json").read_text())
    assert content["best"] == ["good"]
    assert [each["name"] for each in content["models"]] == ["good", "constant", "dead", "broken"]
    assert content["models"][0]["diagnosis"]["verdict"] == "trains"
    assert "13" in content["models"][-1]["failed"]
    assert save(comparison, tmp_path / "seen.svg").read_text().startswith("<svg")


def test_names_that_are_no_text_are_saved(comparison, tmp_path):
    """Of files: Python keeps a byte that is no UTF-8 as half of a surrogate pair, which no encoding takes."""
    rows = tuple(dataclasses.replace(row, name=f"{row.name}\udce9.py") for row in comparison)
    named = dataclasses.replace(comparison, rows=rows)
    for ending in (".html", ".svg", ".json"):
        written = save(named, tmp_path / f"seen{ending}", command="skipway diagnose good\udce9.py")
        assert "good\\udce9.py" in written.read_text("utf-8")
    pytest.importorskip("matplotlib")
    assert save(named, tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")


def test_json_parses_though_one_batch_tells_no_interval(comparison):
    rows = tuple(dataclasses.replace(row, losses=row.losses[:1]) for row in comparison)
    text = dataclasses.replace(comparison, rows=rows).to_json()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["differences"][0]["bound"] == "inf"


def test_all_designs_see_the_same_batches_in_the_same_order_and_stay_as_they_were():
    loader = DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True)
    first, second = Net(), Net(width=24)
    before = copy.deepcopy(first.state_dict())
    found = sw.diagnose([first, second], loader, **SETTINGS)
    one, two = first.notes.seen, second.notes.seen
    assert len(set(one)) >= 8  # the loader shuffles anew in every round
    taken = [len(each.curve) for each in found]
    assert taken[0] == taken[1]
    assert set(one) == set(two)
    assert one[-taken[0] :] == two[-taken[0] :]
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
    assert [row.name for row in sorted(found, key=lambda row: row.name)] == ["Net 1", "Net 2"]


def test_equal_designs_are_not_told_apart(monkeypatch):
    monkeypatch.setattr("skipway.diagnosis.comparison.pass_seconds", lambda diagnoses: dict.fromkeys(diagnoses, 0.1))
    found = sw.diagnose([Net(), Net()], X, targets=Y, **SETTINGS)
    (difference,) = found.differences.values()
    assert difference.mean == 0
    assert not difference.told_apart
    assert set(found.best) == {"Net 1", "Net 2"}
    assert "cannot be told apart" in found.answer
    assert any("a loader gives fresh ones" in remark for remark in found.remarks)


def test_losses_of_different_kinds_are_not_compared():
    """Labels of 4 and of 40 classes, drawn at random."""
    found = sw.diagnose({"few": Net(4), "many": Net(40)}, X, optimizer="adamw", steps=100)
    assert not found.comparable
    assert found.differences == {}
    assert found.remarks[0].startswith("losses are not compared: ")
    assert "not compared" in str(found)


def test_a_failed_design_beside_losses_of_different_kinds_is_shown_as_failed(comparison):
    found = dataclasses.replace(comparison, comparable=False)
    assert found.best == ("good",)
    assert found.answer == "Train good."
    assert "broken" in str(found)
    assert "failed" in json.loads(found.to_json())["models"][-1]


def test_types_and_names():
    assert_type(sw.diagnose(Net(), X, targets=Y), Diagnosis)
    assert_type(sw.diagnose([Net()], X, targets=Y), Comparison)
    assert list(model_names([nn.ReLU(), Net(), nn.ReLU()])) == ["ReLU 1", "Net", "ReLU 2"]
    with pytest.raises(SkipwayError, match="one model or more"):
        sw.diagnose([], X)
    with pytest.raises(SkipwayError, match="model '1' is a str"):
        model_names({"1": "net"})  # type: ignore[dict-item]
    with pytest.raises(SkipwayError, match="one of the models"):
        sw.diagnose([Net(), Net()], X, optimizer=torch.optim.SGD(Net().parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("values", "apart"),
    [((0.1, 0.11, 0.09, 0.1), True), ((0.1, -0.1, 0.12, -0.09), False), ((0.1,), False), ((math.inf, 0.1), False)],
)
def test_a_difference_counts_where_its_interval_excludes_zero(values, apart):
    assert LossDifference("a", "b", values).told_apart is apart


def test_the_bound_is_students():
    """Two values ±1: mean 0, deviation √2, and t of one degree of freedom is tan(0.475 π) = 12.706."""
    assert LossDifference("a", "b", (-1.0, 1.0)).bound == pytest.approx(math.tan(0.475 * math.pi), rel=1e-3)


class Looked:
    """What `equal_steps` reads of a diagnosis."""

    def __init__(self, taken: int, planned: int = 1000) -> None:
        self.measurement = type("", (), {"ahead": type("", (), {"losses": (1.0,) * taken, "fresh": True})})
        self.settings = type("", (), {"steps": planned})


def test_equal_cost_is_more_steps_for_the_faster():
    """The slow one may take 5 % of 1,000 steps, 50 × 0.4 s = 20 s: 200 steps of 0.1 s, not more than are planned."""
    looked = {"slow": Looked(12), "fast": Looked(12), "short": Looked(12, planned=60), "alike": Looked(24)}
    seconds = {"slow": 0.4, "fast": 0.1, "short": 0.1, "alike": 0.37}
    assert equal_steps(looked, seconds, 0.05) == {"slow": 50, "fast": 200, "short": 60, "alike": 50}
    assert equal_steps(looked, seconds, 0.0) == {"slow": 24, "fast": 96, "short": 60, "alike": 24}


class Recorder(Net):
    """Notes the batches that it is trained on, and those that are only looked at."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            self.notes.looked_at.append(float(x.sum()))
        return super().forward(x)


def test_losses_are_compared_on_batches_that_no_step_took():
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(16, 12, generator=generator), Y[:16]) for _ in range(60)]
    model = Recorder()
    diagnosis = sw.diagnose(model, batches, **SETTINGS)
    model.notes = Notes()
    look_equally(diagnosis, 12, 12)
    assert len(set(model.notes.seen)) == 12
    held_out = float(batches[0][0].sum())
    behind = [each for each in model.notes.looked_at if each != held_out]
    assert len(behind) >= 8
    assert set(behind[-8:]).isdisjoint(model.notes.seen)


def test_the_name_of_a_design_breaks_between_its_options_only():
    from skipway.diagnosis.table import DesignName, as_text

    name = "resnet20(scheme='skipinit', classes=10) + layerscale"
    lines = [line.rstrip() for line in as_text(DesignName(name), width=20).splitlines()]
    assert lines == ["resnet20(", "scheme='skipinit',", "classes=10) +", "layerscale"]


@pytest.mark.parametrize(
    ("one", "other", "fresh", "alike"),
    [
        (Objective(len, "given"), (2.344, 2.346), True, True),
        (Objective(len, "given"), (2.344, 2.346), False, True),
        (Objective(len, "own", own=True), (2.344, 2.346), False, True),
        (Objective(len, "own", own=True), (2.3, 2.5), True, True),
        (Objective(len, "own", own=True), (2.3, 2.5), False, False),
        (Objective(len, "random", labelled=False), (1.4, 3.7), True, False),
    ],
)
def test_estimates_of_constant_answers_differ_though_the_losses_are_the_same(one, other, fresh, alike):
    found = [
        SimpleNamespace(
            subject=SimpleNamespace(objective=one, size=16),
            measurement=SimpleNamespace(ahead=SimpleNamespace(constant=constant, fresh=fresh)),
        )
        for constant in other
    ]
    assert are_alike(found) is alike
