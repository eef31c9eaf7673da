"""Trial steps: the first steps of the planned training, which can be continued, and the model put back after each."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skipway.diagnosis.activations import ActivationObserver, Activations
from skipway.diagnosis.constant_answer import ConstantAnswer
from skipway.diagnosis.odds import FirstSteps, Pause
from skipway.diagnosis.settings import OptimizerParts, Settings
from skipway.diagnosis.subject import Subject, dense, reseed
from skipway.hardware.precision import widest
from skipway.nn import set_step
from skipway.optim.schedules import set_lr
from skipway.probes.measures import distinctness, rms
from skipway.probes.objective import output_heads
from skipway.tracing.containers import tensors_in
from skipway.tracing.module_state import detach_attributes, write_values
from skipway.tracing.restoration import restored

__all__ = ["LookAhead", "Trial"]

Part = tuple[Any, Any]


@dataclass(frozen=True)
class LookAhead:
    """What trial steps have shown, see `Trial`.

    Args:
        losses: of the batch of each step, before the step.
        constant: loss of the best constant answer; None where it is not known.
        fresh: whether every step took another batch of a loader.
        unseen: loss on a held-out part of the diagnosed batch, before and after all steps.
        distinct: 1 − mean cosine between the outputs of different samples of that part, before and after.
        predicted: decrease of the loss by the first step, had the loss been linear: ⟨g, −Δw⟩.
        decreased: decrease of the loss on its own batch by the first step.
        moved: |Δw|/|w| of all parameters together over all steps.
        updates: |Δw|/|w| of the first step, by parameter.
        size: samples in the batch of a step.
        outputs: root mean square of the outputs of held-out samples, before and after all steps.
        first_change: root mean square of the change of these outputs by the first step.
        activations: on the way to these outputs, before and after all steps.
    """

    losses: tuple[float, ...] = field(repr=False)
    constant: float | None
    fresh: bool
    unseen: tuple[float, float]
    distinct: tuple[float, float]
    predicted: float
    decreased: float
    moved: float
    updates: dict[str, float] = field(repr=False)
    size: int
    outputs: tuple[float, float]
    first_change: float
    activations: tuple[Activations, Activations] = field(repr=False)

    @property
    def trust(self) -> float:
        """Decrease of the loss by the first step over the predicted one; near 1 for small steps."""
        return self.decreased / self.predicted if self.predicted else math.nan


class Trial:
    """The first steps of the planned training, on the model itself, with its optimizer, warm-up and schedule.

    Every step takes the next batch of the subject's loader, whose first one is held out, or, without one, the next part
    of the batch, the last of which is held out. `advance(to_step)` goes on where the last call ended, and leaves the
    model as it found it: parameters, buffers, gradients, modes and the random state. In between the trial holds its own
    weights and buffers and the state of its optimizer; during the last step of a call one more copy of the weights.
    Dropout differs at each step and is the same in every trial.

    Args:
        subject: model, batch, targets and loss.
        settings: of the planned training.

    >>> import torch
    >>> subject = Subject(torch.nn.Linear(4, 2), torch.randn(32, 4), torch.arange(32) % 2)
    >>> trial = Trial(subject, Settings(lr=0.1)).advance(5).advance(12)
    >>> len(trial.losses), trial.fresh, round(trial.constant, 1)
    (12, False, 0.7)
    """

    def __init__(self, subject: Subject, settings: Settings) -> None:
        self.subject, self.settings = subject, settings
        self.losses: list[float] = []
        self.information: list[float | None] = []
        """How much higher the loss of each step's batch is where every output is replaced by their mean."""
        self.pauses: list[Pause] = []
        """Of the weights and of the held-out part, before the first step and after each `advance`."""
        self.seconds = 0.0
        self.answer = ConstantAnswer(subject)
        made = settings.make(subject.model, subject.program)
        self.optimizer = made if isinstance(made, OptimizerParts) else OptimizerParts([made])
        self.parameters = list(subject.parameters.values())
        self.modules = list(subject.model.modules())
        self.weights: list[Tensor] = []
        self.originals: list[Tensor] = []
        self.buffers: dict[str, Tensor] = {}
        size = self.part_size = subject.chunk
        chunks = [subject.part(start, start + size) for start in range(0, subject.size - size + 1, size)]
        self.parts, self.held_out = chunks[:-1], chunks[-1]
        if self.fresh:
            self.held_out = subject.part(0, subject.size)
        self.source: Iterator[Part] | None = None
        self.first: Look | None = None
        self.last: Look | None = None
        self.predicted = self.decreased = 0.0
        self.first_change = math.nan
        self.updates: dict[str, float] = {}

    @property
    def fresh(self) -> bool:
        """Whether every step takes another batch of a loader; labels that are drawn at random can only be learnt by
        heart, from one batch.
        """
        return self.subject.batches is not None and self.subject.labelled

    @property
    def size(self) -> int:
        """Samples in the batch of a step."""
        return self.subject.size if self.fresh else self.part_size

    @property
    def constant(self) -> float | None:
        """The loss of the best constant answer; None where it is not known."""
        return self.answer.loss

    @property
    def share(self) -> float:
        """What a step costs in steps of the planned training, whose batch is the loader's or the one given."""
        return 1.0 if self.fresh else self.size / self.subject.size

    @property
    def ended(self) -> bool:
        """Whether a loss was not finite, after which no step is taken."""
        return bool(self.losses) and not math.isfinite(self.losses[-1])

    def advance(self, to_step: int) -> Trial:
        """Take further steps until there are so many in all, or a loss is not finite; return the trial."""
        if to_step <= len(self.losses) or self.ended:
            return self
        began = time.perf_counter()
        with self.subject.running(), self.in_place():
            if self.first is None:
                self.first = look(self.subject, self.held_out)
                self.pauses.append(Pause(0.0, 0.0, self.first.distinct, self.first.loss))
                if not self.fresh:
                    self.see_batch()
            before: list[Tensor] = []
            for number in range(len(self.losses), to_step):
                before = [each.detach().clone() for each in self.parameters] if number + 1 == to_step else []
                self.take_step(number)
                if self.ended:
                    break
            self.last = look(self.subject, self.held_out)
            moved, update = (distance(self.parameters, each) for each in (self.originals, before or self.parameters))
            self.pauses.append(Pause(moved, update, self.last.distinct, self.last.loss))
        self.seconds += time.perf_counter() - began
        return self

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The trial's weights and buffers in the model, and the model's own afterwards; one copy is held at a time."""
        held = [parameter.grad for parameter in self.parameters]
        with restored([self.put_back_weights, lambda: self.put_back_gradients(held)]):
            self.put_in_weights()
            for name, buffer in self.subject.model.named_buffers():
                if name in self.buffers:
                    write_values(buffer, self.buffers[name])
            yield
            self.buffers = {name: buffer.detach().clone() for name, buffer in self.subject.model.named_buffers()}
            self.take_out_weights()

    @torch.no_grad()
    def put_in_weights(self) -> None:
        """Exchange the model's weights for the trial's."""
        fresh = not self.weights
        for number, parameter in enumerate(self.parameters):
            self.originals.append(parameter.detach().clone())
            if not fresh:
                parameter.copy_(self.weights[number])
                self.weights[number] = parameter.new_empty(0)
        self.weights = []

    @torch.no_grad()
    def take_out_weights(self) -> None:
        """Exchange the trial's weights for the model's, last one first."""
        weights = []
        while self.originals:
            parameter = self.parameters[len(self.originals) - 1]
            weights.append(parameter.detach().clone())
            parameter.copy_(self.originals[-1])
            self.originals.pop()
        self.weights = weights[::-1]

    @torch.no_grad()
    def put_back_weights(self) -> None:
        """Put the model's weights back that an exception kept in the trial."""
        while self.originals:
            self.parameters[len(self.originals) - 1].copy_(self.originals[-1])
            self.originals.pop()

    def put_back_gradients(self, held: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, held, strict=True):
            parameter.grad = gradient

    def take_step(self, number: int) -> None:
        """One step of the optimizer, at the rate that is planned for it."""
        part = self.part_of(number)
        if (warmup := self.subject.warmup) is not None:
            set_step(self.subject.model, warmup.now.step + number, warmup.total)
        reseed(self.subject.seed + number)
        self.subject.spend(self.share)
        self.losses.append(self.compute_gradients(number, part))
        if self.ended:
            return
        gradients = [parameter.grad for parameter in self.parameters]
        if self.settings.clip is not None:
            with_gradients = [parameter for parameter in self.parameters if parameter.grad is not None]
            self.settings.clip(with_gradients, self.optimizer.param_groups)
        set_lr(self.optimizer, self.settings.factor(number))  # type: ignore[arg-type]
        self.optimizer.step()
        detach_attributes(self.modules)  # of a state that the next call goes on from
        if number == 0:
            self.note_first_step(part, gradients)
        for parameter in self.parameters:
            parameter.grad = None

    def part_of(self, number: int) -> Part:
        """The batch of a step."""
        if not self.fresh:
            return self.parts[number % len(self.parts)]
        if self.source is None:
            assert self.subject.batches is not None
            self.source = iter(self.subject.batches)
            next(self.source)  # the first one is held out
        return next(self.source)

    def compute_gradients(self, number: int, part: Part) -> float:
        """Put the gradients of the loss on a batch into the parameters, None where none arrives; return the loss."""
        subject = self.subject
        output = subject.call(part)
        if not subject.labelled:  # a part keeps the labels that were drawn for it
            reseed(subject.seed + number % len(self.parts))
        loss = subject.value(output, part)
        heads = live_heads(output)
        found = torch.autograd.grad(loss, [*self.parameters, *heads.values()], allow_unused=True)
        gradients = dict(zip(heads, found[len(self.parameters) :], strict=True))
        if heads and self.fresh and not self.answer.complete:
            self.answer.sampled = True
            self.answer.see(output, loss, part, gradients)
        self.information.append(self.answer.information(output, part, gradients))
        for parameter, gradient in zip(self.parameters, found, strict=False):
            parameter.grad = gradient
        return float(loss.detach())

    def see_batch(self) -> None:
        """Tell the constant answer what the parts of the batch ask for that the steps will share."""
        subject = self.subject
        whole = subject.part(0, len(self.parts) * self.part_size)
        for number, part in enumerate([whole] if subject.labelled else self.parts):
            subject.spend(subject.share(part) / 3)
            with subject.running():
                output = subject.call(part)
                reseed(subject.seed + number)
                loss = subject.value(output, part)
                heads = live_heads(output)
                found = torch.autograd.grad(loss, list(heads.values()), allow_unused=True) if heads else ()
                reseed(subject.seed + number)
                self.answer.see(output, loss.detach(), part, dict(zip(heads, found, strict=True)))

    def note_first_step(self, part: Part, gradients: Sequence[Tensor | None]) -> None:
        """Note how far the first step went, and what it achieved."""
        assert self.first is not None
        names = list(self.subject.parameters)
        for name, parameter, old, gradient in zip(names, self.parameters, self.originals, gradients, strict=True):
            change = parameter.detach() - old
            size, weight = float(change.norm()), float(old.norm())
            self.updates[name] = size / weight if weight else (math.inf if size else 0.0)
            if gradient is not None:
                self.predicted -= float((widest(dense(gradient)) * widest(change)).sum())
        self.decreased = self.losses[0] - look(self.subject, part).loss
        self.first_change = float(rms(look(self.subject, self.held_out).output - self.first.output))

    def first_steps(self) -> FirstSteps:
        """The steps so far, as the odds see them."""
        factors = [self.settings.factor(number) for number in range(len(self.losses))]
        pauses = self.pauses
        if not self.subject.labelled:  # nothing that is learnt of random targets lowers the loss on held-out samples
            late = self.losses[-3:]
            seen = [self.losses[0], *[sum(late) / len(late)] * (len(pauses) - 1)]
            pauses = [replace(pause, unseen=loss) for pause, loss in zip(pauses, seen, strict=True)]
        return FirstSteps(
            losses=self.losses,
            information=self.information,
            pauses=pauses,
            constant=self.constant,
            travelled=max(sum(factors), 1e-9),
            planned=self.settings.planned_distance,
            first_rate=factors[0],
            rate=factors[-1],
            fresh=self.fresh,
            adaptive=self.settings.adaptive,
        )

    def result(self) -> LookAhead:
        """What the steps so far have shown.

        Raises:
            ValueError: none was taken.
        """
        if self.first is None or self.last is None:
            raise ValueError("a trial without steps has no result; advance it first")
        return LookAhead(
            losses=tuple(self.losses),
            constant=self.constant,
            fresh=self.fresh,
            unseen=(self.first.loss, self.last.loss),
            distinct=(self.first.distinct, self.last.distinct),
            predicted=self.predicted,
            decreased=self.decreased,
            moved=self.pauses[-1].moved,
            updates=self.updates,
            size=self.size,
            outputs=(float(rms(self.first.output)), float(rms(self.last.output))),
            first_change=self.first_change,
            activations=(self.first.activations, self.last.activations),
        )


