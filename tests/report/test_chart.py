"""Charts of many series: colours that are told apart and can be read, a label for each, and each one alone."""

from __future__ import annotations

import itertools
import re
import unicodedata
from dataclasses import replace

import numpy as np
import pytest

from skipway.report.chart import Bars, Figure, HeatCell, Heatmap, Series
from skipway.report.page import legend
from skipway.report.svg import FEW_SERIES, draw, draw_each, marker, svg_file
from skipway.report.svg_style import COLORS, WIDTH, wrapped_text

# Ottosson 2020, "A perceptual color space for image processing"
CONES = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
OKLAB = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]


def linear(color: str) -> np.ndarray:
    """The light of a colour, red, green and blue."""
    part = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    """The contrast of WCAG 2."""
    low, high = sorted(float(linear(color) @ (0.2126, 0.7152, 0.0722)) + 0.05 for color in (first, second))
    return high / low


@pytest.mark.parametrize(("paper", "place"), [("#ffffff", 0), ("#16181a", 1)])
def test_twelve_colours_are_told_apart_and_can_be_read(paper, place):
    colors = [pair[place] for pair in COLORS]
    assert len(colors) == 12
    assert [color for color in colors if contrast(color, paper) < 4.5] == []
    seen = {color: np.array(OKLAB) @ np.cbrt(np.array(CONES) @ linear(color)) for color in colors}
    nearest = min(itertools.combinations(colors, 2), key=lambda pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]))
    # 0.02 is about what a reader just notices side by side
    assert np.linalg.norm(seen[nearest[0]] - seen[nearest[1]]) > 0.06, nearest


# Machado, Oliveira and Fernandes 2009, "A physiologically-based model for simulation of color vision deficiency", on
# light, of readers without one kind of cone
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("place", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("kind", BLINDNESS)
def test_readers_who_confuse_colours_tell_series_apart(kind, place):
    """Series of one legend and neighbours by their colours; of all others those that look alike by their markers."""
    light = [np.clip(np.array(BLINDNESS[kind]) @ linear(pair[place]), 0, 1) for pair in COLORS]
    seen = [np.array(OKLAB) @ np.cbrt(np.array(CONES) @ each) for each in light]
    distances = {pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in itertools.combinations(range(12), 2)}
    # 0.02 is about what a reader just notices side by side
    alone = [pair for pair in distances if pair[1] < FEW_SERIES or pair[1] == pair[0] + 1]
    assert [pair for pair in alone if distances[pair] < 0.04] == []
    alike = [pair for pair in distances if distances[pair] < 0.05]
    shapes = [marker(index, 0.0, 0.0) for index in range(12)]
    assert [pair for pair in alike if pair not in alone and shapes[pair[0]] == shapes[pair[1]]] == []


def figure(count: int) -> Figure:
    series = tuple(Series.of(f"name {n}", [(1.0, n + 1.0), (2.0, 5.0), (3.0, 2.0 * n)]) for n in range(count))
    return Figure(title="Title", x_label="x", series=series)


def test_few_series_have_a_legend_and_many_a_label_each():
    assert [key.name for key in legend(figure(4))] == ["name 0", "name 1", "name 2", "name 3"]
    assert 'class="label"' not in draw(figure(4))
    for count in (5, 12, 20):
        assert legend(figure(count)) == []
        assert len(set(re.findall(r'data-kind="(series c\d+ d\d)"', draw(figure(count))))) == count
        assert svg_file(figure(count)).count("name 1<") == 2, "the label and its title, no legend below"


def test_more_than_eight_series_are_drawn_alone_too():
    assert draw_each(figure(8)) == ""
    text = draw_each(figure(13))
    assert text.count('class="line faint"') == text.count('class="line"') == 13
    assert [name for name in (f"name {n}<title>" for n in range(13)) if name not in text] == []
    own = [len(re.findall("[ML]", path)) for path in re.findall(r'class="line" d="([^"]*)"', text)]
    others = [len(re.findall("[ML]", path)) for path in re.findall(r'class="line faint" d="([^"]*)"', text)]
    assert (set(own), set(others)) == ({3}, {36})


def test_titles_of_files_fit_and_say_what_the_axis_shows():
    wide = Figure(title="Gradient at the first block, " * 4, x_label="x", y_label="ratio", series=figure(2).series)
    text = svg_file(wide, title="word " * 40)
    lines = re.findall(r'<text class="title"[^>]*>(.*?)</text>', text)
    # DejaVu Sans Bold, a wide font, takes up to 7.5 units a letter
    assert len(lines) > 5
    assert max(map(len, lines)) * 7.5 <= WIDTH - 12
    assert ">ratio</text>" in text
    assert ">ratio</text>" not in svg_file(replace(wide, title="Ratio by depth"))


@pytest.mark.parametrize(
    "name",
    [
        "金毛寻回犬和拉布拉多猎犬的幼崽",
        "골든리트리버강아지의사진들",
        unicodedata.normalize("NFD", "골든리트리버강아지의사진들"),
        "a",
    ],
)
def test_wide_names_fit_beside_a_matrix_and_bars(name):
    """Letters of Chinese, Japanese and Korean take about 12.5 units, others up to 6.6; names end where cells begin."""
    cells = ((HeatCell(0.5, "x"),),)
    matrix = Heatmap(title="t", rows=(name,), columns=(name,), row_title="r", column_title="c", cells=cells)
    bars = Bars(title="t", categories=(name,), series=(("s", (1.0,)),))
    for drawn in (draw(matrix), draw(bars)):
        end, shown = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="end">([^<]*)<', drawn)[0]
        assert float(end) >= sum(widths(shown))
    below, shown = re.findall(r'translate\([\d.]+ ([\d.]+)\) rotate\(-90\)">([^<]*)<', draw(matrix))[0]
    assert float(below) >= sum(widths(shown))
    assert shown.rstrip("…")
    assert name.startswith(shown.rstrip("…"))


def widths(text: str) -> list[float]:
    """Of the letters of a text as they are drawn."""
    letters = unicodedata.normalize("NFC", text)
    return [12.5 if unicodedata.east_asian_width(letter) in ("W", "F") else 6.6 for letter in letters]


def test_wide_titles_wrap_to_the_width_of_a_figure():
    lines = wrapped_text("金毛寻回犬" * 20 + " and others")
    assert "".join(lines).replace(" ", "") == "金毛寻回犬" * 20 + "andothers"
    assert max(sum(widths(line)) for line in lines) <= WIDTH - 12


def test_of_the_path_of_a_module_the_end_is_read():
    names = ("model.encoder.layers.10.self_attention", "golden retriever of the old kind")
    cells = tuple((HeatCell(0.5, "x"),) for _ in names)
    drawn = draw(Heatmap(title="t", rows=names, columns=("1",), row_title="r", column_title="c", cells=cells))
    assert re.findall(r">(…[^<]*|[^<>]*…)<title>", drawn) == ["…10.self_attention", "golden retriever of t…"]
