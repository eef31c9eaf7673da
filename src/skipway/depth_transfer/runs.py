"""Short trainings at one rate: their settings, their losses, and the file that they are kept in."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from skipway.data.randomness import draw_key
from skipway.depth_transfer.batches import TrainingBatches
from skipway.depth_transfer.design import Design
from skipway.errors import DataError, SkipwayError, first_line
from skipway.nn.warmup import set_step
from skipway.optim.groups import param_groups
from skipway.optim.optimizers import OptimizerSpec
from skipway.optim.schedules import lr_factor, parse_schedule, set_lr
from skipway.probes.objective import Loss, Objective, choose_objective
from skipway.schemes import Scheme
from skipway.tracing.example import call_model, copy_example
from skipway.tracing.module_state import TensorValues, attribute_restoration
from skipway.tracing.restoration import seeded_generators, write_buffers

__all__ = ["RateRun", "RunFile", "TrainingPlan", "Trainings"]

TOO_HIGH = 10.0
"""A loss of so many times the first one has diverged."""
AGREEMENT = 1e-3
"""Relative difference of first losses up to which a stored run is taken for one of the same network and batch."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How every short training goes.

    Args:
        optimizer: with its hyperparameters.
        steps: of a training.
        seeds: trainings at each rate, of other weights and batches.
        weight_decay: of the parameters that are decayed.
        warmup: steps in which the rate rises linearly.
        schedule: of the rate after it, a spec string.
        clip: maximum norm of the gradient; None does not clip.
    """

    optimizer: OptimizerSpec
    steps: int
    seeds: int
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: str = "constant"
    clip: float | None = None

    def digest(self, design: str, batches: str, device: str) -> str:
        """Twelve digits that change with whatever decides the losses of a run but seed, depth, scheme and rate."""
        settings = {key: str(value) for key, value in asdict(self).items() if key != "seeds"}
        text = json.dumps([design, batches, device, str(self.optimizer), settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class RateRun:
    """The losses of one training.

    Args:
        scheme, depth, lr, seed: what was trained.
        losses: one per step, before it; the last is not finite, or far above the first, where the training diverged.
        seconds: that it took.
    """

    scheme: str
    depth: int
    lr: float
    seed: int
    losses: tuple[float, ...]
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the last loss is beyond all use."""
        return has_diverged(self.losses[-1], self.losses[0])

    def smoothed(self, steps: int) -> float:
        """The mean loss of the last quarter of the first `steps` steps; infinite where the training diverged by then.

        >>> RateRun("own", 2, 0.1, 0, (4.0, 3.0, 2.0, 1.0), 0.0).smoothed(4)
        1.0
        """
        if len(self.losses) < steps or has_diverged(self.losses[steps - 1], self.losses[0]):
            return math.inf
        return fmean(self.losses[steps - max(1, steps // 4) : steps])


def has_diverged(loss: float, first: float) -> bool:
    """Whether a loss is not finite or far above the first."""
    return not math.isfinite(loss) or (first > 0 and loss > TOO_HIGH * first)


class RunFile:
    """Runs in a file of JSON lines, one per run, written when it is done; without a path they are kept in memory.

    Lines of other settings stay where they are and are passed over. A last line that an interruption cut off is
    removed.

    Args:
        path: of the file; it is created at the first run.
        digest: of the settings, see `TrainingPlan.digest`.
    """

    def __init__(self, path: Path | None, digest: str) -> None:
        self.path, self.digest = path, digest
        self.runs: dict[tuple[str, int, float, int], RateRun] = {}
        self.stored: set[tuple[str, int, float, int]] = set()
        for row in self.rows():
            if row.get("settings") == digest:
                run = self.run_of(row)
                self.keep(run)
                self.stored.add(key_of(run))

    def run_of(self, row: dict[str, Any]) -> RateRun:
        """The run in a line.

        Raises:
            DataError: the line is of another kind.
        """
        try:
            losses = tuple(math.nan if loss is None else float(loss) for loss in row["losses"])
            return RateRun(row["scheme"], row["depth"], row["lr"], row["seed"], losses, row["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"runs={self.path}: a line is no training of this function: {first_line(error)}") from error

    def rows(self) -> Iterator[dict[str, Any]]:
        """The lines of the file.

        Raises:
            DataError: it cannot be read.
        """
        if self.path is None or not self.path.exists():
            return
        try:
            lines = self.path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"runs={self.path}: cannot be read: {first_line(error)}; name another file") from error
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if number < len(lines) - 1:
                    raise DataError(
                        f"runs={self.path}, line {number + 1}: no JSON; the rule is a file that this function wrote"
                    ) from error
                return
            yield row

    def keep(self, run: RateRun) -> None:
        """Take note of a run; of two the longer one counts."""
        known = self.runs.get(key_of(run))
        if known is None or len(known.losses) < len(run.losses):
            self.runs[key_of(run)] = run

    def add(self, run: RateRun) -> None:
        """Keep a run and write it to the file."""
        self.keep(run)
        if self.path is None:
            return
        losses = [float(f"{loss:.7g}") if math.isfinite(loss) else None for loss in run.losses]
        row = {"settings": self.digest, **asdict(run), "losses": losses}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # a line that an interruption cut off
            file.write(json.dumps(row).encode() + b"\n")


def key_of(run: RateRun) -> tuple[str, int, float, int]:
    """What is trained, and with which seed."""
    return run.scheme, run.depth, run.lr, run.seed


@dataclass
class Network:
    """A network that is trained several times from the same start.

    Args:
        model: the network.
        groups: of its parameters, at a rate of 1.
        objective: the loss.
        start: steps that put back what it was at the start, see `start_of`.
        first_loss: of the network as it was made, on its first batch.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    objective: Objective
    start: list[Callable[[], None]]
    first_loss: float

    def reset(self) -> None:
        """Put parameters, buffers and attributes back."""
        for step in self.start:
            step()
        self.model.zero_grad(set_to_none=True)


def start_of(model: nn.Module) -> list[Callable[[], None]]:
    """Steps that put back what a network is now, any number of times: parameters, buffers, also those that a forward
    pass replaces, and the attributes of `attribute_restoration`.
    """
    modules = list(model.modules())
    buffers = [
        (module, name, None if buffer is None else TensorValues.of(buffer))
        for module in modules
        for name, buffer in module._buffers.items()
    ]
    values = [TensorValues.of(parameter).put_back for parameter in model.parameters()]
    return [attribute_restoration(modules), partial(write_buffers, buffers), *values]


@dataclass
class Trainings:
    """All short trainings of a design: made when they are asked for, and once.

    Args:
        design: what is trained.
        batches: on which, on the device.
        plan: how.
        file: where the runs are kept.
        schemes: by their names.
        loss: (output, targets) → a scalar; None: as `choose_objective` chooses it.
        device: where.
        done: is called with every run that was made.
    """

    design: Design
    batches: TrainingBatches
    plan: TrainingPlan
    file: RunFile
    schemes: dict[str, Scheme | None]
    loss: Loss | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    done: Callable[[RateRun], None] = lambda run: None
    prepared: dict[tuple[str, int, int], Network] = field(default_factory=dict, init=False)
    description: str = field(default="", init=False)
    """Of the loss."""
    remarks: list[str] = field(default_factory=list, init=False)
    """What makes trainings less comparable than they should be."""

    def run(self, scheme: str, depth: int, lr: float, seed: int, steps: int) -> RateRun:
        """The training at a rate, of so many steps at least."""
        key = (scheme, depth, lr, seed)
        known = self.file.runs.get(key)
        if known is None or (len(known.losses) < steps and not known.diverged):
            self.file.add(self.train(scheme, depth, lr, seed, steps))
            self.done(self.file.runs[key])
        elif key in self.file.stored:
            self.check_stored(known)
        return self.file.runs[key]

    def check_stored(self, run: RateRun) -> None:
        """Refuse a stored run whose network or batch is another one by now."""
        key = (run.scheme, run.depth, run.seed)
        self.file.stored = {each for each in self.file.stored if (each[0], each[1], each[3]) != key}
        first = self.train(run.scheme, run.depth, run.lr, run.seed, 1).losses[0]
        if not math.isclose(first, run.losses[0], rel_tol=AGREEMENT):
            raise SkipwayError(
                f"runs={self.file.path}: the network with depth {run.depth} begins at a loss of {first:.6g}, and in "
                f"the file at {run.losses[0]:.6g}: the network or its batches have changed since; name another file, "
                "or remove this one"
            )

    def network(self, scheme: str, depth: int, seed: int) -> Network:
        """The network of a seed; those of one depth are kept, since a network is trained at several rates."""
        key = (scheme, depth, seed)
        if key not in self.prepared:
            self.prepared = {other: made for other, made in self.prepared.items() if other[:2] == key[:2]}
            example, targets = self.batches.at(seed, 0)
            model = self.design.build(depth, self.schemes[scheme], example, seed=seed, device=self.device)
            start = start_of(model)
            with seeded(draw_key(seed, "steps"), self.device):  # the random numbers of a training's first step
                objective, first_loss = self.objective(model, example, targets)
            self.prepared[key] = network = Network(model, [], objective, start, first_loss)
            network.reset()
            spec = self.plan.optimizer
            network.groups = param_groups(
                model, example, lr=1.0, weight_decay=self.plan.weight_decay, eps=spec.eps, adaptive=spec.adaptive
            )
        return self.prepared[key]

    def objective(self, model: nn.Module, example: Any, targets: Any) -> tuple[Objective, float]:
        """The loss, chosen from the first output, and its value there.

        Raises:
            SkipwayError: nothing is given that could be learned.
        """
        output = call_model(model, copy_example(example))
        found = choose_objective(output, targets, self.loss, inputs=example)
        if not found.labelled:
            raise SkipwayError(
                f"batches: {self.batches.name} hold no targets, and the network puts out no loss; the best rate for "
                "learning noise says nothing about training; give batches of (inputs, targets), or loss=…"
            )
        self.description = found.description
        return found, float(found(output, targets, example).detach())

    def train(
        self, scheme: str, depth: int, lr: float, seed: int, steps: int, plan: TrainingPlan | None = None
    ) -> RateRun:
        """Train from the start and return the losses; the network keeps its weights until it is trained again."""
        plan, network, began = plan or self.plan, self.network(scheme, depth, seed), time.perf_counter()
        network.reset()
        with seeded(draw_key(seed, "steps"), self.device):
            optimizer = plan.optimizer.build([{**group, "lr": group["lr"] * lr} for group in network.groups])
            shape = parse_schedule(plan.schedule)
            losses: list[float] = []
            for step in range(steps):
                set_lr(optimizer, lr_factor(step, plan.steps, plan.warmup / plan.steps, shape))
                example, targets = self.batches.at(seed, step)
                loss = network.objective(call_model(network.model, copy_example(example)), targets, example)
                losses.append(float(loss.detach()))
                if has_diverged(losses[-1], losses[0]):
                    break
                optimizer.zero_grad()
                take_gradients(loss, network.model)
                if plan.clip is not None:
                    nn.utils.clip_grad_norm_(network.model.parameters(), plan.clip)
                take_optimizer_step(optimizer)
                set_step(network.model, step + 1, plan.steps)
        self.check_start(depth, network.first_loss, losses[0])
        return RateRun(scheme, depth, lr, seed, tuple(losses), round(time.perf_counter() - began, 4))

    def check_start(self, depth: int, made: float, first: float) -> None:
        """Remark, once, that a training began at another loss than the network as it was made."""
        if not self.remarks and math.isfinite(made) and not math.isclose(first, made, rel_tol=AGREEMENT):
            self.remarks.append(
                f"the network with depth {depth} begins at a loss of {made:.6g} as it was made, and at {first:.6g} in "
                "a training: its calls change what cannot be put back (an object of another class), or draw numbers "
                "at random elsewhere than from torch, so trainings do not all start alike; keep state in buffers"
            )


def take_gradients(loss: Tensor, model: nn.Module) -> None:
    """The backward pass.

    Raises:
        SkipwayError: it fails; anybody's network may.
    """
    try:
        loss.backward()
    except RuntimeError as error:
        raise SkipwayError(f"the backward pass of {type(model).__name__} fails: {first_line(error)}") from error


def take_optimizer_step(optimizer: torch.optim.Optimizer) -> None:
    """A step of the optimizer.

    Raises:
        SkipwayError: it fails, as most do at sparse gradients.
    """
    try:
        optimizer.step()
    except RuntimeError as error:
        raise SkipwayError(f"optimizer: a step of {type(optimizer).__name__} fails: {first_line(error)}") from error


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within it torch's random numbers begin at a seed; afterwards they go on where they were. Gradients are on."""
    with seeded_generators([device], seed), torch.enable_grad():
        yield
