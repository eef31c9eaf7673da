"""What weights state about themselves, in their file, its folder or their library: the preprocessing, the classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from PIL import Image
from safetensors import SafetensorError, safe_open

from skipway.data.decode import Grey16
from skipway.data.fit import FITS, RESAMPLES, Fit
from skipway.data.loader import IMAGENET_MEAN, IMAGENET_STD
from skipway.data.preprocessing import finite_numbers
from skipway.data.sources.index import class_name
from skipway.errors import CheckpointError, printable
from skipway.validation import is_whole
from skipway.weights.files import find_file
from skipway.weights.hub import local_path
from skipway.weights.stored_config import CONFIG
from skipway.zoo import import_library

__all__ = ["DataConfig", "WeightsDescription", "find_data_config"]

PREPROCESSOR = "preprocessor_config.json"
"""Where transformers describes how images are made inputs."""


@dataclass(frozen=True)
class DataConfig:
    """How images were made inputs when weights were trained.

    Args:
        mean: subtracted from each channel in [0, 1].
        std: each channel is divided by it.
        origin: where that is stated, in words.
        crop_share: side of the central crop over the shorter side; None where it is not stated.
        resample: "bicubic" or "bilinear"; None where it is not stated, or another filter.
        grey16: conversion of 16-bit grey to 8 bits; None where it is not stated.
        fit: how a rectangle becomes a square; None where it is not stated.
        size: side of the input in pixels, of the weights of a run; None where it is not stated.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str
    crop_share: float | None = None
    resample: str | None = None
    grey16: Grey16 | None = None
    fit: Fit | None = None
    size: int | None = None


class WeightsDescription:
    """What weights state about their inputs and outputs: the header of a file of ours, else the files beside it,
    `preprocessor_config.json` (transformers) and `config.json` (transformers, timm), which are read when asked.

    Args:
        source: file or folder of the weights, or their name on the Hugging Face hub, "hf:org/name".

    Raises:
        MissingExtraError: a name on the hub without huggingface_hub.
        CheckpointError: the hub does not have the weights.
    """

    def __init__(self, source: str | Path) -> None:
        path = local_path(source, (PREPROCESSOR, CONFIG))
        self.folder = path if path.is_dir() else path.parent
        self.file = path
        with suppress(CheckpointError, OSError):  # there are no weights, or several: their reader says so
            self.file = find_file(path, lambda sentence: None) if path.is_dir() else path
        self.preprocessing, self.model = read_header(self.file)

    @cached_property
    def preprocessor(self) -> dict[str, Any]:
        """What `preprocessor_config.json` holds, see `read_description`."""
        return read_description(self.folder / PREPROCESSOR)

    @cached_property
    def config(self) -> dict[str, Any]:
        """What `config.json` holds, see `read_description`."""
        return read_description(self.folder / CONFIG)

    @property
    def data_config(self) -> DataConfig | None:
        """The preprocessing that the weights expect: by the first of the three that states mean and deviation.

        Raises:
            CheckpointError: one that is asked is damaged.
        """
        return (
            of_run(self.preprocessing, printable(self.file))
            or of_transformers(self.preprocessor, printable(self.folder / PREPROCESSOR))
            or of_timm_hub(self.config.get("pretrained_cfg"), printable(self.folder / CONFIG))
        )

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes in the order of the outputs: by the header, else by the `label_names` (timm) or
        `id2label` (transformers) of `config.json`; None where nothing states them.

        Raises:
            CheckpointError: `config.json` is asked and damaged.
        """
        stated: Any = self.preprocessing.get("classes")
        if stated is None:
            stated = self.config.get("label_names")
            by_number = self.config.get("id2label")
            if isinstance(by_number, dict) and all(str(number) in by_number for number in range(len(by_number))):
                stated = [by_number[str(number)] for number in range(len(by_number))]
        named = isinstance(stated, list) and all(isinstance(name, str) for name in stated) and len(set(stated)) > 1
        return tuple(map(class_name, stated)) if named else None

    @property
    def hidden_layer(self) -> list[Any] | None:
        """The name of the classifier and the width of its hidden layer, where the weights of a run have one."""
        head = self.model.get("head")
        return head if isinstance(head, list) and len(head) == 2 else None


def find_data_config(
    source: str | Path | None, names: str, model: str | None, *, file: str | None = None
) -> DataConfig | None:
    """Find the preprocessing that weights expect; None where nothing states it.

    In this order: what the weights state themselves, see `WeightsDescription`; timm, if it is installed and has the
    model; torchvision's transform of the weights that it publishes in a file of that name, or of its newest ones, else
    ImageNet's mean and deviation, which all of its classifiers have.

    Args:
        source: of the weights; None where they come from a library, which alone is asked then.
        names: library that the names of the weights come from, see `skipway.load`.
        model: name of the network, as timm knows it.
        file: name of the file that a library publishes the weights in; None: that of `source`, if any.

    Raises:
        CheckpointError: a description beside the weights is damaged.

    >>> find_data_config("resnet50.pth", "torchvision", None).mean
    (0.485, 0.456, 0.406)
    """
    if source is not None:
        file = Path(source).name if file is None else file
        found = WeightsDescription(source).data_config
        if found is not None:
            return found
    if names == "timm" and model is not None and find_spec("timm") is not None:
        return of_timm(model)
    if names == "torchvision":
        known = model is not None and find_spec("torchvision") is not None
        stated = of_torchvision(str(model), file or "") if known else None
        return stated or DataConfig(IMAGENET_MEAN, IMAGENET_STD, "torchvision's weights")
    return None


def read_header(file: Path) -> list[dict[str, Any]]:
    """What a run wrote about inputs and network into a file of weights, each empty where there is nothing."""
    found: list[Any] = [{}, {}]
    with suppress(OSError, ValueError, RecursionError, SafetensorError):  # none of ours: its reader says what is wrong
        with safe_open(file, framework="pt") as content:
            stored = content.metadata() or {}
        found = [json.loads(stored.get(name, "{}")) for name in ("preprocessing", "model")]
    return [each if isinstance(each, dict) else {} for each in found]


def read_description(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file or another value in it.

    Raises:
        CheckpointError: it is no JSON.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{printable(file)} is damaged: {printable(str(error))}; fetch or write it again"
        ) from error
    return content if isinstance(content, dict) else {}


def of_run(stated: Mapping[str, Any], origin: str) -> DataConfig | None:
    """What the header of weights of ours states."""
    found = of_mapping(stated, "mean", "std", origin, stated.get("crop_share"), stated.get("resample"))
    possible = {
        "grey16": stated.get("grey16") in get_args(Grey16),
        "fit": stated.get("fit") in FITS,
        "size": is_whole(stated.get("size"), 1),
    }
    return found and replace(found, **{name: stated[name] for name, holds in possible.items() if holds})


def of_transformers(stated: Mapping[str, Any], origin: str) -> DataConfig | None:
    """What `preprocessor_config.json` states."""
    if stated.get("do_normalize") is False:
        stated = {**stated, "image_mean": [0.0], "image_std": [1.0]}
    return of_mapping(stated, "image_mean", "image_std", origin, hugging_face_share(stated), stated.get("resample"))


def of_timm_hub(stated: Any, origin: str) -> DataConfig | None:
    """What the `pretrained_cfg` of timm's `config.json` states, if it is an object."""
    stated = stated if isinstance(stated, dict) else {}
    return of_mapping(stated, "mean", "std", origin, stated.get("crop_pct"), stated.get("interpolation"))


