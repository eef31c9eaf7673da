"""Rules on what a loss can reach: outputs that are bounded in front of a cross-entropy, targets that are broadcast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipway.diagnosis.findings import Finding, format_number
from skipway.diagnosis.remedies import Case
from skipway.diagnosis.rule_context import Context, Rule
from skipway.probes.objective import IGNORED, output_heads
from skipway.surgery.transaction import transaction
from skipway.tracing import Program
from skipway.tracing.program import Value

__all__ = ["LOSS_RULES", "LeaveOut"]


@dataclass(frozen=True)
class LeaveOut:
    """Put an identity in the place of a module without parameters, in place."""

    module: str

    def apply(self, case: Case) -> Case:
        with transaction(case.model, title=str(self)) as change:
            change.set_submodule(self.module, nn.Identity())
            operation = change.commit()
        return replace(case, operation=operation)

    def __str__(self) -> str:
        return f"put nn.Identity() in the place of {self.module}, and apply that where probabilities are read"


class Ceiling(NamedTuple):
    """What stands between the last linear map of a network and a cross-entropy, where that bounds the outputs.

    Args:
        loss: the least that any weights reach, in nats.
        operators: that the outputs come through.
        module: that does nothing else; None where there is none.
    """

    loss: float
    operators: tuple[str, ...]
    module: str | None


def bounded_output(context: Context) -> Iterator[Finding]:
    """A softmax, sigmoid or tanh in front of a cross-entropy: no weights bring the loss near 0."""
    asked, ceiling = context.measured.asked, ceiling_of(context)
    if asked is None or ceiling is None or not ceiling.loss > NEAR * asked.entropy:
        return
    through = " and ".join(ceiling.operators)
    yield Finding(
        rule="bounded-output",
        level="serious",
        what=f"the outputs come through {through}, so that no weights bring the loss below "
        f"{format_number(ceiling.loss)}; the best constant answer has {format_number(asked.entropy)}",
        why="Cross-entropy takes a softmax of what it is given. Of numbers that are bounded already it is nearly even, "
        "whatever the network has learned, and its gradients are small. Give it the output of the last linear map.",
        source="torch.nn.CrossEntropyLoss expects unnormalised logits "
        "(https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html); measured on the right "
        f"answers as logits of ±{LOGIT:g}",
        evidence={"least loss": ceiling.loss, "loss of the best constant answer": asked.entropy},
        where=() if ceiling.module is None else (ceiling.module,),
        remedies=() if ceiling.module is None else (LeaveOut(ceiling.module),),
    )


NEAR = 0.1
"""Share of the loss of the best constant answer up to which the least loss counts as near 0."""
LOGIT = 30.0
"""Size of logits that no softmax tells from certainty: e^−60 is left."""


def ceiling_of(context: Context) -> Ceiling | None:
    """What the outputs come through after the last linear map, with the loss of the right answers as its results; None
    where there is no cross-entropy, or where the way back to the map is not one of elements.
    """
    program, asked = context.subject.program, context.subject.asked
    for number in program.returned.get("", {}).values() if asked is not None else ():
        output, labels = program[number], asked[1]  # type: ignore[index]
        axes = [axis for axis in range(1, len(output.shape)) if without(output.shape, axis) == tuple(labels.shape)]
        way = way_back(program, output)
        if not output.floating or not axes or len(way) < 2 or prod(way[-1].shape) != output.numel:
            continue
        answers = best_answers(labels, output.shape, axes[-1])
        given = {way[-1].number: answers.reshape(way[-1].shape)}
        try:
            found = program.replay(number, given, lambda value: constant(context, value))
        except (RuntimeError, TypeError, ValueError, IndexError):  # an operator that wants other numbers
            continue
        if found is None or not bool((found.argmax(axes[-1]) == labels)[labels != IGNORED].all()):
            continue
        loss = float(F.cross_entropy(found.movedim(axes[-1], 1).float(), labels, ignore_index=IGNORED))
        passed = [value for value in way[:-1] if value.part not in ("carry", "slice")]
        return Ceiling(loss, tuple(dict.fromkeys(each.operator.strip("_") for each in passed)), bounding(context, way))
    return None


def without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """A shape without one of its axes."""
    return (*shape[:axis], *shape[axis + 1 :])


def way_back(program: Program, value: Value) -> list[Value]:
    """The values from an output back to the last linear map, which is the last of them; empty where ways join."""
    way = [value]
    while way[-1].part != "map":
        signals = program.signals(way[-1])
        if len(signals) != 1:
            return []
        way.append(program[signals[0]])
    return way


def best_answers(labels: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """Logits of the right answers."""
    answers = torch.full(shape, -LOGIT, device=labels.device)
    return answers.scatter_(axis, labels.clamp_min(0).unsqueeze(axis), LOGIT)


def constant(context: Context, value: Value) -> Tensor:
    """The parameter or buffer that a value is; ones where it is computed from some."""
    model = context.subject.model
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    known = next((held[name] for name in value.parameters if name in held), None)
    matches = known is not None and tuple(known.shape) == value.shape
    return known.detach() if known is not None and matches else torch.ones(value.shape)


def bounding(context: Context, way: list[Value]) -> str | None:
    """The module without parameters and parts of its own that does what bounds the outputs, and nothing else: it runs
    once.
    """
    program, model = context.subject.program, context.subject.model
    numbers = {value.number for value in way}
    for value in way[:-1]:
        for name in program.makers.get(value.number, ()):
            module = model.get_submodule(name)
            own = next(module.parameters(), None) is None and next(module.children(), None) is None
            if name and own and program.runs[name] == 1 and numbers & set(program.given.get(name, {}).values()):
                return name
    return None


def constant_targets(context: Context) -> Iterator[Finding]:
    """One answer that is right for every sample."""
    ahead, asked = context.measured.ahead, context.measured.asked
    if ahead is None or ahead.constant is None or not 0 <= ahead.constant <= SAME * min(ahead.losses[0], 1.0):
        return
    labels = "all labels of the batches that were seen are the same class"
    yield Finding(
        rule="constant-targets",
        level="serious",
        what=f"{labels if asked else 'one output is right for all samples'}: the best constant answer has the loss "
        f"{format_number(ahead.constant)}",
        why="The loss falls to 0 without anything being learned of the inputs. A data set that is sorted by class has "
        "to be shuffled: DataLoader(…, shuffle=True).",
        source="the loss of the best constant answer, beside that of the network",
        evidence={"loss of the best constant answer": ahead.constant, "first loss": ahead.losses[0]},
    )


def trained_already(context: Context) -> Iterator[Finding]:
    """A network that knows the answers before the first step."""
    ahead = context.outlook.ahead
    if ahead is None or ahead.constant is None or not context.learnt:
        return
    yield Finding(
        rule="trained-already",
        level="note",
        what=f"before the first step the loss is {format_number(ahead.unseen[0])}, and the best constant answer has "
        f"{format_number(ahead.constant)}: this network has been trained, or the answer is among its inputs",
        why="The odds are those of trainings that begin with weights drawn at random. Of a trained network the trial "
        "steps only show what these settings do to it: remedies that draw its weights again are not tried.",
        source="the loss of the best constant answer, beside that of the network",
        evidence={"loss": ahead.unseen[0], "loss of the best constant answer": ahead.constant},
    )


SAME = 1e-9
"""Share of the first loss, or of 1 where that has blown up, up to which that of the best constant answer is none."""


ROUNDING = 1e-5
"""Share of two losses up to which they differ by rounding."""


def differ(first: float, second: float) -> bool:
    """Whether two losses differ by more than rounding; of what is not finite nothing is known, so False."""
    finite = isfinite(first) and isfinite(second)
    return finite and abs(first - second) > ROUNDING * max(abs(first), abs(second))


def broadcast_targets(context: Context) -> Iterator[Finding]:
    """Targets (N,) beside outputs (N, 1), or the other way round: a loss of elements compares all with all, so that it
    is the same in another order of the targets, too, and another one where both have one shape.
    """
    subject = context.subject
    part = subject.probed_part
    targets, loss = part[1], subject.loss
    if loss is None or not isinstance(targets, Tensor):
        return
    with subject.running(), torch.no_grad():
        output = subject.call(part)
        head, *others = output_heads(output)[0].values()
        if others or head.shape == targets.shape or head.numel() != targets.numel():
            return
        rolled = [targets.roll(1, axis) for axis in range(targets.ndim)]
        moved = [each for each in rolled if not each.equal(targets)]
        try:
            given, *losses = (float(loss(output, each)) for each in (targets, *moved))
            if all(differ(given, each) for each in losses):
                return  # every output is compared with targets of its own
            fitted = float(loss(output, targets.reshape(head.shape)))
        except Exception:  # anybody's function, which takes targets of one shape only
            return
    subject.spend(subject.share(part) / 3)
    if not differ(given, fitted):
        return
    yield Finding(
        rule="broadcast-targets",
        level="fatal",
        what=f"the outputs have shape {tuple(head.shape)} and the targets {tuple(targets.shape)}: the loss is "
        f"{format_number(given)} in any order of the targets, and {format_number(fitted)} where both have one shape",
        why="Tensors of these shapes are broadcast against each other, so that the output for each sample is compared "
        "with the targets of all samples: the best answer is the mean of the targets, whatever the input. Give the "
        "targets the shape of the outputs: targets.view_as(output).",
        source="broadcasting, https://docs.pytorch.org/docs/stable/notes/broadcasting.html; measured with targets of "
        "both shapes, and in another order",
        evidence={"loss": given, "loss at the same shape": fitted},
    )


LOSS_RULES: tuple[Rule, ...] = (bounded_output, broadcast_targets, constant_targets, trained_already)
