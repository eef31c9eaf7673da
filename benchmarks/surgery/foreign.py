"""Operations of surgery on networks that others wrote, each looked at from outside.

    python -m benchmarks.surgery.foreign [--only TEXT] [--operation NAME] [--processes N]

For each of some fifty tiny networks and each operation: `ok`, `refused` (with the reason), or `fault` (with what is
wrong). Nothing of what the operations verify about themselves is used here. What is looked at:

* outputs in evaluation mode, all of them, and in training mode, with those of a copy made before;
* gradients of all inputs and of parameters that kept their values, with the copy's;
* with random values in everything that was added as 0: which outputs depend on later positions, on other samples and on
  what a padding mask hides, compared with the copy, and a training step;
* modes of all modules, before and after;
* `undo`, and a refusal, leave the state dict, classes, attributes and modes as they were, to the bit.

Networks have no dropout, so that training passes can be compared. A table goes to the terminal and to foreign.csv.
"""

from __future__ import annotations

import argparse
import copy
import csv
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import skipway as sw
from benchmarks.surgery.foreign_networks import NETWORKS, build
from skipway.surgery import (
    Operation,
    checkpointed,
    deepen,
    fold_gains,
    lesion,
    remove_norm,
    rescheme,
    reversible,
    shorten,
    skip_compute,
)
from skipway.tracing import call_model
from skipway.tracing.containers import map_tensors, tensors_in

__all__ = ["OPERATIONS", "Outcome", "examine", "main"]

FILE = Path(__file__).with_name("foreign.csv")
TOLERANCE, GRADIENTS, LEAK = 1e-4, 1e-2, 1e-5

SETS_GRADIENTS = {"Wav2Vec2Model"}
"""Networks that set `requires_grad` themselves, and take no input that has a gradient."""

Operate = Callable[[nn.Module, Any], Operation]


def lesion_first(model: nn.Module, example: Any) -> Operation:
    """Silence the first connection."""
    return lesion(model, example, [connection.name for connection in sw.chain(model, example)][:1])


@dataclass(frozen=True)
class Promise:
    """An operation, and what it promises.

    Args:
        operate: what is done.
        outputs: outputs are equal in evaluation mode.
        training: outputs and gradients are equal in training mode, too.
        prepare: what is done before, and is not looked at.
    """

    operate: Operate
    outputs: bool = False
    training: bool = False
    prepare: Operate | None = None


OPERATIONS: dict[str, Promise] = {
    "rescheme": Promise(lambda m, x: rescheme(m, x, "layerscale"), outputs=True, training=True),
    "rescheme, divide": Promise(lambda m, x: rescheme(m, x, "skipinit(init=0.5)", start="divide"), True, True),
    "rescheme, streams": Promise(lambda m, x: rescheme(m, x, "hyperconnections(2)"), outputs=True, training=True),
    "remove_norm": Promise(remove_norm, outputs=True),
    "shorten": Promise(lambda m, x: shorten(m, x, 1)),
    "deepen": Promise(lambda m, x: deepen(m, x, 1), outputs=True, training=True),
    "lesion": Promise(lesion_first),
    "skip_compute": Promise(lambda m, x: skip_compute(m, x, 0.5), outputs=True),
    "checkpointed": Promise(lambda m, x: checkpointed(m, x, 2), outputs=True, training=True),
    "reversible": Promise(lambda m, x: reversible(m, x)),
    "fold_gains": Promise(
        fold_gains, outputs=True, prepare=lambda m, x: rescheme(m, x, "skipinit(init=0.5)", start="divide")
    ),
    "accelerate": Promise(lambda m, x: sw.accelerate(m, x), outputs=True, training=True),
}


