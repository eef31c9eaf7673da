"""Run of a benchmark: ceilings, the race of each workload, measurements in fresh processes; all into a journal."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.race import subprocesses
from benchmarks.race.architectures import PEERS, config_of, missing_libraries
from benchmarks.race.ceilings import count_flops, measure_ceiling, measure_copy_rate
from benchmarks.race.contenders import ANY, Contender, ReadyContender, Workload, contenders, prepare
from benchmarks.race.devices import DEVICES, DeviceProfile
from benchmarks.race.heats import find_finalists, pacemaker
from benchmarks.race.journal import Journal, RaceRecord, is_final
from benchmarks.race.modes import MODES, OURS
from skipway.errors import SkipwayError, suggest
from skipway.hardware import cpu_count
from skipway.inference.timer import Candidate, Timing, error_line, time_interleaved

__all__ = ["BRANCHES", "PRECISIONS", "WHAT", "BenchmarkPlan", "What", "run_plan"]

What = Literal["infer", "train", "memory", "startup", "growth"]
WHAT: tuple[What, ...] = ("infer", "train", "memory", "startup", "growth")
PRECISIONS = ("float32", "bfloat16")
BRANCHES = (8, 32, 128, 512, 2048, 10000)
GROWN_BATCH, GROWN_SIZE = 4, 32
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class BenchmarkPlan:
    """What to measure.

    Args:
        device: one of `benchmarks.race.devices.DEVICES`.
        networks: see `benchmarks.race.architectures.config_of`; by default the device's.
        what: of `WHAT`.
        precisions: of `PRECISIONS`, or "any".
        batches: images at a time; each is a workload; by default the device's.
        sizes: sides of the images, in pixels; each is a workload.
        branches: depths of the growth.
        peers: libraries beside ours.
        modes: of `benchmarks.race.contenders.MODES`.
        rounds: of each race.
        budget: seconds of a race, half of them for preparing; None: no limit.
        switches: everybody also under our switches.
        ceilings: measure what the machine could do at best, at the start and at the end.
        heat: the races are heats: a pacemaker takes part in each, by which contenders of several heats compare.
        finalists: the races are finals of so many contenders of each side, the fastest of the heats; 0: no finals.

    Raises:
        SkipwayError: a value that cannot be, with those that can.

    >>> plan = BenchmarkPlan(networks=["resnet50"], what=["infer"], batches=[1, 8])
    >>> [str(workload) for workload in plan.workloads()][:2]
    ['infer resnet50 float32 1x224', 'infer resnet50 float32 8x224']
    """

    device: str = "cpu"
    networks: Sequence[str] = ()
    what: Sequence[str] = WHAT
    precisions: Sequence[str] = PRECISIONS
    batches: Sequence[int] = ()
    sizes: Sequence[int] = (224,)
    branches: Sequence[int] = BRANCHES
    peers: Sequence[str] = PEERS
    modes: Sequence[str] = tuple(MODES)
    rounds: int = 5
    budget: float | None = None
    switches: bool = True
    ceilings: bool = True
    heat: bool = False
    finalists: int = 0

    def __post_init__(self) -> None:
        for kind, given, known in (
            ("device", [self.device], DEVICES),
            ("what", self.what, WHAT),
            ("precision", self.precisions, (*PRECISIONS, ANY)),
            ("peer", self.peers, PEERS),
            ("mode", self.modes, MODES),
        ):
            for value in given:
                if value not in known:
                    raise SkipwayError(suggest(kind, value, known))
        usual = DEVICES[self.device]
        # a frozen dataclass fills its own defaults in no other way
        object.__setattr__(self, "networks", tuple(self.networks) or usual.networks)
        object.__setattr__(self, "batches", tuple(self.batches) or (usual.batch,))
        for kind, numbers in (("batch", self.batches), ("size", self.sizes), ("rounds", [self.rounds])):
            for number in numbers:
                if number < 1:
                    raise SkipwayError(f"{kind} {number}: the rule is at least 1")
        if self.finalists < 0 or (self.heat and self.finalists):
            raise SkipwayError(f"finalists {self.finalists}: the rule is at least 0, and a heat has none")
        if self.budget is not None and self.budget <= 0:
            raise SkipwayError(f"budget {self.budget:g}: the rule is more than 0 seconds; leave it away for no limit")
        for network, size in product(self.networks, self.sizes):
            config_of(network, size)
        if "growth" in self.what:
            for number in self.branches:
                config_of(f"vit@{number}", GROWN_SIZE)

    def workloads(self) -> list[Workload]:
        """The races, growth last."""
        found = [
            Workload(network=network, what=what, precision=precision, batch=batch, size=size, device=self.device)
            for what, precision, network, size, batch in product(
                [what for what in ("infer", "train") if what in self.what],
                self.precisions,
                self.networks,
                self.sizes,
                self.batches,
            )
            if (what, precision) != ("train", ANY)
        ]
        return [*found, *self.growth()]

    def growth(self) -> list[Workload]:
        """Training of narrow ViTs of ever more branches."""
        return [
            Workload(
                network=f"vit@{number}",
                what="train",
                precision="float32",
                batch=GROWN_BATCH,
                size=GROWN_SIZE,
                device=self.device,
            )
            for number in (self.branches if "growth" in self.what else ())
        ]

    def present(self) -> list[str]:
        """The peers that are installed."""
        return [name for name in self.peers if name not in missing_libraries()]

    @property
    def stage(self) -> str:
        """What a race is part of: "heat", "final", or nothing."""
        return "heat" if self.heat else "final" if self.finalists else ""

    def contenders(self, workload: Workload, journal: Journal) -> list[Contender]:
        """Who takes part in a workload; compiling nets of thousands of blocks would take hours."""
        if self.finalists:
            return find_finalists(journal, workload, self.finalists)
        modes = [mode for mode in self.modes if not MODES[mode].compiles or workload not in self.growth()]
        chosen = {"peers": self.present(), "modes": modes, "switched": self.switches, "device": self.device}
        found = contenders(workload.what, workload.precision, **chosen)
        return list(dict.fromkeys([pacemaker(workload), *found])) if self.heat else found


def run_plan(plan: BenchmarkPlan, out: str | Path, say: Say = lambda text: None) -> Journal:
    """Measure what a plan asks for and is not yet in the folder.

    Args:
        plan: what.
        out: folder; its `rows.jsonl` is written as things are measured.
        say: told, in one line, what is done.

    Returns:
        the rows, those of earlier calls with them.
    """
    journal = Journal(out)
    journal.write(describe_machine(plan.device))
    for name in plan.peers:
        if name in missing_libraries():
            say(f"{name} is not installed and takes no part: pip install {name}")
            journal.write({"kind": "missing", "library": name})
    ceilings = plan.ceilings and not all(is_measured(plan, workload, journal) for workload in plan.workloads())
    if ceilings:
        measure_ceilings(plan, journal, "start", say)
    for workload in plan.workloads():
        measure_workload(plan, workload, journal, say)
    if ceilings:
        measure_ceilings(plan, journal, "end", say)
    for what, orders in (("memory", memory_jobs(plan)), ("startup", startup_jobs(plan))):
        for row, work in orders if what in plan.what else ():
            measure_in_subprocess(what, row, work, journal, say)
    return journal


def describe_machine(device: str) -> dict[str, Any]:
    """What it is measured on."""
    return {
        "kind": "machine",
        "device": device,
        "processor": DEVICES[device].title(),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "fused_attention": os.environ.get("TIMM_FUSED_ATTN", ""),
    }


def measure_ceilings(plan: BenchmarkPlan, journal: Journal, when: str, say: Say) -> None:
    """Products and copies, at the start and at the end of what is raced between them."""
    for precision in [each for each in plan.precisions if each != ANY]:
        found = measure_ceiling(precision, device=plan.device)
        say(f"ceiling  {precision} {found.flops / 1e9:.0f} GFLOP/s ({found.how})")
        journal.write({"kind": "ceiling", "when": when, "device": plan.device, **asdict(found)})
    rate = measure_copy_rate(device=plan.device)
    say(f"ceiling  copying {rate / 1e9:.1f} GB/s")
    journal.write({"kind": "copy", "when": when, "device": plan.device, "bytes": rate})


def is_measured(plan: BenchmarkPlan, workload: Workload, journal: Journal) -> bool:
    """Whether nothing is left to be measured of a workload."""
    names = {str(each) for each in plan.contenders(workload, journal)}
    return any(
        (race.workload, race.stage) == (workload, plan.stage)
        and race.ended
        and names <= set(race.names)
        and plan.rounds <= race.rounds
        for race in journal.races()
    )


def measure_workload(plan: BenchmarkPlan, workload: Workload, journal: Journal, say: Say) -> None:
    """The race of a workload, or the rest of it."""
    wanted = plan.contenders(workload, journal)
    if not wanted:
        why = "no heat was run" if plan.finalists else f"no mode of {', '.join(plan.modes)} fits"
        say(f"{workload}: {why}; it is left out")
        return
    known = journal.race(workload, [str(each) for each in wanted], plan.rounds, plan.stage)
    if known.ended:
        say(f"{workload}: measured already")
        return
    say(f"{workload}: {len(wanted)} contenders")
    with compiler_reset():
        ready = prepare_all(plan, workload, wanted, known, journal, say)
        run_race(plan, workload, ready, known, journal, say)
        row = {"kind": "end", "workload": asdict(workload), "race": known.number}
        journal.write({**row, "flops": workload_flops(workload)})


@contextmanager
def compiler_reset() -> Iterator[None]:
    """torch.compile's limit of versions of one function is not used up by other workloads."""
    try:
        yield
    finally:
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def prepare_all(
    plan: BenchmarkPlan, workload: Workload, wanted: Iterable[Contender], known: RaceRecord, journal: Journal, say: Say
) -> dict[Contender, ReadyContender]:
    """Everybody that can be prepared in the time; who cannot becomes a row with the reason.

    Peers come first: what a budget leaves out is one of ours before it is one of them.
    """
    ready: dict[Contender, ReadyContender] = {}
    gone = {timing.name for timing in known.timings if timing.error or timing.dropped}
    begun = time.perf_counter()
    for contender in sorted(wanted, key=lambda each: each.library == OURS):
        name, row = (
            str(contender),
            {"kind": "prepared", "workload": asdict(workload), **asdict(contender), "side": contender.side},
        )
        row |= {"name": name, "race": known.number}
        if name in gone:
            continue
        try:
            if plan.budget is not None and time.perf_counter() - begun > plan.budget / 2:
                raise TimeoutError("half of the budget was spent before its timing to be prepared came")
            found = ready[contender] = prepare(contender, workload, ready, journal.choice(workload, contender))
        except Exception as error:
            say(f"  {name}: {error_line(error)}")
            journal.write({**row, "error": error_line(error)})
            continue
        say(f"  {name}: prepared in {found.build_seconds + found.prepare_seconds:.1f} s")
        journal.write({**row, **found.row(), "error": ""})
    return ready


