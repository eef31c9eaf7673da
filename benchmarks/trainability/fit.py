"""Fit the probability of the outlook on the configurations that are not held out.

    python -m benchmarks.trainability.fit

A logistic regression on standardised features, classes weighted equally, its strength the library's default. Prints
`WEIGHTS` of `skipway/diagnosis/outlook.py`, and the accuracy of ten-fold cross-validation on the same half.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from benchmarks.trainability.configurations import Configuration, configurations
from benchmarks.trainability.measurements import read_measurements
from benchmarks.trainability.truth import read_truth
from skipway.diagnosis.indicators import Indicators
from skipway.diagnosis.outlook import indicator_features

__all__ = ["Trial", "examples", "main"]

Trial = tuple[Configuration, Indicators, bool]


def examples(*, held_out: bool | None) -> list[Trial]:
    """Configurations with their indicators and outcomes, of one half, or all (None)."""
    truth = {row["name"]: row["outcome"] == "reached" for row in read_truth()}
    measured = read_measurements()
    names = [field.name for field in fields(Indicators)]
    return [
        (c, Indicators(**{name: measured[c.name][name] for name in names if name in measured[c.name]}), truth[c.name])
        for c in configurations()
        if c.name in truth and c.name in measured and held_out in (None, c.held_out)
    ]


def model() -> Any:
    """The unfitted regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=5000))


def main() -> None:
    """Fit and print."""
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    rows = examples(held_out=False)
    names = list(indicator_features(rows[0][1]))
    inputs = np.array([list(indicator_features(indicators).values()) for _, indicators, _ in rows])
    trains = np.array([outcome for *_, outcome in rows])
    folds = StratifiedKFold(10, shuffle=True, random_state=0)
    found = cross_val_predict(model(), inputs, trains, cv=folds)
    print(f"cross-validated on {len(rows)} configurations: {balanced_accuracy_score(trains, found):.3f}")
    fitted = model().fit(inputs, trains)
    scaler, regression = fitted[0], fitted[1]
    weights = regression.coef_[0] / scaler.scale_
    bias = float(regression.intercept_[0] - (weights * scaler.mean_).sum())
    for name, weight in zip((*names, "bias"), (*weights, bias), strict=True):
        print(f'    "{name}": {weight:.3g},')


if __name__ == "__main__":
    main()
