"""The runner of studies: cells and their keys, the table, resuming, failing cells, dying processes, shares, pages."""

from __future__ import annotations

import math
import os
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import skipway as sw
from skipway.errors import CheckpointError, SkipwayError
from skipway.report.chart import Figure, Point, Series
from skipway.report.svg import draw, svg_file
from skipway.studies.cell import Cell, Choices
from skipway.studies.fit import UNKNOWN_CHANCE, chance, data_of, restart_
from skipway.studies.index import write_index
from skipway.studies.page import published_table, write_study_page
from skipway.studies.runner import Share, cell_by_key, read_rows, remeasure, run
from skipway.studies.statistics import SeedValues, group_values, pair_by_seed, select_best, series_over
from skipway.studies.study import Published, Study, Verdict, find_study, studies
from skipway.studies.table import StudyTable, merge_rows, parts_of
from skipway.studies.variants import compare
from skipway.studies.workers import measure_cells


class Squares(Study):
    """x², with a cell that fails and one whose process dies when asked to."""

    name = "squares"
    title = "Squares <b>& more</b>"
    claim = "x² grows <script>alert(1)</script>."
    source = "Euclid, book II"
    settings = ("x", "seed", "how")
    results = ("square",)
    published = (Published(what="2²", value=4.5, where={"x": 2}, column="square", source="table <1>"),)

    def cells(self, budget, choices):
        depths = choices.depths or (1, 2, 3)
        how = choices.schemes[0] if choices.schemes else None
        return [self.cell(x=x, seed=seed, how=how) for x in depths for seed in choices.seeds or (0, 1)]

    def measure(self, cell, device="cpu"):
        if cell.get("how") == "raise" and cell["x"] == 2:
            raise ValueError("two\nis too <much>")
        if cell.get("how") == "die" and cell["x"] == 2 and cell["seed"] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"square": float(cell["x"] ** 2 + 0.1 * cell["seed"]), "word": "1e5", "flag": True}

    def conclude(self, rows):
        found = group_values(rows, ["x"], "square")
        return [Verdict("It grows & grows.", "holds", "; ".join(f"{key[0]}: {each}" for key, each in found.items()))]

    def figures(self, rows):
        lines = series_over(rows, "x", "square", "how", lambda name: f"x² <{name}>")
        theory = Series.of("theory", [(1.0, 1.0), (3.0, 9.0)], "theory")
        return [
            Figure(name="curve", title="Curve & <more>", x_label="x", y_label="x²", log_x=True, series=(theory, *lines))
        ]

    def summary(self, rows):
        return [{"x <all>": row["x"], "root & more": row["x"] ** 0.5} for row in rows if row["x"] == 1]


def test_a_key_is_of_the_settings_whatever_their_order():
    one, other = Cell.of("a", depth=8, scheme="x"), Cell.of("a", scheme="x", depth=8, width=None)
    assert one.key == other.key
    assert len({one.key, Cell.of("a", depth=9, scheme="x").key, Cell.of("b", depth=8, scheme="x").key}) == 3
    assert Cell.of("a", revision=2, depth=8, scheme="x").key != one.key


def test_the_spread_is_of_the_seeds():
    sample = group_values([{"d": 8, "e": value} for value in (1.0, 2.0, 3.0)] + [{"d": 8, "e": None}], ["d"], "e")[8,]
    assert sample == SeedValues((1.0, 2.0, 3.0))
    assert (sample.mean, sample.deviation, sample.low, sample.high) == (2.0, 1.0, 1.0, 3.0)
    assert sample.error == pytest.approx(1 / 3**0.5)


NAN, INF = math.nan, math.inf


def losses(scheme: str, values, depth: int = 6, lr: float = 0.1, family: str = "vit", **more) -> list[dict]:
    """Trainings of a variant, one for each loss."""
    common = {"kind": "train", "family": family, "scheme": scheme, "depth": depth, "lr": lr, **more}
    return [
        {**common, "seed": seed, "train_loss": value, "test_loss": value, "test_error": 0.5}
        for seed, value in enumerate(values)
    ]


def test_a_loss_that_is_not_finite_is_larger_than_any_other():
    rows = losses("a", (NAN, 1.0), lr=0.9) + losses("a", (2.0, 2.1), lr=0.1) + losses("a", (INF, INF), lr=0.5)
    assert {row["lr"] for row in select_best(rows, ["scheme"], "lr", "train_loss")} == {0.1}


