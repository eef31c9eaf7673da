"""Training: a recipe in, a run folder out.

    outcome = skipway.training.train(skipway.training.Recipe(epochs=3), Path("runs/first"))

The names are loaded when they are first used, so that the command line can read the recipe without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipway.training.evaluation import Evaluation, wilson_interval
    from skipway.training.loop import train
    from skipway.training.propagation import StageSignal, signal_check
    from skipway.training.recipe import Recipe, read_recipe
    from skipway.training.run import Outcome
    from skipway.training.run_folder import RunFolder
    from skipway.training.screen import Screen, Silent, StepReport
    from skipway.training.using import Prediction, Predictor

HOMES = {
    "Evaluation": "evaluation",
    "Outcome": "run",
    "Prediction": "using",
    "Predictor": "using",
    "Recipe": "recipe",
    "RunFolder": "run_folder",
    "Screen": "screen",
    "Silent": "screen",
    "StageSignal": "propagation",
    "StepReport": "screen",
    "read_recipe": "recipe",
    "signal_check": "propagation",
    "train": "loop",
    "wilson_interval": "evaluation",
}

__all__ = [
    "Evaluation",
    "Outcome",
    "Prediction",
    "Predictor",
    "Recipe",
    "RunFolder",
    "Screen",
    "Silent",
    "StageSignal",
    "StepReport",
    "read_recipe",
    "signal_check",
    "train",
    "wilson_interval",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
