"""How often the verdict, made of the untrained network, agrees with what training did.

    python -m benchmarks.trainability.verdicts

Reads `truth.jsonl` and `measurements.jsonl`. "trains if" is about other settings or another network than the one that
was trained, so it counts as saying that this one does not. What counts is the half that no weight was fitted on.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable

from benchmarks.trainability.fit import Example, examples
from benchmarks.trainability.measurements import read_measurements
from benchmarks.trainability.truth import BATCH, STEPS, read_truth
from skipway.diagnosis.outlook import probability

__all__ = ["balanced", "confusion", "main"]

Counts = Counter[tuple[bool, bool]]


def confusion(rows: Iterable[Example]) -> Counts:
    """How many (train, are said to train)."""
    said = read_measurements()
    return Counter((trains, said[configuration.name]["verdict"] == "trains") for configuration, _, trains in rows)


def balanced(counts: Counts) -> float:
    """Mean of the shares of right verdicts among those that train and among those that do not."""
    shares = [
        counts[truth, truth] / total for truth in (True, False) if (total := counts[truth, True] + counts[truth, False])
    ]
    return sum(shares) / len(shares)


def line(name: str, counts: Counts) -> str:
    cells = [counts[True, True], counts[True, False], counts[False, True], counts[False, False]]
    right = (cells[0] + cells[3]) / sum(cells)
    return f"| {name} | {' | '.join(map(str, cells))} | {right:.0%} | {balanced(counts):.0%} |"


def table(rows: list[Example]) -> list[str]:
    """By family, and all."""
    by_family: dict[str, list[Example]] = defaultdict(list)
    for row in rows:
        by_family[row[0].family].append(row)
    return [
        "| family | trains, said so | trains, missed | does not, missed | does not, said so | right | balanced |",
        "|---|---|---|---|---|---|---|",
        *(line(family, confusion(members)) for family, members in by_family.items()),
        line("**all**", confusion(rows)),
    ]


def cost() -> str:
    """What a diagnosis takes of a training of 300 steps."""
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
    """Print the table of the held-out half, both halves' numbers, the cost, and what is wrong."""
    held, chosen = examples(held_out=True), examples(held_out=False)
    print("\n".join(table(held)))
    print(f"\nbalanced accuracy held out: {balanced(confusion(held)):.1%} of {len(held)} configurations; ", end="")
    print(f"on the half that the weights were fitted on: {balanced(confusion(chosen)):.1%} of {len(chosen)}")
    print(cost())
    outcomes = {row["name"]: row for row in read_truth()}
    print("\nwrong, of those held out:")
    for configuration, indicators, trains in held:
        said = read_measurements()[configuration.name]
        if (said["verdict"] == "trains") != trains:
            row = outcomes[configuration.name]
            chance = f"odds {probability(indicators):.0%}"
            why = f"{said['verdict']}, {chance}{''.join(', ' + rule for rule in said['rules'])}"
            print(f"  {configuration.name}: {row['outcome']} ({row['accuracy']:.2f}); said {why}")


if __name__ == "__main__":
    sys.exit(main())
