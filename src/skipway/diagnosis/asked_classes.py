"""What a loss asks of an output of classes, read from its gradient, and which tokens that output depends on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.hardware.precision import widest
from skipway.probes.objective import IGNORED, output_heads
from skipway.surgery.independence import others_like
from skipway.tracing.containers import map_tensors, tensors_in
from skipway.tracing.example import call_model

if TYPE_CHECKING:
    from skipway.diagnosis.subject import Subject

__all__ = ["AskedClasses", "answer_in_sight", "entropy_of_counts", "read_asked_classes", "sees_later"]

SILENT = 1e-3
"""Size of a parameter up to which what it multiplies may not be seen in the output: gains of 1e-6, maps of 0."""


@dataclass(frozen=True)
class AskedClasses:
    """What a loss asks of an output of classes.

    Args:
        classes: that the output tells apart.
        places: samples, or positions of samples, at which a class is asked for.
        cross_entropy: mean of -log p(asked) over these places, before training.
        entropy: of the frequencies of the asked classes, in nats: the loss of the best constant answer.
        ahead: how far after a position the token stands that is asked for there and that the output depends on: 1, the
            next token, is seen; 0, copying is enough; None: no answer is in sight.
    """

    classes: int
    places: int
    cross_entropy: float
    entropy: float
    ahead: int | None = None

    @property
    def uniform(self) -> float:
        """The loss of an output that gives every class the same probability, log(classes)."""
        return math.log(self.classes)

    def describe(self, constant: float | None = None) -> str:
        """What a network that has learnt nothing reaches: a constant answer, of this loss if it is known better."""
        best = self.entropy if constant is None else constant
        source = f"the entropy of {self.places:,} labels" if constant is None else "by the frequencies of the classes"
        return (
            f"the best constant answer has a loss of {best:.3g}, {source}; equal probabilities have "
            f"log {self.classes:,} = {self.uniform:.3g}; the network starts at {self.cross_entropy:.3g}"
        )


def read_asked_classes(head: Tensor, gradient: Tensor | None) -> tuple[AskedClasses, Tensor] | None:
    """Read from the gradient of a loss what it asks an output for, and the class asked for at each place, -100 where
    none is; None where the loss is no cross-entropy.

    The gradient of -log softmax(z)[y] is p - onehot(y): it adds up to 0 over the classes, and half of its magnitude is
    at y, nearly so under label smoothing.
    """
    if gradient is None or head.ndim < 2:
        return None
    gradient, rough = gradient.detach().float(), gradient.dtype in (torch.float16, torch.bfloat16)
    for axis in dict.fromkeys((head.ndim - 1, 1)):
        sizes, lowest = gradient.abs().sum(axis), gradient.amin(axis)
        live, clear = sizes > 0, sizes > 1e-3 * sizes.max()  # where the answer is right already, rounding is left
        if head.shape[axis] < 2 or not bool(live.any()) or bool((-lowest < 0.4 * sizes)[clear].any()):
            continue
        if rough or bool((gradient.sum(axis).abs() <= 0.02 * sizes)[clear].all()):
            asked = torch.where(live, gradient.argmin(axis), IGNORED)
            loss = F.cross_entropy(head.detach().movedim(axis, 1).float(), asked, ignore_index=IGNORED)
            seen = asked[live]
            return AskedClasses(head.shape[axis], len(seen), float(loss), entropy(seen, head.shape[axis])), asked
    return None


def entropy(labels: Tensor, classes: int) -> float:
    """Entropy of the frequencies of classes, in nats, see `entropy_of_counts`.

    >>> round(entropy(torch.tensor([0, 1]).repeat(1000), 2), 3)
    0.693
    """
    return entropy_of_counts(torch.bincount(labels.flatten().cpu(), minlength=classes))


def entropy_of_counts(counts: Tensor, *, corrected: bool = True) -> float:
    """Entropy of classes that were counted in a sample, in nats.

    Corrected for a small sample it is the larger one of two estimates: of Miller (1955), the number of classes that
    were seen, less one, over twice the number of samples more; and of Chao & Shen (2003, eq. 7), which allows for
    classes that the sample lacks by the f classes seen once: -sum C p log(C p) / (1 - (1 - C p)^n), C = 1 - f / n.

    >>> round(entropy_of_counts(torch.ones(64)), 2), round(math.log(64), 2)
    (4.16, 4.16)
    >>> round(entropy_of_counts(torch.cat([torch.ones(64), torch.zeros(936)])), 2), round(math.log(1000), 2)
    (6.91, 6.91)
    """
    seen = widest(counts[counts > 0])
    size, once = float(seen.sum()), float((seen == 1).sum())
    if not size:
        return math.log(len(counts))
    shares = seen / size
    plain = float(-(shares * shares.log()).sum())
    if not corrected:
        return plain
    shares = shares * (1 - min(once, size - 1) / size)
    covered = float(-(shares * shares.log() / (1 - (1 - shares).clamp_min(0) ** size)).sum())
    return min(max(plain + (len(seen) - 1) / (2 * size), covered), math.log(len(counts)))


def answer_in_sight(subject: Subject, asked: Tensor) -> int | None:
    """How far after a position the token stands that the loss asks for there, where the output depends on it.

    1: the next token, so that a causal mask is missing; 0: the same token, so that copying is enough. None: no token of
    the inputs is the answer at nine places of ten, or the output does not change with it, as in a causal network, or
    that cannot be measured.
    """
    part = subject.probed_part
    count = subject.count(part)
    asked = batch_first(asked, subject, count)
    if asked.ndim != 2 or asked.shape[1] < 2:
        return None
    for number, tensor in enumerate(tensors_in(part[0])):
        tokens = batch_first(tensor, subject, count)
        if tokens.is_floating_point() or tokens.shape != asked.shape:
            continue
        for ahead in (1, 0):
            answers, wanted = tokens[:, ahead:], asked[:, : asked.shape[1] - ahead]
            places = wanted != IGNORED
            if not bool(places.any()) or float((answers == wanted)[places].float().mean()) < 0.9:
                continue
            for place in neighbours(central(places), places):
                changed = changed_positions(subject, number, place + ahead)
                if changed is not None and place < len(changed) and bool(changed[place]):
                    return ahead
    return None


def batch_first(tokens: Tensor, subject: Subject, count: int) -> Tensor:
    """A view of tokens (samples, positions), which sequence-first batches hold the other way round."""
    flipped = subject.samples.axis == 1 and tokens.ndim == 2 and tokens.shape[1] == count
    return tokens.T if flipped else tokens


def central(places: Tensor) -> int:
    """The position, nearest to the middle, at which most samples are asked."""
    counts = places.sum(0).tolist()
    return min(range(len(counts)), key=lambda place: (-counts[place], abs(place - len(counts) // 2)))


def neighbours(place: int, places: Tensor) -> list[int]:
    """A position and the one after it, or before it, where an answer is asked for, too: of positions that are pooled in
    groups, the last of each group has the next token in another one.
    """
    asked = places.any(0).tolist()
    return [place, *(each for each in (place + 1, place - 1) if 0 <= each < len(asked) and asked[each])][:2]


def sees_later(subject: Subject, tokens: Tensor) -> bool | None:
    """Whether outputs depend on later ones of these tokens of the probed part; None where that cannot be measured."""
    part = subject.probed_part
    number = next((number for number, each in enumerate(tensors_in(part[0])) if each is tokens), None)
    if number is None:
        return None
    last = batch_first(tokens, subject, subject.count(part)).shape[1] - 1
    changed = changed_positions(subject, number, last)
    return None if changed is None else bool(changed[:last].any())


def changed_positions(subject: Subject, number: int, position: int) -> Tensor | None:
    """Whether the output at each position changes with the token at one position, in evaluation mode, with parameters
    that are nearly 0 at others, for the time being; None where that cannot be measured.

    Args:
        number: of the tensor of tokens among the tensors of the inputs.
        position: of the tokens that are exchanged.
    """
    part = subject.part(0, min(2, subject.size))
    count = subject.count(part)

    def exchange(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        if next(numbers) == number:
            tokens = batch_first(tensor, subject, count)
            tokens[:, position] = batch_first(others_like(tensor), subject, count)[:, position]
        return tensor

    numbers = itertools.count()
    other = map_tensors(exchange, part[0])
    try:
        with subject.running(), torch.no_grad(), awake(subject.model):
            subject.model.eval()
            pair = [call_model(subject.model, map_tensors(torch.clone, each)) for each in (part[0], other)]
            heads = [next(iter(output_heads(output)[0].values())) for output in pair]
    except SkipwayError:
        return None
    before, after = (widest(subject.samples.samples_first(head, count)) for head in heads)
    if before.shape != after.shape or before.ndim < 3 or not bool(before.isfinite().all()):
        return None
    return (before - after).abs().flatten(2).amax((0, 2)) > 1e-5 * before.std()


@contextmanager
def awake(model: nn.Module) -> Iterator[None]:
    """Parameters that are nearly 0 are drawn at random, so that nothing hides behind them, and put back."""
    quiet = [each for each in model.parameters() if each.is_floating_point() and each.numel() and is_quiet(each)]
    kept = [each.detach().clone() for each in quiet]
    try:
        for each in quiet:
            each.normal_(std=0.1)
        yield
    finally:
        for each, old in zip(quiet, kept, strict=True):
            each.copy_(old)


def is_quiet(parameter: nn.Parameter) -> bool:
    """Whether the values of a parameter are nearly 0."""
    return float(parameter.detach().float().square().mean()) < SILENT**2