def live_heads(output: Any) -> dict[str, Tensor]:
    """The heads of an output that a gradient reaches, by name; none of an output that is a loss."""
    parts = output_heads(output)[0] if any(each.ndim for each in tensors_in(output)) else {}
    return {name: head for name, head in parts.items() if head.requires_grad}


def distance(weights: Sequence[Tensor], origins: Sequence[Tensor]) -> float:
    """|w − w₀|/|w₀| over all tensors."""
    moved = sum(
        float(widest(new.detach() - old.detach()).square().sum()) for new, old in zip(weights, origins, strict=True)
    )
    size = sum(float(widest(old.detach()).square().sum()) for old in origins)
    return math.sqrt(moved / max(size, 1e-30))


class Look(NamedTuple):
    """A pass without gradients over a part of the batch.

    Args:
        loss: of it.
        distinct: 1 − mean cosine between the outputs of different samples.
        output: the outputs.
        activations: on the way to them.
    """

    loss: float
    distinct: float
    output: Tensor
    activations: Activations


def look(subject: Subject, part: Part) -> Look:
    """Run a part of the batch without gradients."""
    subject.spend(subject.share(part) / 3)
    with subject.running(), torch.no_grad():
        with ActivationObserver(subject.model) as observer:
            output = subject.call(part)
        signal = subject.signal(output, part)
        value = float(subject.value(output, part).detach())
        return Look(value, float(distinctness(signal)), signal, observer.read())
