"""Mend every held-out network that is said not to train, and train what `fix()` returns.

    python -m benchmarks.trainability.fixes --cifar cifar10-jpeg.tar.xz --text tinyshakespeare.txt.xz     # resumes

A line of fixes.jsonl next to this file for each configuration that fails and is told so with fresh batches: what was
applied, the verdict afterwards, and the outcome of 1,500 steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import skipway as sw
from benchmarks.trainability.configurations import Configuration
from benchmarks.trainability.prefixes import first_batches, settings_for
from benchmarks.trainability.truth import TRUTH, add_data_options, read_lines, resume, run_steps
from skipway.optim.schedules import set_lr

__all__ = ["FIXES", "main"]

FIXES = Path(__file__).with_name("fixes.jsonl")


def mended(configuration: Configuration, allowance: float) -> dict[str, Any] | None:
    """One line of the file; None where the verdict is another one."""
    model = configuration.build()
    diagnosis = sw.diagnose(
        model, first_batches(configuration), allowance=allowance, **settings_for(configuration, model)
    )
    if diagnosis.verdict != "will not train":
        return None
    line = {"name": configuration.name, "odds": round(diagnosis.odds, 3)}
    if not diagnosis.offers:
        return {**line, "applied": [], "outcome": "no offer"}
    treatment = diagnosis.fix()
    network, settings = treatment.model.train(), treatment.settings
    optimizer = settings.make(network)
    weights = list(network.parameters())

    def take_step(step: int) -> None:
        if settings.clip is not None:
            settings.clip([weight for weight in weights if weight.grad is not None])
        set_lr(optimizer, settings.factor(step))  # type: ignore[arg-type]
        optimizer.step()

    row = run_steps(configuration, network, take_step)
    after = {"verdict": treatment.after.verdict, "odds after": round(treatment.after.odds, 3)}
    applied = [str(remedy) for remedy in treatment.applied]
    return {**line, **after, "applied": applied, **{key: row[key] for key in ("outcome", "gained", "steps")}}


def main() -> None:
    """Mend and train what is not yet in the file, and print the share that then learns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_options(parser)
    parser.add_argument("--allowance", type=float, default=0.03)
    parser.add_argument("--out", type=Path, default=FIXES)
    options = parser.parse_args()
    failing = {name for name, row in read_lines(TRUTH).items() if row["outcome"] in ("stuck", "diverged")}

    def work(configuration: Configuration) -> dict[str, Any] | None:
        wanted = configuration.held_out and configuration.name in failing
        return mended(configuration, options.allowance) if wanted else None

    resume(options, work)
    rows = read_lines(options.out).values()
    learn = sum(row["outcome"] in ("learns", "late") for row in rows)
    print(f"{learn} of {len(rows)} learn, {sum(row['outcome'] == 'no offer' for row in rows)} without an offer")


if __name__ == "__main__":
    main()
