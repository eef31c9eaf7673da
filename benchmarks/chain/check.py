"""Compare `skipway.chain` with what a person read in the source.

    python -m benchmarks.chain.check            # all architectures of both tables, or the names given

Prints a line for each architecture with its differences; the exit status is 1 if there are any.
"""

from __future__ import annotations

import sys
from collections import Counter

import skipway as sw
from benchmarks.chain.transformers_truth import TINY, TinyTruth, build_tiny
from benchmarks.chain.truth import TRUTHS, Truth, build

__all__ = ["compare", "main"]


def compare(truth: Truth) -> list[str]:
    """The differences between `chain` and the truth about one architecture."""
    model, example = build(truth.model)
    chain = sw.chain(model, example)
    placements = Counter("+".join(connection.seen.norms) or "none" for connection in chain)
    scales = Counter(
        "none" if (scale := connection.seen.scale) is None else "per channel" if scale.per_channel else "scalar"
        for connection in chain
    )
    found = {
        "connections": dict(Counter(connection.seen.skip for connection in chain)),
        "refused": dict(Counter(refusal.reason for refusal in chain.refused)),
    }
    differences = [
        f"{key}: read {getattr(truth, key)}, found {value}"
        for key, value in found.items()
        if value != getattr(truth, key)
    ]
    for key, counts in (("placement", placements), ("scale", scales)):
        if getattr(truth, key) not in most_frequent(counts):
            differences.append(f"{key}: read {getattr(truth, key)}, found {dict(counts)}")
    return differences


def compare_counts(truth: TinyTruth) -> list[str]:
    """The difference between the number of connections that `chain` finds and the one that was read."""
    found = len(sw.chain(*build_tiny(truth)))
    return [] if found == truth.connections else [f"connections: read {truth.connections}, found {found}"]


def most_frequent(counts: Counter[str]) -> set[str]:
    """The most frequent entry, or entries that are equally frequent."""
    highest = max(counts.values(), default=0)
    return {entry for entry, count in counts.items() if count == highest} or {"none"}


def main(names: list[str]) -> int:
    """Compare, print, and count the architectures that differ."""
    wrong = 0
    chosen = [truth for truth in (*TRUTHS, *TINY) if not names or truth.model in names]
    for truth in chosen:
        differences = compare(truth) if isinstance(truth, Truth) else compare_counts(truth)
        wrong += bool(differences)
        print(f"{truth.model:45} {'; '.join(differences) or 'agrees'}", flush=True)
    print(f"{wrong} of {len(chosen)} architectures differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
