"""How early sw.monitor warns of trainings that fail, and how often falsely of those that learn.

    python -m benchmarks.early_warning run --cifar cifar10-jpeg.tar.xz --text tinyshakespeare.txt.xz [--limit 200]
    python -m benchmarks.early_warning table

The configurations are those of `benchmarks.trainability`, in their order; outcomes and steps are those of its
`truth.jsonl`. A run here is the same training with the monitor on, so it ends as there. It is taken to the step of
divergence, or to half of the planned steps: a warning that comes later saves little. One JSON line per run in
`early_warning.jsonl`; names that it holds are skipped, so it can be interrupted, and `--part 0/2` shares the work.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import skipway as sw
from benchmarks.trainability.configurations import STEPS, Configuration
from benchmarks.trainability.truth import TRUTH, add_data_options, planned_step, read_lines, resume, steps_of
from skipway.monitoring import EarlyWarning

__all__ = ["main", "run", "table"]

FILE = Path(__file__).with_name("early_warning.jsonl")
BAD = ("stuck", "diverged")
GOOD = ("learns", "late")


def run(configuration: Configuration, outcome: str, steps: int) -> dict[str, Any]:
    """Train a configuration with the monitor on; what it warned of, and when."""
    model = configuration.build()
    optimizers = configuration.make_optimizers(model)
    found: list[EarlyWarning] = []
    last = math.nan
    with sw.monitor(model, optimizers, on_warning=found.append) as watch:
        for loss in islice(steps_of(configuration, model, planned_step(configuration, optimizers)), steps):
            watch.log(loss=loss)
            last = loss.item()
            if not math.isfinite(last):
                break
    return {
        "name": configuration.name,
        "family": configuration.family,
        "outcome": outcome,
        "steps": watch.step,
        "loss_last": last if math.isfinite(last) else None,
        "warnings": [{"step": each.step, "rule": each.rule, "at": each.connection} for each in found],
        "samples": len(watch.samples),
        "share": round(watch.share, 4),
        "remarks": watch.remarks,
    }


def taken(row: dict[str, Any], planned: int) -> int:
    """Steps that a run takes: to the divergence, else at most half of what was planned."""
    return int(row["steps"]) if row["outcome"] == "diverged" else min(int(row["steps"]), planned // 2)


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """How many were warned of, how early, how often falsely; by outcome, then by rule."""
    yield "| outcome | runs | warned of | first at step, median | steps before the end, median (tenth, nine tenths) |"
    yield "|---|---|---|---|---|"
    for outcome in (*GOOD, "marginal", *BAD):
        chosen = [row for row in rows if row["outcome"] == outcome]
        # the loss of a diverged run is not finite in its last step, so a warning in that step comes too late
        early = [row for row in chosen if any(each["step"] < row["steps"] for each in row["warnings"])]
        first = [min(each["step"] for each in row["warnings"]) for row in early]
        before = sorted(row["steps"] - each for row, each in zip(early, first, strict=True))
        if not chosen:
            continue
        share = f"{len(early)} ({len(early) / len(chosen):.0%})"
        lead = f"{median(before):.0f} ({before[len(before) // 10]}, {before[len(before) * 9 // 10]})" if before else "—"
        yield f"| {outcome} | {len(chosen)} | {share} | {median(first) if first else '—'} | {lead} |"
    yield ""
    fail, learn = (sum(row["outcome"] in kind for row in rows) for kind in (BAD, GOOD))
    yield f"| rule | of {fail} that fail | of {learn} that learn |"
    yield "|---|---|---|"
    counts = {
        kind: Counter(rule for row in rows if row["outcome"] in kind for rule in rules_of(row)) for kind in (BAD, GOOD)
    }
    for rule in sorted(counts[BAD] | counts[GOOD], key=lambda rule: -counts[BAD][rule]):
        yield f"| {rule} | {counts[BAD][rule]} | {counts[GOOD][rule]} |"


def rules_of(row: dict[str, Any]) -> set[str]:
    """The rules that warned in a run before its last step."""
    return {each["rule"] for each in row["warnings"] if each["step"] < row["steps"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    add_data_options(parser)
    parser.add_argument("--truth", type=Path, default=TRUTH, help="file of the outcomes")
    parser.add_argument("--out", type=Path, default=FILE, help="file of the runs")
    parser.add_argument("--steps", type=int, help="no more than so many of each run")
    options = parser.parse_args()
    if options.what == "run":
        outcomes = read_lines(options.truth)

        def work(configuration: Configuration) -> dict[str, Any] | None:
            row = outcomes.get(configuration.name)
            if row is None:
                return None
            return run(configuration, row["outcome"], min(taken(row, STEPS), options.steps or STEPS))

        resume(options, work)
    print("\n".join(table(list(read_lines(options.out).values()))))


if __name__ == "__main__":
    main()
