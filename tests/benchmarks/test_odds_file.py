"""Trees as columns of numbers: what scikit-learn's models answer is what the packed ones answer."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

from benchmarks.trainability.fit import candidates, exported
from skipway.diagnosis.odds import leaf, unpacked


@pytest.mark.parametrize("kind", ["150 boosted trees of depth 2", "40 random trees"])
def test_packed_trees_answer_as_the_fitted_model(kind):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(120, 4)).round(1)
    model = candidates()[kind].fit(x, x[:, 0] + 0.3 * x[:, 1] > draw.normal(size=120) / 2)
    x += 0.0123  # off every threshold, which lies half-way between two tenths
    stored = exported(model)
    assert len(stored["trees"]["features"]) == len(stored["trees"]["thresholds"]) + len(stored["trees"]["leaves"])
    score = [stored["bias"] + sum(leaf(tree, row) for tree in unpacked(**stored["trees"])) for row in x]
    odds = np.array(score) if stored["link"] == "odds" else 1 / (1 + np.exp(-np.array(score)))
    assert abs(odds - model.predict_proba(x)[:, 1]).max() < 1e-3  # four digits of every leaf
