"""What an exported file said about its images was a part of what changes a pixel.

| trial | input | right value |
|---|---|---|
| B10 | every field of the stored preprocessing, away from its default | in the file, and obeyed by its reader |
| B10 | images of odd sizes, 16-bit, grey, RGBA, palette, EXIF-rotated | the probabilities of `skipway predict` |
| – | the steps in words, in the file and on the model's card | name every value |
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.inference.test_onnx import needs_onnx

import skipway as sw
from skipway.checkpoint.files import write_tensors
from skipway.data.preprocessing import Preprocessing
from skipway.inference import Predictor
from skipway.inference.publish import write_hub_folder, write_onnx

SIZE = 12
COLOUR = Preprocessing(("cat", "dog", "ox"), 3, SIZE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "none")
GREY = Preprocessing(("cat", "dog", "ox"), 1, SIZE, (0.4,), (0.3,), "none")
RECORDS = {
    "plain": COLOUR,
    "grey": GREY,
    "resized": replace(COLOUR, crop="resized", crop_share=0.875),
    "padded": replace(COLOUR, fit="pad", resample="bilinear"),
    "mirrored": replace(COLOUR, flip_test=True),
    "squeezed": replace(GREY, fit="squeeze", grey16="minmax", crop_share=0.7),
}


class Reader:
    """A reader of the file's metadata with NumPy and Pillow alone. A field that it does not know is an error."""

    def __init__(self, path: Path) -> None:
        import onnx
        import onnxruntime

        stored = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.record = dict(stored["preprocessing"])
        self.steps = stored["input_steps"]
        rest = self.record.keys() - {
            *("classes", "channels", "size", "mean", "std", "grey16", "fit", "crop_share", "resample", "flip_test"),
            "crop",  # of training images
        }
        assert not rest, f"the reader ignores {rest}"

    def probabilities(self, file: Path) -> dict[str, float]:
        pixels = self.square(self.eight_bits(file)).reshape(SIZE, SIZE, -1).astype(np.float32) / 255
        pixels = (pixels - np.float32(self.record["mean"])) / np.float32(self.record["std"])
        images = pixels.transpose(2, 0, 1)[None]
        (logits,) = self.session.run(None, {"images": images})[0]
        if self.record["flip_test"]:
            logits = (logits + self.session.run(None, {"images": images[..., ::-1].copy()})[0][0]) / 2
        shares = np.exp(logits - logits.max())
        return dict(zip(self.record["classes"], (shares / shares.sum()).tolist(), strict=True))

    def eight_bits(self, file: Path) -> Image.Image:
        image = Image.open(file)
        image.load()  # where Pillow itself turns a TIFF
        turn = image.getexif().get(274, 1)
        if image.mode.startswith("I"):
            values = np.asarray(image).astype(np.float64)
            low, high = (values.min(), values.max()) if self.record["grey16"] == "minmax" else (0, 65535)
            image = Image.fromarray(np.floor((values - low) * 255 / max(high - low, 1) + 0.5).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if self.record["channels"] == 1 else "RGB")
        quarter = {3: 180, 6: 270, 8: 90}.get(turn)
        return image if quarter is None else image.rotate(quarter, expand=True)

    def square(self, image: Image.Image) -> np.ndarray:
        share, fit = self.record["crop_share"], self.record["fit"]
        resample = Image.Resampling[self.record["resample"].upper()]
        if fit == "pad":
            side = max(image.size)
            canvas = Image.new(image.mode, (side, side), (128,) * len(image.getbands()))
            canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = canvas
        sides = image.size if fit == "squeeze" else [min(image.size)] * 2
        left, top = ((whole - share * side) / 2 for whole, side in zip(image.size, sides, strict=True))
        box = (left, top, left + share * sides[0], top + share * sides[1])
        return np.asarray(image.resize((SIZE, SIZE), resample, box=box))


