"""What features tell about the images of a run: planted duplicates, wrong labels, the page and the file."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

import skipway as sw
from skipway.report.run.findings import SAME_PIXELS, pixel_correlation

CLASSES, EACH, SIDE = 3, 30, 48


def picture(label: int, number: int, generator: np.random.Generator) -> Image.Image:
    """A smooth random image whose colours tell the class."""
    coarse = generator.integers(0, 90, (6, 6, 3))
    coarse[..., label] += 150
    return Image.fromarray(coarse.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


CHANGES = {
    "compressed": lambda image: compressed(image),
    "resized": lambda image: image.resize((SIDE // 2, SIDE // 2)).resize((SIDE, SIDE)),
    "brighter": lambda image: image.point(lambda value: min(255, int(0.8 * value) + 20)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def compressed(image: Image.Image) -> Image.Image:
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=60)
    return Image.open(stored).convert("RGB")


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_picture_is_known_again_and_others_are_not(change):
    generator = np.random.default_rng(0)
    pictures = [picture(number % CLASSES, number, generator) for number in range(20)]
    pixels = [torch.from_numpy(np.asarray(each).copy()) for each in pictures]
    changed = torch.from_numpy(np.asarray(CHANGES[change](pictures[0])).copy())
    assert pixel_correlation(pixels[0], changed) > SAME_PIXELS
    assert max(pixel_correlation(pixels[0], other) for other in pixels[1:]) < 0.9


def test_even_pictures_are_no_duplicates():
    white, grey = torch.full((8, 8, 3), 255, dtype=torch.uint8), torch.full((8, 8, 3), 128, dtype=torch.uint8)
    assert pixel_correlation(white, grey) == 0.0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on pictures with two test images that were trained on, too, and one wrong label."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    for split, count in (("train", EACH), ("val", 8), ("test", 8)):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                image = picture(label, number, generator)
                image.save(folder / split / f"class{label}" / f"{number}.png")
    source = Image.open(folder / "train/class0/3.png")
    CHANGES["compressed"](source).save(folder / "test/class0/twin.png")
    CHANGES["mirrored"](source).save(folder / "test/class0/mirror.png")
    picture(2, 0, generator).save(folder / "train/class1/wrong.png")
    return sw.fit(
        folder, out=folder.parent / "run", model="resnet8", width=8, size=32, epochs=6, batch_size=16, freeze="none",
        optimizer="adamw", lr=3e-3, workers=0, augment="none", start="random", quiet=True,
    )  # fmt: skip


def test_what_was_planted_is_in_the_file(run):
    with (run.folder / "findings.csv").open() as file:
        rows = list(csv.DictReader(file))
    twins = {row["file"] for row in rows if row["kind"] == "duplicate"}
    assert {"class0/twin.png", "class0/mirror.png"} <= {name.removeprefix("test/") for name in twins}
    assert all("class0/3.png" in row["other"] for row in rows if row["kind"] == "duplicate")
    wrong = [row for row in rows if row["kind"] == "label"]
    assert [(row["file"].removeprefix("train/"), row["label"], row["other"]) for row in wrong] == [
        ("class1/wrong.png", "class1", "class2")
    ]


def test_the_page_shows_them(run):
    text = run.report.read_text()
    section = text[text.index('id="findings"') : text.index('id="inputs"')]
    assert "1 label that the neighbours contradict" in section
    assert "class2? " in section
    assert section.count("pair ") >= 4
    assert 'aria-label="Map of the images"' in section
    assert section.count("<circle") >= 130


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