def run_race(
    plan: BenchmarkPlan,
    workload: Workload,
    ready: dict[Contender, ReadyContender],
    known: RaceRecord,
    journal: Journal,
    say: Say,
) -> None:
    """Turn after timing, each written as it comes."""
    limit = None if plan.budget is None else plan.budget / 2
    by_name = {str(each): each for each in ready}
    for timing in time_interleaved(
        timer_candidates(ready, DEVICES[workload.device]), plan.rounds, known=known.timings, limit=limit
    ):
        say(f"  round {timing.round + 1}/{plan.rounds}  {timing.name}: {format_timing(timing, workload)}")
        row = {key: value for key, value in asdict(timing).items() if key != "seconds" or value == value}
        journal.write({"kind": "timing", "workload": asdict(workload), "race": known.number, **row})
        if is_final(timing):
            del ready[by_name[timing.name]]


def timer_candidates(ready: dict[Contender, ReadyContender], device: DeviceProfile) -> list[Candidate]:
    """Contenders as a race takes them; the fastest mode of each library stays to the end."""
    return [
        Candidate(str(each), found.run, f"{each.library} {each.switched}", found.within, device.calls, device.finish)
        for each, found in ready.items()
    ]


def format_timing(timing: Timing, workload: Workload) -> str:
    """A timing in words."""
    if is_final(timing):
        return timing.error or f"left, {timing.dropped}"
    return f"{1000 * timing.seconds:.1f} ms, {workload.batch / timing.seconds:.1f} images/s"


