"""Random folders, lists, texts and checkpoints, read by Skipway under two oracles.

    python -m benchmarks.fuzz folders --cases 1000 --seed 0
    python -m benchmarks.fuzz lists
    python -m benchmarks.fuzz texts
    python -m benchmarks.fuzz checkpoints

No exception but `SkipwayError` may leave Skipway, and nothing may pass in silence: what was read, left out and refused
adds up to what is there. Each subject is a module here with `CASES`, a strategy of hypothesis, and
`outcome(case, folder) -> str`, which writes the case below an empty folder, reads it, asserts the oracles, and returns
what happened in a word or two: "read", "read with remarks", "refused". A failure is printed with its minimised case,
and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

__all__ = ["SUBJECTS", "main", "run_cases"]

SUBJECTS = ("folders", "lists", "texts", "checkpoints")
# what a minimised case may take to print
MAX_LINES = 60


def run_cases(
    cases: Any, outcome: Callable[[Any, Path], str], count: int, start: int
) -> tuple[Counter[str], list[BaseException]]:
    """Run up to `count` cases; return how often each outcome occurred, and the failures with their minimised cases."""
    outcomes: Counter[str] = Counter()

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(cases)
    def run(case: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcomes[outcome(case, Path(folder))] += 1
            except Exception:
                outcomes["FAILED (minimising repeats it)"] += 1
                raise

    try:
        run()
    except Exception as error:
        return outcomes, list(getattr(error, "exceptions", [error]))
    return outcomes, []


def main(arguments: list[str] | None = None) -> int:
    """Run the cases of one subject and print a table of the outcomes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given_options = parser.parse_args(arguments)
    subject = import_module(f"benchmarks.fuzz.{given_options.subject}")
    began = time.monotonic()
    outcomes, failures = run_cases(subject.CASES, subject.outcome, given_options.cases, given_options.seed)
    total = sum(outcomes.values())
    print(f"{given_options.subject}: {total:,} cases in {time.monotonic() - began:.0f} s, seed {given_options.seed}")
    for word, count in outcomes.most_common():
        print(f"  {count:>7,}  {word}")
    for number, failure in enumerate(failures, 1):
        print(f"\nfailure {number}")
        print("".join(traceback.format_exception(failure)[-MAX_LINES:]))
    print("no failure" if not failures else f"{len(failures)} failures", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
