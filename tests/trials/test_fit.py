"""Kind: what is lost of wide images is said, and a choice keeps it; the choice travels with the weights.

| trial | input | right value |
|---|---|---|
| | wide and tall images by crop, pad, squeeze | the pixels that each fit is defined by |
| | the same in memory, from files and from the cache | the same pixels |
| | random crops of a padded or squeezed square | lie in that square |
| | classes that differ at the ends of wide images | crop cannot tell them apart; pad and squeeze can |
| | `predict`, `evaluate`, `from_pretrained`, the hub folder, an older header | obey the fit of the training |
| | images whose crop loses more than a third of their area | a remark with the measured share and the options |
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tests.trials.pictures import write_images

from skipway.cli import main
from skipway.data import load
from skipway.data.decode import DecodeSpec, decode
from skipway.data.fit import FITS, PAD_VALUE, evaluation_share, fit_square
from skipway.data.preprocessing import Preprocessing
from skipway.errors import CheckpointError, DataError
from skipway.inference.predict import from_pretrained

SMALL = ("--model", "resnet8", "--width", "8", "--workers", "0", "--device", "cpu")


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from 0 to 255 to the right, green downwards."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, np.full_like(across, 7)], -1).round().astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 64), (40, 40), (300, 20), (21, 200), (33, 32)])
@pytest.mark.parametrize("size", [16, 32, 48])
def test_each_fit_shows_what_it_is_defined_by(width, height, size):
    image = ramp(width, height)
    long, short = max(width, height), min(width, height)
    lines = np.linspace(0, 255, size)
    squeezed = fit_square(image, size, fit="squeeze").astype(int)
    edge = 2 + 255 / size
    assert np.abs(squeezed[..., 0] - lines).max() <= edge
    assert np.abs(squeezed[..., 1] - lines[:, None]).max() <= edge
    cropped = fit_square(image, size).astype(int)
    wide = 0 if width >= height else 1
    lost = (1 - short / long) / 2 * 255
    assert abs(cropped[..., wide].min() - lost) <= edge
    assert abs(cropped[..., wide].max() - (255 - lost)) <= edge
    padded = fit_square(image, size, fit="pad").astype(int)
    own = (padded[..., 2] == 7) if width != height else np.ones((size, size), bool)
    bars = (padded == PAD_VALUE).all(-1)
    # all of the image, in its proportions, and the rest is grey
    assert abs(own.sum() - size * size * short / long) <= 2 * size
    assert (own | bars).all()
    assert padded[own][:, 0].max() - padded[own][:, 0].min() >= 255 - 2 * edge * long / short


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [16, 224])
def test_memory_files_and_cache_agree(tmp_path, fit, size):
    folder = write_images(tmp_path / "d", {"cat": 4, "dog": 4}, side=(60, 20))
    options = {"size": size, "fit": fit, "crop": "none", "channels": 3, "holdout": 0.25}
    first = load(folder, **options, cache=False)
    (batch,) = first.evaluation_batches("test", batch_size=9, device=torch.device("cpu"))
    for number, name in zip(batch.numbers, first.test.names, strict=True):
        expected = torch.from_numpy(decode(folder / name, DecodeSpec(3, size, fit=fit)).copy())
        found = batch.inputs[int(number)].permute(1, 2, 0) * torch.tensor(first.std) + torch.tensor(first.mean)
        assert (found * 255 - expected).abs().max() < 0.1
    for _ in range(2):
        cached = load(folder, **options, cache=tmp_path / "cache")
        (again,) = cached.evaluation_batches("test", batch_size=9, device=torch.device("cpu"))
        assert torch.equal(again.inputs, batch.inputs)
    other = load(folder, **{**options, "fit": "pad" if fit != "pad" else "crop"}, cache=tmp_path / "cache")
    (different,) = other.evaluation_batches("test", batch_size=9, device=torch.device("cpu"))
    assert not torch.equal(different.inputs, batch.inputs)


@pytest.mark.parametrize("fit", ["pad", "squeeze"])
@pytest.mark.parametrize("cache", [True, False])
def test_random_crops_are_taken_from_the_square(tmp_path, fit, cache):
    """The ends of an image six times as wide as high, red and blue, both come up; the middle crop shows neither."""
    pixels = np.full((40, 240, 3), 7, np.uint8)
    pixels[:, :60], pixels[:, -60:] = (250, 0, 0), (0, 0, 250)
    for name in ("cat", "dog"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for number in range(6):
            pixels[0, 0, 1] = number + 10 * (name == "cat")
            Image.fromarray(pixels).save(tmp_path / "d" / name / f"{number}.png")
    kept = tmp_path / "cache" if cache else False
    data = load(tmp_path / "d", size=32, crop="resized", fit=fit, cache=kept, workers=0)
    (batch,) = data.train_batches(seed=0, epoch=0, batch_size=len(data.train), device=torch.device("cpu"))
    colours = batch.inputs * torch.tensor(data.std)[:, None, None] + torch.tensor(data.mean)[:, None, None]
    red, blue = (colours[:, channel].flatten(1).amax(1) > 0.8 for channel in (0, 2))
    assert (red | blue).all()
    (tested,) = data.evaluation_batches("test", batch_size=99, device=torch.device("cpu"))
    colours = tested.inputs * torch.tensor(data.std)[:, None, None] + torch.tensor(data.mean)[:, None, None]
    assert (colours[:, 0].flatten(1).amax(1) > 0.8).all()
    assert (colours[:, 2].flatten(1).amax(1) > 0.8).all()


def ends(root, classes=("left", "right"), each=12):
    """Wide images whose classes differ at the ends alone."""
    noise = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(each):
            pixels = noise.integers(0, 60, (16, 64, 3), dtype=np.uint8)
            pixels[:, slice(0, 16) if label == 0 else slice(48, 64)] += 180
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.mark.parametrize(("fit", "tells"), [("crop", False), ("pad", True), ("squeeze", True)])
def test_the_fit_decides_what_can_be_learned(tmp_path, fit, tells):
    data = load(ends(tmp_path), size=16, fit=fit, flip=False)
    (batch,) = data.train_batches(seed=0, epoch=0, batch_size=len(data.train), device=torch.device("cpu"))
    side = (batch.inputs[..., :4] - batch.inputs[..., -4:]).mean((1, 2, 3))
    apart = (side[batch.labels == 0].min() > side[batch.labels == 1].max()).item()
    assert apart == tells


@pytest.mark.parametrize("fit", ["pad", "squeeze"])
def test_every_reader_obeys_the_fit_of_the_training(tmp_path, fit, capsys):
    folder, run = ends(tmp_path / "d"), tmp_path / "run"
    options = ("--fit", fit, "--epochs", "8", "--batch-size", "8", "--size", "16", "--no-flip", "--crop", "none")
    assert main(["train", str(folder), "--out", str(run), "--quiet", *options, *SMALL]) == 0
    model = from_pretrained(run)
    preprocessing = model.preprocessing
    assert isinstance(preprocessing, Preprocessing)
    assert (preprocessing.fit, preprocessing.crop_share) == (fit, 1.0)
    path = folder / "left/0.png"
    expected = decode(path, DecodeSpec(3, 16, fit=fit))
    assert (preprocessing.of_file(path).numpy() == expected).all()
    assert (preprocessing.of_picture(Image.open(path)).numpy() == expected).all()
    capsys.readouterr()
    assert main(["evaluate", str(run), str(folder), "--device", "cpu", "--json"]) == 0
    assert '"accuracy": 1.0' in capsys.readouterr().out
    assert main(["predict", str(run), str(folder), "--top", "1"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert all(f"/{row.split(chr(9))[1].split()[0]}/" in row for row in rows)
    assert main(["export", str(run), "--hub", str(tmp_path / "hub")]) == 0
    assert from_pretrained(tmp_path / "hub").preprocessing == preprocessing
    step = {"pad": "on a square of grey 128", "squeeze": "of both sides"}[fit]
    assert step in (tmp_path / "hub/README.md").read_text()


def test_headers_without_a_fit_were_cropped_and_unknown_fits_are_refused():
    known = Preprocessing(("cat", "dog"), 1, 8, (0.5,), (0.5,), "resized", fit="squeeze")
    values = known.to_json()
    assert Preprocessing.from_json(values, "x") == known
    assert Preprocessing.from_json({k: v for k, v in values.items() if k != "fit"}, "x").fit == "crop"
    with pytest.raises(CheckpointError, match="holds a fit that cannot be"):
        Preprocessing.from_json({**values, "fit": "stretch"}, "x")
    with pytest.raises(DataError, match="fit='stretch': the rule is crop, pad or squeeze"):
        load(fit="stretch")
    assert [evaluation_share("resized", fit) for fit in FITS] == [224 / 256, 1.0, 1.0]


@pytest.mark.parametrize(("side", "lost"), [((60, 20), 67), ((20, 60), 67), ((50, 30), 40), ((40, 30), None)])
def test_what_the_crop_loses_is_said(tmp_path, side, lost):
    folder = write_images(tmp_path, {"cat": 4, "dog": 4}, side=side)
    said = [remark for remark in load(folder, size=16).remarks if "of the area" in remark]
    assert said == (
        []
        if lost is None
        else [
            f"the central crop leaves out {lost} % of the area of the images; "
            "fit='pad' or fit='squeeze' keeps all of it"
        ]
    )
    assert not any("of the area" in remark for remark in load(folder, size=16, fit="pad").remarks)