def hugging_face_share(stated: Mapping[str, Any]) -> float | None:
    """`crop_pct`, or the crop over the shorter side before it."""
    size, crop = stated.get("size"), stated.get("crop_size")
    if isinstance(stated.get("crop_pct"), int | float):
        return stated["crop_pct"]
    edge = size.get("shortest_edge") if isinstance(size, dict) else size
    side = crop.get("height") if isinstance(crop, dict) else crop
    if stated.get("do_center_crop") and isinstance(edge, int) and isinstance(side, int) and 0 < side <= edge:
        return side / edge
    return None


def of_timm(model: str) -> DataConfig | None:
    """What timm says about the weights that it has under a name, with their tag or the first."""
    config = import_library("timm").get_pretrained_cfg(model.replace("-", "_"))
    if config is None:
        return None
    stated = {"mean": config.mean, "std": config.std}
    tag = f" ({config.tag})" if config.tag else ""
    return of_mapping(stated, "mean", "std", f"timm's weights of {model}{tag}", config.crop_pct, config.interpolation)


def of_torchvision(model: str, file: str) -> DataConfig | None:
    """What torchvision says about its weights of a model in a file of that name, else about the newest; None where
    it has none.
    """
    models = import_library("torchvision").models
    if model not in models.list_models():
        return None
    published = models.get_model_weights(model)
    weights = next((each for each in published if Path(each.url).name == file), published.DEFAULT)
    made = weights.transforms()
    stated = {"mean": list(getattr(made, "mean", ())), "std": list(getattr(made, "std", ()))}
    crop, edge = (getattr(made, name, [None])[0] for name in ("crop_size", "resize_size"))
    share = crop / edge if crop and edge else None
    resample = getattr(getattr(made, "interpolation", None), "value", None)
    return of_mapping(stated, "mean", "std", f"torchvision's weights of {model} ({weights.name})", share, resample)


def of_mapping(
    stated: Mapping[str, Any], mean: str, std: str, origin: str, share: Any, resample: Any
) -> DataConfig | None:
    """The config of a description that has mean and deviation, each a list of numbers or one number."""
    middle, scale = numbers(stated.get(mean)), numbers(stated.get(std))
    if middle is None or scale is None or len(middle) != len(scale) or min(scale) <= 0:
        return None
    fitting = share if isinstance(share, int | float) and not isinstance(share, bool) and 0 < share <= 1 else None
    # Pillow's numbers, which Hugging Face stores, or timm's names; other filters are not ours
    ours = (name for name in RESAMPLES if resample in (name, Image.Resampling[name.upper()]))
    return DataConfig(middle, scale, origin, fitting, next(ours, None))


def numbers(value: Any) -> tuple[float, ...] | None:
    """A finite number or several, as floats; None for anything else."""
    return finite_numbers(value if isinstance(value, Sequence) else [value])
