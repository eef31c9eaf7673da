"""Evaluation of a trained run, on its own test images or on others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from skipway.data.decode import MAX_MEGAPIXELS
from skipway.data.sources.detect import COLUMNS, index_source
from skipway.data.sources.index import FilesByClass, class_name, name_list
from skipway.errors import DataError, counted, printable
from skipway.inference.evaluation import Evaluation, evaluate
from skipway.inference.predict import NetworkChoices, Predictor
from skipway.inference.run_images import full_name, learned_images, load_run_data

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RunEvaluation", "autocast_for", "evaluate_images", "evaluate_run"]


@dataclass(frozen=True)
class RunEvaluation:
    """The evaluation of a trained network on a set of images.

    Args:
        name: name of the image set.
        classes: class names in the order of the outputs.
        evaluation: loss and confusion matrix.
        unreadable: (file, reason) of each image that was skipped.
        absent: classes without images.
        remarks: sentences about files that were left out and what else a user may not expect.
    """

    name: str
    classes: tuple[str, ...]
    evaluation: Evaluation
    unreadable: tuple[tuple[str, str], ...] = ()
    absent: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def evaluate_run(
    path: str | Path,
    *,
    device: str = "auto",
    flip: bool | None = None,
    batch_size: int | None = None,
    **network: Unpack[NetworkChoices],
) -> RunEvaluation:
    """Evaluate a run on its test images, in the precision in which it was trained.

    Args:
        path: the run folder, whose best weights by validation are evaluated, or a file of weights in it.
        device: see `Predictor`.
        flip: average the logits with those of the mirrored image; None for the setting of the run.
        batch_size: images per forward pass; None for that of the run.
        network: see `from_pretrained`.

    Raises:
        CheckpointError: there is no run, or its weights cannot be used.
        DataError: the images have changed since the run.
    """
    predictor = Predictor.load(path, device=device, **network)
    instead = "pass images to evaluate on, which are read as the weights expect"
    data, recipe = load_run_data(path, predictor.preprocessing, instead)
    evaluation = evaluate(
        predictor.model,
        data.evaluation_batches("test", batch_size=batch_size or recipe.batch_size, device=predictor.device),
        classes=len(data.classes),
        autocast=lambda: autocast_for(recipe.precision, predictor.device),
        flip=recipe.flip_test if flip is None else flip,
    )
    assert evaluation is not None
    return RunEvaluation(f"{data.name}, test split", data.classes, evaluation, remarks=tuple(doubts(evaluation)))


def doubts(evaluation: Evaluation) -> Iterator[str]:
    """A sentence where the network puts out what is no number, which is counted as an answer like others."""
    if not math.isfinite(evaluation.loss):
        yield f"the mean loss is {evaluation.loss}: outputs of the network are not finite, whose answers mean nothing"


def known_before(path: str | Path, names: set[str]) -> Iterator[str]:
    """A sentence where a run was trained, or its weights were chosen, on some of the images."""
    counts = {split: len(known & names) for split, known in learned_images(path).items()}
    if sum(counts.values()):
        ways = (("train", "trained on"), ("validation", "used to choose the weights"))
        parts = [f"{counts[split]} of them were {what}" for split, what in ways if counts[split]]
        advice = "without images, `skipway evaluate` takes the test images of the run"
        yield f"{' and '.join(parts)}: on new images the accuracy is likely to be lower; {advice}"


def autocast_for(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The autocast context of a run's precision; float32 if the device does not support it."""
    if precision in ("auto", "float32") or (precision == "float16" and device.type == "cpu"):
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def evaluate_images(
    path: str | Path,
    data: Path,
    *,
    device: str = "auto",
    flip: bool | None = None,
    batch_size: int = 64,
    workers: int = 1,
    outside: bool = False,
    max_megapixels: float = MAX_MEGAPIXELS,
    columns: Sequence[str] = COLUMNS,
    **network: Unpack[NetworkChoices],
) -> RunEvaluation:
    """Evaluate a network on images of known classes: on their test split, else their validation split, else on all.

    Args:
        path: see `from_pretrained`.
        data: images as for `skipway train`; the network must know their classes.
        device: see `Predictor`.
        flip: average the logits with those of the mirrored image; None for the setting of the run.
        batch_size: images per forward pass.
        workers: threads that decode images.
        outside: follow links, and paths in lists, that lead out of the data.
        max_megapixels: limit for the pixels of one image, see `skipway.data.DataChoices`.
        columns: names of the columns of a list, see `skipway.data.DataChoices`.
        network: see `from_pretrained`.

    Raises:
        CheckpointError: the weights cannot be used.
        DataError: unknown classes, or no readable image.
    """
    predictor = Predictor.load(path, device=device, max_megapixels=max_megapixels, **network)
    numbers = {class_name(name): number for number, name in enumerate(predictor.classes)}
    nested = any("/" in name for name in numbers)
    found = index_source(
        data,
        allow_empty=True,
        outside=outside,
        columns=columns,
        subfolders="classes" if nested else "merge",
        fewest=1,
    )
    parts = {"test": found.test, "validation": found.validation, "train": found.train}
    chosen = next((split for split, part in parts.items() if part), "train")
    files: FilesByClass = {}
    for name, members in (parts[chosen] or {}).items():
        files.setdefault(class_name(name), []).extend(members)
    unknown = [name for name in files if files[name] and name not in numbers]
    if unknown:
        raise DataError(
            f"class {name_list(unknown)} in {printable(data)} is not one of the network's: "
            f"{name_list(predictor.classes, 20)}"
        )
    pairs = [(file, numbers[name]) for name in files if name in numbers for file in files[name]]
    unreadable: list[tuple[str, str]] = []
    batches = predictor.batches(
        [file for file, _ in pairs],
        torch.tensor([number for _, number in pairs], dtype=torch.int64),
        batch_size=batch_size,
        workers=workers,
        opened=found.store.read,
        failed=lambda file, reason: unreadable.append((file, reason)),
    )
    flip = predictor.preprocessing.flip_test if flip is None else flip
    with torch.inference_mode():
        evaluation = evaluate(predictor.model, batches, classes=len(numbers), autocast=lambda: nullcontext(), flip=flip)
    assert evaluation is not None
    if not evaluation.total:
        first = f"; the first: {printable(unreadable[0][0])}: {unreadable[0][1]}" if unreadable else ""
        raise DataError(f"none of {counted(len(pairs), 'image')} in {printable(data)} can be read{first}")
    absent = tuple(name for name in predictor.classes if not files.get(class_name(name)))
    names = {full_name(found, file) for file, _ in pairs}
    remarks = [*found.left_out.sentences(), *found.remarks, *known_before(path, names), *doubts(evaluation)]
    if others := len(found.files) - sum(map(len, files.values())):
        remarks.append(f"the {chosen} split is evaluated, not the {counted(others, 'image')} of other splits")
    name = found.name if chosen == "train" else f"{found.name}, {chosen} split"
    return RunEvaluation(name, predictor.classes, evaluation, tuple(unreadable), absent, tuple(remarks))
