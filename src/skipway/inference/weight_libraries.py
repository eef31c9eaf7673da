"""Published weights as timm and torchvision keep them: in their local caches, and where they fetch them from."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from skipway.weights.files import read_weights
from skipway.zoo import import_library

__all__ = ["LIBRARIES", "WeightLibrary"]


class WeightLibrary(Protocol):
    """A library of networks with published weights. Names are its own, a tag of timm's included."""

    def find_cached(self, name: str) -> Path | None:
        """The file of weights in a local cache."""
        ...

    def cached_names(self) -> Iterator[str]:
        """The names of all networks whose weights are in a local cache."""
        ...

    def read(self, name: str, file: Path) -> dict[str, Tensor]:
        """The state dict of a file."""
        ...

    def fetch(self, name: str) -> dict[str, Tensor]:
        """The state dict, fetched into the cache."""
        ...

    def describe(self, name: str) -> str:
        """Which weights are taken for a name, with their licence as far as the library states it."""
        ...

    def address(self, name: str) -> str | None:
        """The URL of the weights; None if there are none."""
        ...


def hub_file(repository: str, filename: str) -> Path | None:
    """A file in the cache of the Hugging Face hub."""
    if find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repository.partition("@")
    found = try_to_load_from_cache(name, filename, revision=revision or None)
    return Path(found) if isinstance(found, str) else None


def torch_hub_file(url: str | None) -> Path | None:
    """A file that torch hub has downloaded from a URL."""
    file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name) if url else None
    return file if file is not None and file.is_file() else None


class Timm:
    """timm, which takes weights from the Hugging Face hub, or from a URL."""

    files = ("model.safetensors", "pytorch_model.bin")

    def config(self, name: str) -> Any:
        """timm's description of the weights of a name; None if there are none."""
        try:
            return import_library("timm").get_pretrained_cfg(name)
        except RuntimeError:  # a tag that the network does not have
            return None

    def find_cached(self, name: str) -> Path | None:
        config = self.config(name)
        if config is None:
            return None
        files = (config.hf_hub_filename,) if config.hf_hub_filename else self.files
        on_hub = (hub_file(config.hf_hub_id, file) for file in files if config.hf_hub_id)
        return next((file for file in on_hub if file is not None), torch_hub_file(config.url))

    def cached_names(self) -> Iterator[str]:
        if find_spec("huggingface_hub") is None:
            return
        from huggingface_hub import constants

        timm = import_library("timm")
        for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--timm--*")):
            name = folder.name.removeprefix("models--timm--")
            if timm.is_model(name.partition(".")[0]) and self.find_cached(name) is not None:
                yield name

    def read(self, name: str, file: Path) -> dict[str, Tensor]:
        # timm renames the tensors of some files
        overlay = {"file": str(file)}
        return import_library("timm").create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()

    def fetch(self, name: str) -> dict[str, Tensor]:
        return import_library("timm").create_model(name, pretrained=True).state_dict()

    def describe(self, name: str) -> str:
        config = self.config(name)
        if config is None:
            return name
        return f"{config.tag or name}, {'licence ' + config.license if config.license else 'no licence stated'}"

    def address(self, name: str) -> str | None:
        config = self.config(name)
        if config is None or not config.hf_hub_id:
            return None if config is None else config.url or None
        from huggingface_hub import hf_hub_url

        name, _, revision = config.hf_hub_id.partition("@")
        return hf_hub_url(name, config.hf_hub_filename or self.files[0], revision=revision or None)


class Torchvision:
    """torchvision, which takes weights from URLs into the cache of torch hub."""

    def weights(self, name: str) -> list[Any]:
        """All weights of a network, the default first."""
        models = import_library("torchvision").models
        if name not in models.list_models():
            return []
        kinds = models.get_model_weights(name)
        return sorted(kinds, key=lambda each: each is not kinds.DEFAULT)

    def cached_weights(self, name: str) -> Any:
        """The first weights of a network whose file is in the cache; None if there are none."""
        return next((each for each in self.weights(name) if torch_hub_file(each.url) is not None), None)

    def find_cached(self, name: str) -> Path | None:
        weights = self.cached_weights(name)
        return None if weights is None else torch_hub_file(weights.url)

    def cached_names(self) -> Iterator[str]:
        for name in import_library("torchvision").models.list_models(module=import_library("torchvision").models):
            if self.find_cached(name) is not None:
                yield name

    def read(self, name: str, file: Path) -> dict[str, Tensor]:
        return read_weights(file)

    def fetch(self, name: str) -> dict[str, Tensor]:
        return import_library("torchvision").models.get_model(name, weights=self.weights(name)[0]).state_dict()

    def describe(self, name: str) -> str:
        weights = self.cached_weights(name) or next(iter(self.weights(name)), None)
        return f"{name if weights is None else weights.name}, no licence stated"

    def address(self, name: str) -> str | None:
        return next((each.url for each in self.weights(name)), None)


LIBRARIES: dict[str, WeightLibrary] = {"timm": Timm(), "torchvision": Torchvision()}
