"""Batches of a loader for trial steps: the same ones for every trial, on the model's device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from skipway.errors import SkipwayError, counted
from skipway.tracing.containers import map_tensors, tensors_in
from skipway.tracing.example import split_batch

__all__ = ["Batches", "LoaderPass", "check_finite_batch", "is_finite"]

Batch = tuple[Any, Any]
MOST_KEPT = 2**29
"""Bytes of batches of an iterator that are kept, since they cannot be had again."""


class Batches:
    """What a loader yields, as examples with targets, on a device; every trial begins it anew.

    An iterator, which cannot be begun anew, is taken no further than the longest trial needs, and its batches are kept
    for the other trials, up to 512 MiB. A batch of one sample among larger ones, which batch statistics refuse, is left
    out.

    Args:
        loader: any iterable of batches.
        device: on which the model is; None: batches stay where they are.

    Raises:
        SkipwayError: the loader fails, or yields no batch, or one whose values are not finite; here or in a trial.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device | None = None) -> None:
        self.loader, self.device = loader, device
        self.rounds = self.small = 0
        begun = LoaderPass(loader)
        self.once = begun.iterator is loader
        self.kept: list[Any] = []
        first = begun.take()
        if first is None:
            raise SkipwayError(f"example={type(loader).__name__}: the loader yields no batch; give one that does")
        self.least = begun.least = min(2, samples_in(first))
        second = begun.take()
        self.single = second is None
        """Whether the loader has one batch alone."""
        self.kept += [first, second] if self.once and second is not None else [first]
        self.going_on = begun if self.once else None  # else worker processes end here
        self.first = self.prepared(first)

    def prepared(self, batch: Any) -> Batch:
        """A batch as an example with targets, on the device."""
        inputs, targets = split_batch(batch)
        check_finite_batch(f"example={name_of(self.loader)}", inputs, targets)
        if self.device is None:
            return inputs, targets
        return map_tensors(self.moved, inputs), map_tensors(self.moved, targets)

    def moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end, from the first one on."""
        return self.continued() if self.once else self.renewed()

    def renewed(self) -> Iterator[Batch]:
        """The batches of a loader that can be begun anew, round by round."""
        rounds = 0
        while True:
            begun = LoaderPass(self.loader, self.least)
            while (batch := begun.take()) is not None:
                yield self.prepared(batch)
            rounds += 1
            self.rounds, self.small = max(self.rounds, rounds), max(self.small, begun.small)
            if not begun.taken:  # an object that can be read once, though it is no iterator
                yield self.prepared(self.kept[0])

    def continued(self) -> Iterator[Batch]:
        """The kept batches of an iterator, then further ones, and when it ends the kept ones again."""
        assert self.going_on is not None
        number = 0
        while True:
            if number == len(self.kept) and (batch := self.going_on.take()) is not None:
                if self.going_on.taken * bytes_in(self.kept[0]) <= MOST_KEPT:
                    self.kept.append(batch)
                    number += 1
                yield self.prepared(batch)
                continue
            if number == len(self.kept):
                number, self.rounds = 0, self.rounds + 1
                self.small = self.going_on.small
            number += 1
            yield self.prepared(self.kept[number - 1])

    @property
    def remark(self) -> str:
        """What a reader of a verdict has to know about the batches."""
        parts: list[str] = []
        if self.going_on is not None:
            taken = counted(self.going_on.taken, "batch", "batches")
            parts.append(f"{taken} taken from an iterator, which goes on after them")
        if self.rounds:
            parts.append(f"the loader ended {counted(self.rounds, 'time')}, so that batches repeat")
        if self.small:
            parts.append(f"{counted(self.small, 'batch', 'batches')} of fewer than 2 samples left out")
        return "; ".join(parts)


class LoaderPass:
    """One pass over a loader, whose own random generators go on within it and are back after each batch.

    Args:
        loader: any iterable of batches.
        least: samples of a batch that is not left out.
        argument: under which a caller gave the loader.
    """

    def __init__(self, loader: Iterable[Any], least: int = 0, argument: str = "example") -> None:
        self.name, self.least = f"{argument}={name_of(loader)}", least
        self.taken = self.small = 0
        self.generators = generators_of(loader)
        self.states = [each.get_state() for each in self.generators]
        with self.reading("it cannot be iterated over"):
            self.iterator = iter(loader)

    def take(self) -> Any:
        """The next batch that is large enough; None at the end."""
        while True:
            with self.reading(f"batch {self.taken + self.small + 1} cannot be read"):
                batch = next(self.iterator, self)
            if batch is self:
                return None
            if samples_in(batch) >= self.least:
                self.taken += 1
                return batch
            self.small += 1

    @contextmanager
    def reading(self, problem: str) -> Iterator[None]:
        """The generators stand where this pass has left them, and an error of the loader or its data set is named."""
        held = [each.get_state() for each in self.generators]
        try:
            self.put(self.states)
            yield
        except SkipwayError:
            raise
        except Exception as error:  # anybody's data set
            raise SkipwayError(
                f"{self.name}: {problem}: {type(error).__name__}: {error}; the rule is a loader that can be "
                "read to its end"
            ) from error
        finally:
            self.states = [each.get_state() for each in self.generators]
            self.put(held)

    def put(self, states: Sequence[Tensor]) -> None:
        """Set the states of the generators."""
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)


def name_of(loader: Any) -> str:
    """A loader in a message: the function that yields batches, or the class."""
    function = getattr(loader, "function", None)
    return type(loader).__name__ if function is None else f"{getattr(function, '__name__', 'partial')}()"


def check_finite_batch(loader: str, inputs: Any, targets: Any) -> None:
    """Refuse a batch with values that are not finite."""
    for name, given in (("inputs", inputs), ("targets", targets)):
        if not all(map(is_finite, tensors_in(given))):
            raise SkipwayError(
                f"{loader}: a batch has {name} that are not finite; the rule is finite numbers: mend the data, since "
                "one such batch makes all weights NaN"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether every value of a tensor that can be read, a dense one on a real device, is finite."""
    looked_at = tensor.is_floating_point() and tensor.layout is torch.strided and not tensor.is_nested
    return not looked_at or tensor.is_meta or bool(tensor.isfinite().all())


def samples_in(batch: Any) -> int:
    """The length of the first tensor of a batch."""
    return next((len(each) for each in tensors_in(batch) if each.ndim), 0)


def bytes_in(batch: Any) -> int:
    """Bytes of the tensors of a batch."""
    return sum(each.numel() * each.element_size() for each in tensors_in(batch))


def generators_of(loader: Any) -> list[torch.Generator]:
    """The random generators that a `DataLoader` and its samplers own."""
    owners = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler"))]
    owners.append(getattr(owners[-1], "sampler", None))
    found = {
        id(each): each for owner in owners if isinstance(each := getattr(owner, "generator", None), torch.Generator)
    }
    return list(found.values())
