"""The arithmetic of a time budget: how many optimizer steps fit into some seconds, and the schedule over them.

Everything here is a function of measured costs and positions, without a clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

__all__ = ["Plan", "RunCosts", "RunWork", "plan_steps", "validation_part"]

# the latest steps count most: a step has lost most of its weight after so many others
HORIZON = 16
# weight of the first step, which pays for what is done once
FIRST_WEIGHT = 0.05
# a pause within a step counts as so many steps at most, so that it does not change the plan
LONGEST = 4.0
# share of the time that validation may take, and the share of one validation if there is time for few
VALIDATION_SHARE, ONE_VALIDATION_SHARE = 0.2, 0.1
# fewest images that a validation is reduced to
FEWEST_IMAGES = 100
# where not one epoch fits, so many validations at most
PARTS = 4
# change of the steps that are left, from which a plan is changed
TOLERANCE = 0.03


@dataclass(frozen=True)
class RunCosts:
    """Seconds that the parts of a run take.

    Args:
        step: an optimizer step, of late.
        weight: of the steps that this is the mean of.
        image: an evaluated image; 0: not known.
        save: a checkpoint.
        report: what follows the test.
    """

    step: float = 0.0
    weight: float = 0.0
    image: float = 0.0
    save: float = 0.0
    report: float = 0.0

    def with_steps(self, count: int, seconds: float) -> RunCosts:
        """The costs after some more steps in so many seconds.

        >>> RunCosts().with_steps(1, 9.0).with_steps(10, 10.0).step < 1.1
        True
        """
        if count < 1:
            return self
        if not self.weight:
            return replace(self, step=seconds / count, weight=FIRST_WEIGHT * count)
        if self.weight > LONGEST:
            seconds = min(seconds, LONGEST * max(1, count) * self.step)
        kept = self.weight * (1 - 1 / HORIZON) ** count
        return replace(self, step=(kept * self.step + seconds) / (kept + count), weight=kept + count)

    def validation(self, images: int) -> float:
        """Seconds of an evaluation, with the best weights and the checkpoint that are written after it."""
        return images * self.image + 2 * self.save

    def ending(self, images: int) -> float:
        """Seconds of the last weights, the test and the report."""
        return self.save + images * self.image + self.report


@dataclass(frozen=True)
class RunWork:
    """What a run has to do.

    Args:
        per_epoch: steps in which all training images are seen.
        validation: images that are validated on.
        test: images that are tested on.
    """

    per_epoch: int
    validation: int
    test: int


@dataclass(frozen=True)
class Plan:
    """The length of a run, and where its schedule is.

    A schedule is a function of the part of the run that is done. That part grows evenly with the steps from where it
    was when the plan was made, so that it is continuous where the plan changes, and 1 at the planned end.

    Args:
        end: optimizer steps of the run.
        length: steps between two validations.
        start: step at which the plan was made.
        position: part of the run that was done there, 0 <= position <= 1.

    >>> plan = Plan(end=100, length=10).extended(50, 200)
    >>> plan.position, plan.virtual_step(50), plan.virtual_step(200)
    (0.5, 100.0, 200.0)
    """

    end: int = 0
    length: int = 0
    start: int = 0
    position: float = 0.0

    def virtual_step(self, step: int) -> float:
        """The step of a run of `end` steps without changes of plan at which the schedule is the same; `step` itself if
        the plan never changed.
        """
        done = self.position * self.end
        return max(0.0, done + (step - self.start) * ((self.end - done) / max(1, self.end - self.start)))

    def extended(self, step: int, end: int) -> Plan:
        """The plan made at a step, with another end."""
        part = min(1.0, self.virtual_step(step) / max(1, self.end))
        return replace(self, end=end, start=step, position=part)

    def adjusted(self, step: int, left: int) -> Plan:
        """The plan with so many steps left after `step`, unless that is nearly what is planned."""
        planned = self.end - step
        return self if abs(left - planned) <= TOLERANCE * max(left, planned) else self.extended(step, step + left)


def fitting_steps(seconds: float, costs: RunCosts, work: RunWork, taken: int, length: int) -> tuple[int, int]:
    """The most steps that fit into `seconds`, with all validations among and after them, the test and the report; and
    the number of these validations. The last one is after 0.5 to 1.5 times `length` steps, or more where another one
    would not fit.

    Args:
        taken: steps since the last validation.
        length: steps between two validations.

    >>> costs, work = RunCosts(step=1.0, image=0.1), RunWork(per_epoch=50, validation=50, test=100)
    >>> fitting_steps(70.0, costs, work, taken=0, length=50)
    (55, 1)
    """
    validation = costs.validation(work.validation)
    room, step = seconds - costs.ending(work.test), max(costs.step, 1e-9)
    taken = min(taken, length)
    rounds = max(1, int(max(0.0, room) / (length * step + validation)) - 1)
    while int((room - rounds * validation) / step) + taken >= length * (rounds + 0.5):
        if (room - (rounds + 1) * validation) / step + taken < length * (rounds + 0.5):
            break  # another validation takes the time of the steps before it
        rounds += 1
    return max(0, int((room - rounds * validation) / step)), rounds


def epoch_length(steps: int, costs: RunCosts, work: RunWork) -> int:
    """The steps between two validations in a run of `steps` steps: an epoch; parts of it where not one fits; several
    where validating takes too long.

    >>> costs, work = RunCosts(step=1.0, image=0.1), RunWork(per_epoch=100, validation=50, test=100)
    >>> [epoch_length(steps, costs, work) for steps in (10, 80, 400)]
    [10, 20, 100]
    >>> epoch_length(4000, RunCosts(step=1.0, image=2.0), work)
    400
    """
    length = work.per_epoch if steps >= work.per_epoch else math.ceil(steps / PARTS)
    least = math.ceil(costs.validation(work.validation) * (1 / VALIDATION_SHARE - 1) / max(costs.step, 1e-9))
    if least > work.per_epoch:
        least = math.ceil(least / work.per_epoch) * work.per_epoch
    return max(1, min(max(length, least), max(steps, 1)))


def plan_steps(
    seconds: float, costs: RunCosts, work: RunWork, done: int, taken: int, length: int = 0
) -> tuple[int, int, int]:
    """The steps that fit into `seconds`, the steps between two validations, and the number of validations.

    Args:
        done: steps since the start of the run.
        taken: steps since the last validation.
        length: steps between two validations so far, which stays where half or twice as many would be better at most;
            0: before the first validation.

    >>> plan_steps(75.0, RunCosts(step=1.0, image=0.1), RunWork(per_epoch=100, validation=50, test=100), 0, 0)
    (50, 20, 3)
    """
    steps, _ = fitting_steps(seconds, costs, work, taken, work.per_epoch)
    better = epoch_length(done + steps, costs, work)
    length = length if better <= 2 * length <= 4 * better else better
    steps, rounds = fitting_steps(seconds, costs, work, taken, length)
    return steps, length, rounds


def validation_part(seconds: float, costs: RunCosts, work: RunWork) -> int:
    """The number of images that a validation has time for: all, or fewer where one of them takes more than a tenth of
    the time.

    >>> work = RunWork(per_epoch=100, validation=5000, test=100)
    >>> [validation_part(seconds, RunCosts(step=1.0, image=0.1), work) for seconds in (600.0, 6000.0)]
    [590, 5000]
    """
    room = ONE_VALIDATION_SHARE * (seconds - costs.ending(work.test)) - 2 * costs.save
    fits = int(room / costs.image) if costs.image > 0 else work.validation
    return min(work.validation, max(fits, FEWEST_IMAGES))
