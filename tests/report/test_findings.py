"""What features tell about the images of a run: planted duplicates, wrong labels, the page and the file."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import skipway as sw
from skipway.report.run.findings import ImageFeatures, ImageFindings, write_findings

CLASSES, EACH, SIDE = 3, 30, 48


def picture(label: int, number: int, generator: np.random.Generator) -> Image.Image:
    """A smooth random image whose colours tell the class."""
    coarse = generator.integers(0, 90, (6, 6, 3))
    coarse[..., label] += 150
    return Image.fromarray(coarse.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on pictures with test images that were trained on, too, two of them the same files, and one wrong label."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    for split, count in (("train", EACH), ("val", 8), ("test", 8)):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                image = picture(label, number, generator)
                image.save(folder / split / f"class{label}" / f"{number}.png")
    source = Image.open(folder / "train/class0/3.png")
    source.save(folder / "test/class0/twin.jpg", quality=60)
    source.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "test/class0/mirror.png")
    shutil.copy(folder / "train/class2/5.png", folder / "test/class2/same.png")
    for split in ("train", "test"):
        Image.new("RGB", (SIDE, SIDE), "white").save(folder / split / "class1/white.png")
    picture(2, 0, generator).save(folder / "train/class1/wrong.png")
    return sw.fit(
        folder, out=folder.parent / "run", model="resnet8", width=8, size=32, epochs=6, batch_size=16, freeze="none",
        optimizer="adamw", lr=3e-3, workers=0, augment="none", start="random", quiet=True,
    )  # fmt: skip


def test_what_was_planted_is_in_the_file(run):
    with (run.folder / "findings.csv").open() as file:
        rows = list(csv.DictReader(file))
    twins = {Path(row["file"]).name: row["other"] for row in rows if row["kind"] == "duplicate"}
    assert twins == {
        "twin.jpg": "train: train/class0/3.png",
        "mirror.png": "train: train/class0/3.png",
        "same.png": "train: train/class2/5.png",
        "white.png": "train: train/class1/white.png",
    }
    wrong = [row for row in rows if row["kind"] == "label"]
    assert [(row["file"].removeprefix("train/"), row["label"], row["other"]) for row in wrong] == [
        ("class1/wrong.png", "class1", "class2")
    ]


def test_the_page_shows_them(run):
    text = run.report.read_text()
    section = text[text.index('id="findings"') : text.index('id="inputs"')]
    assert "1 label that the neighbours contradict" in section
    assert "class2? " in section
    assert "4 near-duplicates between splits (2 of them the same file)" in section
    assert section.count("pair ") == 8
    assert "The ten nearest images vote for the label of " in section
    assert 'aria-label="Map of the images"' in section
    assert section.count("<circle") >= 130


def test_names_that_are_no_text_are_written(tmp_path):
    """Python keeps a byte of a file name that is no UTF-8 as half of a surrogate pair, which no encoding takes."""
    splits, numbers = ("train", "test"), torch.tensor([0, 0])
    given = ImageFeatures(torch.zeros(2, 1), torch.tensor([0, 0]), splits, numbers, torch.zeros(2, 16, 16), "")
    found = ImageFindings(given, (), ((0, 1, 1.0),), 1, (1,), torch.zeros(2, 2), 1.0)
    part = SimpleNamespace(names=["caf\udce9.png"])
    data: Any = SimpleNamespace(train=part, test=part, classes=("th\udce9",))
    write_findings(tmp_path / "findings.csv", found, data)
    with (tmp_path / "findings.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["caf\\udce9.png"] * 2
    assert rows[0]["other"] == "test: caf\\udce9.png"


def test_features_that_do_not_know_the_labels_doubt_none(tmp_path):
    """Labels drawn by chance: the network has learned nothing of new images, and its neighbours are no witnesses."""
    generator = np.random.default_rng(2)
    for split, count in (("train", 40), ("val", 8), ("test", 8)):
        for label in range(CLASSES):
            (tmp_path / "data" / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                image = picture(int(generator.integers(CLASSES)), number, generator)
                image.save(tmp_path / "data" / split / f"class{label}" / f"{number}.png")
    run = sw.fit(
        tmp_path / "data", out=tmp_path / "run", model="resnet8", width=8, size=32, epochs=1, batch_size=32,
        freeze="none", workers=0, augment="none", start="random", quiet=True,
    )  # fmt: skip
    section = run.report.read_text().partition('id="findings"')[2].partition('id="inputs"')[0]
    assert "too few to doubt labels by them" in section
    assert "that the neighbours contradict" not in section
    assert "label," not in (run.folder / "findings.csv").read_text().partition("\n")[2]


def test_networks_without_one_linear_classifier_say_why(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.body = nn.Conv2d(1, 8, 3, 2, 1)\n"
        "        self.out = nn.Conv2d(8, 10, 1)\n\n    def forward(self, x):\n"
        "        return self.out(self.body(x).relu()).mean((2, 3))\n"
    )
    run = sw.fit(
        out=tmp_path / "run", model=f"{tmp_path / 'net.py'}:Net", channels=1, epochs=1, batch_size=256, workers=0,
        quiet=True,
    )  # fmt: skip
    section = run.report.read_text().partition('id="findings"')[2].partition('id="inputs"')[0]
    assert "Features are what goes into the classifier" in section
    assert not (run.folder / "findings.csv").exists()
