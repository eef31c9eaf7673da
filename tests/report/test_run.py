"""The page of a run: whole, safe, self-contained and small, whatever the run and its names; and its numbers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import skipway as sw
from skipway.cli.app import app
from skipway.inference.metrics import calibration, class_scores, confused_pairs
from skipway.recipe import Recipe, ResolvedRecipe
from skipway.report.chart import MOST_POINTS, Axis, Bars, Figure, Point, Series, thinned
from skipway.report.run.command import again_command, train_command
from skipway.report.run.curves import training_figures
from skipway.report.run.depth import gain_rows, signal_figures
from skipway.report.run.page import SECTIONS
from skipway.report.run.pictures import data_url
from skipway.report.svg import draw
from skipway.training.loop import train
from skipway.training.reporter import SilentReporter
from skipway.training.run import Outcome
from skipway.training.run_folder import RunFolder, append_rows

TINY = Recipe(depth=8, width=4, epochs=2, batch_size=256, device="cpu", precision="float32")
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)<",
    "\x1b[31mred\nline\r\u202e",
    '"><b>&amp;',
)


class Page(HTMLParser):
    """A page taken apart: tags are balanced, and everything is there to be looked at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def count(self, tag: str) -> int:
        return [name for name, _ in self.seen].count(tag)


def check(path: Path) -> Page:
    """What holds for every page."""
    content = path.read_text(encoding="utf-8")
    page = Page(content)
    assert page.count("script") == 1, "ours, and the policy names it by its hash"
    for tag, attributes in page.seen:
        assert tag not in {"link", "iframe", "object", "base", "form"}
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in content
    assert "@import" not in content
    assert "http:" not in content
    assert "https:" not in content
    assert not re.search(r"[^\n -~\u00a0-\uffff]", content), "no control characters"
    policy = next(a["content"] for t, a in page.seen if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    ids = [attributes.get("id") for tag, attributes in page.seen if tag == "section"]
    assert ids == list(SECTIONS)
    assert "nan" not in " ".join(attributes.get("d") or "" for _, attributes in page.seen)
    return page


def pictures(root: Path, names: tuple[str, ...], each: int = 4, side: int = 8) -> Path:
    """A folder of noise: classes of these names, files of these names."""
    noise = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in names:
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(each):
                file = folder / f"{number}{name[:20].replace('/', '')}.png"
                Image.fromarray(noise.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(file)
    return root


class Said(SilentReporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def message(self, label: str, text: str) -> None:
        self.lines.append((label, text))


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Outcome:
    return train(TINY, tmp_path_factory.mktemp("digits") / "run")


def test_the_page_of_a_run_shows_everything(digits):
    page = check(digits.folder.report)
    assert digits.folder.report.stat().st_size < 300_000
    evaluation = digits.evaluation
    assert f"{100 * evaluation.accuracy:.1f} %" in page.text
    assert f"of {evaluation.total:,} test images" in page.text
    for text in SECTIONS.values():
        assert text in page.text
    titles = (
        "Loss",
        "Accuracy",
        "Learning rate",
        "Gradient norm",
        "Confusion matrix",
        "Reliability",
        "Images of each class",
    )
    for text in titles:
        assert text in page.text
    assert "were not watched" in page.text, "ten steps are too few for a sample"
    section = page.source.partition('id="findings"')[2].partition('id="inputs"')[0]
    assert page.count("img") == 32 + 24 + section.count("<img")
    assert train_command(digits.recipe) in page.text
    assert f"skipway{sw.__version__}" in page.text, "the machine"
    cells = [a for t, a in page.seen if t == "rect" and (a.get("class") or "").startswith("cell")]
    mixed = 3 + 1  # connections and what reads them all
    assert len(cells) == 100 + 2 * mixed * (mixed + 1) // 2, "confusion, and depth mixing forward and backward"
    assert "Depth mixing" in page.text


def test_the_page_of_one_epoch_without_mistakes(tmp_path):
    data = pictures(tmp_path / "data", ("dark", "light"))
    for file in data.rglob("*.png"):
        Image.new("RGB", (8, 8), "white" if "light" in str(file) else "black").save(file)
    recipe = dataclasses.replace(TINY, data=data, epochs=1, batch_size=4, ema=0.5, lr=0.01, flip=False)
    outcome = train(recipe, tmp_path / "run")
    page = check(outcome.folder.report)
    assert outcome.evaluation.accuracy == 1
    assert "No mistakes." in page.text


def test_names_are_text_and_nothing_else(tmp_path):
    data = pictures(tmp_path / "data<b>", HOSTILE)
    recipe = dataclasses.replace(TINY, data=data, epochs=1, batch_size=8, augment="mixup(0.5)")
    said = Said()
    outcome = train(recipe, tmp_path / "run", reporter=said)
    assert not [text for label, text in said.lines if label == "warning"]
    page = check(outcome.folder.report)
    assert page.count("b") == sum(1 for _ in re.finditer("<b>", outcome.folder.report.read_text()))
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "\\x1b[31mred\\nline" in page.text
    assert "\\u202e" in page.text


def test_many_classes_are_pairs_and_not_a_matrix(tmp_path):
    data = pictures(tmp_path / "data", tuple(f"class {number}" for number in range(45)), each=2)
    outcome = train(dataclasses.replace(TINY, data=data, epochs=1, batch_size=32), tmp_path / "run")
    page = check(outcome.folder.report)
    assert "Confusion matrix" not in page.text
    assert "Most frequent mistakes" in page.text
    assert "classes, largest first" in page.text
    assert len([a for t, a in page.seen if t == "tr"]) > 45


def test_connections_that_were_watched_and_gains_are_drawn(tmp_path):
    recipe = dataclasses.replace(TINY, batch_size=64, health=0.9, scheme="layerscale(init=0.1)")
    outcome = train(recipe, tmp_path / "run")
    page = check(outcome.folder.report)
    for title in ("Stream after each connection", "Gradient after each connection", "Learned gain of each branch"):
        assert title in page.text
    names = [row.name for row in gain_rows(sw.from_pretrained(tmp_path / "run"))]
    assert names == ["stages.0.0", "stages.1.0", "stages.2.0"]


def test_a_report_that_fails_loses_no_run(tmp_path, monkeypatch):
    def broken(*given):
        raise RuntimeError("out of ink \x1b[2J")

    monkeypatch.setattr("skipway.training.image_task.write_report", broken)
    said = Said()
    outcome = train(dataclasses.replace(TINY, epochs=1), tmp_path / "run", reporter=said)
    assert outcome.finished
    assert outcome.folder.summary.exists()
    assert ("warning", "no report: out of ink \\x1b[2J") in said.lines


def test_a_long_run_stays_small(digits):
    """100 epochs of 50 rows, 64 pictures of 224 pixels, each in its share of the page."""
    epochs = [
        {
            "epoch": n,
            "step": 50 * n,
            "lr": 0.1 / n,
            "train_loss": 2 / n,
            "train_accuracy": 0.9,
            "validation_loss": None,
            "validation_accuracy": 0.8,
        }
        for n in range(1, 101)
    ]
    steps = [{"step": n, "loss": 1 + n % 7, "norm": 0.1 * n, "lr": 0.1} for n in range(1, 5001)]
    assert sum(len(draw(figure)) for figure in training_figures(epochs, steps, 90)) < 200_000
    noise = torch.randint(256, (224, 224, 3), dtype=torch.uint8)
    assert 64 * len(data_url(noise)) < 2_000_000


def test_steps_are_drawn_in_the_epoch_that_they_belong_to():
    """An epoch ends with a validation, after any number of steps: here 4 and 6."""
    epochs = [{"epoch": 1, "step": 4, "train_loss": 1.0}, {"epoch": 2, "step": 10, "train_loss": 0.5}]
    steps = [{"step": step, "loss": 1.0, "norm": 1.0, "lr": 0.1} for step in range(1, 11)]
    loss, rate, norm = training_figures(epochs, steps, 2)
    expected = [*(step / 4 for step in (1, 2, 3, 4)), *(1 + step / 6 for step in (1, 2, 3, 4, 5, 6))]
    for figure in (loss, rate, norm):
        assert [point.x for point in figure.series[0].points] == pytest.approx(expected), figure.title


def test_numbers_that_are_not_finite_leave_gaps():
    points = [(1.0, 2.0), (2.0, float("nan")), (3.0, float("inf")), (4.0, 0.0), (5.0, 1.0)]
    figure = Figure(title="Title", x_label="x", series=(Series.of("line", points),), log_y=True)
    text = draw(figure)
    assert re.search(r'd="M[\d.]+ [\d.]+M[\d.]+ [\d.]+"', text)
    assert text.count("data-x") == 4
    assert not Figure(title="Title", x_label="x", series=(Series.of("line", [(1.0, float("nan"))]),)).drawn
    samples = [{"step": 1, "connections": {"a": {"stream": float("nan"), "branch": 1.0, "gradient": 0.0}}}]
    branch, *others = signal_figures(samples)
    assert branch.title.startswith("Branch")
    assert "Hollow" in others[0].note
    assert signal_figures([{"step": 1, "connections": []}]) == []
    assert thinned([Point(0.0, float("nan"))] * 1000)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_thinned_lines_keep_values_that_are_not_finite(value):
    """Isolated ones among many points: a marker and a gap for each of them."""
    odd = (500, 3000)
    values = [value if step in odd else 1.0 + step % 3 for step in range(5000)]
    points = thinned([Point(float(step), y) for step, y in enumerate(values)])
    assert [point.x for point in points if not math.isfinite(point.y)] == [500.0, 3000.0]
    assert len(points) <= MOST_POINTS
    assert [point.x for point in points] == sorted(point.x for point in points)
    text = draw(Figure(title="Title", x_label="x", series=(Series("line", tuple(points)),)))
    assert text.count("M", text.index('class="line" d="'), text.index('"/></g>')) == 3
    assert text.count('class="marker edge"') == (0 if math.isnan(value) else 2)


def test_all_kinds_of_values_in_every_stretch_are_not_too_many():
    kinds = (1.0, 2.0, math.inf, -math.inf, math.nan)
    assert len(thinned([Point(float(step), kinds[step % 5]) for step in range(5000)])) <= MOST_POINTS


@pytest.mark.parametrize(("low", "high", "log"), [(0, 1, False), (0, 3e-7, False), (1e-9, 1e9, True), (0.4, 3.0, True)])
def test_axes_have_a_few_ticks(low, high, log):
    ticks = Axis(low, high, 0, 100, log=log).ticks
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick * (1 + 1e-9) and tick * (1 - 1e-9) <= high for tick in ticks)


def test_bars_of_empty_classes():
    chart = Bars(title="Images", categories=("a", "b"), series=(("x", (0.0, 0.0)), ("y", (0.0, 0.0))))
    assert draw(chart).count("<rect") == 4


def test_a_dozen_series_differ_in_colour_or_dashes_and_are_labelled():
    series = tuple(Series.of(f"series {n}", [(1.0, float(n)), (2.0, 1.0)]) for n in range(16))
    text = draw(Figure(title="Title", x_label="x", series=series))
    assert len(set(re.findall(r'<g class="series (c\d+ d\d)"><path class="line"', text))) == 16
    heights = sorted(float(y) for y in re.findall(r'class="label" x="[\d.]+" y="([\d.]+)"', text))
    assert len(heights) == 16
    assert min(b - a for a, b in itertools.pairwise(heights)) > 10


def test_the_command_means_the_recipe(digits):
    """What the page says can be typed."""
    recipes = [
        digits.recipe,
        Recipe(data=Path("my photos"), flip=True, flip_test=True, time="1h", clip="norm(1.0)", workers=0),
    ]
    for recipe in recipes:
        words = shlex.split(train_command(recipe))
        _, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
        typed = bound.arguments.get("recipe", Recipe())
        for name in ("mean", "std"):
            assert typed.numbers(name) == (
                pytest.approx(stored, rel=1e-3) if (stored := recipe.numbers(name)) else None
            )
        plain = {"mean": None, "std": None}
        assert typed.to_json() | plain == recipe.to_json() | plain


def test_the_command_is_short_and_says_what_is_exact(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = train_command(Recipe(data=tmp_path / "my photos", mean="0.4913996898,0.4821584196,0.4465309242"))
    assert text == "skipway train 'my photos' --mean 0.4914,0.4822,0.4465"
    assert again_command(tmp_path / "runs" / "first") == "skipway train --config runs/first"
    assert train_command(Recipe(data=tmp_path.parent / "other")) == f"skipway train {tmp_path.parent / 'other'}"


@pytest.mark.parametrize(
    ("fields", "idle"),
    [
        ({"time": "1h", "steps": 9}, {"--steps", "--epochs"}),
        ({"steps": 9}, {"--epochs"}),
        ({"freeze": "all"}, {"--lr", "--epochs"}),
    ],
)
def test_the_command_leaves_out_what_has_no_effect(fields, idle):
    """Of what a run stores; pasted, it would be remarked upon."""
    words = shlex.split(train_command(ResolvedRecipe(epochs=30, lr=0.1, **fields)))
    assert idle.isdisjoint(words)
    assert all(f"--{name}" in words for name in list(fields)[:1])


def test_scores_are_scikit_learns():
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    random = np.random.default_rng(0)
    true = random.integers(0, 6, 300)
    taken = np.where(random.random(300) < 0.6, true, random.integers(0, 7, 300))
    scores = class_scores(torch.from_numpy(confusion_matrix(true, taken, labels=range(8))))
    precision, recall, f1, images = precision_recall_fscore_support(true, taken, labels=range(8), zero_division=0)
    for ours, theirs in ((scores.precision, precision), (scores.recall, recall), (scores.f1, f1)):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert scores.images.tolist() == images.tolist()
    assert scores.balanced_accuracy == pytest.approx(recall[:6].mean())
    assert scores.macro_f1 == pytest.approx(f1[:6].mean())


def test_calibration_is_scikit_learns():
    from sklearn.calibration import calibration_curve

    random = np.random.default_rng(1)
    confidence = random.random(500)
    correct = random.random(500) < confidence**2
    accuracy, mean = calibration_curve(correct, confidence, n_bins=15)
    found = calibration(torch.from_numpy(confidence), torch.from_numpy(correct))
    np.testing.assert_allclose([each.accuracy for each in found.bins], accuracy)
    np.testing.assert_allclose([each.confidence for each in found.bins], mean)
    weights = np.array([each.images for each in found.bins]) / 500
    assert found.error == pytest.approx(float((weights * abs(accuracy - mean)).sum()))
    assert calibration(torch.tensor([float("nan")]), torch.tensor([True])).bins == ()
    edges = calibration(torch.tensor([0.0, 1.0]), torch.tensor([False, True]))
    assert (edges.error, len(edges.bins)) == (0.0, 2)


def test_pairs_without_mistakes():
    assert confused_pairs(torch.eye(3, dtype=torch.int64), 5) == []


def test_the_page_says_what_the_summary_says(digits):
    summary = json.loads(digits.folder.summary.read_text())
    page = Page(digits.folder.report.read_text())
    assert f"test loss{summary['test_loss']:.4f}" in page.text
    assert all(
        f"{count:,} of" in page.text for count in torch.tensor(summary["confusion"]).diagonal().tolist() if count
    )


def test_rows_that_are_cut_short_are_left_out(tmp_path):
    append_rows(tmp_path / "health.jsonl", [{"step": 1}])
    with (tmp_path / "health.jsonl").open("a") as file:
        file.write('{"step": 2, "conn')
    assert RunFolder(tmp_path).read_health() == [{"step": 1}]
