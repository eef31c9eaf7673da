"""Which task a recipe asks for."""

from __future__ import annotations

from skipway.recipe import Recipe
from skipway.training.image_task import ImageClassification
from skipway.training.task import Task

__all__ = ["choose_task"]


def choose_task(recipe: Recipe) -> Task:
    """The task of a recipe."""
    return ImageClassification()