@dataclass
class Outcome:
    """What became of one operation on one network: `ok`, `refused` or `fault`, and why."""

    network: str
    operation: str
    verdict: str = "ok"
    reason: str = ""
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def examine(network: str, operation: str) -> Outcome:
    """Carry out an operation on a network, and look at everything from outside."""
    outcome, started = Outcome(network, operation), time.monotonic()
    promise = OPERATIONS[operation]
    model, example = build(network)
    mix_modes(model)
    try:
        if promise.prepare is not None:
            promise.prepare(model, example)
        pristine, twin = snapshot(model), twin_of(model)
        outcome.faults += carry_out(promise, twin, model, example)
        outcome.faults += [f"{what} is not as it was" for what in differences(pristine, snapshot(model))]
    except sw.SkipwayError as problem:
        outcome.verdict, outcome.reason = "refused", " ".join(str(problem).split())
        outcome.faults += ["refused without a reason"] * (not outcome.reason)
        if promise.prepare is None:
            outcome.faults += [f"{what} is not as it was" for what in differences(pristine, snapshot(model))]
    except Exception as problem:  # the fault that is looked for
        outcome.faults.append(f"raises {type(problem).__name__}: {' '.join(str(problem).split())}")
    if outcome.faults:
        outcome.verdict, outcome.reason = "fault", "; ".join(outcome.faults)
    outcome.seconds = time.monotonic() - started
    return outcome


Look = Callable[[Promise, nn.Module, nn.Module, Any, dict[str, nn.Parameter]], list[str]]


def carry_out(promise: Promise, twin: nn.Module, model: nn.Module, example: Any, look: Look | None = None) -> list[str]:
    """Faults of an operation up to its undo; `look` finds those of the network after it, `compare` if it is None."""
    modes = {module: module.training for module in model.modules()}
    parameters = dict(model.named_parameters())
    operation = promise.operate(model, example)
    try:
        faults = (look or compare)(promise, twin, model, example, parameters)
    except Exception as problem:
        faults = [f"afterwards {type(problem).__name__}: {' '.join(str(problem).split())[:160]}"]
    changed = [module for module in model.modules() if modes.get(module, module.training) != module.training]
    faults += ["the mode of a module changed"] * bool(changed)
    try:
        operation.undo()
    except Exception as problem:
        faults.append(f"undo raises {type(problem).__name__}: {problem}")
    return faults


def mix_modes(model: nn.Module) -> None:
    """Training mode with some modules in evaluation mode, as people freeze norms."""
    model.train()
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    for module in norms[:1]:
        module.eval()


