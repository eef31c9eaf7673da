"""Images embedded in the page: the worst mistakes, and training inputs after augmentation."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from skipway.data import Data
from skipway.errors import printable
from skipway.inference.metrics import percent
from skipway.report.run.predictions import Predictions
from skipway.report.svg_style import clipped

__all__ = ["INPUTS", "Picture", "data_url", "ending", "input_pictures", "mistake_pictures", "picture_of_pixels"]

# images of the augmented batch
INPUTS = 24
# images up to EXACT pixels a side are stored unchanged, larger ones are reduced to SHOWN
EXACT, SHOWN = 40, 128
QUALITY = 80
CPU = torch.device("cpu")


class Picture(NamedTuple):
    """An image on the page: data URL, whether its pixels are shown enlarged, and caption."""

    address: str
    pixels: bool
    alt: str
    title: str
    lines: tuple[str, ...]
    file: str = ""


def mistake_pictures(data: Data, predictions: Predictions, names: Sequence[str]) -> list[Picture]:
    """Return the misclassified images with the largest losses."""
    pictures = []
    for _, index, inputs in predictions.mistakes:
        true, predicted = names[int(predictions.labels[index])], names[int(predictions.predicted[index])]
        file = printable(data.test.names[int(predictions.numbers[index])])
        confidence = percent(float(predictions.confidence[index]))
        title = clipped(f"{predicted}, {confidence}", 60)
        pictures.append(picture_of(inputs, data, file, title, (f"true: {clipped(true, 40)}",), ending(file)))
    return pictures


def input_pictures(data: Data, seed: int, names: Sequence[str]) -> list[Picture]:
    """Return the first training images of the first epoch after augmentation, as the network received them."""
    count = min(INPUTS, len(data.train))
    batch = next(data.train_batches(seed=seed, epoch=0, batch_size=count, device=CPU))
    labelled = zip(batch.inputs, (target_text(target, names) for target in batch.targets), strict=True)
    return [picture_of(inputs, data, text, "", (clipped(text, 60),)) for inputs, text in labelled]


def picture_of(inputs: Tensor, data: Data, alt: str, title: str, lines: tuple[str, ...], file: str = "") -> Picture:
    """Return the picture of an input (C, H, W)."""
    return picture_of_pixels(pixels_of(inputs, data), alt, title, lines, file)


def picture_of_pixels(pixels: Tensor, alt: str, title: str, lines: tuple[str, ...], file: str = "") -> Picture:
    """Return the picture of pixels, uint8 (H, W, C)."""
    return Picture(data_url(pixels), max(pixels.shape[:2]) <= EXACT, alt, title, lines, file)


def pixels_of(inputs: Tensor, data: Data) -> Tensor:
    """Convert a normalised input (C, H, W) to pixels, uint8 (H, W, C)."""
    mean, std = (torch.tensor(each).reshape(-1, 1, 1) for each in (data.mean, data.std))
    return ((inputs.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


def target_text(target: Tensor, names: Sequence[str]) -> str:
    """Describe a target: a class, or the fractions of two classes.

    >>> target_text(torch.tensor([0.25, 0.75, 0.0]), ["cat", "dog", "cow"])
    'dog 75 %, cat 25 %'
    """
    if target.ndim == 0:
        return names[int(target)]
    fractions, classes = (column.tolist() for column in target.topk(min(2, len(target))))
    mixed = [(names[number], fraction) for fraction, number in zip(fractions, classes, strict=True) if fraction > 0]
    return mixed[0][0] if len(mixed) == 1 else ", ".join(f"{name} {100 * fraction:.0f} %" for name, fraction in mixed)


def data_url(pixels: Tensor) -> str:
    """Encode pixels, uint8 (H, W, C), as a data URL: PNG for small images, a reduced JPEG for larger ones.

    >>> data_url(torch.zeros(8, 8, 1, dtype=torch.uint8)).partition(",")[0]
    'data:image/png;base64'
    """
    image = Image.fromarray(pixels.squeeze(-1).contiguous().numpy() if pixels.shape[-1] == 1 else pixels.numpy())
    stored = io.BytesIO()
    if max(image.size) <= EXACT:
        kind = "png"
        image.save(stored, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image.thumbnail((SHOWN, SHOWN))
        image.save(stored, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(stored.getvalue()).decode()}"


def ending(file: str) -> str:
    """Shorten a long path to its end, which identifies the file.

    >>> ending("a" * 40 + "/b.png")
    '…aaaaaaaaaaaaaaaaaaaaaaa/b.png'
    """
    return file if len(file) <= 30 else f"…{file[-29:]}"
