"""The images of a run of `skipway train`, as its network takes them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from skipway.checkpoint.files import read_json, read_safetensors
from skipway.data import Data, load
from skipway.data.preprocessing import Preprocessing
from skipway.data.sources.detect import index_source
from skipway.data.sources.index import FilesByClass, SourceIndex
from skipway.data.split import read_split
from skipway.errors import CheckpointError, DataError, SkipwayError, counted, printable
from skipway.inference.predict import read_inputs, weights_file
from skipway.recipe import Recipe, ResolvedRecipe

__all__ = ["RunImages", "full_name", "learned_images", "load_run_data"]

CPU = torch.device("cpu")
BATCH = 256
"""Images that are decoded at a time."""


def load_run_data(path: str | Path, preprocessing: Preprocessing, instead: str) -> tuple[Data, ResolvedRecipe]:
    """Load the images that a run was trained and tested on, with its recipe.

    Args:
        path: the run folder, or a file of weights in it.
        preprocessing: what the weights expect.
        instead: what to do where the run's own images cannot be used, for messages.

    Raises:
        CheckpointError: there is no recipe, or its weights expect another preprocessing.
        DataError: the images have changed since the run.
    """
    file = weights_file(path).parent / "config.json"
    stored = read_json(file)
    if not isinstance(stored, dict) or not isinstance(stored.get("recipe"), dict):
        raise CheckpointError(f"{printable(file)} contains no recipe, so its images are unknown; {instead}")
    recipe = ResolvedRecipe.of(Recipe.from_json(stored["recipe"], printable(file)))
    data = load(recipe.data, **recipe.data_choices(), listed=read_split(file.with_name("split.json")))
    fingerprint = stored["data"].get("fingerprint") if isinstance(stored.get("data"), dict) else None
    if data.classes != preprocessing.classes or data.fingerprint != fingerprint:
        raise DataError(
            f"the images in {printable(str(recipe.data))} have changed since the run, so which of them it was not "
            f"trained on is not known; {instead}"
        )
    read = replace(data.preprocessing, flip_test=preprocessing.flip_test)  # a choice of evaluation
    if read != preprocessing:
        raise CheckpointError(
            f"{printable(str(path))}: these weights expect another preprocessing than {printable(file)} describes; "
            f"{instead}"
        )
    return data, recipe


def learned_images(path: str | Path) -> dict[str, set[str]]:
    """The files that a run was trained on and that its weights were chosen on, by split; empty where that is not known.

    Args:
        path: the run folder, or a file of weights in it.
    """
    try:
        file = weights_file(path).parent / "config.json"
        recipe = ResolvedRecipe.of(Recipe.from_json(read_json(file)["recipe"], printable(file)))
        choices = {name: value for name, value in recipe.data_choices().items() if name in INDEXED}
        if recipe.data is None:  # the bundled digits
            return {}
        index = index_source(recipe.data, allow_empty=True, fewest=1, **choices)
        listed = read_split(file.with_name("split.json"))
    except (SkipwayError, KeyError, TypeError):  # weights alone, text, or images that are no longer there
        return {}
    return {
        split: {full_name(index, name) for name in (listed[split] if listed else names_of(getattr(index, split)))}
        for split in ("train", "validation")
    }


INDEXED = ("outside", "columns", "subfolders")
"""Choices of a recipe that say where a source has its images."""


def full_name(index: SourceIndex, name: str) -> str:
    """The path of an image of a source; of one in an archive, as if it were a file beside it."""
    return os.path.join(index.root.resolve(), name)


def names_of(files: FilesByClass | None) -> list[str]:
    """The names of all images of a split."""
    return [name for members in (files or {}).values() for name in members]


class RunImages:
    """The images of a run: training images to calibrate on, held-out ones to check on.

    Args:
        path: the run folder, or a file of weights in it.

    Raises:
        CheckpointError: there is no run of images.
        DataError: the images have changed since the run.
    """

    def __init__(self, path: str | Path) -> None:
        file = weights_file(path)
        inputs = read_inputs(read_safetensors(file)[1], file)
        if not isinstance(inputs, Preprocessing):
            raise SkipwayError(f"{printable(str(path))}: a run of text; the rule is one of images")
        self.path, self.preprocessing = path, inputs
        self.data, _ = load_run_data(path, inputs, "give images as tensors or by a DataLoader")

    def calibration(self, count: int) -> Tensor:
        """Up to so many training images, float32 (N, C, H, W), drawn regardless of class and not augmented."""
        return self.data.sample(count, seed=0, device=CPU).inputs.contiguous()

    def held_out(self) -> tuple[Tensor, Tensor]:
        """The validation images, float32 (N, C, H, W), and their classes, int64 (N,).

        Raises:
            DataError: the run had none.
        """
        batches = list(self.data.evaluation_batches("validation", batch_size=BATCH, device=CPU))
        if not batches:
            raise DataError(
                f"{printable(str(self.path))}: the run has {counted(0, 'validation image')}; give check=, held-out "
                "images with their classes"
            )
        return torch.cat([each.inputs for each in batches]).contiguous(), torch.cat([each.labels for each in batches])