def twin_of(model: nn.Module) -> nn.Module:
    """A copy made before; weights computed by an older form of weight norm are no leaves, and are copied by hand."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that has to come back."""
    return {
        "the state dict": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "the order of the state dict": list(model.state_dict()),
        "a class": [type(module) for module in model.modules()],
        "the set of attributes": [sorted(vars(module)) for module in model.modules()],
        "an attribute": [
            {name: value for name, value in vars(module).items() if isinstance(value, int | float | str)}
            for module in model.modules()
        ],
        "the config": str(getattr(model, "config", "")),
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "a gradient": [parameter.grad is None for parameter in model.parameters()],
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    """What differs between two snapshots."""
    for what, value in one.items():
        if what == "the state dict":
            other_values = other[what]
            if value.keys() != other_values.keys() or not all(torch.equal(value[k], other_values[k]) for k in value):
                yield what
        elif value != other[what]:
            yield what


def compare(
    promise: Promise, twin: nn.Module, model: nn.Module, example: Any, known: dict[str, nn.Parameter]
) -> list[str]:
    """Faults of a network after an operation, whose copy from before is the twin."""
    faults: list[str] = []
    if promise.outputs:
        gap = gap_of(evaluate(twin, example), evaluate(model, example))
        faults += [f"outputs differ by {gap:.2g}"] * (not gap <= TOLERANCE)
    faults += compare_training(promise, twin, model, example, known)
    old = set(known.values())
    silent = [p for p in model.parameters() if p not in old and bool((p == 0).all() or (p == -1).all())]
    kept = [parameter.detach().clone() for parameter in silent]
    with torch.no_grad():
        for parameter in silent:
            parameter.normal_(std=0.2)
    faults += compare_leaks(twin, model, example)
    try:
        train(model, example)
    except Exception as problem:
        faults.append(f"a training step raises {type(problem).__name__}: {' '.join(str(problem).split())[:120]}")
    with torch.no_grad():
        for parameter, value in zip(silent, kept, strict=True):
            parameter.copy_(value)
    return faults


def evaluate(model: nn.Module, example: Any) -> list[Tensor]:
    """All outputs in evaluation mode; modes and buffers are put back."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        found = list(tensors_in(call_model(model.eval(), fresh(example))))
    for module, mode in modes.items():
        module.training = mode
    return found


def fresh(example: Any) -> Any:
    """A copy of an example."""
    return map_tensors(lambda tensor: tensor.detach().clone(), example)


@dataclass
class Trained:
    """What a training pass computes."""

    outputs: list[Tensor]
    inputs: list[Tensor]
    gradients: dict[nn.Parameter, Tensor]


def train(model: nn.Module, example: Any, count: int | None = None) -> Trained:
    """A training pass with `backward`, as a user makes it; of the outputs the first `count` make the loss. Buffers,
    modes and gradients are put back.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = {module: module.training for module in model.modules()}
    given = fresh(example)
    signals = [t for t in tensors_in(given) if t.is_floating_point() and bool(t.isfinite().all())]
    inputs = [t.requires_grad_() for t in signals if type(model).__name__ not in SETS_GRADIENTS]
    torch.manual_seed(1)
    output = call_model(model.train(), given)
    put_out = list(tensors_in(output))
    losses = [
        (t.float() * torch.randn(t.shape, generator=torch.Generator().manual_seed(t.numel()))).sum()
        for t in put_out[:count]
        if t.requires_grad
    ]
    torch.stack(losses).sum().backward()
    found = {p: p.grad.detach().clone() for p in model.parameters() if p.grad is not None}
    result = Trained(
        [t.detach().clone() for t in tensors_in(output)],
        [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs],
        found,
    )
    for parameter in model.parameters():
        parameter.grad = None
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    for module, mode in modes.items():
        module.training = mode
    return result


def compare_training(
    promise: Promise, twin: nn.Module, model: nn.Module, example: Any, known: dict[str, nn.Parameter]
) -> list[str]:
    """Faults of a training pass: the first output, gradients of inputs and of parameters that kept their values."""
    before = train(twin, example, 1)
    try:
        after = train(model, example, 1)
    except Exception as problem:
        return [f"a training pass raises {type(problem).__name__}: {' '.join(str(problem).split())[:160]}"]
    if not promise.training:
        return []
    faults: list[str] = []
    gap = gap_of(before.outputs[:1], after.outputs[:1])
    faults += [f"outputs in training differ by {gap:.2g}"] * (not gap <= TOLERANCE)
    gap = gap_of(before.inputs, after.inputs)
    faults += [f"gradients of inputs differ by {gap:.2g}"] * (not gap <= GRADIENTS)
    theirs = dict(twin.named_parameters())
    same = [n for n, p in known.items() if p in after.gradients and torch.equal(p, theirs[n]) and p.ndim > 1]
    largest = max((float(before.gradients[theirs[n]].abs().max()) for n in same), default=1.0)
    gaps = {n: float((after.gradients[known[n]] - before.gradients[theirs[n]]).abs().max()) / largest for n in same}
    worst = max(gaps, key=gaps.__getitem__, default="")
    faults += [f"the gradient of {worst} differs by {gaps[worst]:.2g}"] * (bool(gaps) and not gaps[worst] <= GRADIENTS)
    return faults


def gap_of(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest difference of two lists of tensors over the largest value of each; of more tensors after than before,
    each before is compared with the one that is closest.
    """
    worst = 0.0
    for number, old in enumerate(before):
        fitting = [after[number]] if len(before) == len(after) else [new for new in after if new.shape == old.shape]
        gaps = [relative(old, new) for new in fitting if new.shape == old.shape]
        worst = max(worst, min(gaps, default=float("inf")))
    return worst


def relative(old: Tensor, new: Tensor) -> float:
    if not old.numel():
        return 0.0
    gap = torch.where(old == new, 0.0, (new.float() - old.float()).abs()).max()
    return float(gap.nan_to_num(float("inf"))) / (float(old.float().abs().nan_to_num(0, 0, 0).max()) or 1.0)


def compare_leaks(twin: nn.Module, model: nn.Module, example: Any) -> list[str]:
    """Faults of independence: an output of the twin does not move with something, and the model's does."""
    faults: list[str] = []
    first = next(tensors_in(example))
    for what, changed, kept in perturbed(example, first):
        old, new = leak_of(twin, example, changed, kept), leak_of(model, example, changed, kept)
        if old <= LEAK and new > 10 * LEAK:
            faults.append(f"outputs depend on {what} by {new:.2g}, and did not before")
    return faults


def perturbed(example: Any, first: Tensor) -> Iterator[tuple[str, Any, Tensor]]:
    """Examples with other values in later samples, in later positions, or behind padding; and what was kept, of the
    first two axes.
    """
    other = (first + 1) % 60 if not first.is_floating_point() else first.flip(0) + torch.randn_like(first)
    rows = torch.arange(first.shape[0]) < first.shape[0] - first.shape[0] // 2
    columns = torch.arange(first.shape[1]) < first.shape[1] - first.shape[1] // 2
    grids = {"later entries of axis 0": rows[:, None].expand(*first.shape[:2])}
    grids["later entries of axis 1"] = columns[None].expand(*first.shape[:2])
    for mask in list(tensors_in(example))[1:]:
        if mask.shape in (first.shape[:2], first.shape[:2][::-1]) and not mask.is_floating_point():
            shown = mask.bool() if mask.dtype is not torch.bool else ~mask
            grids["padding"] = shown if shown.shape == first.shape[:2] else shown.T
    for what, kept in grids.items():
        whole = kept.reshape(*kept.shape, *(1,) * (first.ndim - 2))
        changed = torch.where(whole, first, other)
        yield what, map_tensors(lambda t, changed=changed: changed if t is first else t, example), kept


def leak_of(model: nn.Module, example: Any, changed: Any, kept: Tensor) -> float:
    """The largest change of the first output where nothing was exchanged; infinite where that cannot be said."""
    old, new = evaluate(model, example)[0], evaluate(model, changed)[0]
    if old.shape[:1] == kept.shape[:1] and bool((kept == kept[:, :1]).all()):
        old, new = old[kept[:, 0]], new[kept[:, 0]]
    elif old.shape[:2] == kept.shape:
        old, new = old[kept], new[kept]
    else:
        return float("inf")
    return relative(old, new)


def examine_pair(pair: tuple[str, str]) -> Outcome:
    """`examine` in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return examine(*pair)


def table(outcomes: Sequence[Outcome]) -> str:
    """Network × operation, one letter each, and the faults in words."""
    operations = list(dict.fromkeys(outcome.operation for outcome in outcomes))
    cells = {(outcome.network, outcome.operation): outcome.verdict for outcome in outcomes}
    networks = list(dict.fromkeys(outcome.network for outcome in outcomes))
    width = max(map(len, networks))
    lines = [" " * width + "  " + "  ".join(operations)]
    for network in networks:
        row = "  ".join(cells.get((network, each), "").ljust(len(each)) for each in operations)
        lines.append(f"{network.ljust(width)}  {row}")
    lines += [f"fault: {o.network}, {o.operation}: {o.reason[:300]}" for o in outcomes if o.verdict == "fault"]
    counts = Counter(outcome.verdict for outcome in outcomes)
    return "\n".join([*lines, ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))])


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine the grid; the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--operation", choices=OPERATIONS, help="this operation alone")
    parser.add_argument("--processes", type=int, default=2)
    choices = parser.parse_args(arguments)
    operations = [choices.operation] if choices.operation else list(OPERATIONS)
    pairs = [(network, each) for network in NETWORKS if choices.only in network for each in operations]
    with multiprocessing.get_context("spawn").Pool(choices.processes) as pool:
        outcomes = list(pool.imap(examine_pair, pairs, chunksize=len(operations)))
    print(table(outcomes))
    if not choices.only and not choices.operation:
        with FILE.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["network", "operation", "verdict", "reason"])
            writer.writerows([o.network, o.operation, o.verdict, o.reason[:240]] for o in outcomes)
    return sum(outcome.verdict == "fault" for outcome in outcomes)


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
