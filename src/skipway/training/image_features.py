"""Features of the images of a finished run, for the report: those that are at hand, and as many more as time allows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skipway.data.randomness import permutation
from skipway.errors import SkipwayError, counted
from skipway.inference.duplicates import SIDE, thumbnails
from skipway.optim.freeze import FrozenTrunk
from skipway.report.run.findings import ImageFeatures, ImageFindings, find_in_images, write_findings
from skipway.surgery.classifier import find_classifiers
from skipway.tracing import preserved_state
from skipway.training.features import FeatureSource, compute_features
from skipway.training.run import Run

__all__ = ["FeatureRecorder", "feature_seconds", "report_findings"]

SHARE, LEAST = 0.02, 2.0
"""Share of the seconds of the training, and seconds, that features for the report may take."""
MOST, BATCH = 5000, 64
"""Images of a split that are looked at, and of a batch."""
FEW = 50
"""Images below which nothing is looked for."""


class FeatureRecorder:
    """Records what goes into the classifier of a run while its network runs, at no cost.

    Args:
        run: its network has its best weights.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows: list[Tensor] = []
        self.reason = ""
        self.name = ""
        if run.ranks.world > 1:
            self.reason = "Several processes trained, each of which saw a share of the images."
            return
        if run.progress.head is not None:  # the features are what goes into its hidden layer
            self.name = run.progress.head[0]
            return
        try:
            names = find_classifiers(run.model, run.example)
        except SkipwayError as error:
            self.reason = f"No classifier is found: {error}."
            return
        if len(names) == 1 and isinstance(run.model.get_submodule(names[0]), nn.Linear):
            self.name = names[0]
        else:
            kinds = "none" if not names else "several" if len(names) > 1 else "one that is no linear map"
            self.reason = f"Features are what goes into the classifier, and {run.recipe.model} has {kinds}."

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context in which every forward pass is recorded."""
        if not self.name:
            yield
            return
        hook = self.run.model.get_submodule(self.name).register_forward_pre_hook(self.record, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def record(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.rows.append(next(iter((*args, *named.values()))).detach().float().cpu())

    def tested(self) -> Tensor | None:
        """Features of all test images; None where they were not recorded image by image (mirrored, too, say)."""
        rows = torch.cat(self.rows) if self.rows and all(row.ndim == 2 for row in self.rows) else torch.zeros(0, 0)
        return rows if len(rows) == len(self.run.data.test) else None


def feature_seconds(training: float) -> float:
    """Seconds that features for the report may take after so many seconds of training."""
    return max(LEAST, SHARE * training)


def report_findings(run: Run, recorder: FeatureRecorder) -> ImageFindings | str:
    """Look for wrong labels, near-duplicates and outliers in the images of a run, and write them to its folder.

    Returns:
        what was found; or why nothing was looked for, in words.
    """
    if not recorder.name:
        return recorder.reason
    run.reporter.activity("images")
    try:
        given = collect_features(run, recorder)
        if len(given.labels) < FEW:
            return f"{counted(len(given.labels), 'image')} are too few to look for wrong labels and duplicates."
        found = find_in_images(given, run.data)
    except SkipwayError as error:
        return f"Nothing was looked for: {error}."
    write_findings(run.folder.findings, found, run.data)
    run.reporter.message("images", f"{found.sentence()}: see the report")
    return found


def collect_features(run: Run, recorder: FeatureRecorder) -> ImageFeatures:
    """Features of the test images as they were tested, of the others from the cache where the trunk is still the one
    that the classifier was fitted to, else of a random part of them.
    """
    plan = run.recipe.freeze_plan
    fitted = isinstance(plan, FrozenTrunk) and run.progress.best_epoch == 0 and run.recipe.cache is not False
    views = plan.views if isinstance(plan, FrozenTrunk) else 0
    began, allowed = time.monotonic(), feature_seconds(run.seconds)
    rows, small, splits, numbers, complete = [], [], [], [], True
    for split in ("test", "validation", "train"):
        count = len(getattr(run.data, split))
        order = permutation(count, run.recipe.seed, 0)[:MOST]
        tested = recorder.tested() if split == "test" else None
        if not count:
            continue
        if tested is not None:
            found, images = tested[order], read_thumbnails(run, split, order, began + allowed / 2)
        elif fitted and split != "test":
            cached = compute_features(FeatureSource(run, recorder.name, views), split)
            if cached is None:
                break
            found, images = cached[0][order], read_thumbnails(run, split, order, began + allowed)
        else:
            found, images = sample_features(run, recorder.name, split, order, began + allowed)
        complete = complete and len(found) == count
        rows.append(found)
        small.append(images)
        splits += [split] * len(found)
        numbers.append(order[: len(found)])
    labels = [
        getattr(run.data, split).labels[part] for split, part in zip(dict.fromkeys(splits), numbers, strict=False)
    ]
    pixels = torch.cat(small)
    origin = describe_origin(fitted, complete, pixels)
    return ImageFeatures(torch.cat(rows), torch.cat(labels), tuple(splits), torch.cat(numbers), pixels, origin)


def describe_origin(fitted: bool, complete: bool, pixels: Tensor) -> str:
    """Describe what computed the features, of how many images, and for how many there were thumbnails."""
    trunk = (
        "the trunk as published or initialised" if fitted else "the trained network, which knows the training images"
    )
    part = "all images" if complete else f"{counted(len(pixels), 'image')}, a random part"
    read = int(pixels.flatten(1).isfinite().all(1).sum())
    missing = f"; copies were looked for among {read:,} of them, as many as there was time for" * (read < len(pixels))
    return f"By {trunk}, of {part}{missing}"


def read_thumbnails(run: Run, split: str, order: Tensor, deadline: float) -> Tensor:
    """Thumbnails of the images of a split in an order; nan of those for which there is no time."""
    found = torch.full((len(order), SIDE, SIDE), torch.nan)
    done = 0
    for pixels in getattr(run.data, split).fetch(order.split(BATCH), torch.device("cpu"), None):
        found[done : done + len(pixels)] = thumbnails(pixels)
        done += len(pixels)
        if time.monotonic() > deadline or run.stop():
            break
    return found


def sample_features(run: Run, name: str, split: str, order: Tensor, deadline: float) -> tuple[Tensor, Tensor]:
    """Features and thumbnails of the images of a split in an order, of as many as there is time for."""
    source = FeatureSource(run, name)
    found, small = [torch.zeros(0, source.width)], [torch.zeros(0, SIDE, SIDE)]
    with preserved_state(run.model), torch.no_grad():
        run.model.eval()
        for batch in order.split(min(BATCH, source.batch_size)):
            if time.monotonic() > deadline or run.stop():
                break
            pixels = next(iter(getattr(run.data, split).fetch([batch], run.device, None)))
            found.append(torch.from_numpy(source.features(run.data.normalised(pixels))))
            small.append(thumbnails(pixels).cpu())
    return torch.cat(found), torch.cat(small)
