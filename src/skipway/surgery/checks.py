"""What an operation promises: properties that are measured before it and have to hold after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError, counted
from skipway.surgery.independence import Leaks, Perturbation, measure_leaks
from skipway.surgery.operation import abbreviate
from skipway.surgery.training_pass import TrainingPass, run_training_pass
from skipway.surgery.verification import difference, output_gap, outputs
from skipway.tracing import Example
from skipway.tracing.containers import tensors_in

__all__ = [
    "CHECKS",
    "EQUAL",
    "EQUAL_WITH_DRAWS",
    "Check",
    "ComparisonRule",
    "EqualTraining",
    "EqualTrainingWithDraws",
    "EvaluatedOutputs",
    "Independence",
    "NotComparedError",
    "RunnableTraining",
    "rounding_of",
]

GRADIENT_TOLERANCE = 1e-2
"""Bound on relative differences of gradients: rounding through many layers. A wrong gradient differs by more."""
ROUNDINGS = 16.0
"""How many times as much as by a rounding of the weights a gradient may change: a sum of n terms in another order can
be off by n roundings.
"""
UNSTEADY = 0.1
"""Bound on relative differences of gradients that rounding changes by more than `GRADIENT_TOLERANCE`: what comes from
small batches through many norms and rectifiers. A wrong gradient differs by more.
"""
SMALL = 1e-2
"""A gradient below this share of the average one is compared with the average one."""
LEAK = 1e-5
"""A change of an output below this share of its largest value is rounding."""


class NotComparedError(SkipwayError):
    """A property that cannot be measured on this network and example; the message says why."""


@dataclass(frozen=True)
class ComparisonRule:
    """How values before and after an operation are compared.

    Args:
        tolerance: bound on the difference of the outputs, relative to their largest value; None if they may change.
        recast: parameters that enter in another way than before, so that their gradients are others.
        rounded: measures the property of the network as it is now, with its parameters changed by a rounding.
    """

    tolerance: float | None
    recast: AbstractSet[nn.Parameter] = frozenset()
    rounded: Callable[[], Any] | None = None


class Check:
    """A property of a network. One that has no property to lose is measured as None."""

    name: ClassVar[str]
    awake: ClassVar[bool] = False
    """Whether parameters that the operation added or set to 0 are drawn at random when it is measured afterwards."""

    def measure(self, model: nn.Module, example: Example, before: Any = None) -> Any:
        """Measure it; the model is left alone. `before` is what was measured before the operation, after it.

        Raises:
            NotComparedError: that is not possible.
        """
        raise NotImplementedError

    def compare(self, before: Any, after: Any, how: ComparisonRule) -> str:
        """Say in words what holds.

        Raises:
            SkipwayError: it does not hold any more.
        """
        raise NotImplementedError


class EvaluatedOutputs(Check):
    """All outputs in evaluation mode are equal up to the tolerance."""

    name = "outputs in evaluation"

    def measure(self, model: nn.Module, example: Example, before: Any = None) -> list[Tensor]:
        return outputs(model, example)

    def compare(self, before: list[Tensor], after: list[Tensor], how: ComparisonRule) -> str:
        if how.tolerance is not None and len(after) < len(before):
            raise SkipwayError(f"the network returned {counted(len(before), 'tensor')}, and returns {len(after)}")
        gap = output_gap(before, after)
        if how.tolerance is not None and not gap <= how.tolerance:
            raise SkipwayError(
                f"the output changed by {gap:.3g} of its largest value, more than tolerance={how.tolerance:g}"
            )
        tensors = counted(len(before), "tensor")
        allowed = "" if how.tolerance is None else f" ({how.tolerance:.3g} is allowed)"
        return f"{tensors}, difference {gap:.3g} of the largest value{allowed}"


class RunnableTraining(Check):
    """A training pass runs, forward and backward."""

    name = "training"
    draws_by_shape: ClassVar[bool] = False

    def measure(self, model: nn.Module, example: Example, before: Any = None) -> TrainingPass:
        try:
            found = run_training_pass(model, example, self.reference(before), draws_by_shape=self.draws_by_shape)
        except Exception as problem:  # whatever a network raises in training mode, and a batch of one sample makes it
            what = f"{type(problem).__name__}: " * (not isinstance(problem, SkipwayError))
            raise NotComparedError(f"a training pass does not run ({what}{problem})") from problem
        if found is None:
            raise NotComparedError("no output has a gradient")
        return found

    def reference(self, before: TrainingPass | None) -> TrainingPass | None:
        """The pass before the operation, if gradients are compared with it."""
        return None

    def compare(self, before: TrainingPass, after: TrainingPass, how: ComparisonRule) -> str:
        count = sum(gradient is not None for gradient in after.gradients.values())
        parameters = counted(len(after.parameters), "parameter")
        return f"a pass forward and backward runs; with a gradient: {count} of {parameters}"


class EqualTraining(RunnableTraining):
    """A training pass computes the same outputs, running statistics and gradients, of the inputs and of all parameters
    that were there before and kept their values. Random numbers are the same in both.
    """

    def reference(self, before: TrainingPass | None) -> TrainingPass | None:
        return before

    def compare(self, before: TrainingPass, after: TrainingPass, how: ComparisonRule) -> str:
        loosest = 1.0 if how.tolerance is None else how.tolerance
        gap = output_gap(before.outputs, after.outputs)
        if not gap <= max(10 * loosest, LEAK):
            raise SkipwayError(f"in training mode the output changed by {gap:.3g} of its largest value")
        kept = [(key, old, after.buffers[key]) for key, old in before.buffers.items() if key in after.buffers]
        wrong = [
            f"{type(module).__name__}.{name}"
            for (module, name), old, new in kept
            if old.numel() and not (old.shape == new.shape and difference([old], [new]) <= max(10 * loosest, LEAK))
        ]
        if wrong:
            raise SkipwayError(f"after a training pass {abbreviate(wrong)} hold other values than before")
        gaps = gradient_gaps(pairs_before_and_after(before, after, how.recast))
        allowed = max(GRADIENT_TOLERANCE, rounding_of(after.parameters.values()), 10 * loosest)
        unsteady = (
            self.compare_with_rounding(gaps, after, how, allowed) if max(gaps.values(), default=0.0) > allowed else ""
        )
        buffers, gradients = counted(len(kept), "buffer"), counted(len(gaps), "gradient")
        return (
            f"a pass forward and backward: outputs (difference {gap:.3g}), {buffers} and {gradients} "
            f"(difference {max(gaps.values(), default=0.0):.3g}) are equal{unsteady}"
        )

    def compare_with_rounding(
        self, gaps: Mapping[str, float], after: TrainingPass, how: ComparisonRule, allowed: float
    ) -> str:
        """Say which gradients change by more than is allowed because rounding changes them as much.

        Raises:
            SkipwayError: one changes by more than that.
        """
        try:
            rounded = None if how.rounded is None else how.rounded()
        except NotComparedError:
            rounded = None
        own = (
            {}
            if rounded is None
            else gradient_gaps(
                [
                    *(
                        (f"input {number}", *pair)
                        for number, pair in enumerate(zip(after.inputs, rounded.inputs, strict=True))
                    ),
                    *((name, after.gradients[name], rounded.gradients[name]) for name in after.parameters),
                ]
            )
        )
        wide = {name: gap for name, gap in gaps.items() if not gap <= allowed}
        for name in sorted(wide, key=lambda each: -wide[each]):
            bound = max(allowed, min(ROUNDINGS * own.get(name, 0.0), UNSTEADY))
            if not wide[name] <= bound:
                rounding = f"; rounding of the weights changes it by {own[name]:.3g}" if name in own else ""
                raise SkipwayError(f"the gradient of {name} changed by {wide[name]:.3g} of its size{rounding}")
        return (
            f"; rounding of the weights changes {abbreviate(list(wide))} by up to {max(own[name] for name in wide):.3g}"
        )


class EqualTrainingWithDraws(EqualTraining):
    """The same where parts that were added draw random numbers of their own, which changes those of all others: random
    numbers depend on what they are drawn for.
    """

    draws_by_shape = True


def rounding_of(parameters: Iterable[Tensor]) -> float:
    """How much rounding may change what is computed with parameters of the narrowest type among these."""
    types = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    return 8 * max((torch.finfo(each).eps for each in types), default=0.0)


GradientPair = tuple[str, Tensor | None, Tensor | None]


def pairs_before_and_after(
    before: TrainingPass, after: TrainingPass, recast: AbstractSet[nn.Parameter]
) -> list[GradientPair]:
    """The gradients that have to be equal: of the inputs, and of the parameters that kept their values."""
    names = {parameter: name for name, parameter in after.parameters.items()}
    pairs = [(f"input {number}", *pair) for number, pair in enumerate(zip(before.inputs, after.inputs, strict=True))]
    for name, parameter in before.parameters.items():
        now = names.get(parameter)
        if now is not None and parameter not in recast and before.versions[name] == after.versions[now]:
            pairs.append((name, before.gradients[name], after.gradients[now]))
    return pairs


def gradient_gaps(pairs: Iterable[GradientPair]) -> dict[str, float]:
    """The difference of each pair of gradients relative to its size, of those that exist: root mean squares."""
    known = [(name, old, new) for name, old, new in pairs if old is not None or new is not None]
    if not known:
        return {}
    sizes = [root_mean_square(new if old is None else old) for _, old, new in known]
    floor = SMALL * sum(sizes) / len(sizes) or 1.0
    gaps: dict[str, float] = {}
    for (name, old, new), size in zip(known, sizes, strict=True):
        gap = new if old is None else old if new is None else new - old
        ratio = 0.0 if gap is None else root_mean_square(gap) / max(size, floor)
        gaps[name] = ratio if ratio == ratio else float("inf")
    return gaps


def root_mean_square(tensor: Tensor | None) -> float:
    """The size of a tensor's values."""
    if tensor is None or not tensor.numel():
        return 0.0
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return float(torch.linalg.vector_norm(dense.abs().float())) / dense.numel() ** 0.5


