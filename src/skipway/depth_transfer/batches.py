"""Batches of short trainings: functions of seed and step, so that all networks and rates see the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skipway.data import Data
from skipway.data.randomness import draw_key
from skipway.data.text import TextData
from skipway.diagnosis.batches import LoaderPass, check_finite_batch
from skipway.errors import SkipwayError
from skipway.tracing.containers import entries_of, map_tensors, tensors_in
from skipway.tracing.example import as_batch, split_batch
from skipway.tracing.restoration import devices_in_use, seeded_generators

__all__ = ["TrainingBatches", "as_training_batches", "image_batches", "text_batches"]

MOST_BYTES = 2**30
"""Of a loader's batches, which are kept for all trainings."""


@dataclass(frozen=True)
class TrainingBatches:
    """What short trainings are fed with.

    Args:
        name: what it is, in words; stored runs are taken up again only where it is the same.
        at: (seed, step) → (example, targets).
        remark: what a reader of a result has to know; "" for nothing.
    """

    name: str
    at: Callable[[int, int], tuple[Any, Any]]
    remark: str = ""

    def on(self, device: torch.device) -> TrainingBatches:
        """The same batches on a device."""

        def moved(seed: int, step: int) -> tuple[Any, Any]:
            return map_tensors(lambda tensor: tensor.to(device), self.at(seed, step))

        return TrainingBatches(self.name, moved, self.remark)


def image_batches(data: Data, samples: int) -> TrainingBatches:
    """Batches of the training images of a source."""
    samples = min(samples, len(data.train))
    steps = data.steps(samples)

    def at(seed: int, step: int) -> tuple[Any, Any]:
        epoch, start = divmod(step, steps)
        batch = next(
            data.train_batches(seed=seed, epoch=epoch, batch_size=samples, device=torch.device("cpu"), start=start)
        )
        return batch.inputs, batch.targets

    return TrainingBatches(f"{samples} images of {data.name} {data.fingerprint}", at, "; ".join(data.remarks))


def text_batches(data: TextData, samples: int) -> TrainingBatches:
    """Batches of windows of a text, with the next tokens as targets."""
    steps = data.steps(samples)
    name = f"{samples} windows of {data.context} tokens of {data.name} {data.fingerprint}"

    def at(seed: int, step: int) -> tuple[Any, Any]:
        return data.train_batch(*divmod(step, steps), samples, seed=seed)

    return TrainingBatches(name, at, "; ".join(data.remarks))


def as_training_batches(given: Any, steps: int) -> TrainingBatches:
    """Batches of a loader, or one batch for all steps.

    Of a loader the trainings of seed k take the batches k · steps, k · steps + 1, …, read once and kept for all
    networks and rates; one that ends is begun again. A tensor, a tuple of inputs and targets or a mapping is one batch.

    Args:
        given: an iterable of batches, a list of tuples or mappings among them; `(inputs, targets)`; or what the model
            is called with.
        steps: of a training.

    Raises:
        SkipwayError: it yields no batch, or its batches take more than 1 GiB.
    """
    several = isinstance(given, list) and all(isinstance(each, tuple | list | Mapping) for each in given)
    if isinstance(given, tuple | list) and len(given) == 2 and not several:
        return one_batch(*given)
    if (isinstance(given, Tensor | tuple | list) and not several) or entries_of(given) is not None:
        return one_batch(*as_batch(given))
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | nn.Module | torch.utils.data.Dataset):
        raise SkipwayError(
            f"batches={type(given).__name__}: the rule is a DataLoader, another iterable of batches, or one batch as "
            "(inputs, targets)"
        )
    kept = KeptBatches(given)
    kind = type(given).__name__
    return TrainingBatches(f"batches of a {kind}", lambda seed, step: kept.take(seed * steps + step))


def one_batch(example: Any, targets: Any) -> TrainingBatches:
    """The same batch in every step."""
    remark = "one batch is used in every step, so these are rates for learning it by heart; give a loader for others"
    return TrainingBatches("one batch", lambda seed, step: (example, targets), remark)


class KeptBatches:
    """The batches of a loader by number. Torch's random numbers, of which a loader shuffles and augments, begin at a
    function of that number, so that another session reads the same batches.

    Args:
        loader: read as far as is asked for, and begun again where it ends.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.batches: list[tuple[Any, Any]] = []
        self.rest = self.read(loader)
        self.bytes = 0

    def read(self, loader: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield the batches again and again, without the last one of a round where it is smaller than the first one."""
        full = None
        while True:
            known, last, begun = len(self.batches), None, LoaderPass(loader, argument="batches")
            while (batch := begun.take()) is not None:
                if last is not None:
                    yield last
                last = split_batch(batch)
                check_finite_batch(begun.name, *last)
                full = elements_in(last) if full is None else full
            if last is not None and full is not None and elements_in(last) >= full:
                yield last
            if len(self.batches) == known:
                return

    def following(self) -> tuple[Any, Any] | None:
        """The next batch; None where there is none."""
        with seeded_generators(devices_in_use(), draw_key(len(self.batches), "batches")):
            return next(self.rest, None)

    def take(self, number: int) -> tuple[Any, Any]:
        """The batch of a number; of a source that can be read once and has ended, those it had again."""
        while len(self.batches) <= number and (found := self.following()) is not None:
            self.batches.append(found)
            self.bytes += sum(each.numel() * each.element_size() for each in tensors_in(found))
            if self.bytes > MOST_BYTES:
                raise SkipwayError(
                    f"batches: the first {len(self.batches)} take more than 1 GiB, and all trainings need the same "
                    "ones; take smaller batches, or fewer steps or seeds"
                )
        if not self.batches:
            raise SkipwayError("batches: the loader yields no batch; give one that does")
        return self.batches[number % len(self.batches)]


def elements_in(batch: Any) -> int:
    """The numbers in the tensors of a batch."""
    return sum(each.numel() for each in tensors_in(batch))
