"""The loss of the best constant answer: what a network reaches that has learnt nothing of its inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipway.diagnosis.asked_classes import entropy_of_counts, read_asked_classes
from skipway.diagnosis.subject import Subject, reseed
from skipway.errors import SkipwayError
from skipway.hardware.precision import widest
from skipway.probes.objective import IGNORED, output_heads
from skipway.tracing.containers import map_tensors, tensors_in

__all__ = ["ConstantAnswer"]

ENOUGH, PER_CLASS = 5000, 20
"""Labels, and labels for each class, from which on no further batch is looked at."""
LARGE = 30_000_000
"""Numbers in an output from which on it is not copied in double precision."""
SAME, BESIDE = 0.01, 0.3
"""Share of the loss up to which it is the cross-entropy of one output, and up to which a part beside that may be a
constant one, as that of a router."""


class ConstantAnswer:
    """The loss of the best constant answer, from outputs of a network for one batch or for several.

    Where the loss is a cross-entropy, whoever computes it, that is the entropy of the labels: of those that the trial
    steps learn where they share one batch, else estimated for all labels from those of the first batches. Another loss
    of the output is minimised over one output for all samples and positions, by L-BFGS, without a pass of the model. Of
    a loss that a model computes itself from something else it is not known.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.sampled = False
        """Whether the batches are samples of further ones."""
        self.counts: Tensor | None = None
        self.beside = 0.0
        self.values: list[float] = []
        self.known = True
        self.start: float | None = None
        """The first loss: far from it outputs are saturated, and their gradient no longer tells what is asked for."""

    @property
    def complete(self) -> bool:
        """Whether further batches would not change it."""
        if self.counts is None:
            return not self.known or len(self.values) >= 4
        return int(self.counts.sum()) >= min(ENOUGH, PER_CLASS * len(self.counts))

    @property
    def loss(self) -> float | None:
        """The loss; None where it is not known."""
        if self.counts is not None:
            return entropy_of_counts(self.counts, corrected=self.sampled) + self.beside
        return sum(self.values) / len(self.values) if self.values else None

    def see(self, output: Any, loss: Tensor, part: tuple[Any, Any], gradients: Mapping[str, Tensor | None]) -> None:
        """Take in one batch.

        Args:
            output: of the model.
            loss: of it.
            part: example and targets of the batch.
            gradients: of the loss with respect to the heads of the output by name; None where none arrives.
        """
        entering = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        if not bool(loss.isfinite()):
            return
        value = float(loss.detach())
        self.start = value if self.start is None else self.start
        if (self.counts is not None or self.values) and not 0.5 < value / (self.start or 1.0) < 2:
            return
        heads = output_heads(output)[0]
        found = None
        if len(entering) == 1 and not self.values:
            ((name, gradient),) = entering.items()
            found = self.given_labels(heads[name], part[1], value)
            if found is None:
                found = self.asked_labels(heads[name], gradient, value)
        if found is not None:
            labels, classes = found
            counts = torch.bincount(labels[labels != IGNORED].flatten(), minlength=classes).cpu()
            self.counts = counts if self.counts is None else self.counts + counts
        elif self.counts is None:
            least = self.minimum(output, heads, part) if entering else None
            self.known = least is not None
            self.values += [] if least is None else [least]

    def given_labels(self, head: Tensor, targets: Any, loss: float) -> tuple[Tensor, int] | None:
        """The one tensor of class numbers among the targets, and the number of classes, where a loss is its
        cross-entropy; None where it is not.
        """
        found = [each for each in tensors_in(targets) if each.dtype == torch.int64]
        for axis in dict.fromkeys((head.ndim - 1, 1)):
            classes = head.shape[axis]
            if len(found) != 1 or found[0].shape != head.shape[:axis] + head.shape[axis + 1 :] or classes < 2:
                continue
            known = found[0][found[0] != IGNORED]
            if not known.numel() or int(known.min()) < 0 or int(known.max()) >= classes:
                continue
            outputs = widest(head.detach().movedim(axis, 1))
            if self.is_cross_entropy(float(F.cross_entropy(outputs, found[0], ignore_index=IGNORED)), loss):
                return found[0], classes
        return None

    def asked_labels(self, head: Tensor, gradient: Tensor, loss: float) -> tuple[Tensor, int] | None:
        """The classes that a loss asks for, as its gradient shows, and their number, where it is their cross-entropy;
        None where it is not.
        """
        found = read_asked_classes(head, gradient)
        if found is None or not self.is_cross_entropy(found[0].cross_entropy, loss):
            return None
        return found[1], found[0].classes

    def is_cross_entropy(self, computed: float, loss: float) -> bool:
        """Whether a loss is the cross-entropy that was computed from its output, or that and a small constant part."""
        beside = loss - computed
        own = self.subject.objective is not None and self.subject.objective.own
        allowed = BESIDE if own else SAME
        if not abs(beside) <= allowed * abs(loss) + 1e-3:
            return False
        self.beside = beside if abs(beside) > SAME * abs(loss) else 0.0
        return True

    def minimum(self, output: Any, heads: Mapping[str, Tensor], part: tuple[Any, Any]) -> float | None:
        """The smallest loss of one output for all samples and positions; None where the loss is not computed from it,
        or is not finite.
        """
        if self.subject.objective is None or self.subject.objective.own:
            return None
        means = {id(head): mean_over(widest(head.detach()), self.constant_shape(head)) for head in heads.values()}

        def evaluate(constants: Mapping[int, Tensor]) -> Tensor:
            answers = {id(head): broadcast(constants[id(head)], head) for head in heads.values()}
            return widest(self.loss_with(answers, output, part))

        def closure() -> Tensor:
            loss = evaluate(constants) / scale  # the steps of the search are no smaller than the loss is large
            found = torch.autograd.grad(loss, variables, allow_unused=True)
            for variable, gradient in zip(variables, found, strict=True):
                variable.grad = torch.zeros_like(variable) if gradient is None else gradient
            return loss

        # from the mean of outputs that have blown up the search does not come back
        starts = (means, {number: torch.zeros_like(mean) for number, mean in means.items()})
        with suppress(SkipwayError, RuntimeError, ValueError, TypeError):  # a loss that refuses such an output
            losses = [float(evaluate(start).detach()) for start in starts]
            first = min(filter(math.isfinite, losses), default=None)
            if first is None:
                return None
            scale = max(abs(first), 1e-12)
            constants = {number: each.requires_grad_() for number, each in starts[losses.index(first)].items()}
            variables = list(constants.values())
            search = torch.optim.LBFGS(variables, max_iter=25, line_search_fn="strong_wolfe")
            search.step(closure)  # type: ignore[arg-type]
            last = float(evaluate(constants).detach())
            return min(first, last) if math.isfinite(last) else first
        return None

    def information(self, output: Any, part: tuple[Any, Any], gradients: Mapping[str, Tensor | None]) -> float | None:
        """How much higher the loss is where every output is replaced by their mean over samples and positions; None
        where that cannot be told.

        What is common to all samples, such as how frequent the classes of a batch are, is in both losses. What is left
        is what the outputs say about their own samples, far below the noise of the loss itself.
        """
        heads = {name: head for name, head in output_heads(output)[0].items() if gradients.get(name) is not None}
        if not heads or self.subject.objective is None or sum(head.numel() for head in heads.values()) > LARGE:
            return None
        if self.subject.objective.own:
            ((name, head), *others) = heads.items()
            found = None if others else read_asked_classes(head, gradients[name])
            if found is None:
                return None
            axis = 1 if found[1].shape == head.shape[:1] + head.shape[2:] and head.ndim > 2 else head.ndim - 1
            constant = widest(head.detach().movedim(axis, -1).flatten(0, -2)).mean(0).log_softmax(0)
            labels = found[1][found[1] != IGNORED]
            return float(-constant[labels].mean()) - found[0].cross_entropy
        exact = {id(head): widest(head.detach()) for head in heads.values()}
        means = {
            id(head): broadcast(mean_over(exact[id(head)], self.constant_shape(head)), exact[id(head)])
            for head in heads.values()
        }
        with suppress(SkipwayError, RuntimeError, ValueError, TypeError), torch.no_grad():  # a loss that refuses them
            return float(self.loss_with(means, output, part) - self.loss_with(exact, output, part))
        return None

    def loss_with(self, answers: Mapping[int, Tensor], output: Any, part: tuple[Any, Any]) -> Tensor:
        """The loss of an output whose heads, by their identity, are replaced by answers, with the targets that were
        drawn for it where they are drawn at random.
        """
        reseed(torch.initial_seed())
        return self.subject.value(map_tensors(lambda t: answers.get(id(t), t.detach()), output), part)

    def constant_shape(self, head: Tensor) -> tuple[int, ...]:
        """The shape of one answer: the head's with every axis but that of its channels of length 1."""
        returned = self.subject.program.returned.get("", {}).values()
        values = [self.subject.program[number] for number in returned]
        channels = [v.channel for v in values if v.shape[1:] == tuple(head.shape[1:]) and v.channel is not None]
        axis = channels[0] if channels else head.ndim - 1 if head.ndim < 4 else 1
        return tuple(size if place == axis and place else 1 for place, size in enumerate(head.shape))


def mean_over(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The mean over the axes that have length 1 in a shape."""
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    return tensor.mean(axes, keepdim=True).nan_to_num() if axes else tensor.clone()


def broadcast(constant: Tensor, like: Tensor) -> Tensor:
    """A constant in the shape and precision of an output."""
    return constant.to(like.dtype).expand(like.shape).contiguous()
