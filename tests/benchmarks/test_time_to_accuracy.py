"""Parts of the ablation are options that change the preset, and its table compares with the preset."""

from __future__ import annotations

import pytest

from benchmarks.time_to_accuracy.ablation import PARTS, table_lines
from benchmarks.time_to_accuracy.race import PLANS
from skipway.cli.app import app


@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if part.options])
def test_a_part_changes_the_preset(name):
    recipes = [
        app.parse_args(["train", "--preset", "fast", *options])[1].arguments["recipe"]
        for options in ((), PARTS[name].options)
    ]
    changed = recipes[0].changes(recipes[1])
    assert len(changed) == len(PARTS[name].options) // 2 or all("no" in option for option in PARTS[name].options)
    assert changed


def test_the_table_compares_means_with_the_preset():
    rows = [
        {"part": part, "seed": seed, "epochs": 4, "accuracy": accuracy, "processor": 100.0 + seed}
        for part, seed, accuracy in (("the preset", 0, 0.8), ("the preset", 1, 0.82), ("no flips", 0, 0.79))
    ]
    assert table_lines(rows)[2:] == [
        "| the preset | 4 | 81.0 % |  | 100 s | 2 |",
        "| no flips | 4 | 79.0 % | -2.0 | 100 s | 1 |",
    ]


def test_each_goal_has_a_plan_for_both():
    assert all(set(plan) == {"skipway", "plain"} for plan in PLANS.values())
