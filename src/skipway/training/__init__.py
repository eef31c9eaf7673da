"""Training: a recipe in, a run folder out.

    outcome = skipway.training.train(skipway.recipe.Recipe(epochs=3), Path("runs/first"))
    folds = skipway.training.cross_validate(skipway.recipe.Recipe(epochs=3), Path("runs/folds"), folds=5)

The names are loaded when they are first used, so that the command line loads torch only when it trains.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipway.training.cross_validation import CrossValidation, cross_validate
    from skipway.training.loop import train
    from skipway.training.reporter import Reporter, SilentReporter, StepReport
    from skipway.training.run import Outcome
    from skipway.training.run_folder import RunFolder

HOMES = {
    "CrossValidation": "cross_validation",
    "cross_validate": "cross_validation",
    "Outcome": "run",
    "RunFolder": "run_folder",
    "Reporter": "reporter",
    "SilentReporter": "reporter",
    "StepReport": "reporter",
    "train": "loop",
}

__all__ = [
    "CrossValidation",
    "Outcome",
    "Reporter",
    "RunFolder",
    "SilentReporter",
    "StepReport",
    "cross_validate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
