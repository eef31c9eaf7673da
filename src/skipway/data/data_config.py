"""The preprocessing that published weights expect, where their file, its folder or their library states it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError, safe_open

from skipway.data.fit import RESAMPLES
from skipway.data.loader import IMAGENET_MEAN, IMAGENET_STD
from skipway.data.preprocessing import finite_numbers
from skipway.data.sources.index import class_name
from skipway.errors import CheckpointError, printable
from skipway.weights.files import LAYOUT
from skipway.zoo import import_library

__all__ = ["DataConfig", "find_class_names", "find_data_config", "find_hidden_layer"]


@dataclass(frozen=True)
class DataConfig:
    """How images were made inputs when weights were trained.

    Args:
        mean: subtracted from each channel in [0, 1].
        std: each channel is divided by it.
        origin: where that is stated, in words.
        crop_share: side of the central crop over the shorter side; None where it is not stated.
        resample: "bicubic" or "bilinear"; None where it is not stated, or another filter.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str
    crop_share: float | None = None
    resample: str | None = None


def find_data_config(
    source: str | Path | None, names: str, model: str | None, *, file: str | None = None
) -> DataConfig | None:
    """Find the preprocessing that weights expect; None where nothing states it.

    In this order: the header of a file of ours; `preprocessor_config.json` (transformers) and `config.json` with a
    `pretrained_cfg` (timm) in the same folder; timm, if it is installed and has the model; torchvision's transform
    of the weights that it publishes in a file of that name, or of its newest ones, else ImageNet's mean and deviation,
    which all of its classifiers have.

    Args:
        source: file or folder of the weights; None where they come from a library, which alone is asked then.
        names: library that the names of the weights come from, see `skipway.load`.
        model: name of the network, as timm knows it.
        file: name of the file that a library publishes the weights in; None: that of `source`, if any.

    Raises:
        CheckpointError: a description beside the weights is damaged.

    >>> find_data_config("resnet50.pth", "torchvision", None).mean
    (0.485, 0.456, 0.406)
    """
    if source is not None:
        path = Path(source)
        file = path.name if file is None else file
        found = next(filter(None, (own_header(path), *described_beside(path))), None)
        if found is not None:
            return found
    if names == "timm" and model is not None and find_spec("timm") is not None:
        return of_timm(model)
    if names == "torchvision":
        known = model is not None and find_spec("torchvision") is not None
        stated = of_torchvision(str(model), file or "") if known else None
        return stated or DataConfig(IMAGENET_MEAN, IMAGENET_STD, "torchvision's weights")
    return None


def find_class_names(source: str | Path) -> tuple[str, ...] | None:
    """Find the names of the classes that weights put out, in the order of the outputs; None where nothing states them.

    In this order: the header of a file of ours; `config.json` in the same folder, with `id2label` (transformers) or
    `label_names` (timm).
    """
    path = Path(source)
    stated: Any = (read_own_entry(path, "preprocessing") or ("", {}))[1].get("classes")
    file = (path if path.is_dir() else path.parent) / "config.json"
    if stated is None and file.is_file():
        config = read_description(file)
        stated = config.get("label_names")
        by_number = config.get("id2label")
        if isinstance(by_number, dict) and all(str(number) in by_number for number in range(len(by_number))):
            stated = [by_number[str(number)] for number in range(len(by_number))]
    named = isinstance(stated, list) and all(isinstance(name, str) for name in stated) and len(set(stated)) > 1
    return tuple(map(class_name, stated)) if named else None


def find_hidden_layer(source: str | Path) -> list[Any] | None:
    """The name of the classifier and the width of its hidden layer, where the weights of a run have one."""
    _, model = read_own_entry(Path(source), "model") or ("", {})
    head = model.get("head")
    return head if isinstance(head, list) and len(head) == 2 else None


def read_own_entry(path: Path, name: str) -> tuple[Path, dict[str, Any]] | None:
    """An entry of the header of the file that weights are read from, where a run wrote it."""
    file = next((path / name for name in LAYOUT if (path / name).is_file()), path)
    try:
        with safe_open(file, framework="pt") as content:
            stated = json.loads((content.metadata() or {}).get(name, "null"))
    except (OSError, ValueError, SafetensorError):  # no file of ours; what is wrong with it, its reader says
        return None
    return (file, stated) if isinstance(stated, dict) else None


def own_header(path: Path) -> DataConfig | None:
    """What the header of a file of ours states."""
    found = read_own_entry(path, "preprocessing")
    if found is None:
        return None
    file, stated = found
    return of_mapping(stated, "mean", "std", printable(file), stated.get("crop_share"), stated.get("resample"))


def described_beside(path: Path) -> Iterator[DataConfig | None]:
    """What the folder of the weights says in the files of transformers and of timm."""
    folder = path if path.is_dir() else path.parent
    file = folder / "preprocessor_config.json"
    if file.is_file():
        stated = read_description(file)
        if stated.get("do_normalize") is False:
            stated = {**stated, "image_mean": [0.0], "image_std": [1.0]}
        yield of_mapping(
            stated, "image_mean", "image_std", printable(file), hugging_face_share(stated), stated.get("resample")
        )
    file = folder / "config.json"
    if file.is_file():
        stated = read_description(file).get("pretrained_cfg")
        if isinstance(stated, dict):
            share, resample = stated.get("crop_pct"), stated.get("interpolation")
            yield of_mapping(stated, "mean", "std", printable(file), share, resample)


def read_description(file: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{printable(file)} is damaged: {printable(str(error))}; fetch or write it again"
        ) from error
    return content if isinstance(content, dict) else {}


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
