"""Fit the odds that a training learns to the half of the truth that is not held out.

    python -m benchmarks.trainability.fit PREFIXES.jsonl [MORE.jsonl …]     # files of `prefixes`

Of a few simple models the one with the smallest log-loss in a grouped cross-validation (all prefixes of a training in
one fold) is chosen, in two settings: every step on a fresh batch, and all steps on parts of one batch. Thresholds of a
decision come from the odds of the cross-validation. Written to src/skipway/diagnosis/odds.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import skipway.diagnosis.odds as odds_module
from benchmarks.trainability.configurations import STEPS, Configuration, configurations
from benchmarks.trainability.truth import TRUTH, read_lines
from skipway.diagnosis.odds import CHECKPOINTS, LOW, FirstSteps, Pause, features, is_hopeless

__all__ = ["Row", "first_steps", "held_out", "learnt", "main", "rows"]

FOLDS = 8
GRADES = {"learns": True, "late": True, "stuck": False, "diverged": False}
"""Marginal ends are in neither class."""
MODES = ("fresh", "one batch")
CERTAINTIES = (0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
LONGEST = 150
"""Checkpoint up to which the thresholds are calibrated: 10 % of the steps."""
FILE = Path(odds_module.__file__).with_name("odds.json")
Grade = bool | None


class Row(NamedTuple):
    """A prefix of a training; without values where it is hopeless."""

    name: str
    steps: int
    values: tuple[float, ...] | None
    learns: bool


def held_out() -> set[str]:
    """Names of the configurations on which nothing was tuned."""
    return {configuration.name for configuration in configurations() if configuration.held_out}


def learnt(row: dict[str, Any]) -> Grade:
    """Whether a training ended well; None at the margin."""
    return GRADES.get(row["outcome"])


def first_steps(recorded: dict[str, Any], configuration: Configuration, mode: str, steps: int) -> FirstSteps:
    """The first of the recorded steps, as the odds see them."""
    factors = [configuration.rate_factor(step) for step in range(STEPS)]
    pauses = [Pause(**{k: float("nan") if v is None else v for k, v in each.items()}) for each in recorded["pauses"]]
    pause = 3 + CHECKPOINTS.index(steps)
    return FirstSteps(
        losses=[float("nan") if loss is None else loss for loss in recorded["losses"][:steps]],
        information=recorded["information"][:steps],
        pauses=pauses[:pause],
        constant=recorded["constant"],
        travelled=sum(factors[:steps]),
        planned=sum(factors),
        first_rate=factors[0],
        rate=factors[steps - 1],
        fresh=mode == "fresh",
        adaptive=configuration.optimizer != "sgd",
    )


def rows(prefixes: dict[str, dict[str, Any]], truth: dict[str, dict[str, Any]], mode: str) -> Iterator[Row]:
    """All prefixes of the trainings that are not held out and end clearly."""
    held = held_out()
    for configuration in configurations():
        name = configuration.name
        if name in held or name not in prefixes or name not in truth or learnt(truth[name]) is None:
            continue
        recorded, learns = prefixes[name][mode], bool(learnt(truth[name]))
        for steps in itertools.takewhile(lambda step: step <= LONGEST, CHECKPOINTS):
            first = first_steps(recorded, configuration, mode, steps)
            if len(first.losses) < steps or is_hopeless(first.losses, first.unit):
                yield Row(name, steps, None, learns)
                break
            yield Row(name, steps, tuple(features(first).values()), learns)


def candidates() -> dict[str, Any]:
    """Simple models of scikit-learn."""
    from sklearn.ensemble import ExtraTreesClassifier, GradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    boosted = {"learning_rate": 0.05, "subsample": 0.5, "min_samples_leaf": 20, "max_features": 0.3, "random_state": 0}
    return {
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000)),
        "150 boosted trees of depth 2": GradientBoostingClassifier(n_estimators=150, max_depth=2, **boosted),
        "100 boosted trees of depth 3": GradientBoostingClassifier(n_estimators=100, max_depth=3, **boosted),
        "40 random trees": ExtraTreesClassifier(40, min_samples_leaf=12, max_features=0.4, random_state=0),
    }


def cross_validated(model: Any, table: list[Row]) -> Any:
    """Odds of every row by a model that has not seen its training."""
    from sklearn.model_selection import GroupKFold, cross_val_predict

    x, y = np.array([row.values for row in table]), np.array([row.learns for row in table])
    groups = [row.name for row in table]
    return cross_val_predict(model, x, y, groups=groups, cv=GroupKFold(FOLDS), method="predict_proba")[:, 1]


def log_loss(odds: Any, table: list[Row]) -> float:
    """Mean of −log p(outcome)."""
    chance = np.where([row.learns for row in table], odds, 1 - odds)
    return float(-np.log(np.clip(chance, LOW, 1)).mean())


def exported(model: Any) -> dict[str, Any]:
    """A fitted model as numbers: weights of a logistic regression, or trees, whose leaves add up to log-odds or to
    odds.
    """
    if hasattr(model, "named_steps"):
        scaler, regression = (step for _, step in model.steps)
        weights = regression.coef_[0] / scaler.scale_
        bias = float(regression.intercept_[0] - (weights * scaler.mean_).sum())
        return {
            "link": "logit",
            "bias": round(bias, 5),
            "weights": [round(float(w), 6) for w in weights],
            "trees": packed([], None),
        }
    if hasattr(model, "init_"):
        prior = float(model.init_.class_prior_[1])
        boosted = [each.tree_ for (each,) in model.estimators_]
        trees = packed(boosted, lambda value: model.learning_rate * value[0, 0])
        return {"link": "logit", "bias": round(float(np.log(prior / (1 - prior))), 5), "weights": [], "trees": trees}
    share = 1 / len(model.estimators_)
    forest = [each.tree_ for each in model.estimators_]
    trees = packed(forest, lambda value: share * value[0, 1] / value[0].sum())
    return {"link": "odds", "bias": 0.0, "weights": [], "trees": trees}


def packed(trees: Sequence[Any], value_of: Any) -> dict[str, list[float]]:
    """Trees as the columns that `skipway.diagnosis.odds.unpacked` reads; two leaves of one value are one."""
    columns: dict[str, list[float]] = {"features": [], "thresholds": [], "leaves": []}
    for tree in trees:
        pack(node_of(tree, 0, value_of), columns)
    return columns


def node_of(tree: Any, n: int, value_of: Any) -> tuple[Any, ...]:
    """A node (feature, threshold, left, right) or a leaf (value,), to four digits."""
    if tree.children_left[n] < 0:
        return (float(f"{value_of(tree.value[n]):.4g}"),)
    left, right = (node_of(tree, side[n], value_of) for side in (tree.children_left, tree.children_right))
    return left if left == right else (int(tree.feature[n]), float(f"{tree.threshold[n]:.4g}"), left, right)


def pack(node: tuple[Any, ...], columns: dict[str, list[float]]) -> None:
    """Append a node and its subtrees to the columns."""
    if len(node) == 1:
        columns["features"].append(-1)
        columns["leaves"].append(node[0])
        return
    feature, threshold, left, right = node
    columns["features"].append(feature)
    columns["thresholds"].append(threshold)
    pack(left, columns)
    pack(right, columns)


def runs_of(odds: Any, table: list[Row], hopeless: list[Row]) -> list[tuple[bool, list[float]]]:
    """For each training whether it learns, and its odds from checkpoint to checkpoint."""
    found: dict[str, tuple[bool, list[tuple[int, float]]]] = {}
    pairs = [*zip(table, odds, strict=True), *((row, LOW) for row in hopeless)]
    for row, value in pairs:
        found.setdefault(row.name, (row.learns, []))[1].append((row.steps, float(value)))
    return [(bool(learns), [value for _, value in sorted(looks)]) for learns, looks in found.values()]


def thresholds(runs: list[tuple[bool, list[float]]]) -> list[list[float]]:
    """For each certainty the upper and the lower threshold with the fewest undecided, where of the decided of each
    class at most a share of 1 − certainty is told wrongly, half a training more counted as wrong.
    """
    failing = [max(looks) for learns, looks in runs if not learns]
    learning = [min(looks) for learns, looks in runs if learns]
    found = []
    for upper in np.quantile(failing, np.linspace(0.6, 1, 41)):
        for lower in np.quantile(learning, np.linspace(0, 0.3, 31)):
            told = Counter(
                (learns, next((value > upper for value in looks if value > upper or value < lower), None))
                for learns, looks in runs
            )
            learning_told, failing_told = (told[c, True] + told[c, False] for c in (True, False))
            wrong = ((told[True, False] + 0.5) / (learning_told + 1), (told[False, True] + 0.5) / (failing_told + 1))
            found.append((learning_told + failing_told, max(wrong), round(float(upper), 4), round(float(lower), 4)))
    best = {c: max(((n, u, w) for n, worst, u, w in found if worst <= 1 - c), default=None) for c in CERTAINTIES}
    return [[certainty, *each[1:]] for certainty, each in best.items() if each is not None]


def chosen(everything: list[Row], words: str) -> dict[str, Any]:
    """The best model, fitted to all rows, with a line of words for every candidate."""
    table = [row for row in everything if row.values is not None]
    hopeless = [row for row in everything if row.values is None]
    found = {name: cross_validated(model, table) for name, model in candidates().items()}
    scores = {name: log_loss(odds, table) for name, odds in found.items()}
    for name, score in scores.items():
        print(f"{words}: {name:30} log-loss {score:.4f}")
    best = min(scores, key=lambda name: scores[name])
    model = candidates()[best]
    model.fit(np.array([row.values for row in table]), np.array([row.learns for row in table]))
    runs = runs_of(found[best], table, hopeless)
    levels = thresholds(runs)
    print(f"{words}: {best}, {len(runs)} trainings, {sum(not learns for learns, _ in runs)} of which fail; {levels}")
    return {"model": best, "trainings": len(runs), "thresholds": levels, **exported(model)}


def read_prefixes(paths: Sequence[Path], truth: dict[str, Any]) -> dict[str, Any]:
    """The recorded first steps by name, with the loss of the best constant answer."""
    found: dict[str, Any] = {}
    for path in paths:
        for name, line in read_lines(path).items():
            if name in truth:
                found[name] = {mode: {**line[mode], "constant": truth[name]["constant"]} for mode in MODES}
    return found


def main() -> None:
    """Fit both settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", type=Path, nargs="+")
    truth = read_lines(TRUTH)
    prefixes = read_prefixes(parser.parse_args().prefixes, truth)
    content = {mode: chosen(list(rows(prefixes, truth, mode)), mode) for mode in MODES}
    FILE.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
