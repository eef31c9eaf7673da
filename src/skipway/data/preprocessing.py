"""`Preprocessing`: from an image to an input of the network, as stored in the header of a weights file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from skipway.data.batches import normalize
from skipway.data.decode import (
    MAX_MEGAPIXELS,
    DecodeSpec,
    UnreadableImage,
    decode,
    silence_pillow,
    to_eight_bit,
    turn_upright,
)
from skipway.data.fit import FITS, RESAMPLES, Fit, Resample, central_share, evaluation_share, fit_square
from skipway.errors import CheckpointError, DataError, printable

__all__ = ["Preprocessing"]

Crop = Literal["pad", "resized", "none"]
Grey16 = Literal["range", "minmax"]
MAX_SIDE = 4096


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of images in evaluation, and the classes of the outputs: all that changes an input, or the
    meaning of an output, and is not in the weights. It travels in the header of weights, the run's `config.json`, ONNX
    files and hub folders, and everything that reads these follows it.

    Args:
        classes: names in the order of the outputs.
        channels: 1 (grey) or 3 (RGB).
        size: side of the square input in pixels.
        mean: per channel in [0, 1]; subtracted from the input.
        std: per channel; the input is divided by it.
        crop: random crop of the training images.
        grey16: conversion of 16-bit grey to 8 bits, see `skipway.data.decode`.
        fit: how a rectangle becomes a square, see `skipway.data.fit`.
        crop_share: side of the central crop over the shorter side of the image, or of the square that `fit` makes.
        resample: the filter that images are scaled with, antialiased as Pillow does it.
        flip_test: whether the logits of an image are the mean of its own and of those of its mirror image.

    >>> Preprocessing(("cat", "dog"), 1, 8, (0.5,), (0.5,), "none").spec(max_megapixels=64)
    DecodeSpec(channels=1, size=8, grey16='range', fit='crop', max_megapixels=64, crop_share=1.0, resample='bicubic')
    """

    classes: tuple[str, ...]
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: Crop
    grey16: Grey16 = "range"
    fit: Fit = "crop"
    crop_share: float = 1.0
    resample: Resample = "bicubic"
    flip_test: bool = False

    def spec(self, max_megapixels: float = MAX_MEGAPIXELS) -> DecodeSpec:
        """How image files are decoded."""
        return DecodeSpec(
            self.channels, self.size, self.grey16, self.fit, max_megapixels, self.crop_share, self.resample
        )

    @property
    def example(self) -> Tensor:
        """An input of one image, all zeros: (1, channels, size, size)."""
        return torch.zeros(1, self.channels, self.size, self.size)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: object, source: str) -> Preprocessing:
        """Read the result of `to_json`, or the header of a run's weights.

        Raises:
            CheckpointError: a field is missing, unknown, or outside its range.
        """
        defaults = {field.name: field.default for field in fields(cls)}
        needed = {name for name, default in defaults.items() if default is MISSING}
        if not isinstance(values, dict) or not needed <= values.keys() <= defaults.keys():
            raise CheckpointError(f"{source}: the rule is a preprocessing with {', '.join(defaults)} and nothing else")
        if "crop_share" not in values:  # weights of an earlier version, which did not store it
            defaults["crop_share"] = evaluation_share(values["crop"], values.get("fit", "crop"))
        read: dict[str, Any] = {**defaults, **values}
        classes, channels, size, share = (read[name] for name in ("classes", "channels", "size", "crop_share"))
        mean, std = finite_numbers(read["mean"]), finite_numbers(read["std"])
        rules = {
            "classes": is_text_list(classes) and len(set(classes)) == len(classes) >= 2,
            "channels": channels in (1, 3) and isinstance(channels, int),
            "size": isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= MAX_SIDE,
            "mean": mean is not None and len(mean) == channels,
            "std": std is not None and len(std) == channels and min(std) > 0,
            "crop": read["crop"] in get_args(Crop),
            "grey16": read["grey16"] in get_args(Grey16),
            "fit": read["fit"] in FITS,
            "crop_share": isinstance(share, int | float) and not isinstance(share, bool) and 0 < share <= 1,
            "resample": read["resample"] in RESAMPLES,
            "flip_test": isinstance(read["flip_test"], bool),
        }
        wrong = [name for name, holds in rules.items() if not holds]
        if wrong:
            raise CheckpointError(
                f"{source}: the preprocessing holds a {wrong[0]} that cannot be: write the file again"
            )
        read |= {"classes": tuple(classes), "mean": mean, "std": std}
        return cls(**read)

    def of_tensor(self, images: Tensor) -> Tensor:
        """Inputs (N, C, H, W) from images (N, C, H, W) with H = W = `size`, uint8 or floating point in [0, 1].

        Raises:
            DataError: another shape, or values outside.
        """
        shape = (self.channels, self.size, self.size)
        if images.ndim != 4 or tuple(images.shape[1:]) != shape:
            raise DataError(f"images of shape {tuple(images.shape)}: the rule is (N, {', '.join(map(str, shape))})")
        if images.dtype != torch.uint8:
            if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
                raise DataError(
                    f"images of {images.dtype}: the rule is uint8 from 0 to 255, or floating point from 0 to 1 that is "
                    "not yet normalised"
                )
            images = images.float() * 255
        return normalize(images.permute(0, 2, 3, 1), self.mean, self.std)

    def of_file(
        self, source: Path | bytes, *, max_megapixels: float = MAX_MEGAPIXELS, name: Path | None = None
    ) -> Tensor:
        """Decode a file, or its bytes with the file's name, by which TGA is known: uint8 (size, size, channels).

        Raises:
            UnreadableImage: see `skipway.data.decode`.
        """
        return torch.from_numpy(decode(source, self.spec(max_megapixels), name=name).copy())

    def of_picture(self, image: Image.Image) -> Tensor:
        """Convert an image of Pillow, as if read from a file: uint8 (size, size, channels).

        Raises:
            UnreadableImage: it cannot be decoded, or its values have no known range.
        """
        name = Path(getattr(image, "filename", "") or "image")
        silence_pillow()
        try:
            if image.mode == "F":
                raise ValueError("32-bit float values of unknown range; give it 8 or 16 bits")
            image.load()
            upright = turn_upright(to_eight_bit(image, self.channels, self.grey16), image)
            pixels = fit_square(upright, self.size, central_share(self.crop_share), self.fit, self.resample)
        except Exception as error:  # Pillow's plugins raise whatever their parsers do
            raise UnreadableImage(name, printable(str(error))) from error
        return torch.from_numpy(pixels.copy()).reshape(self.size, self.size, self.channels)


def is_text_list(values: object) -> bool:
    """Whether a JSON value is a list of strings."""
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def finite_numbers(values: object) -> tuple[float, ...] | None:
    """Read a list of finite numbers, of which true and false are none; None if it is anything else."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        return None
    fine = [isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values]
    return tuple(float(value) for value in values) if fine and all(fine) else None
