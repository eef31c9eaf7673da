"""Weights of ours and of other libraries: declarative key maps, read both ways, strict."""

from skipway.weights import cait, convnext, resnet, swin, vit
from skipway.weights.files import read
from skipway.weights.keymap import Convert, KeyMap, Rule, rule
from skipway.weights.loader import Report, Source, export_names, load, match
from skipway.weights.tables import register

__all__ = [
    "Convert",
    "KeyMap",
    "Report",
    "Rule",
    "Source",
    "cait",
    "convnext",
    "export_names",
    "load",
    "match",
    "read",
    "register",
    "resnet",
    "rule",
    "swin",
    "vit",
]
