"""Linear probing: the features of the frozen network are computed once, and the classifier is fitted to them."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from skipway.checkpoint.files import write_json
from skipway.data import Batch
from skipway.data.cache.store import cache_folder
from skipway.data.image_dataset import MemoryDataset
from skipway.errors import SkipwayError, counted, printable, spell
from skipway.surgery.classifier import find_classifiers
from skipway.tracing import preserved_state
from skipway.training.ema import ModelEMA
from skipway.training.linear_head import LinearHead, select_linear_head
from skipway.training.records import write_weights
from skipway.training.run import Run

__all__ = ["fit_classifier"]

TOLERANCE = 1e-3
"""Largest difference between the network's logits and its classifier on the features, over the largest logit."""

Split = Literal["train", "validation"]


def fit_classifier(run: Run) -> bool:
    """Fit the classifier of the run's network to the features of the training images, in place.

    The features are what goes into the classifier in evaluation mode. They are computed once and kept in the cache, by
    the content of weights and images, so that an interrupted run goes on where it was. The penalty of the regression
    is selected on the validation images (`skipway.training.linear_head`). With `freeze="all"` the run is finished
    then; with "first" everything is trained from there, and kept only where validation improves (Kumar et al.
    2022, https://arxiv.org/abs/2202.10054).

    Returns:
        False if the run was told to stop.

    Raises:
        SkipwayError: several processes, no validation images, mixed images, or a network whose logits are not a linear
            map of features.
    """
    check_choices(run)
    classifier = find_linear_classifier(run)
    began = time.monotonic()
    pairs = []
    for split in ("train", "validation"):
        found = compute_features(run, classifier, split)
        if found is None:
            return False
        pairs.append(found)
    seconds = time.monotonic() - began
    images = sum(len(labels) for _, labels in pairs)
    run.reporter.message(
        "features", f"{classifier.in_features:,} of each of {counted(images, 'image')}, in {seconds:,.0f} s"
    )
    head = select_linear_head(pairs[0], pairs[1], len(run.data.classes))
    install(run, classifier, head)
    return True


def check_choices(run: Run) -> None:
    """Refuse what linear probing cannot be combined with."""
    choice = spell("freeze", run.recipe.freeze)
    if run.ranks.world > 1:
        raise SkipwayError(f"{choice}: the rule is one process; run it without torchrun")
    if not len(run.data.validation):
        raise SkipwayError(
            f"{choice}: validation images select its penalty, and there are none; set validation above 0"
        )


def find_linear_classifier(run: Run) -> nn.Linear:
    """The one linear map that makes the logits.

    Raises:
        SkipwayError: there are several, it is no `nn.Linear` with a bias, or something follows it.
    """
    names = find_classifiers(run.model, run.example)
    modules = [run.model.get_submodule(name) for name in names]
    way_out = f"{spell('freeze', str(run.recipe.epochs))} trains the classifier by steps"
    if len(modules) != 1 or not isinstance(modules[0], nn.Linear) or modules[0].bias is None:
        kinds = ", ".join(f"{name} ({type(module).__name__})" for name, module in zip(names, modules, strict=True))
        raise SkipwayError(
            f"{spell('freeze', run.recipe.freeze)}: the rule is a network with one linear classifier "
            f"with a bias, and {run.recipe.model} has {kinds or 'none'}; {way_out}"
        )
    batch = run.data.sample(2, seed=0, device=run.device)
    with preserved_state(run.model), torch.no_grad():
        features, logits = features_of(run.model.eval(), modules[0], batch.inputs)
        gap = (modules[0](features) - logits).abs().max() if features.ndim == 2 else torch.tensor(math.inf)
    if not gap <= TOLERANCE * logits.abs().max():
        raise SkipwayError(
            f"{spell('freeze', run.recipe.freeze)}: something follows {names[0]} in {run.recipe.model}, so "
            f"that its logits are not a linear map of features; {way_out}"
        )
    return modules[0]


