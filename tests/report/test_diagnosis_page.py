"""What a diagnosis looks like: table, picture and page show every finding at its place, whatever the net."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from torch import nn

import skipway as sw
from skipway.diagnosis import Diagnosis, Finding, NextLook, diagnose
from skipway.diagnosis.remedies import LearningRate
from skipway.diagnosis.rows import folded
from skipway.diagnosis.table import as_text, findings_view
from skipway.errors import MissingExtraError
from skipway.report import save
from skipway.report.diagnosis import bands_of, diagnosis_figures, diagnosis_page, trial_figures
from skipway.report.page import sentence
from skipway.report.pyplot import save_picture
from skipway.report.svg import MOST_TOOLTIPS, draw

VOID = {"meta", "br"}
EVIL = "<script>alert('1')</script> & more"


def findings(places: list[str]) -> tuple[Finding, ...]:
    """One of each level: at several places, at one, at a parameter inside of one, at none."""
    source = "Hanin 2018, https://arxiv.org/abs/1803.01719."
    return (
        Finding(
            rule="first-rule",
            level="fatal",
            what=EVIL,
            why="because",
            source=source,
            where=tuple(places[1:3]),
            evidence={"ratio": math.inf, "depth": 3.0},
            remedies=(LearningRate(0.01),),
        ),
        Finding(rule="second-rule", level="serious", what="what", why=EVIL, source=source, where=(places[0],)),
        Finding(rule="third-rule", level="note", what="what", why="because", source="measured"),
    )


def diagnosed(model: nn.Module, *shape: int, **changes: object) -> Diagnosis:
    torch.manual_seed(0)
    found = diagnose(model, torch.randn(8, *shape), targets=torch.randint(4, (8,)), remedies=0)
    return replace(found, findings=findings([row.name for row in found.rows]), **changes)  # type: ignore[arg-type]


def broken() -> nn.Module:
    """Infinite from its second connection on, with a branch that is zero before."""
    model = sw.build("resnet", depth=20, scheme="skipinit(init=1.0, norm='remove')", classes=4, width=4)
    with torch.no_grad():
        model.get_submodule("stages.0.0.branch.conv1").weight.zero_()
        model.get_submodule("stages.0.2.branch.conv1").weight.mul_(1e38)
        model.get_submodule("stages.2.1.branch.conv1").weight.fill_(math.nan)
    return model


MODELS = {
    "residual": (lambda: sw.build("resnet", depth=8, classes=4, width=4), (3, 8, 8)),
    "transformer": (lambda: sw.build("vit-tiny-16", depth=2, image=8, patch=4, dim=8, heads=2, classes=4), (3, 8, 8)),
    "layers": (lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), (6,)),
    "broken": (broken, (3, 8, 8)),
}


@pytest.fixture(scope="module")
def diagnoses() -> dict[str, Diagnosis]:
    return {name: diagnosed(make(), *shape) for name, (make, shape) in MODELS.items()}


@pytest.fixture(params=MODELS)
def diagnosis(request, diagnoses) -> Diagnosis:
    return diagnoses[request.param]


def deepened(diagnosis: Diagnosis, times: int) -> Diagnosis:
    """The same connections many times over, as if the net were that deep."""
    measured = diagnosis.measurement
    signals, connections = [], []
    for turn in range(times):
        for signal, connection in zip(measured.connections, diagnosis.chain, strict=True):
            name = f"{turn}.{signal.name}"
            signals.append(replace(signal, name=name))
            connections.append(replace(connection, name=name, seen=replace(connection.seen, name=name)))
    chain = sw.Chain(diagnosis.chain.model, connections, None)
    middle = signals[len(signals) // 2].name
    pointed = replace(findings([middle, middle, middle])[0], where=(middle,))
    measurement = replace(measured, connections=tuple(signals))
    return replace(diagnosis, measurement=measurement, chain=chain, findings=(pointed,))


def test_the_table_has_a_row_for_each_place_and_every_finding(diagnosis):
    text = diagnosis.table()
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    rows = diagnosis.rows
    for row in rows:
        assert any(line.startswith(row.name) for line in text.splitlines())
    marked = {mark: [row.name for row in rows if mark in row.marks] for mark in (1, 2, 3)}
    assert marked == {1: [row.name for row in rows[1:3]], 2: [rows[0].name], 3: []}
    for count, (symbol, finding) in enumerate(zip("✗!·", diagnosis.findings, strict=True), 1):
        assert f"{symbol}{count} {finding.level} · {finding.rule}" in text
    assert "→ set the learning rate to 0.01" in text
    assert type(diagnosis.subject.model).__name__ in text


def test_a_parameter_marks_the_connection_that_it_is_in(diagnoses):
    found = diagnoses["broken"]
    inside = replace(findings(["x"])[1], where=("stages.1.1.branch.conv2.weight", "stages.2.0.scale.gain"))
    rows = replace(found, findings=(inside,)).rows
    assert [row.name for row in rows if row.marks] == ["stages.1.1", "stages.2.0"]


def test_deep_nets_are_folded_around_the_findings(diagnoses):
    deep = deepened(diagnoses["residual"], 70)
    lines = deep.table().splitlines()
    assert len(lines) < 50
    rows = deep.rows
    assert len(rows) == 210
    shown = folded(rows)
    assert sum(1 if not isinstance(entry, list) else len(entry) for entry in shown) == 210
    assert (shown[0], shown[-1]) == (rows[0], rows[-1])
    marked = next(row for row in rows if row.marks)
    assert any(line.startswith(marked.name) and "✗1" in line for line in lines)
    assert any(re.match(r"⋮ \d+ more ", line) for line in lines)


def test_colours_say_nothing_that_the_text_does_not(diagnosis, diagnoses):
    file = io.StringIO()
    Console(file=file, force_terminal=True, width=100, color_system="standard").print(diagnosis)
    assert "\x1b[" in file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert [line.rstrip() for line in plain.splitlines()] == diagnosis.table().splitlines()
    narrow = io.StringIO()
    Console(file=narrow, width=72).print(diagnosis)
    assert max(map(len, narrow.getvalue().splitlines())) <= 72


def test_before_and_after_stand_side_by_side(diagnoses):
    treatment = diagnoses["residual"].fix(LearningRate(0.003))
    text = str(treatment)
    assert re.search(r"^training +sgd at 0.1 +sgd at 0.003$", text, re.MULTILINE)
    assert re.search(r"^verdict +", text, re.MULTILINE)
    assert "→ set the learning rate to 0.003" in text
    assert max(map(len, text.splitlines())) <= 100
    file = io.StringIO()
    Console(file=file, width=100).print(treatment)
    assert [line.rstrip() for line in file.getvalue().splitlines()] == text.splitlines()


def test_findings_alone():
    text = as_text(findings_view(findings(["a", "b", "c"])))
    assert text.startswith("✗1 fatal · first-rule · b, c\n")
    assert text.count("source: ") == 3


def test_the_picture_is_drawn_and_saved(diagnosis, tmp_path):
    pytest.importorskip("matplotlib")
    figure = save_picture(tmp_path / "seen.png", diagnosis_figures(diagnosis), title=diagnosis.verdict)
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 3
    assert figure.axes[0].get_shared_x_axes().joined(figure.axes[0], figure.axes[1])
    assert {axes.get_yscale() for axes in figure.axes} == {"log"}
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert set(labels) == {"1 first-rule", "2 second-rule"}
    assert diagnosis.verdict.lower() in figure.get_suptitle().lower()


def test_a_deep_picture_has_few_names_and_one_band_a_stretch(diagnoses, tmp_path):
    pytest.importorskip("matplotlib")
    deep = deepened(diagnoses["residual"], 70)
    figure = save_picture(tmp_path / "deep.png", diagnosis_figures(deep))
    assert len(figure.axes[2].get_xticklabels()) <= 9
    rows = deep.rows
    stretch = tuple(row.name for row in (*rows[5:9], rows[20]))
    found = replace(deep, findings=(replace(deep.findings[0], where=stretch),))
    assert [(band.first, band.last, band.label) for band in bands_of(found)] == [
        (6, 9, "1 first-rule"),
        (21, 21, "1"),
    ]


def test_pictures_of_nothing_and_with_panels_to_spare_are_drawn(diagnoses, tmp_path):
    pytest.importorskip("matplotlib")
    assert len(save_picture(tmp_path / "none.png", [], title="None of them trains").axes) == 1
    figure = save_picture(tmp_path / "three.png", diagnosis_figures(diagnoses["residual"])[:3], columns=2)
    assert [axes.axison for axes in figure.axes] == [True, True, True, False]


def test_without_matplotlib_the_picture_says_how_to_get_it(diagnoses, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'skipway\[plot\]'"):
        save(diagnoses["residual"], tmp_path / "seen.png")
    assert save(diagnoses["residual"], tmp_path / "seen.svg").read_text().startswith("<svg xmlns=")


class Reader(HTMLParser):
    """Checks that tags nest, and keeps what a test asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_fetches_nothing(diagnosis):
    text = diagnosis_page(diagnosis)
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    assert [tag for tag, _ in reader.seen].count("script") == 1, "what a finding says is not run"
    for tag, attributes in reader.seen:
        assert tag not in {"link", "img", "iframe"}
        assert "src" not in attributes
        if tag != "a":
            assert not any("://" in (value or "") for name, value in attributes.items() if name != "title")
    assert "url(" not in text
    assert "@import" not in text
    assert diagnosis.remarks
    for remark in diagnosis.remarks:
        assert sentence(remark) in reader.text
    for finding in diagnosis.findings:
        assert finding.rule in reader.text
        assert finding.what in reader.text
        assert finding.why in reader.text
    assert "https://arxiv.org/abs/1803.01719" in {attributes.get("href") for _, attributes in reader.seen}
    rows = [attributes for tag, attributes in reader.seen if tag == "tr"]
    assert len(rows) == 1 + len(diagnosis.rows)
    assert f"Skipway {sw.__version__}" in reader.text
    assert "nan" not in " ".join(attributes.get("d") or "" for _, attributes in reader.seen)