@pytest.mark.parametrize(
    ("first", "second", "sign"),
    [
        ((1.0, 1.1, 1.2), (NAN, NAN, INF), -1),
        ((NAN, NAN, NAN), (1.0, 1.1, 1.2), 1),
        ((1.0, 1.1, 1.2), (1.01, NAN, 1.21), 0),
        ((1.0, NAN, 1.2), (NAN, 1.0, 1.2), 0),
        ((NAN, NAN, NAN), (NAN, INF, NAN), 0),
    ],
)
def test_a_seed_that_diverges_on_one_side_is_an_infinite_difference(first, second, sign):
    found = pair_by_seed(losses("a", first), losses("b", second), "test_loss")
    assert found.sign == sign
    verdict = compare("a is better.", losses("a", first) + losses("b", second), "a", "b")
    assert verdict.answer == {-1: "holds", 1: "does not hold", 0: "open"}[sign]
    assert "nan" not in verdict.text
    assert ("∞ with" in verdict.text) is bool(found.differences.values)
    rows = losses("plain", second) + losses("other", first)
    assert find_study("text-schemes").figures(rows) or not found.differences.values


def test_networks_that_diverge_have_verdicts():
    norms, dense = find_study("text-norms"), find_study("fully-connected")
    rows = [
        row
        for name, low, high in (("pre-norm", 1.0, 1.05), ("post-norm", NAN, INF), ("Peri-LN", 1.0, NAN))
        for rate, loss in ((2e-3, low), (8e-3, high))
        for row in losses(name, (loss, loss), 10, rate, "GPT")
    ]
    verdict = norms.conclude(rows)[-1]
    assert (verdict.answer, "post-norm none" in verdict.text) == ("does not hold", True)

    def first_losses(rezero):
        table = {"vanilla": (NAN, 2.3), "residual": (9e4, NAN), "LayerNorm": (2.2, 2.1), "ReZero": (1.7, rezero)}
        return [
            {"scheme": name, "depth": 64, "seed": seed, "loss_1": one, "loss_3": three if seed else 1.0 + three}
            for name, (one, three) in table.items()
            for seed in (0, 1)
        ]

    assert [each.answer for each in dense.conclude(first_losses(0.5))[:2]] == ["holds", "holds"]
    assert dense.conclude(first_losses(NAN))[0].answer == "does not hold"


def test_variants_are_paired_at_the_same_depth():
    """The other variant is a little better, and deep networks, which it was measured at alone, are far worse."""

    def grid(plain, other, family, **more):
        shallow, deep = (0.1, 0.11, 0.12), (5.1, 5.11, 5.12)
        return [
            row
            for values, depth in ((shallow, 4), (deep, 8))
            for name, shift in ((plain, 0.0), (other, -0.01))
            for row in losses(name, tuple(value + shift for value in values), depth, family=family, **more)
            if depth == 8 or name == plain
        ]

    table = find_study("scheme-table")
    rows = [*grid("identity", "layerscale", "vit"), *losses("rezero", (0.2, 0.2, 0.2), 4)]
    rows += losses("dyt", (0.3, 0.3, 0.3), 4)
    assert "Lower: layerscale, 8 blocks. Higher: rezero, 4 blocks, dyt, 4 blocks." in table.conclude(rows)[0].text
    lines = {line["scheme"]: line for line in table.summary(rows)}
    assert lines["layerscale"]["ViT, 8 blocks: minus plain"].startswith("-0.01")
    assert "ViT, 4 blocks: test loss" not in lines["layerscale"]
    text = find_study("text-schemes")
    rows = grid("plain pre-norm", "layerscale(init=0.1)", "GPT")
    assert text.conclude(rows)[0].answer == "holds"
    assert text.figures(rows)[0].categories == ("layerscale, 8 blocks",)
    decay = find_study("stream-decay")
    rows = [row for value in (0.05, 2.0) for row in grid("not decayed", "decayed", "vit", weight_decay=value)]
    assert "2 with 8 blocks: -0.01" in decay.conclude(rows)[1].text
    assert decay.conclude(rows)[1].answer == "does not hold"
    assert {line["weight decay"] for line in decay.summary(rows)} == {0.05, 2.0}
    assert {line["seeds"] for line in decay.summary(rows)} == {3}
    assert "decayed, 8 blocks" in [line.name for line in decay.figures(rows)[1].series]


def test_one_seed_has_no_interval():
    rows = losses("identity", (0.1,), 4) + losses("layerscale", (0.2,), 4)
    assert [line["ViT: minus plain"] for line in find_study("scheme-table").summary(rows)] == ["", ""]
    assert [line["ViT: minus plain"] for line in find_study("scheme-table").summary(rows[1:])] == [""]