def features_of(model: nn.Module, classifier: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into the classifier, and what the model puts out."""
    given: list[Tensor] = []
    handle = classifier.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    try:
        logits = model(inputs)
    finally:
        handle.remove()
    return given[-1], logits


def compute_features(run: Run, classifier: nn.Linear, split: Split) -> tuple[Tensor, Tensor] | None:
    """Features (N, D) and labels (N) of a split, not augmented, from the cache as far as it has them; None if the run
    was told to stop.
    """
    labels = getattr(run.data, split).labels
    table = FeatureTable.open(run, split, len(labels), classifier.in_features)
    with preserved_state(run.model), torch.inference_mode():
        run.model.eval()
        for batch in remaining_batches(run, split, table.done):
            with run.autocast():
                features, _ = features_of(run.model, classifier, batch.inputs)
            table.append(features.float().cpu().numpy())
            run.reporter.images_read(table.done, len(labels))
            if run.ranks.any(run.stop()):
                return None
    return torch.from_numpy(np.asarray(table.rows)), labels


def remaining_batches(run: Run, split: Split, done: int) -> Iterator[Batch]:
    """The images of a split from number `done` on, in order."""
    size = max(1, run.recipe.batch_size // run.progress.accumulation)
    yield from run.data.evaluation_batches(split, batch_size=size, device=run.device, start=done)


@dataclass
class FeatureTable:
    """Features of the first `done` images of a split, float32 (N, D), in a file of the cache or in memory.

    Args:
        rows: of all images.
        done: number of images whose features are there.
        progress: file that holds `done`; None in memory.
    """

    rows: np.ndarray
    done: int
    progress: Path | None

    @classmethod
    def open(cls, run: Run, split: Split, count: int, width: int) -> FeatureTable:
        """The table of a run, as far as an earlier one filled it."""
        try:
            folder = cache_folder(None)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"features-{fingerprint(run, split)}.npy"
            progress = path.with_suffix(".json")
            done = min(count, read_progress(progress)) if path.exists() else 0
            rows = np.lib.format.open_memmap(path, "r+" if done else "w+", np.float32, (count, width))
            return cls(rows, done if rows.shape == (count, width) else 0, progress)
        except (OSError, ValueError) as error:
            run.reporter.message("note", f"features are not cached: {printable(str(error))}")
            return cls(np.empty((count, width), np.float32), 0, None)

    def append(self, features: np.ndarray) -> None:
        """Add the features of the next images."""
        self.rows[self.done : self.done + len(features)] = features
        self.done += len(features)
        if self.progress is not None:
            self.rows.flush()  # type: ignore[attr-defined]
            write_json(self.progress, {"done": self.done})


def read_progress(path: Path) -> int:
    """The number of images in a table; 0 if it is not known."""
    try:
        return int(json.loads(path.read_text())["done"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def fingerprint(run: Run, split: Split) -> str:
    """Hash of everything that features depend on: images, preprocessing, weights, precision, versions."""
    digest = hashlib.sha256()
    images = getattr(run.data, split)
    if isinstance(images, MemoryDataset):
        content = [hashlib.sha256(images.images.numpy().tobytes()).hexdigest()]
    else:
        content = [ascii((name, images.store.stamp(name))) for name in images.names]
    about: dict[str, Any] = {
        "images": content,
        "preprocessing": run.data.preprocessing.to_json(),
        "model": run.recipe.model,
        "precision": run.recipe.precision,
        "device": run.device.type,
        "torch": torch.__version__,
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    for name, tensor in run.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def install(run: Run, classifier: nn.Linear, head: LinearHead) -> None:
    """Write a fitted head into the classifier, record it as the best so far, and end the run if that was all."""
    with torch.no_grad():
        classifier.weight.copy_(head.weight)
        classifier.bias.copy_(head.bias)
    if run.ema is not None:
        run.ema = ModelEMA(run.model, run.ema.decay)
    progress = run.progress
    progress.head_fitted = True
    progress.best_accuracy, progress.best_loss, progress.best_epoch = head.accuracy, head.loss, 0
    if not run.recipe.freeze_plan.takes_steps:
        progress.epochs = 0
    write_weights(run, run.folder.best)
    run.reporter.message(
        "head",
        f"fitted with penalty {head.penalty:.2g}, right for {100 * head.accuracy:.1f} % of the validation images",
    )
