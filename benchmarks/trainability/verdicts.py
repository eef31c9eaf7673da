"""Agreement of the verdicts on untrained networks with the outcome of their training.

    python -m benchmarks.trainability.verdicts

Reads truth.jsonl, measurements.jsonl, baselines.jsonl and fixes.jsonl. Only the half on which nothing was fitted
counts. Trainings that end at the margin are in neither class.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from benchmarks.trainability.baselines import BASELINES
from benchmarks.trainability.fit import held_out, learnt
from benchmarks.trainability.fixes import FIXES
from benchmarks.trainability.measurements import MEASUREMENTS
from benchmarks.trainability.truth import STEPS, TRUTH, read_lines
from skipway.diagnosis.odds import decide

__all__ = ["balanced", "main", "simulated"]

CERTAINTY = 0.95
PART = 1 / 8
"""Share of the batch that a trial step takes where there is one batch."""
COSTS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
Said = dict[str, str]


def balanced(pairs: Iterable[tuple[bool, bool]]) -> float:
    """Mean of the shares of right answers among those that learn and those that do not; pairs of (learns, said so)."""
    counts = Counter(pairs)
    shares = [
        counts[truth, truth] / total for truth in (True, False) if (total := counts[truth, True] + counts[truth, False])
    ]
    return sum(shares) / max(len(shares), 1)


def simulated(
    looks: Sequence[Sequence[float]], certainty: float, allowance: float, *, fresh: bool
) -> tuple[str, float, float]:
    """The verdict, the odds and the cost where trial steps may cost a share of the training's: of the looks, each
    (steps, odds, processor time), the first that is certain, and "undecided" after the last that is allowed.
    """
    odds, spent = 0.5, 0.0
    for steps, odds_now, _ in looks:
        share = steps / STEPS * (1 if fresh else PART)
        if share > allowance:
            break
        odds, spent = odds_now, share
        verdict = decide(odds, certainty, fresh=fresh)
        if verdict is not None:
            return verdict, odds, spent
    return "undecided", odds, spent


def score(said: Said, truth: dict[str, Any]) -> tuple[float, float]:
    """Balanced accuracy of the decided ones, and share of undecided ones."""
    decided = [
        (bool(learnt(truth[name])), verdict == "trains") for name, verdict in said.items() if verdict != "undecided"
    ]
    return balanced(decided), 1 - len(decided) / max(len(said), 1)


def best_threshold(values: dict[str, float], names: Sequence[str], truth: dict[str, Any]) -> float:
    """The threshold of the highest balanced accuracy on some configurations."""
    levels = sorted({values[name] for name in names})
    return max(levels, key=lambda level: balanced((bool(learnt(truth[n])), values[n] >= level) for n in names))


def family_table(said: Said, truth: dict[str, Any]) -> list[str]:
    """Right, wrong and undecided by family."""
    lines = [
        "| family | learns: yes | no | undecided | fails: no | yes | undecided | right of decided |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[str]] = defaultdict(list)
    for name in said:
        groups[truth[name]["family"]].append(name)
    groups["**all**"] = list(said)
    for family, names in groups.items():
        counts = Counter((bool(learnt(truth[name])), said[name]) for name in names)
        cells = [counts[True, v] for v in ("trains", "will not train", "undecided")]
        cells += [counts[False, v] for v in ("will not train", "trains", "undecided")]
        right, wrong = cells[0] + cells[3], cells[1] + cells[4]
        share = f"{right / (right + wrong):.0%}" if right + wrong else "–"
        lines.append(f"| {family} | {' | '.join(map(str, cells))} | {share} |")
    return lines


def reliability(odds: dict[str, float], truth: dict[str, Any]) -> list[str]:
    """Odds in bins beside what came true, and the Brier score."""
    lines = ["| odds | trainings | mean odds | learnt |", "|---|---|---|---|"]
    for low, high in ((0, 0.05), (0.05, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 0.95), (0.95, 1.01)):
        chosen = [name for name, value in odds.items() if low <= value < high]
        if chosen:
            mean = sum(odds[name] for name in chosen) / len(chosen)
            came = sum(bool(learnt(truth[name])) for name in chosen) / len(chosen)
            lines.append(f"| {low:.2f} to {min(high, 1):.2f} | {len(chosen)} | {mean:.2f} | {came:.2f} |")
    brier = sum((value - bool(learnt(truth[name]))) ** 2 for name, value in odds.items()) / max(len(odds), 1)
    return [*lines, "", f"Brier score {brier:.3f}"]


def curve(held: Sequence[str], rows: dict[str, Any], truth: dict[str, Any], mode: str) -> list[str]:
    """Accuracy over cost."""
    lines = [
        "| may cost | balanced accuracy of decided | undecided | cost, median | balanced accuracy, undecided by odds |",
        "|---|---|---|---|---|",
    ]
    for cost in COSTS:
        found = {name: simulated(rows[name][mode]["looks"], CERTAINTY, cost, fresh=mode == "fresh") for name in held}
        right, open_ = score({name: verdict for name, (verdict, _, _) in found.items()}, truth)
        forced = balanced((bool(learnt(truth[name])), odds >= 0.5) for name, (_, odds, _) in found.items())
        spent = median(spent for _, _, spent in found.values())
        lines.append(f"| {cost:.1%} | {right:.1%} | {open_:.1%} | {spent:.1%} | {forced:.1%} |")
    return lines


def baseline_lines(held: Sequence[str], fitted: Sequence[str], truth: dict[str, Any]) -> list[str]:
    """Balanced accuracy of the simpler forecasts, at thresholds chosen on the other half."""
    rows = read_lines(BASELINES)
    lines = ["| forecast | balanced accuracy |", "|---|---|"]
    words = {
        "loss": "loss after 45 real steps",
        "range": "learning-rate range test, 45 steps",
        "rules": "rules of thumb",
    }
    for key, label in words.items():
        values = {name: row[key] for name, row in rows.items()}
        judged, chosen = ([name for name in names if name in values] for names in (held, fitted))
        if judged and chosen:
            level = best_threshold(values, chosen, truth)
            share = balanced((bool(learnt(truth[name])), values[name] >= level) for name in judged)
            lines.append(f"| {label} | {share:.1%} of {len(judged)} |")
    return lines


def fix_lines() -> list[str]:
    """What became of the networks that `fix()` mended."""
    rows = list(read_lines(FIXES).values())
    offered = [row for row in rows if row["outcome"] != "no offer"]
    learn = sum(bool(learnt(row)) for row in rows)
    words = f"{learn} of {len(rows)} networks that were rightly said not to train learn after `fix()`"
    lines = [f"{words}; {len(offered)} had an offer, {learn / max(len(offered), 1):.0%} of which learn:", ""]
    failed = [row for row in rows if not learnt(row)]
    return lines + [
        f"* {row['name']}: {row['outcome']} after {'; '.join(row['applied']) or 'nothing'}" for row in failed
    ]


def main() -> None:
    """Print the tables."""
    truth, rows = read_lines(TRUTH), read_lines(MEASUREMENTS)
    known = [name for name in truth if name in rows]
    unseen = held_out()
    held = [name for name in known if name in unseen and learnt(truth[name]) is not None]
    margin = [name for name in known if name in unseen and learnt(truth[name]) is None]
    fitted = [name for name in truth if name not in unseen and learnt(truth[name]) is not None]
    fails = sum(not learnt(truth[name]) for name in held)
    print(f"{len(truth)} trainings: {dict(Counter(row['outcome'] for row in truth.values()))}; held out {len(held)}, ")
    print(f"of which {fails} fail, and {len(margin)} at the margin\n")
    for mode, words in (("fresh", "a loader of fresh batches"), ("one batch", "one batch of 128 samples or 64 texts")):
        print(f"## With {words}\n")
        said = {name: rows[name][mode]["verdict"] for name in held}
        right, open_ = score(said, truth)
        spent = median(rows[name][mode]["share"] for name in held)
        print(f"balanced accuracy {right:.1%} of the decided, {open_:.1%} undecided, median cost {spent:.2%}\n")
        print("\n".join([*family_table(said, truth), ""]))
        print("\n".join([*reliability({name: rows[name][mode]["odds"] for name in held}, truth), ""]))
        print("\n".join([*curve(held, rows, truth, mode), ""]))
        print("At the margin:", dict(Counter(rows[name][mode]["verdict"] for name in margin)), "\n")
        for name in held:
            row = truth[name]
            if said[name] != "undecided" and bool(learnt(row)) != (said[name] == "trains"):
                odds = f"odds {rows[name][mode]['odds']:.0%}"
                print(f"* {name}: {row['outcome']} ({row['gained']:.2f}); said {said[name]}, {odds}")
        print()
    print("## Simpler forecasts\n")
    print("\n".join([*baseline_lines(held, fitted, truth), ""]))
    print("## Remedies\n")
    print("\n".join(fix_lines()))


if __name__ == "__main__":
    main()