def test_a_diverged_training_is_a_marker_at_the_top_of_a_loss_figure():
    rows = [
        {"scheme": "plain", "lr": rate, "seed": seed, "test_loss": math.nan if (rate, seed) == (0.1, 0) else rate}
        for rate in (0.01, 0.1)
        for seed in (0, 1)
    ]
    (line,) = series_over(rows, "lr", "test_loss", "scheme")
    assert [(point.y, point.count) for point in line.points] == [(0.01, 2), (math.inf, 2)]


@pytest.mark.parametrize("name", ["skipinit", "layerscale", "convnext-parts", "streams"])
def test_a_published_number_is_compared_at_the_best_learning_rate(name):
    study = find_study(name)
    each = study.published[0]
    rows = [
        {**each.where, "lr": rate, "seed": seed, "train_loss": 1 - rate, "train_error": 1 - rate}
        | {study.criterion: rate, each.column: rate}
        for rate in (0.3, 0.1)
        for seed in (0, 1, 2)
    ]
    assert each.measured_values(rows, study.criterion) == SeedValues((0.1, 0.1, 0.1))
    assert "(3 seeds)" in str(published_table(study, rows)[0].rows[0])


@pytest.mark.parametrize("name", ["depth-transfer", "text-depth-transfer"])
def test_the_own_variants_are_judged_against_their_own_shallow_network(name):
    study = find_study(name)

    def at_the_base(*schemes):
        cells = study.cells("cpu", Choices(schemes=schemes or None))
        return {cell["scheme"] for cell in cells if cell["kind"] == "train" and cell["depth"] == 2}

    assert at_the_base() == {"no factor"}
    assert at_the_base("rezero", "1/√m", "1/m") == {"rezero", "1/√m"}
    rows = [
        row
        for scheme, depth, best in (("rezero", 2, 2e-3), ("no factor", 2, 1.6e-2), ("1/m", 8, 1.6e-2))
        for rate in (2e-3, 1.6e-2)
        for row in losses(scheme, (abs(rate - best),), depth, rate)
    ]
    claim = next(each for each in study.conclude(rows) if each.claim.startswith("With 1/m the best"))
    assert (claim.answer, "Best rate 0.016 with 2 blocks, 0.016 with 8" in claim.text) == ("holds", True)
    foreign = [row for row in rows if row["scheme"] != "no factor"]
    assert {each.answer for each in study.conclude(foreign)} == {"open"}
    assert all(draw(figure) for figure in study.figures(rows))


def guessing(counts):
    return chance(SimpleNamespace(test=SimpleNamespace(labels=torch.arange(len(counts)).repeat_interleave(counts))))


