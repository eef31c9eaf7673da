"""Features of the images of a run: what goes into its classifier in evaluation mode, computed once and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from skipway.data import Batch
from skipway.data.cache.features import FeatureTable
from skipway.data.cache.store import cache_folder, cache_remark
from skipway.data.image_dataset import MemoryDataset
from skipway.errors import SkipwayError
from skipway.tracing import preserved_state
from skipway.training.recovery import is_out_of_memory
from skipway.training.run import Run
from skipway.training.setup import model_config

__all__ = ["FeatureSource", "compute_features", "features_of"]

Split = Literal["train", "validation"]

PIXELS = {"cpu": 32 * 224**2, "cuda": 256 * 224**2}
"""Pixels of a batch by the type of the device; without gradients more fits than in training."""
MOST_IMAGES = 512
CHECKED = 8
"""Images whose features are computed again to see whether cached ones are still those of the network."""
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest difference of features that are the same, over the largest feature, by precision."""


@dataclass(frozen=True)
class FeatureSource:
    """The part of a run that makes features: its network up to the classifier.

    Args:
        run: the run; its network is left as it is.
        name: of the classifier in the network.
        views: number of augmented views of each training image besides the image itself.
    """

    run: Run
    name: str
    views: int = 0

    @property
    def classifier(self) -> nn.Module:
        """What makes the logits of the features: a linear map, or a hidden layer with one."""
        return self.run.model.get_submodule(self.name)

    @property
    def width(self) -> int:
        """Number of features of an image."""
        return next(module.in_features for module in self.classifier.modules() if isinstance(module, nn.Linear))

    @property
    def trunk(self) -> dict[str, Any]:
        """The description of the network without its classifier."""
        return {name: value for name, value in model_config(self.run).items() if name != "head"}

    @property
    def batch_size(self) -> int:
        """Images of a batch, the same in every run on such a device and images of this size, so that features are equal
        bit for bit.
        """
        pixels = PIXELS.get(self.run.device.type, PIXELS["cpu"])
        return max(1, min(MOST_IMAGES, pixels // self.run.data.size**2))

    def batches(self, split: Split, start: int) -> Iterator[Batch]:
        """All images of a split from number `start` on, then those of each view; numbers count through all of them."""
        data, count = self.run.data, len(getattr(self.run.data, split))
        choices: dict[str, Any] = {"batch_size": self.batch_size, "device": self.run.device}
        if start < count:
            yield from data.evaluation_batches(split, **choices, start=start)
        for view in range(self.views if split == "train" else 0):
            first = max(0, start - count * (view + 1))
            if first < count:
                yield from data.view_batches(seed=self.run.recipe.seed, view=view, **choices, start=first)

    def features(self, inputs: Tensor) -> np.ndarray:
        """Features float32 (B, D) of normalised images, in halves where the memory is too small for all."""
        try:
            with self.run.autocast():
                features, _ = features_of(self.run.model, self.classifier, inputs)
            return features.float().cpu().numpy()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(inputs) == 1:
                raise SkipwayError(
                    f"out of memory: not even one image of {inputs.shape[-1]} pixels fits; take a smaller model or size"
                ) from error
        torch.cuda.empty_cache()
        return np.concatenate([self.features(half) for half in inputs.chunk(2)])

    def table(self, split: Split, count: int) -> FeatureTable:
        """The table of a split in the cache."""
        remark = partial(self.run.reporter.message, "note")
        folder = None
        if self.run.recipe.cache is not False:
            try:
                folder = cache_folder(None)
                if split == "train":
                    remark(cache_remark("features of the images are", folder))
            except OSError as error:
                remark(f"features are not cached: {error}")
        name = digest_json([str(self.run.recipe.data), split, self.trunk])[:16]
        return FeatureTable(folder, name, self.key(split), count, self.width, remark)

    def key(self, split: Split) -> str:
        """Hash of what features depend on: images, preprocessing, weights, precision, versions, views."""
        run = self.run
        about: dict[str, Any] = {
            "images": image_stamps(run, split),
            "preprocessing": run.data.preprocessing.to_json(),
            "model": self.trunk,
            "precision": run.recipe.precision,
            "device": run.device.type,
            "batch": self.batch_size,
            "torch": torch.__version__,
            "views": [run.recipe.seed, repr(run.data.augmentation)] if self.views and split == "train" else None,
        }
        digest = hashlib.sha256(digest_json(about).encode())
        for name, tensor in run.model.state_dict().items():
            if not name.startswith(f"{self.name}."):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]


def digest_json(values: Any) -> str:
    """Hash of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def image_stamps(run: Run, split: Split) -> list[str]:
    """What changes with an image of a split: its content, or name, size and modification time of its file."""
    images = getattr(run.data, split)
    if not isinstance(images, MemoryDataset):
        return [ascii((name, images.store.stamp(name))) for name in images.names]
    digest = hashlib.sha256()
    for rows in images.rows.split(MOST_IMAGES):
        digest.update(images.decoded.images[rows].numpy().tobytes())
    return [digest.hexdigest()]


def features_of(model: nn.Module, classifier: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into the classifier, and what the model puts out."""
    given: list[Tensor] = []
    handle = classifier.register_forward_pre_hook(
        lambda _, args, named: given.append(next(iter((*args, *named.values())))), with_kwargs=True
    )
    try:
        logits = model(inputs)
    finally:
        handle.remove()
    return given[-1], logits


def compute_features(source: FeatureSource, split: Split) -> tuple[Tensor, Tensor] | None:
    """Features (N, D) and labels (N) of a split, from the cache as far as it has them; None if told to stop.

    The training images come first as they are, then once for each view.
    """
    run = source.run
    own = getattr(run.data, split).labels
    labels = own.repeat(1 + (source.views if split == "train" else 0))
    with source.table(split, len(labels)) as table, preserved_state(run.model), torch.no_grad():
        run.model.eval()
        if table.done and not still_valid(source, split, table):
            run.reporter.message("note", "cached features are not what the network computes now: they are made anew")
            table.clear()
        for batch in source.batches(split, table.done):
            table.append(source.features(batch.inputs))
            run.reporter.activity("features", table.done, len(labels))
            if run.ranks.meet(stop=run.stop())[1]:
                return None
        return torch.from_numpy(table.read()), labels


def still_valid(source: FeatureSource, split: Split, table: FeatureTable) -> bool:
    """Whether the first cached features are those that the network computes now: its code may have changed."""
    images = getattr(source.run.data, split)
    numbers = torch.arange(min(CHECKED, table.done, len(images)))
    inputs = source.run.data.normalised(next(images.fetch([numbers], source.run.device, None)))
    now = torch.from_numpy(source.features(inputs))
    gap = (now - torch.from_numpy(table.read(len(numbers)))).abs().max()
    return bool(gap <= TOLERANCES[source.run.recipe.precision] * now.abs().max())