def workload_flops(workload: Workload) -> int:
    """Operations of a workload, counted on two of its images; 0 where they cannot be counted.

    A training step is three forward passes: torch's counter takes the gradients of a depthwise convolution for those of
    a full one. The gradient of the images, which nobody needs, is counted with it: 1 % of a ResNet-50.
    """
    eager = Contender(library=OURS, mode="eager", what="infer", precision="float32")
    small = Workload(network=workload.network, what="infer", precision="float32", batch=2, size=workload.size)
    passes = {"infer": 1, "train": 3}[workload.what]
    try:
        return passes * count_flops(eager.prepare(small).run) * workload.batch // 2
    except Exception:
        return 0


SubprocessJob = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


def memory_jobs(plan: BenchmarkPlan) -> Iterator[SubprocessJob]:
    """Training steps whose memory is asked for; on a CPU, where it takes minutes to compile one, of eager modes."""
    modes = [mode for mode in plan.modes if plan.device != "cpu" or not MODES[mode].compiles]
    for network, precision, size, batch in product(plan.networks, plan.precisions, plan.sizes, plan.batches):
        workload = Workload(
            network=network, what="train", precision=precision, batch=batch, size=size, device=plan.device
        )
        chosen = {"peers": plan.present(), "modes": modes, "switched": False, "device": plan.device}
        for contender in contenders("train", precision, **chosen):
            row = {
                "workload": asdict(workload),
                "library": contender.library,
                "name": str(contender),
                "side": contender.side,
            }
            yield row, partial(subprocesses.measure_memory, contender, workload)


def startup_jobs(plan: BenchmarkPlan) -> Iterator[SubprocessJob]:
    """Libraries taking turns at being imported."""
    for network, number in product(plan.networks, range(plan.rounds)):
        for library in (OURS, *plan.present()):
            row = {"library": library, "network": network, "size": plan.sizes[0], "round": number}
            yield row, partial(subprocesses.measure_startup, library, network, plan.sizes[0])


def measure_in_subprocess(
    kind: str, row: dict[str, Any], work: Callable[[], dict[str, Any]], journal: Journal, say: Say
) -> None:
    """One process, or what is known of it; a failure becomes a row with the reason."""
    if journal.has(kind, **row):
        return
    try:
        found = work()
    except Exception as error:
        found = {"error": error_line(error)}
    shown = "  ".join(f"{key} {value:.4g}" if isinstance(value, float | int) else value for key, value in found.items())
    name = row.get("name", row["library"])
    where = row.get("network") or row["workload"]["network"]
    say(f"{kind} {where}  {name}: {shown}")
    journal.write({"kind": kind, **row, "error": "", **found})