def test_chance_is_the_best_constant_answer():
    found = guessing(torch.tensor([3, 1]))
    assert found["chance_error"] == 0.25
    assert found["chance_loss"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert guessing(torch.tensor([4, 4]))["chance_loss"] == pytest.approx(math.log(2))
    digits = chance(data_of(None))
    assert (digits["chance_error"], digits["chance_loss"]) == pytest.approx((0.9, math.log(10)), rel=0.01)


@pytest.mark.parametrize(
    ("name", "number", "poor", "answer"),
    [
        ("fixup", 0, lambda cell: True, "does not hold"),
        ("schemes", 0, lambda cell: cell["scheme"] == "plain", "holds"),
        ("skipinit", 1, lambda cell: cell["depth"] == 64, "holds"),
        ("skipless-vit", 1, lambda cell: cell["scheme"] == "no skip", "holds"),
        ("norm-placement", 1, lambda cell: not cell["warmup"], "does not hold"),
        ("fully-connected", 1, lambda cell: False, "holds"),
        ("fully-connected", 2, lambda cell: True, "does not hold"),
        ("paths", 0, lambda cell: cell["scheme"] == "plain", "holds"),
    ],
)
def test_what_counts_as_trained_depends_on_the_classes_of_the_data(name, number, poor, answer):
    """Of two equal classes, an error of 48 % is that of chance, and a hundred times its loss is 69."""
    study = find_study(name)
    rows = []
    for cell in study.cells("cpu", Choices(data="photos")):
        error = 0.48 if poor(cell) else 0.1
        measured = {"dataset": "photos", "train_error": error, "test_error": error, "loss_1": 100.0, "blocks": 9}
        measured |= {"intact": 0.1, "deleted_1": 0.3 if poor(cell) else 0.1, "worst": 0.5}
        rows.append({**dict(cell.settings), "key": cell.key, **measured})
    told = [{**row, **guessing(torch.tensor([1, 1]))} for row in rows]
    assert study.conclude(told)[number].answer == answer
    found = study.conclude(rows)[number]
    assert (found.answer, found.text) == ("open", UNKNOWN_CHANCE)
    of_ten = [{**row, "data": None} for row in rows]
    assert study.conclude(of_ten)[number].answer not in (answer, "open")
    assert {each.note for each in study.figures(told) if "Chance" in each.note} <= {"Chance is 50 %."}
    assert {each.note for each in study.figures(of_ten) if "Chance" in each.note} <= {"Chance is 90 %."}


def test_largest_depths_and_rates_are_those_that_beat_chance():
    study = find_study("schemes")
    cells = [cell for cell in study.cells("cpu", Choices(data="photos")) if cell["kind"] == "as it is"]
    rows = [{**dict(cell.settings), "test_error": 0.45, "train_error": 0.45} for cell in cells]
    told = [{**row, **guessing(torch.tensor([1, 1]))} for row in rows]
    assert {line["largest depth that trains"] for line in study.summary(told)} == {None}
    assert {line["largest depth that trains"] for line in study.summary([{**r, "data": None} for r in rows])} == {110}
    assert {line["scheme"]: line["needs normalisation"] for line in study.summary(rows)}["identity"] is None


def test_values_come_back_from_a_table_as_they_were(tmp_path):
    table = StudyTable(tmp_path / "t.csv", ("scheme",))
    rows = [
        {"key": "a", "scheme": "skipinit(init=0.0, norm='remove')", "loss": float("inf"), "error": None},
        {"key": "b", "scheme": '"q", true', "loss": 1e-300, "error": "a\nb", "new": False},
        {"key": "c", "scheme": "true", "loss": 3, "error": "-1"},
    ]
    for row in rows:
        table.append(row)
    first, second, third = table.rows()
    assert first == {**rows[0], "new": None}
    assert second == rows[1]
    assert third == {**rows[2], "new": None}
    assert table.header() == ["key", "scheme", "loss", "new", "error"]


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    study, path = Squares(), tmp_path / "squares.csv"
    run(study, tmp_path, jobs=0)
    content = path.read_bytes()
    for cut in range(len(content) - 40, len(content)):
        path.write_bytes(content[:cut])
        assert len(read_rows(tmp_path, study)) == 5
    rows = run(study, tmp_path, jobs=0)
    assert [row["square"] for row in rows] == pytest.approx([1.0, 1.1, 4.0, 4.1, 9.0, 9.1])
    assert len(read_rows(tmp_path, study)) == 6


def test_another_file_is_no_table(tmp_path):
    (tmp_path / "squares.csv").write_text("a,b\n1,2\n")
    with pytest.raises(CheckpointError, match="no column 'key'"):
        run(Squares(), tmp_path, jobs=0)


def test_what_is_done_is_not_measured_again_and_what_failed_is(tmp_path):
    class Watcher:
        started_cells = 0

        def begin(self, study, cells, known):
            self.known = known

        def started(self, cell):
            self.started_cells += 1

        def done(self, study, found):
            pass

    study, watcher = Squares(), Watcher()
    choices = Choices(schemes=("raise",))
    rows = run(study, tmp_path, jobs=0, choices=choices, watcher=watcher)
    errors = [row["error"] for row in rows]
    assert sum(error is not None for error in errors) == 2
    assert errors[2].startswith("ValueError: two\nis too <much> (test_studies.py:")
    assert [row["square"] for row in rows if not row["error"]] == pytest.approx([1.0, 1.1, 9.0, 9.1])
    again = run(study, tmp_path, jobs=0, choices=choices, watcher=watcher)
    assert (watcher.known, watcher.started_cells) == (4, 8)
    assert sum(row["error"] is not None for row in again) == 2


def test_every_row_is_measured_again_from_its_settings(tmp_path):
    study = Squares()
    rows = run(study, tmp_path, jobs=0, choices=Choices(seeds=(5,)))
    cell = cell_by_key(study, tmp_path, str(rows[1]["key"])[:6], "cpu")
    assert cell == study.cell(x=2, seed=5)
    assert remeasure(study, cell)["square"] == rows[1]["square"]
    with pytest.raises(SkipwayError, match="none of the keys of squares match"):
        cell_by_key(study, tmp_path, "zzz", "cpu")


def test_rows_of_an_earlier_revision_are_left_out(tmp_path):
    class Later(Squares):
        revision = 2

    run(Squares(), tmp_path, jobs=0)
    assert read_rows(tmp_path, Later()) == []


def test_shares_of_an_array_are_disjoint_and_merge(tmp_path):
    study = Squares()
    for index in range(4):
        run(study, tmp_path, jobs=0, share=Share.read(f"{index}/4"))
    assert len(parts_of(tmp_path, "squares")) == 4
    assert sorted(len(StudyTable(path).rows()) for path in parts_of(tmp_path, "squares")) == [1, 1, 2, 2]
    assert len(read_rows(tmp_path, study)) == 6
    for wrong in ("4/4", "1", "-1/4", "a/b"):
        with pytest.raises(SkipwayError, match="INDEX/COUNT"):
            Share.read(wrong)


def test_of_two_tables_the_one_that_changed_last_counts(tmp_path):
    """After a job array, whose shares stay, cells may be measured again by another command."""
    study = Squares()
    rows = run(study, tmp_path, jobs=0, share=Share.read("0/1"))
    StudyTable(tmp_path / "squares.csv", study.settings).append({**rows[0], "square": 7.0})
    (share,) = tmp_path.glob("squares.share-*.csv")
    for time, expected in ((1, 7.0), (2**31, rows[0]["square"])):
        os.utime(share, (time, time))
        assert read_rows(tmp_path, study)[0]["square"] == expected


def test_the_last_row_without_an_error_counts():
    good, bad, later = {"key": "a", "v": 1}, {"key": "a", "error": "x"}, {"key": "a", "v": 2}
    assert merge_rows([[good], [bad]]) == [good]
    assert merge_rows([[bad], [good]]) == [good]
    assert merge_rows([[good], [later]]) == [later]


def test_processes_measure_the_same_as_this_one():
    study = find_study("propagation")
    cells = study.cells("cpu", Choices(depths=(4,), schemes=("Fixup", "nonsense", "residual, no norm"), seeds=(0,)))
    options = {"devices": ["cpu"], "started": lambda cell: None}
    here = {found.cell: found for found in measure_cells(study, cells, jobs=0, **options)}
    there = {found.cell: found for found in measure_cells(study, cells, jobs=2, **options)}
    assert len(there) == len(cells)
    for cell, found in there.items():
        assert found.results == here[cell].results
    (failed,) = [found for found in there.values() if found.error]
    assert "unknown scheme 'nonsense'" in failed.error


def test_a_process_that_dies_stops_no_other(tmp_path):
    rows = run(Squares(), tmp_path, jobs=1, choices=Choices(schemes=("die",)))
    assert [(row.get("square"), row["error"]) for row in rows if row["error"]] == [(None, "the process died: SIGKILL")]
    assert rows[2]["error"]
    assert [row["square"] for row in rows if not row["error"]] == pytest.approx([1.0, 1.1, 4.1, 9.0, 9.1])


@pytest.fixture
def page(tmp_path):
    run(Squares(), tmp_path, jobs=0, choices=Choices(schemes=("raise",)))
    return write_study_page(Squares(), tmp_path)


def test_a_page_is_whole_and_fetches_nothing(page):
    text = page.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r'(?:src|href)="(?:https?:)?//', text)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "x² &lt;raise&gt;" in text
    assert "<b>& more" not in text
    # policy and code agree, or the browser would run nothing
    import base64
    import hashlib

    for tag in ("style", "script"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        assert base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode() in text


def test_a_page_shows_verdict_command_published_number_and_what_failed(page):
    text = page.read_text()
    assert "It grows &amp; grows." in text
    assert "skipway study squares --budget cpu" in text
    assert "4.50" in text
    assert "Summary" in text
    assert "x &lt;all&gt;" in text
    assert "Failed cells" in text
    assert "two\nis too &lt;much&gt;" in text
    assert (page.parent / "squares-curve.svg").read_text().startswith("<svg xmlns=")
    assert page.stat().st_size < 300_000


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_reads_values_hides_lines_and_blocks_nothing(page):
    """The script works; and what the policy allows is enough, told by the browser's console."""
    probe = """
      const figure = document.querySelector("figure"), svg = figure.querySelector("svg[role=img]");
      const box = svg.getBoundingClientRect();
      const mark = svg.querySelector("[data-x]"), unit = box.width / svg.viewBox.baseVal.width;
      const [x, y] = [box.left + mark.dataset.x * unit + 2, box.top + mark.dataset.y * unit];
      svg.dispatchEvent(new PointerEvent("pointermove", {clientX: x, clientY: y}));
      document.title = figure.querySelector(".reading").textContent;
      figure.querySelector("button.key").click();
      document.title += ` off ${svg.querySelectorAll("g.off").length}`;
    """
    open_page = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
    (page.parent / "probe.html").write_text(open_page.replace("</body>", f"<script>{{{probe}}}</script></body>"))

    def browse(name: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent}/profile"]
        where = f"file://{page.parent}/{name}"
        return subprocess.run([*command, *options, where], capture_output=True, text=True, timeout=100, check=True)

    assert (
        "<title>x² &lt;raise&gt;, 1 x: 1.05, 1.00 to 1.10 (2 seeds) off 1</title>"
        in browse("probe.html", "--dump-dom").stdout
    )
    assert "CONSOLE" not in browse(page.name, "--dump-dom", "--enable-logging=stderr").stderr


def test_a_study_without_rows_has_no_page(tmp_path):
    assert write_study_page(Squares(), tmp_path) is None


def test_an_svg_file_is_xml_with_title_legend_and_both_colours():
    from xml.etree import ElementTree

    lines = (
        Series("a & b", (Point(1, 0.5, 0.4, 0.6, 3), Point(10, float("inf"), 1, 1, 1), Point(100, float("nan"), 0, 0))),
    )
    figure = Figure(name="f", title="<t>", x_label="depth", y_label="error", log_x=True, series=lines, percent=True)
    root = ElementTree.fromstring(svg_file(figure))
    words = " ".join(root.itertext())
    assert "<t>" in words
    assert "a & b, 1 depth: 50.0 %, 40.0 % to 60.0 % (3 seeds)" in words
    assert "prefers-color-scheme: dark" in words
    assert "NaN" not in draw(figure)
    assert "not finite (1 seed)" in draw(figure)


def test_a_logarithmic_axis_takes_zero(tmp_path):
    line = Series("a", tuple(Point(x, y, y, y) for x, y in ((1, 1.0), (2, 0.0), (4, 1e-200))))
    figure = Figure(name="f", title="t", x_label="x", y_label="y", log_x=True, series=(line,), log_y=True)
    assert "nan" not in draw(figure)


@pytest.mark.parametrize("name", list(studies()))
def test_every_study_says_what_it_must(name):
    study = find_study(name)
    text = study.opening()
    for heading in ("Claim:", "Source:", "Command:", "Hardware:", "Time:", "Result:"):
        assert heading in text
    assert f"skipway study {name}" in text
    assert study.minutes
    for budget in ("cpu", "gpu", "paper"):
        cells = study.cells(budget, Choices())
        assert len({cell.key for cell in cells}) == len(cells) > 5
        assert {cell.get("seed") for cell in cells} >= {0, 1, 2}
        assert all(set(dict(cell.settings)) <= set(study.settings) for cell in cells)
    # no rows decide nothing, and break nothing
    assert {verdict.answer for verdict in study.conclude([])} == {"open"}
    for figure in study.figures([]):
        assert svg_file(figure)


@pytest.mark.parametrize("name", list(studies()))
def test_any_part_of_the_rows_gives_verdicts_and_figures(name):
    """A run that was stopped has a page, too."""
    study = find_study(name)
    rows = read_rows(Path(__file__).parents[2] / "docs/studies", study)
    generator = random.Random(0)
    for _ in range(25):
        some = generator.sample(rows, generator.randint(0, min(len(rows), generator.choice([3, 20, 1000]))))
        assert all(verdict.text for verdict in study.conclude(some))
        assert all(draw(figure) for figure in study.figures(some))


def test_the_index_has_every_study_with_rows(tmp_path):
    run(find_study("propagation"), tmp_path, jobs=0, choices=Choices(depths=(3,), schemes=("Fixup",), seeds=(0,)))
    index, pages = write_index(tmp_path)
    assert pages == [tmp_path / "propagation.html"]
    assert 'href="propagation.html"' in index.read_text()


def test_modules_are_started_in_their_order(monkeypatch):
    """Each draws random numbers, so that another order in another process would be another start at the same seed."""
    model, order = sw.build("resnet", depth=8, width=4, classes=2), []
    monkeypatch.setattr("skipway.studies.fit.reset", lambda name, module: order.append(module))
    restart_(model, {})
    assert order == [module for each in sw.chain(model) for module in each.residual.modules()]