def save_images(folder: Path) -> list[Path]:
    """Smooth pictures: an alias of one filter in place of another would not pass unseen, rounding does."""
    rows, columns = np.mgrid[0:31, 0:47].astype(np.float64)
    wave = 120 + 90 * np.sin(rows / 5) * np.cos(columns / 9)
    colour = np.stack([wave, wave[:, ::-1], wave[::-1]], -1).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    turned = Image.Exif()
    turned[274] = 3
    pictures = {
        "odd": Image.fromarray(colour),
        "tall": Image.fromarray(np.ascontiguousarray(colour.transpose(1, 0, 2))),
        "grey": Image.fromarray(wave.astype(np.uint8)),
        "sixteen": Image.fromarray((20_000 + 40 * wave).astype(np.uint16)),
        "alpha": Image.fromarray(np.dstack([colour, (255 - wave).astype(np.uint8)])),
        "grey-alpha": Image.fromarray(np.dstack([wave.astype(np.uint8), colour[..., 1]])),
        "palette": Image.fromarray(colour).quantize(32),
        "bits": Image.fromarray(wave > 120),
    }
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    pictures["odd"].save(folder / "turned.png", exif=exif)
    pictures["alpha"].save(folder / "upside-down.png", exif=turned)
    pictures["odd"].save(folder / "photo.tif", exif=exif)
    return sorted(folder.iterdir())


def save_weights(folder: Path, record: Preprocessing) -> Path:
    options = {"name": "resnet20", "blocks": [1], "width": 4, "classes": 3, "channels": record.channels}
    model = sw.build(**options)
    with np.errstate(all="ignore"):
        for parameter in model.parameters():
            parameter.data.mul_(3 if parameter.ndim == 2 else 1)  # logits that differ visibly
    write_tensors(folder / "w.safetensors", model.state_dict(), {"model": options, "preprocessing": record.to_json()})
    return folder / "w.safetensors"


@needs_onnx
@pytest.mark.parametrize("kind", RECORDS)
def test_the_metadata_alone_tell_the_preprocessing(tmp_path, kind):
    weights = save_weights(tmp_path, RECORDS[kind])
    said: list[str] = []
    write_onnx(weights, tmp_path / "m.onnx", sides="fixed", remark=said.append)
    assert any("an image and its mirror image" in each for each in said) == RECORDS[kind].flip_test
    reader, predictor = Reader(tmp_path / "m.onnx"), Predictor.load(weights)
    (tmp_path / "images").mkdir()
    files = save_images(tmp_path / "images")
    seen = set()
    for file, expected in zip(files, predictor.predict(files, top=None), strict=True):
        assert expected.error == ""
        found = reader.probabilities(file)
        # where an image is padded, its edge may fall between pixels of the square
        worst = 0.02 if RECORDS[kind].fit == "pad" else 1e-4
        for name, probability in expected.probabilities.items():
            assert found[name] == pytest.approx(probability, abs=worst), file.name
        seen.add(round(expected.probability, 5))
    assert len(seen) > 5


def test_every_field_is_in_the_trial_and_in_words():
    """A field that is added without a record here, or without a word in the steps, fails."""
    from skipway.inference.publish import input_steps

    for field in fields(Preprocessing):
        values = {getattr(record, field.name) for record in RECORDS.values()}
        assert field.default is MISSING or len(values) > 1, field.name
        if field.name in ("classes", "crop"):
            continue  # the outputs, and the crop of training images
        texts: dict[object, set[str]] = {}
        for record in RECORDS.values():
            texts.setdefault(getattr(record, field.name), set()).add(" ".join(input_steps(record)))
        assert all(a.isdisjoint(b) for x, a in texts.items() for y, b in texts.items() if x != y), field.name


def test_the_card_says_the_steps(tmp_path):
    write_hub_folder(save_weights(tmp_path, RECORDS["padded"]), tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "scale it to 12 x 12, bilinear, antialiased" in card
    assert "square of grey 128" in card
    assert math.isclose(json.loads((tmp_path / "hub" / "config.json").read_text())["preprocessing"]["mean"][0], 0.4)
