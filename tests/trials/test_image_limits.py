"""Kind: a limit has a reason in its message and an option; what can be read in less memory is.

| trial | input | right value |
|---|---|---|
| B9 | JPEG files of 108 megapixels | read, at reduced scale |
| B9 | PNG files of 81 megapixels, none other | refused with the size, the limit and the option |
| B9 | the same with the option | read |
| | a large PNG beside others | damaged, with size and option, from training and `predict` |
| | JPEG over Pillow's own limit of 179 megapixels | read, at reduced scale |
| | a progressive JPEG over the limit | refused, since it is held in memory at full size |
| | `predict` and `evaluate` with the option | as `train` |
| | a limit that is no number of megapixels | refused |
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.trials.pictures import write_images

from skipway.cli import main
from skipway.data import load
from skipway.data.decode import DecodeSpec, UnreadableImage, decode
from skipway.errors import DataError, SkipwayError
from skipway.recipe import Recipe

SMALL = ("--epochs", "1", "--model", "resnet8", "--width", "4", "--workers", "0", "--device", "cpu")


def large(path: Path, side: tuple[int, int], mode: str = "L", value: int = 99, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, side, value).save(path, **options)
    return path


@pytest.mark.parametrize("side", [(12_000, 9_000), (16_000, 12_000)])
def test_large_jpeg_is_decoded_at_reduced_scale(tmp_path, side):
    path = large(tmp_path / "a.jpg", side, value=200)
    assert np.abs(decode(path, DecodeSpec(1, 16)).astype(int) - 200).max() <= 1
    assert np.abs(decode(path, DecodeSpec(1, 700)).astype(int) - 200).max() <= 1


def test_a_reduced_image_is_the_image(tmp_path):
    """A ramp from dark to bright keeps its values at every scale: column x of 64 is 4 x + 1.5 of 256."""
    ramp = np.arange(256, dtype=np.uint8).repeat(8)[None].repeat(2048, 0)
    path = tmp_path / "ramp.jpg"
    Image.fromarray(ramp).save(path, quality=95)
    for limit in (64.0, 1.5, 0.4, 0.1):
        found = decode(path, DecodeSpec(1, 64, max_megapixels=limit))[..., 0].astype(float)
        assert np.abs(found.mean(0) - (4 * np.arange(64) + 1.5))[1:-1].max() < 2


def test_a_limit_is_named_with_size_and_option(tmp_path, capsys):
    for name in ("cat", "dog"):
        for number in range(4):
            large(tmp_path / "d" / name / f"{number}.png", (90 + number, 90), value=50 + number + 9 * len(name))
    reason = r"9\dx90: more than 0.001 megapixels; max_megapixels=1 allows it"
    with pytest.raises(
        DataError, match=f"no readable training image; 8 files cannot be read, the first: .*0.png: {reason}"
    ):
        load(tmp_path / "d", max_megapixels=0.001)
    assert main(["train", str(tmp_path / "d"), "--max-megapixels", "0.001"]) == 3
    assert "90x90: more than 0.001 megapixels; --max-megapixels 1 allows it" in capsys.readouterr().err


def test_a_large_png_is_read_by_the_option(tmp_path):
    path = large(tmp_path / "a.png", (9_000, 9_000), mode="1", value=1)
    with pytest.raises(UnreadableImage, match="9000x9000: more than 64 megapixels; max_megapixels=81 allows it"):
        decode(path, DecodeSpec(1, 16))
    assert (decode(path, DecodeSpec(1, 16, max_megapixels=81)) == 255).all()


def test_one_large_image_beside_others_has_its_reason_everywhere(tmp_path, capsys):
    folder, run = write_images(tmp_path / "d", {"cat": 5, "dog": 5}), str(tmp_path / "run")
    path = large(folder / "cat/large.png", (9_000, 9_000), mode="1")
    limit = ("--most-unreadable", "0.5")
    assert main(["train", str(folder), "--out", run, *SMALL, *limit]) == 0
    assert "cat/large.png: 9000x9000: more than 64 megapixels; --max-megapixels 81 allows it" in capsys.readouterr().out
    for command in (["predict", run, str(path)], ["evaluate", run, str(folder), "--device", "cpu"]):
        status = main(command)
        said = "".join(capsys.readouterr())
        assert status == (3 if command[0] == "predict" else 0)
        assert "9000x9000: more than 64 megapixels; --max-megapixels 81 allows it" in said
        assert main([*command, "--max-megapixels", "81"]) == 0
        assert "more than" not in "".join(capsys.readouterr())


def test_progressive_jpeg_counts_at_full_size(tmp_path):
    path = large(tmp_path / "a.jpg", (8_200, 8_000), progressive=True)
    with pytest.raises(UnreadableImage, match="max_megapixels=66 allows it"):
        decode(path, DecodeSpec(1, 16))


def test_pillows_own_limit_does_not_hide_the_option(tmp_path):
    """200 megapixels of nothing: over the 179 at which Pillow raises an error of its own."""
    file = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    with pytest.raises(UnreadableImage, match="20000x10000: more than 64 megapixels; max_megapixels=200 allows it"):
        decode(tmp_path / "a.png", DecodeSpec(1, 16))


@pytest.mark.parametrize("value", [0, -1, float("nan"), 1e9, "64"])
def test_a_limit_is_a_number_of_megapixels(tmp_path, value):
    with pytest.raises(SkipwayError, match="max_megapixels="):
        load(write_images(tmp_path, {"cat": 2, "dog": 2}), max_megapixels=value)
    if not isinstance(value, str):
        with pytest.raises(SkipwayError, match="max_megapixels="):
            load(tmp_path, **Recipe(data=tmp_path, max_megapixels=value).data_choices())