def test_the_page_shows_the_health_of_several_streams(diagnoses):
    model = sw.build("vit-tiny-16", scheme="mhc(n=2)", depth=1, dim=8, heads=2, patch=4, image=8, classes=4)
    text = diagnosis_page(diagnosed(model, 3, 8, 8))
    assert "2 connections over 2 streams" in text
    assert all("Several streams" not in diagnosis_page(each) for each in diagnoses.values())


def test_the_page_groups_what_was_refused(diagnoses):
    refused = diagnoses["transformer"].chain.refused
    text = diagnosis_page(diagnoses["transformer"])
    assert refused
    assert "Additions that are not residual connections" in text
    assert "Additions that are no" not in diagnosis_page(diagnoses["layers"])


def test_the_charts_of_a_page_have_a_style_for_every_class(diagnoses):
    """Shapes without a rule are drawn as black blocks."""
    text = diagnosis_page(diagnoses["residual"])
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]  # type: ignore[index]
    drawn = {
        name for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL) for name in re.findall(r'class="([^"]+)"', svg)
    }
    names = {name for group in drawn for name in group.split()}
    assert {"line", "marker", "band", "grid", "c0", "d0"} <= names
    assert [name for name in sorted(names) if f".{name}" not in style] == []


def test_a_deep_page_has_tooltips_and_stays_small(diagnoses):
    deep = deepened(diagnoses["residual"], 70)
    assert len(deep.rows) <= MOST_TOOLTIPS
    svg = draw(diagnosis_figures(deep)[0])
    assert svg.count("<title>") >= 2 * len(deep.rows)
    assert len(diagnosis_page(deep)) < 1_000_000


