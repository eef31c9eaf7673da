"""Agreement of the verdicts on untrained networks with the outcome of their training.

    python -m benchmarks.trainability.verdicts

Reads `truth.jsonl` and `measurements.jsonl`. "trains if" is about other settings, or another network, than the
one that was trained, so it counts as "does not train". What counts is the half on which no weight was fitted.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable

from benchmarks.trainability.fit import Trial, examples
from benchmarks.trainability.measurements import read_measurements
from benchmarks.trainability.truth import BATCH, STEPS, read_truth
from skipway.diagnosis.outlook import probability

__all__ = ["balanced", "confusion", "main"]

Counts = Counter[tuple[bool, bool]]


def confusion(rows: Iterable[Trial]) -> Counts:
    """Counts of (trains, is said to train)."""
    said = read_measurements()
    return Counter((trains, said[configuration.name]["verdict"] == "trains") for configuration, _, trains in rows)


def balanced(counts: Counts) -> float:
    """Balanced accuracy: mean of the shares of right verdicts among those that train and those that do not."""
    shares = [
        counts[truth, truth] / total for truth in (True, False) if (total := counts[truth, True] + counts[truth, False])
    ]
    return sum(shares) / len(shares)


def line(name: str, counts: Counts) -> str:
    cells = [counts[True, True], counts[True, False], counts[False, True], counts[False, False]]
    right = (cells[0] + cells[3]) / sum(cells)
    return f"| {name} | {' | '.join(map(str, cells))} | {right:.0%} | {balanced(counts):.0%} |"


def table(rows: list[Trial]) -> list[str]:
    """The table in Markdown: a row for each family, and one for all."""
    by_family: dict[str, list[Trial]] = defaultdict(list)
    for row in rows:
        by_family[row[0].family].append(row)
    return [
        "| family | trains, said so | trains, missed | does not, missed | does not, said so | right | balanced |",
        "|---|---|---|---|---|---|---|",
        *(line(family, confusion(members)) for family, members in by_family.items()),
        line("**all**", confusion(rows)),
    ]


def cost() -> str:
    """Cost of a diagnosis relative to a training of 300 steps."""
    truth = {row["name"]: row for row in read_truth()}
    measured = read_measurements()
    shares = sorted(
        row["seconds"] / (truth[name]["seconds_per_step"] * STEPS) for name, row in measured.items() if name in truth
    )
    passes = sum(row["passes"] for row in measured.values()) / len(measured)
    samples = passes * 128 / (BATCH * STEPS)
    return (
        f"cost: {passes:.1f} passes over 128 images, {samples:.1%} of the images that {STEPS} steps of {BATCH} see; "
        f"{shares[len(shares) // 2]:.1%} of their processor time in the median"
    )


def main() -> None:
    """Print the table of the held-out half, the accuracy on both halves, the cost and the wrong verdicts."""
    held, chosen = examples(held_out=True), examples(held_out=False)
    print("\n".join(table(held)))
    print(f"\nbalanced accuracy held out: {balanced(confusion(held)):.1%} of {len(held)} configurations; ", end="")
    print(f"on the half that the weights were fitted on: {balanced(confusion(chosen)):.1%} of {len(chosen)}")
    print(cost())
    outcomes = {row["name"]: row for row in read_truth()}
    print("\nwrong verdicts of the held-out half:")
    for configuration, indicators, trains in held:
        said = read_measurements()[configuration.name]
        if (said["verdict"] == "trains") != trains:
            row = outcomes[configuration.name]
            chance = f"probability {probability(indicators):.0%}"
            why = f"{said['verdict']}, {chance}{''.join(', ' + rule for rule in said['rules'])}"
            print(f"  {configuration.name}: {row['outcome']} ({row['accuracy']:.2f}); said {why}")


if __name__ == "__main__":
    sys.exit(main())
