"""`transfer`: does the learning rate of a shallow network suit a deep one, and which scheme would make it?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from skipway.data.randomness import draw_key
from skipway.depth_transfer.batches import TrainingBatches
from skipway.depth_transfer.coordinates import check_coordinates
from skipway.depth_transfer.design import OWN, Design, Make, based_scheme, choose_design, count_branches, spec_of
from skipway.depth_transfer.regression import Estimate, paired_difference
from skipway.depth_transfer.result import DepthTransfer, SchemeRates
from skipway.depth_transfer.runs import RateRun, RunFile, TrainingPlan, Trainings
from skipway.depth_transfer.search import BestRate, RateSearch
from skipway.diagnosis.asked_classes import entropy
from skipway.errors import SkipwayError
from skipway.hardware.device import choose_device
from skipway.optim.optimizers import SGD, AdamW, parse_optimizer
from skipway.optim.schedules import parse_schedule, usual_warmup
from skipway.probes.objective import Loss
from skipway.tracing.restoration import seeded_generators
from skipway.validation import check_call, check_positive, check_positive_int, check_rule, check_whole, is_whole

__all__ = ["COORDINATE_STEPS", "DEFAULT_SCHEMES", "Progress", "transfer"]

DEFAULT_SCHEMES = (OWN, "depthscaled(exponent=1)")
COORDINATE_STEPS = 5
WIDE, NEAR = (-4, -2, 0, 2, 4), (-2, 0, 2)
"""Octaves around the first guess, and around the best rate of a shallower network."""
LEARNT = 0.02
"""Share of the first loss by which the best one has to be lower."""
Progress = Callable[[str, float | None], None]
"""(what was trained, seconds that are left or None)"""


@check_call
def transfer(
    make: str | Make,
    depths: Sequence[int],
    batches: Any = None,
    *,
    schemes: Sequence[str] = DEFAULT_SCHEMES,
    loss: Loss | None = None,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    warmup: int | None = None,
    schedule: str = "constant",
    clip: float | None = None,
    steps: int = 60,
    seeds: int = 3,
    samples: int = 32,
    columns: str | None = None,
    sweep: bool = True,
    lr: float | None = None,
    runs: str | Path | None = None,
    device: str = "auto",
    progress: Progress = lambda text, seconds: None,
) -> DepthTransfer:
    """Measure whether the best learning rate of a shallow network is that of a deep one, by many short trainings.

    Two things are measured for each scheme. The **coordinate check**: how root mean squares of the stream, the branches
    and their changes by five steps at one rate go with the residual branches L, as L^p with a 95 % interval (Yang et
    al. 2022, "Tensor Programs V"). The **rate sweep**: at each depth the rate with the lowest loss after `steps` steps.
    A quarter of the steps with one seed finds the region, all steps find the octave, and all seeds measure the
    losses there, on the same batches and from the same weights at every rate. A search ends only when the loss rises on
    both sides. The best rate is the lowest point of a parabola through the losses over log rate, with Fieller's
    interval from the noise between seeds; where that is wider than four octaves, all rates that cannot be told from the
    best are its interval. A line through log rate over log L gives the power p of lr* ∝ L^p.

    The networks that `make` gives are trained and thrown away. Best rates of short trainings tend to be higher than
    those of long ones; it is how they change with depth that carries over.

    Args:
        make: depth → a module, or (module, batch); or a family or variant of Skipway's ("gpt-micro", "resnet", "vit"),
            or "FILE.py:NAME" of such a function. The depth is the argument named depth, blocks, layers or alike, else
            the only one.
        depths: at least two.
        batches: a `DataLoader` or another iterable of batches, one batch as (inputs, targets), or the path of images as
            for `skipway train` or of a text; None: what `make` gives, and for Skipway's families the embedded digits or
            the text of Python's standard library.
        schemes: "own" is the network as it is made, which the others are compared with wherever it stands in the list;
            without it they are compared with the first one. Others are built into Skipway's networks in place of their
            own scheme, and put on other networks by `rescheme(start="scheme")`. `depthscaled` without a base is given
            the branches of the shallowest network, and its rates by `param_groups`, so exponent=1 is CompleteP.
        loss: (output, targets) → a scalar; None: as `skipway.probes.objective.choose_objective` chooses it.
        optimizer: a spec string, "adamw", "sgd(momentum=0.95)", "muon".
        weight_decay: of the weights, ≥ 0.
        warmup: steps in which the rate rises, from 0 to all; None: a tenth, or 0 if the schedule rises by itself.
        schedule: of the rate after it, a spec string: constant, cosine, trapezoid.
        clip: maximum norm of the gradient, > 0; None does not clip.
        steps: of each training, ≥ 8.
        seeds: trainings at each rate; with one the noise is not known.
        samples: in a batch of a folder, a text, or embedded data.
        columns: of a list of images, with commas, or of the text in a table, where `batches` is the path of one; None:
            by content.
        sweep: whether rates are swept; else only coordinates are checked.
        lr: the rate of the coordinate check; None: the best one of the shallowest network, without a sweep the
            optimizer's default.
        runs: a file of JSON lines that keeps every training, so that the same call takes up where it was interrupted.
        device: auto, cpu, cuda.
        progress: is called after every training.

    Raises:
        SkipwayError: an argument out of its range; a network that fails, has nothing to learn, or does not grow with
            depth; a `runs` file of other networks or batches.
        DataError: data that cannot be read.

    >>> import skipway as sw
    >>> found = sw.transfer("resnet(width=4, stem_width=4)", [8, 14], sweep=False, seeds=1, samples=8, schemes=["own"])
    >>> [each.name for each in found.coordinates if each.growth == "grows"]  # doctest: +SKIP
    ['stream']
    """
    chosen = check_depths(depths)
    check_whole("steps", steps, 8)
    for name, value in (("seeds", seeds), ("samples", samples)):
        check_positive_int(name, value)
    check_rule("schemes", list(schemes), len(schemes) > 0 and not isinstance(schemes, str), "a list of spec strings")
    for name, value in (("lr", lr), ("clip", clip)):
        if value is not None:
            check_positive(name, value)
    if warmup is not None:
        check_whole("warmup", warmup, 0, steps, of="steps")
    shape = parse_schedule(schedule)
    plan = TrainingPlan(
        optimizer=parse_optimizer(optimizer),
        steps=steps,
        seeds=seeds,
        weight_decay=weight_decay,
        warmup=int(usual_warmup(shape, 0.1) * steps) if warmup is None else warmup,
        schedule=schedule,
        clip=clip,
    )
    began, place = time.perf_counter(), choose_device(device)
    with seeded_generators([place], draw_key(0, "design")):
        design, given, remarks = choose_design(make, batches, chosen, steps=steps, samples=samples, columns=columns)
        analysis = Analysis.of(design, given.on(place), plan, chosen, schemes, loss, place, runs)
        analysis.progress = progress
        swept = analysis.sweep() if sweep else ()
        found = analysis.result(swept, lr)
    remarks = (*remarks, *filter(None, [given.remark]), *found.remarks)
    return replace(found, remarks=remarks, seconds=round(time.perf_counter() - began, 1))


def check_depths(depths: Sequence[int]) -> list[int]:
    """The depths in ascending order, each once."""
    whole = not isinstance(depths, str) and all(is_whole(each, 1) for each in depths)
    check_rule("depths", depths, whole and len(set(depths)) > 1, "at least two different whole numbers from 1 on")
    return sorted(set(depths))


@dataclass
class Analysis:
    """A sweep and a coordinate check over the depths of a design.

    Args:
        trainings: that are asked for.
        branches: residual connections by depth.
        remarks: what a reader has to know.
        progress: is told of every training.
    """

    trainings: Trainings
    branches: dict[int, int]
    remarks: list[str]
    progress: Progress = lambda text, seconds: None
    pending: list[tuple[str, int]] = field(default_factory=list, init=False)
    speed: dict[int, float] = field(default_factory=dict, init=False)
    """Seconds per step by depth."""
    spent: int = field(default=0, init=False)
    """Steps of the search that goes on."""

    @classmethod
    def of(
        cls,
        design: Design,
        batches: TrainingBatches,
        plan: TrainingPlan,
        depths: Sequence[int],
        schemes: Sequence[str],
        loss: Loss | None,
        device: torch.device,
        runs: str | Path | None,
    ) -> Analysis:
        """Count the branches at every depth, give schemes without a base that of the shallowest network, and put the
        network as it is made first.
        """
        example, remarks = batches.at(0, 0)[0], []
        branches = {depth: count_branches(design, depth, example, device) for depth in depths}
        if not any(branches.values()):
            remarks.append("no residual connections are found, so L is the depth itself")
            branches = {depth: depth for depth in depths}
        without = [depth for depth, count in branches.items() if not count]
        if without:
            raise SkipwayError(
                f"depths={list(branches)}: the rule is a residual connection at every depth, and {design.name} has "
                f"none at {' and '.join(map(str, without))}; leave {'it' if len(without) == 1 else 'them'} out"
            )
        counts = list(branches.values())
        if sorted(set(counts)) != counts:
            listed = ", ".join(f"depth {depth}: {count}" for depth, count in branches.items())
            raise SkipwayError(f"{design.name}: the residual connections do not grow with depth ({listed})")
        texts = sorted(dict.fromkeys(schemes), key=lambda text: text != OWN)
        parsed = {text: based_scheme(text, counts[0]) for text in texts}
        named = {spec_of(scheme): scheme for scheme in parsed.values()}
        if "plain" in parsed:
            remarks.append("the scheme plain is the network without skips; own is the network as it is made")
        file = RunFile(None if runs is None else Path(runs), plan.digest(design.name, batches.name, device.type))
        return cls(Trainings(design, batches, plan, file, named, loss, device), branches, remarks)

    def sweep(self) -> tuple[SchemeRates, ...]:
        """The best rates of all schemes."""
        self.trainings.done = self.tell
        names = list(self.trainings.schemes)
        self.pending = [(name, depth) for name in names for depth in self.branches]
        found: dict[str, SchemeRates] = {}
        for name in names:
            found[name] = self.sweep_scheme(name)
        return tuple(found.values())

    def sweep_scheme(self, name: str) -> SchemeRates:
        """The best rates of one scheme, from the shallowest network on."""
        rates: list[BestRate] = []
        scheme, guess, shallow = self.trainings.schemes[name], 0, math.nan
        for depth, count in self.branches.items():
            same = self.trainings.design.is_own(scheme, count) and OWN in self.trainings.schemes
            search = RateSearch(self.trainings, OWN if same else name, depth, self.trainings.plan.optimizer.base_lr)
            self.spent = 0
            guess, best, remark = search.find([guess + step for step in (NEAR if rates else WIDE)])
            shallow = best.value if not rates else shallow
            rates.append(best_rate(search, name, count, guess, best, shallow, remark))
            self.pending.remove((name, depth))
        code = f"{self.trainings.design.code(scheme)}\n{optimizer_code(self.trainings.plan)}"
        return SchemeRates(name, code, tuple(rates))

    def tell(self, run: RateRun) -> None:
        """Report a training with the time that is left."""
        self.speed[run.depth] = run.seconds / len(run.losses)
        self.spent += len(run.losses)
        plan = self.trainings.plan
        expected = plan.steps * (1 + 3 + 3 * (plan.seeds - 1) + plan.seeds / 2)
        left = sum(expected * self.pace(depth) for _, depth in self.pending[1:])
        left += max(expected - self.spent, plan.steps / 2) * self.pace(run.depth)
        loss = run.smoothed(len(run.losses))
        ended = f"loss {loss:.4g}" if math.isfinite(loss) else "diverges"
        steps = f"{len(run.losses)} steps"
        self.progress(f"{run.scheme}, depth {run.depth}, rate {run.lr:.3g}, seed {run.seed}, {steps}: {ended}", left)

    def pace(self, depth: int) -> float:
        """Seconds per step at a depth, from the nearest one that is known."""
        near = min(self.speed, key=lambda known: abs(math.log(self.branches[known] / self.branches[depth])))
        return self.speed[near] * self.branches[depth] / self.branches[near]

    def constant_loss(self) -> float | None:
        """The loss of the best constant answer where targets are classes: the entropy of those that are trained on."""
        if not self.trainings.description.startswith("cross-entropy"):
            return None
        plan, at = self.trainings.plan, self.trainings.batches.at
        found = [at(0, step)[1] for step in range(plan.steps)]
        if not all(isinstance(each, Tensor) and not each.is_floating_point() for each in found):
            return None
        labels = torch.cat([each.flatten().cpu() for each in found])
        labels = labels[labels >= 0]
        return entropy(labels, int(labels.max()) + 1) if len(labels) else None

    def result(self, swept: tuple[SchemeRates, ...], lr: float | None) -> DepthTransfer:
        """Coordinates at one rate, and all remarks."""
        trainings, plan = self.trainings, self.trainings.plan
        if lr is None:
            best = swept[0].rates[0].lr.value if swept else math.nan
            lr = best if math.isfinite(best) else plan.optimizer.base_lr
        sizes, coordinates = [], []
        for name in trainings.schemes:
            rows, found = check_coordinates(trainings, self.branches, name, lr, COORDINATE_STEPS)
            sizes += rows
            coordinates += found
        if swept:
            self.remarks += sweep_remarks(swept, plan, self.constant_loss())
        unit = "nats" if "cross-entropy" in trainings.description else ""
        settings = {
            "optimizer": str(plan.optimizer),
            "steps": f"{plan.steps}, the first {plan.warmup} with a rising rate, then {plan.schedule}",
            "seeds": str(plan.seeds),
            "weight decay": f"{plan.weight_decay:g}",
            "clip": "none" if plan.clip is None else f"{plan.clip:g}",
            "batches": trainings.batches.name,
            "loss": trainings.description,
            "device": trainings.device.type,
        }
        return DepthTransfer(
            name=trainings.design.name,
            settings=settings,
            schemes=swept,
            coordinates=tuple(coordinates),
            sizes=tuple(sizes),
            coordinate_lr=lr,
            unit=unit,
            remarks=(*self.remarks, *trainings.remarks),
            seconds=0.0,
        )


def optimizer_code(plan: TrainingPlan) -> str:
    """Python that makes the optimizer, with `lr` to be filled in."""
    spec = plan.optimizer
    decay = f", weight_decay={plan.weight_decay:g}" if plan.weight_decay else ""
    adaptive = "" if spec.adaptive else ", adaptive=False"
    groups = f"groups = sw.param_groups(model, example, lr=lr{decay}, eps={spec.eps}{adaptive})\n"
    if isinstance(spec, AdamW):
        return f"{groups}optimizer = torch.optim.AdamW(groups, betas=({spec.beta1}, {spec.beta2}), eps={spec.eps})"
    if isinstance(spec, SGD):
        nesterov = spec.nesterov and spec.momentum > 0
        return f"{groups}optimizer = torch.optim.SGD(groups, momentum={spec.momentum}, nesterov={nesterov})"
    return f'{groups}optimizer = skipway.optim.optimizers.parse_optimizer("{spec}").build(groups)'


def best_rate(
    search: RateSearch, name: str, branches: int, guess: int, best: Estimate, shallow: float, remark: str
) -> BestRate:
    """The best rate of a network, with what it loses at that of the shallowest one."""
    ours = round(shallow) if math.isfinite(shallow) else guess
    lost = Estimate(0.0, 0.0, 0.0)
    if ours != guess:
        other = search.curve(ours)
        lost = paired_difference(other, search.curve(guess))
    seeds = range(search.trainings.plan.seeds)
    first = fmean(search.trainings.run(search.scheme, search.depth, search.rate(guess), s, 1).losses[0] for s in seeds)
    return BestRate(
        scheme=name,
        depth=search.depth,
        branches=branches,
        lr=Estimate(*(rate_of(search.unit, k) for k in (best.value, best.low, best.high))),
        loss=search.mean(guess),
        first_loss=first,
        shallow_lr=search.rate(ours),
        lost=lost,
        tried=search.tried(),
        remark=remark,
    )


def rate_of(unit: float, k: float) -> float:
    """unit · 2^k, for finite k within what floats hold.

    >>> rate_of(1.0, -2), rate_of(1.0, -math.inf), rate_of(1.0, math.inf)
    (0.25, 0.0, inf)
    """
    return unit * 2.0 ** (max(min(k, 99), -99) if math.isfinite(k) else k)


def sweep_remarks(swept: Sequence[SchemeRates], plan: TrainingPlan, constant: float | None) -> list[str]:
    """What limits the result of a sweep.

    Args:
        constant: loss of the best constant answer; None where it is not known.
    """
    remarks = [
        f"rates are those for {plan.steps} steps; longer trainings want lower ones, and the change with depth is what "
        "carries over"
    ]
    rates = [rate for each in swept for rate in each.rates if math.isfinite(rate.loss)]
    short = [each for each in rates if each.first_loss - each.loss < LEARNT * abs(each.first_loss)]
    frequent = [each for each in rates if constant is not None and each.loss > constant * (1 - LEARNT)]
    if short:
        remarks.append(f"little is learned in {plan.steps} steps ({depths_of(short)}); take more steps")
    elif frequent:
        remarks.append(
            f"no more is learned in {plan.steps} steps than how frequent classes are, a loss of {constant:.3g} "
            f"({depths_of(frequent)}); take more steps"
        )
    return remarks


def depths_of(rates: Sequence[BestRate]) -> str:
    """The depths of some networks in words."""
    return ", ".join(dict.fromkeys(f"depth {each.depth}" for each in rates))
