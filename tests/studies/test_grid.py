"""What a study's own grid has: choices that cannot be measured are refused, and less than the grid decides less."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from skipway.cli.study import run_study, split_specs
from skipway.errors import SkipwayError
from skipway.studies.cell import Choices
from skipway.studies.grid import check_choices, find_gap, judge, own_values, split_by_grid
from skipway.studies.page import study_command, write_study_page
from skipway.studies.runner import read_rows, run
from skipway.studies.statistics import group_values
from skipway.studies.study import Study, Verdict, find_study, studies
from skipway.studies.workers import describe_exception


class Depths(Study):
    """The depth itself."""

    name = "depths"
    title = claim = source = "depths"
    settings = ("scheme", "depth", "seed")
    results = ("value",)

    def cells(self, budget, choices):
        seeds = choices.seeds or (0, 1)
        depths = choices.depths or (8, 64)
        schemes = choices.schemes or ("plain", "a, b")
        grid = product(schemes, depths, seeds)
        return [self.cell(scheme=name, depth=depth, seed=seed) for name, depth, seed in grid]

    def measure(self, cell, device="cpu"):
        return {"value": cell["depth"]}

    def conclude(self, rows):
        return [Verdict("Deep networks fail.", "does not hold", "64: 1."), Verdict("Others.", "open", "not measured")]

    def figures(self, rows):
        return []


def judged(tmp_path, **choices):
    """The verdicts on a part of the grid, and the page."""
    study = Depths()
    rows = run(study, tmp_path, jobs=0, choices=Choices(**choices))
    gap = find_gap(study, rows)
    return judge(study, rows, gap), gap, write_study_page(study, tmp_path).read_text("utf-8")


def test_the_whole_grid_is_judged_as_the_study_says(tmp_path):
    verdicts, gap, page = judged(tmp_path)
    assert (verdicts, gap) == (Depths().conclude([]), None)
    assert "reduced grid" not in page


def test_without_the_deepest_network_every_claim_is_open_and_says_why(tmp_path):
    verdicts, gap, page = judged(tmp_path, depths=(8, 22), seeds=(0,))
    assert [verdict.answer for verdict in verdicts] == ["open", "open"]
    assert "deepest network was not measured" in verdicts[0].text
    assert "does not hold. 64: 1." in verdicts[0].text
    assert "depth 64; seed 1." in gap.text
    assert gap.text in page


def test_with_fewer_seeds_an_answer_stands_and_is_marked(tmp_path):
    verdicts, gap, _ = judged(tmp_path, seeds=(0,))
    assert [verdict.answer for verdict in verdicts] == ["does not hold", "open"]
    assert all(verdict.text.endswith("The grid is a reduced one.") for verdict in verdicts)
    assert "depth" not in gap.text


def test_a_deeper_network_than_the_grids_decides(tmp_path):
    assert judged(tmp_path, depths=(8, 128))[0][0].answer == "does not hold"


def test_cells_that_failed_are_missing():
    study = Depths()
    rows = [{**dict(cell.settings), "key": cell.key} for cell in study.cells("cpu", Choices())]
    assert find_gap(study, rows[:-1]).text.endswith("1 of 8 cells.")


class Widths(Study):
    """The width, which the budgets and the data change, beside cells that they do not change."""

    name = "widths"
    title = claim = source = "widths"
    settings = ("kind", "scheme", "depth", "seed", "width", "data")
    results = ("value",)

    def cells(self, budget, choices):
        seeds, depths, schemes = choices.seeds or (0, 1), choices.depths or (4, 8), choices.schemes or ("a", "b")
        common = {"data": choices.data, "width": {"cpu": 8, "gpu": 16, "paper": 64}[budget]}
        starts = [self.cell(kind="start", scheme=scheme, depth=4, seed=seed) for scheme in schemes for seed in seeds]
        return starts + [
            self.cell(kind="train", scheme=scheme, depth=depth, seed=seed, **common)
            for scheme, depth, seed in product(schemes, depths, seeds)
        ]

    def measure(self, cell, device="cpu"):
        return {"value": float(cell.get("width", 0) + (1000 if cell.get("data") else 0))}

    def conclude(self, rows):
        values = group_values([row for row in rows if row["kind"] == "train"], [], "value")
        return [Verdict("One width.", "holds", f"mean {values[()].mean:g}")] if values else []

    def figures(self, rows):
        return []


def test_rows_of_several_budgets_and_data_sets_are_judged_apart(tmp_path, capsys):
    study = Widths()

    def means():
        return [study.conclude(part.measured)[0].text for part in split_by_grid(study, read_rows(tmp_path, study))]

    run(study, tmp_path, jobs=0)
    assert means() == ["mean 8"]
    run(study, tmp_path, jobs=0, choices=Choices(data="cifar10", seeds=(0,)))
    assert means() == ["mean 8", "mean 1008"]  # the newest complete one first
    options = {"budget": "gpu", "choices": Choices(), "jobs": 0, "share": None, "device": "cpu"}
    assert run_study(study, tmp_path, options) == 0
    assert means() == ["mean 16", "mean 8", "mean 1008"]
    terminal, page = capsys.readouterr().out, (tmp_path / "widths.html").read_text("utf-8")
    for text in (terminal, page):
        assert "mean 16" in text
        assert "reduced grid" not in text
        assert "with other sizes or data: --budget cpu (12 cells); --budget cpu --data cifar10 (8 cells)." in text


def test_the_grid_of_a_users_data_is_complete_with_the_cells_that_the_data_do_not_change(tmp_path):
    study = Widths()
    run(study, tmp_path, jobs=0, budget="gpu", choices=Choices(data="cifar10"))
    (part,) = split_by_grid(study, read_rows(tmp_path, study))
    assert (part.budget, part.data, part.complete, len(part.rows)) == ("gpu", "cifar10", True, 12)
    run(study, tmp_path, jobs=0, budget="gpu")
    parts = split_by_grid(study, read_rows(tmp_path, study))
    assert {part.data: (part.complete, len(part.rows)) for part in parts} == {"cifar10": (True, 12), None: (True, 12)}


class Images(Widths):
    """The number of images."""

    def measure(self, cell, device="cpu"):
        return {"value": float(len([*Path(cell.get("data", ".")).rglob("*.png")]))}


def test_cells_are_measured_again_where_their_path_holds_other_images(tmp_path, capsys):
    study, data = Images(), tmp_path / "photos"
    for name, shade in product(("cat", "dog"), range(6)):
        (data / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * shade).save(data / name / f"{shade}.png")
    choices = Choices(data=str(data))

    def measure(given=choices):
        options = {"budget": "cpu", "choices": given, "jobs": 0, "share": None, "device": "cpu"}
        assert run_study(study, tmp_path / "out", options) == 0
        parts = split_by_grid(study, read_rows(tmp_path / "out", study))
        return {study.conclude(part.measured)[0].text for part in parts}, capsys.readouterr().out

    assert measure()[0] == {"mean 12"}
    found, text = measure()
    assert "12 cells, 12 of them already measured" in text
    first = study.fingerprint(str(data))
    Image.new("L", (8, 8), 200).save(data / "cat" / "new.png")
    found, text = measure(Choices(data=str(data), seeds=(0,)))
    assert found == {"mean 12", "mean 13"}  # never one mean of both
    assert "widths: 4 cells measured on other files of --data" in text
    found, text = measure()
    assert found == {"mean 13"}
    assert "12 cells, 8 of them already measured" in text
    second = study.fingerprint(str(data))
    Image.new("L", (64, 64), 200).save(data / "cat" / "new.png")
    assert len({first, second, study.fingerprint(str(data))}) == 3
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 200)
    of_text = find_study("text-schemes")
    known = of_text.fingerprint(str(tmp_path / "text.txt"))
    (tmp_path / "text.txt").write_text("to be or not to bet\n" * 200)
    assert of_text.fingerprint(str(tmp_path / "text.txt")) != known


@pytest.mark.parametrize("data", ["My  Photos", "a\u3000b", "a\u00a0b", " a", "a\tb", "a\nb", '"a"', "1", "a b"])
def test_rows_are_found_again_whatever_whitespace_the_data_path_has(data, tmp_path):
    study = Widths()
    rows = run(study, tmp_path, jobs=0, choices=Choices(data=data))
    assert [row["key"] for row in read_rows(tmp_path, study)] == [row["key"] for row in rows]


def test_the_command_of_a_page_measures_its_rows(tmp_path):
    study, count = Widths(), 0

    def command(*runs):
        nonlocal count
        count += 1
        for choices in runs:
            run(study, tmp_path / str(count), jobs=0, choices=Choices(**choices))
        (part,) = split_by_grid(study, read_rows(tmp_path / str(count), study))
        return study_command(study, part).removeprefix("skipway study widths --budget cpu")

    assert command({}) == ""
    assert command({"schemes": ("a",), "seeds": (0,)}) == ""  # a part of the grid: the command resumes
    assert command({"seeds": (0, 5)}) == " --seeds 0,5"
    assert command({"schemes": ("plain",)}) == " --schemes plain"
    assert command({"schemes": ("a", "plain"), "depths": (4, 16)}) == " --depths 4,16 --schemes a,plain"
    assert command({"depths": (16,), "schemes": ("a",)}, {"depths": (32,), "schemes": ("b",)}) == ""


@pytest.mark.parametrize(
    ("name", "choices", "message"),
    [
        ("skipinit", {"depths": (20,)}, r"near it are 16 and 22; its own depths: 16, 64"),
        ("layerscale", {"depths": (17,)}, "depth 17: .*its own depths: 4, 24"),
        ("orthogonal", {"depths": (17,)}, "depth 17: .*its own depths: 6, 18"),
        ("skipinit", {"schemes": ("nosuch",)}, r"unknown scheme 'nosuch'.*its own schemes: 'BatchNorm', "),
        # these would be measured as another scheme, fail with a KeyError, or be left out without a word
        ("sinkhorn", {"schemes": ("nosuch",)}, "own schemes only.*alike, independent"),
        ("fully-connected", {"schemes": ("rezero",)}, "own schemes only"),
        ("skipless-vit", {"schemes": ("rezero",)}, "own schemes only"),
        ("norm-placement", {"schemes": ("pre-norm", "rezero")}, "own schemes only"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(name, choices, message, tmp_path):
    with pytest.raises(SkipwayError, match=message):
        run(find_study(name), tmp_path, jobs=0, choices=Choices(**choices))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", studies())
def test_a_published_number_is_that_of_a_cell_and_the_published_rows_are_of_one_grid(name):
    study = find_study(name)
    cells = [dict(cell.settings) for budget in ("cpu", "gpu", "paper") for cell in study.cells(budget, Choices())]
    for each in study.published:
        wanted = {key: value for key, value in each.where.items() if key != "dataset"}
        assert any(wanted.items() <= cell.items() for cell in cells), each.what
        for budget in ("cpu", "gpu", "paper"):
            same = [cell for cell in study.cells(budget, Choices()) if wanted.items() <= dict(cell.settings).items()]
            assert len({(cell.get("lr"), cell.get("seed")) for cell in same}) == len(same), each.what
    rows = read_rows(Path(__file__).parents[2] / "docs/studies", study)
    assert [part.budget for part in split_by_grid(study, rows)] == ["cpu"]


@pytest.mark.parametrize("name", studies())
def test_the_own_grid_of_every_study_can_be_built_and_its_schemes_can_be_typed(name):
    study = find_study(name)
    own = [str(scheme) for scheme in own_values(study, "scheme")]
    assert split_specs(",".join(own), own) == own
    for budget in ("cpu", "gpu", "paper"):
        assert check_choices(study, Choices(), budget)


def test_a_message_for_users_does_not_name_a_line_of_code():
    def error(kind):
        try:
            raise kind("too deep")
        except ValueError as raised:
            return describe_exception(raised)

    assert error(SkipwayError) == "too deep"
    assert re.fullmatch(r"ValueError: too deep \(test_grid.py:\d+\)", error(ValueError))
