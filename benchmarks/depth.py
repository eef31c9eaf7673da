"""Depth 10 to 10,000: time and memory per branch, what each memory mode keeps and costs, reversible chains kept flat.

Claims    time and memory per branch of build, initialise, diagnose and a step are the same from 10 to 10,000 branches;
          the peak of a reversible chain, parameters and their gradients aside, grows by 2 % at most from 100 to 10,000
          branches, at 1.35 of the ordinary chain's time per branch at most
Command   python -m benchmarks.depth [--deepest 10000] [--only growth|steps|modes|reversible], eight minutes on one core
Method    growth: fully connected branches of 16 channels; each depth runs in a process of its own, with as many
          networks as make 1,000 branches. Time is the CPU time of one thread, bytes are the growth of the process.
          steps, modes, reversible: candidates take turns in one process, in a new order each round; ratios are
          medians over the rounds. steps: the same branches, with as many networks per depth as make the number of
          branches of the deepest one, forward through all of them and then backward through all, so that every depth
          works on the same number of bytes (in growth, depths 10 and 100 stay in the processor's cache). modes,
          reversible: convolutional branches of 64 channels on 8 x 8 maps. Peak bytes are those of all live tensors at
          the worst moment of a step, counted below autograd, without parameters and their gradients.
Result    benchmarks/depth.md
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import skipway as sw
from benchmarks.race.devices import DEVICES
from skipway.models.resnet.blocks import CONV_KIT, Conv
from skipway.nn import ConvBranch, Residual
from skipway.nn.placement import Placement
from skipway.nn.site import Site
from skipway.schemes import parse_scheme
from skipway.studies.chains import block_chain
from skipway.surgery import Budget, SquareRoot, checkpointed, reversible, skip_compute
from skipway.surgery.saved_tensors import saved_bytes

PAGE = Path(__file__).with_suffix(".md")
WIDTH, SIDE, BATCH = 64, 8, 8
Key = TypeVar("Key")


def dressing(depth: int) -> str:
    """A branch of 1/√L: with 0.1 at any depth the stream grows 1.01^L-fold, and nothing inverts at 10,000."""
    return f"skipinit(init={depth**-0.5:.4g})"


def linear_network(depth: int) -> nn.Module:
    """Pre-activation branches of two maps, 16 wide."""
    return nn.Sequential(nn.Linear(16, 16), *block_chain(dressing(depth), depth, width=16), nn.Linear(16, 4))


def convolutional_network(depth: int, width: int = WIDTH) -> nn.Module:
    """Pre-activation branches of two 3 x 3 convolutions without norms."""
    chosen, kit = parse_scheme(dressing(depth)), replace(CONV_KIT, norm=None)
    blocks = []
    for index in range(depth):
        site = Site(dim=width, index=index, depth=depth, since=index)
        blocks.append(
            Residual(
                **chosen.slots(
                    site,
                    branch=lambda kit, placement: ConvBranch([Conv(width, width, 3)] * 2, kit, placement.end),
                    shortcut=None,
                    kit=kit,
                    placement=Placement(pre=("act",)),
                )
            )
        )
    chain = sw.initialise_(nn.Sequential(*blocks), chosen)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), *chain, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)
    )


def together(models: list[nn.Module], inputs: Tensor, labels: Tensor) -> float:
    """Forward through all networks, then backward through all; CPU seconds."""
    start = time.process_time()
    losses = [F.cross_entropy(model(inputs), labels) for model in models]
    for loss in losses:
        loss.backward()
    del loss, losses  # what they kept goes within the time
    return time.process_time() - start


def step(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Forward and backward, from no gradients; CPU seconds."""
    model.zero_grad(set_to_none=True)
    return together([model], images, labels)


class Live(TorchDispatchMode):
    """When tensors come and go, those that were there before not counted; storages, each once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = {parameter.untyped_storage()._cdata: -1 for parameter in model.parameters()}
        self.alive: dict[int, Any] = {}
        self.events: list[tuple[int, int]] = []  # the storage's number, bytes that come or go

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.note(leaf.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        place, size, number = storage._cdata, storage.nbytes(), len(self.events)
        if place in self.known:
            return

        def gone(_: Any) -> None:
            del self.known[place], self.alive[number]
            self.events.append((number, -size))

        self.known[place], self.alive[number] = number, weakref.ref(storage, gone)
        self.events.append((number, size))

    def peak(self, *aside: Tensor) -> int:
        """The most bytes at one time, without those of some tensors."""
        left_out = {self.known.get(tensor.untyped_storage()._cdata) for tensor in aside}
        return max(accumulate(size for number, size in self.events if number not in left_out), default=0)


def peak_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Of one step, without the gradients of parameters."""
    model.zero_grad(set_to_none=True)
    with Live(model) as live:
        F.cross_entropy(model(images), labels).backward()
    peak = live.peak(*(parameter.grad for parameter in model.parameters() if parameter.grad is not None))
    model.zero_grad(set_to_none=True)
    return peak


