"""Lint: known mistakes, found without training and without a batch, by rules on a model and its optimizer."""

from skipway.diagnosis.lint.catalogue import RULES, lint
from skipway.diagnosis.lint.rule import Hit, Rule
from skipway.diagnosis.lint.survey import Link, Survey

__all__ = ["RULES", "Hit", "Link", "Rule", "Survey", "lint"]
