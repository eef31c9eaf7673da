"""Lint: rules that find known mistakes in a model and its optimizer, without data and without training it."""

from skipway.diagnosis.lint.catalogue import RULES, lint
from skipway.diagnosis.lint.rule import Hit, LintRule
from skipway.diagnosis.lint.survey import Link, Survey

__all__ = ["RULES", "Hit", "Link", "LintRule", "Survey", "lint"]