def growth(depth: int) -> dict[str, float]:
    """Microseconds and bytes per branch of each stage of a network's life, in this process."""
    torch.set_num_threads(1)
    count = max(1, 1000 // depth)
    inputs, labels = torch.randn(64, 16), torch.randint(4, (64,))
    first = linear_network(10)  # whatever is loaded when it is first used
    sw.diagnose(first, (inputs, labels))
    step(first, inputs, labels)
    del first
    found: dict[str, float] = {}
    models: list[nn.Module] = []

    def measure(name: str, action: Callable[[], object], share: int = count) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before, start = resident(), time.process_time()
        action()
        found[name] = (time.process_time() - start) / (share * depth) * 1e6
        found[f"{name} bytes"] = (resident("VmHWM") - before) / (share * depth)

    measure("build", lambda: models.extend(linear_network(depth) for _ in range(count)))
    measure("initialise", lambda: [sw.initialise_(model[1:-1]) for model in models])
    measure("step", lambda: [together([model], inputs, labels) for model in models])
    looked = models[: max(1, min(count, 100 // depth))]
    measure("chain", lambda: [sw.chain(model, inputs) for model in looked], len(looked))
    measure("diagnose", lambda: [sw.diagnose(model, (inputs, labels)) for model in looked], len(looked))
    return found


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process now, or with "VmHWM" at most since that was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def growth_table(depths: list[int]) -> str:
    rows = {}
    for depth in depths:
        command = [sys.executable, "-m", "benchmarks.depth", "--growth-of", str(depth)]
        rows[depth] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(depth, rows[depth], file=sys.stderr, flush=True)
    stages = ("build", "initialise", "chain", "diagnose", "step")
    head = "| branches | " + " | ".join(stages) + " |\n|---:|" + "---:|" * len(stages)
    lines = [
        f"| {depth:,} | " + " | ".join(f"{row[s]:,.0f} µs, {row[s + ' bytes'] / 1e3:.1f} kB" for s in stages) + " |"
        for depth, row in rows.items()
    ]
    deepest, middle = rows[depths[-1]], rows[depths[min(1, len(depths) - 1)]]
    compared = "; ".join(f"{s} {deepest[s] / middle[s]:.2f}" for s in stages)
    return "\n".join([head, *lines]) + f"\n\nTime per branch at {depths[-1]:,} over that at {depths[1]:,}: {compared}."


def steps_table(depths: list[int], rounds: int) -> str:
    """A step of as many branches, in networks of each depth."""
    inputs, labels = torch.randn(64, 16), torch.randint(4, (64,))
    networks = {depth: [linear_network(depth) for _ in range(depths[-1] // depth)] for depth in depths}
    taken = interleaved({depth: partial(together, networks[depth], inputs, labels) for depth in depths}, rounds)
    lines = ["| branches | networks | time per branch | times that of 100 (quartiles) |", "|---:|---:|---:|---:|"]
    for depth in depths:
        time_per_branch = statistics.median(taken[depth]) / depths[-1] * 1e6
        compared = spread(taken[depth], taken[depths[1]])
        lines.append(f"| {depth:,} | {len(networks[depth]):,} | {time_per_branch:,.0f} µs | {compared} |")
    return "\n".join(lines)


class Twice(nn.Module):
    """A network whose forward pass is computed twice, once without gradients: what any scheme that computes activations
    again costs at least."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            self.model(images)
        return self.model(images)


def interleaved(contestants: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """Seconds of each contestant's turns, each round in an order of its own."""
    taken: dict[Key, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        if rounds == 1 and number:  # of thousands of branches one round is enough, and takes long enough
            break
        for name in random.sample(list(contestants), len(contestants)):
            seconds = contestants[name]()
            if number or rounds == 1:  # the first of several rounds warms up
                taken[name].append(seconds)
    return taken


def batch_of(size: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, SIDE, SIDE), torch.randint(10, (size,))


def modes_table(depth: int, rounds: int) -> str:
    """What each mode keeps, at most, and costs."""
    ordinary, batch = convolutional_network(depth), batch_of()
    kept = saved_bytes(ordinary, batch[0])
    modes: dict[str, Callable[[nn.Module], Any]] = {
        "ordinary": lambda model: None,
        "checkpointed, each block": lambda model: checkpointed(model, batch[0]),
        "checkpointed, every 8": lambda model: checkpointed(model, batch[0], 8),
        "checkpointed, √L": lambda model: checkpointed(model, batch[0], SquareRoot()),
        "checkpointed, budget of a half": lambda model: checkpointed(model, batch[0], Budget(kept / 2)),
        "checkpointed, budget of a fifth": lambda model: checkpointed(model, batch[0], Budget(kept / 5)),
        "reversible (another function)": lambda model: reversible(model, batch[0][:2]),
        "skip_compute(0.5), rising (another function in training)": lambda model: skip_compute(model, batch[0], 0.5),
    }
    contestants, operations = {}, {}
    for name, operate in modes.items():
        contestants[name] = copy.deepcopy(ordinary)
        operations[name] = operate(contestants[name])
    taken = interleaved({name: partial(step, model, *batch) for name, model in contestants.items()}, rounds)
    lines = [
        "| mode | segments | kept for backward | peak of a step | of the ordinary | time per branch | ordinary = 1 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    whole = peak_bytes(contestants["ordinary"], *batch)
    for name, model in contestants.items():
        ratios = [a / b for a, b in zip(taken[name], taken["ordinary"], strict=True)]
        peak, operation = peak_bytes(model, *batch), operations[name]
        segments = len(operation.touched) if name.startswith("checkpointed") else "–"
        lines.append(
            f"| {name} | {segments} | {saved_bytes(model, batch[0]) / 1e6:.2f} MB | {peak / 1e6:.2f} MB "
            f"| {peak / whole:.1%} | {statistics.median(taken[name]) / depth * 1e6:,.0f} µs "
            f"| {statistics.median(ratios):.2f} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def reversible_table(depths: list[int], rounds: int) -> str:
    """Growth of the peak, and time against the ordinary chain; at the deepest the reversible one alone, once."""
    lines = [
        "| branches | peak of a step | ordinary keeps | time per branch | ordinary | ratio (quartiles) "
        "| ordinary and one forward pass more |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    peaks, batch = {}, batch_of()
    for depth in depths:
        model = convolutional_network(depth)
        ordinary = copy.deepcopy(model)
        contestants = {"ordinary": ordinary, "one forward more": Twice(ordinary)} if depth <= 1000 else {}
        kept = saved_bytes(model, batch[0])
        reversible(model, batch[0][:1])
        steps = {name: partial(step, each, *batch) for name, each in {**contestants, "reversible": model}.items()}
        taken = interleaved(steps, max(1, min(rounds, 5000 // depth)))
        peaks[depth] = peak_bytes(model, *batch)
        times = {name: f"{statistics.median(values) / depth * 1e6:,.0f} µs" for name, values in taken.items()}
        compared, least = (
            spread(taken[name], taken["ordinary"]) if contestants else "–"
            for name in ("reversible", "one forward more")
        )
        lines.append(
            f"| {depth:,} | {peaks[depth] / 1e6:.3f} MB | {kept / 1e6:,.0f} MB "
            f"| {times['reversible']} | {times.get('ordinary', '–')} | {compared} | {least} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
        del model, ordinary, contestants, steps
    deepest = max(depths)
    grown = peaks[deepest] / peaks[min(depths)] - 1
    return "\n".join(lines) + f"\n\nThe peak grows by {grown:.2%} from {min(depths):,} to {deepest:,} branches."


def spread(first: list[float], second: list[float]) -> str:
    """Median and quartiles of the ratios, round by round."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{statistics.median(ratios):.3f} ({low:.3f}, {high:.3f})"


def machine() -> str:
    return (
        f"one thread of {DEVICES['cpu'].title()}, {os.cpu_count()} cores, PyTorch {torch.__version__.partition('+')[0]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepest", type=int, default=10_000)
    parser.add_argument("--modes-depth", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("growth", "steps", "modes", "reversible"))
    parser.add_argument("--growth-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.growth_of:
        print(json.dumps(growth(options.growth_of)))
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    depths = [depth for depth in (10, 100, 1000, 10_000) if depth <= options.deepest]
    tables = {
        "growth": lambda: growth_table(depths),
        "steps": lambda: steps_table(depths, options.rounds),
        "modes": lambda: modes_table(options.modes_depth, options.rounds),
        "reversible": lambda: reversible_table(depths[1:], options.rounds),
    }
    titles = {
        "growth": "Per branch, from 10 to 10,000",
        "steps": "A step, per branch, of as many branches at every depth",
        "modes": f"Memory modes, {options.modes_depth} branches",
        "reversible": "Reversible chains",
    }
    chosen = [options.only] if options.only else list(tables)
    text = "\n\n".join(f"## {titles[name]}\n\n{tables[name]()}" for name in chosen)
    print(text)
    if not options.only:
        method = (__doc__ or "").partition("Method")[2].partition("Result")[0]
        about = " ".join(method.split())
        PAGE.write_text(
            f"# Depth\n\nMade by `python -m benchmarks.depth`, {date.today()}, {machine()}.\n\n{about}\n\n{text}\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