def test_the_page_of_a_treatment_compares_before_and_after(diagnoses):
    treatment = diagnoses["residual"].fix(LearningRate(0.003))
    text = diagnosis_page(treatment, "skipway diagnose x --fix")
    reader = Reader()
    reader.feed(text)
    assert "sgd at 0.1" in reader.text
    assert "sgd at 0.003" in reader.text
    assert "set the learning rate to 0.003" in reader.text
    assert "skipway diagnose x --fix" in reader.text
    # three figures before and after, the losses of both, and two heat maps of the depth mixing matrix
    assert text.count('role="img"') == 9


def test_the_page_is_headed_by_what_was_asked_and_shows_the_losses_beside_the_best_constant_answer(diagnoses):
    found = diagnoses["residual"]
    text = diagnosis_page(found, name="my_file.py:make")
    assert "<h1>my_file.py:make</h1>" in text
    assert "ResNet · " in text
    (figure,) = trial_figures(found)
    losses, constant = figure.series
    assert [point.y for point in losses.points] == list(found.measurement.ahead.losses)
    assert {point.y for point in constant.points} == {found.measurement.ahead.constant}
    assert constant.name in text
    assert trial_figures(diagnoses["broken"]) == []


@pytest.mark.parametrize(("command", "said"), [("", "allowance=0.08"), ("skipway diagnose x", "--allowance 0.08")])
def test_what_would_decide_is_said_in_the_words_of_the_reader(diagnoses, tmp_path, command, said):
    unsure = replace(diagnoses["residual"], verdict="undecided", next_look=NextLook(80, 0.08, 40.0))
    for ending in (".html", ".svg"):
        text = save(unsure, tmp_path / f"a{ending}", command=command).read_text("utf-8")
        assert said in re.sub(r"</text>\s*<text[^>]*>", " ", text)
        assert ("allowance=" in text) is (not command)


def test_json_parses_though_numbers_are_not_finite(diagnosis):
    content = json.loads(diagnosis.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [finding["rule"] for finding in content["findings"]] == [f.rule for f in diagnosis.findings]
    assert content["findings"][0]["evidence"]["ratio"] == "inf"


def test_gradients_that_are_not_measured_leave_no_empty_chart():
    """One operator writes into several streams; the remark says so."""
    model = sw.build(
        "vit-tiny-16", scheme="hyperconnections(2)", depth=2, dim=16, heads=2, patch=8, image=16, classes=3
    )
    diagnosis = sw.diagnose(model, torch.randn(8, 3, 16, 16))
    assert [figure.name for figure in diagnosis_figures(diagnosis)] == ["forward", "distinct"]
    assert any("gradients at them are not measured" in remark for remark in diagnosis.remarks)