class Independence(Check):
    """Outputs depend on no more than before: on no later position in a causal network, on no other sample, on nothing
    that a padding mask hides; with random values in what was added or set to 0, since parts that put out 0 hide it.
    """

    name = "what outputs depend on"
    awake = True

    def measure(self, model: nn.Module, example: Example, before: Any = None) -> Leaks:
        if not any(tensor.numel() for tensor in tensors_in(example)):
            raise NotComparedError("the example holds no values")
        leaks = measure_leaks(model, example)
        if any(stays != stays for found in leaks.values() for stays, _ in found.values()):
            raise NotComparedError("outputs are not finite")
        return leaks

    def compare(self, before: Leaks, after: Leaks, how: ComparisonRule) -> str:
        kept: list[Perturbation] = []
        for perturbation, leaks in before.items():
            independent = [key for key, (stays, moves) in leaks.items() if stays <= LEAK < moves]
            changed = after.get(perturbation, {})
            worst = max((changed[key][0] for key in independent if key in changed), default=0.0)
            if worst > 10 * LEAK:
                raise SkipwayError(
                    f"outputs did not depend on {perturbation}, and change with it by {worst:.3g} of the largest once "
                    "what was added does not put out 0 any more"
                )
            if independent:
                kept.append(perturbation)
        if not kept:
            return "no independence was seen before, so none can be lost"
        return f"nothing new; still not on {', nor on '.join(map(str, kept))}"


CHECKS: tuple[Check, ...] = (EvaluatedOutputs(), RunnableTraining(), Independence())
"""What is checked of every operation; outputs in evaluation mode may change as far as its tolerance says."""
EQUAL_WITH_DRAWS: tuple[Check, ...] = (EvaluatedOutputs(), EqualTrainingWithDraws(), Independence())
"""The same where parts that were added draw random numbers."""
EQUAL: tuple[Check, ...] = (EvaluatedOutputs(), EqualTraining(), Independence())
"""What is checked of an operation that keeps the function in training, too."""
