"""Weights of Skipway and of other libraries: declarative key maps, used in both directions, strict."""

from skipway.weights import cait, convnext, gpt, resnet, swin, vit
from skipway.weights.export import export_names
from skipway.weights.files import read_weights
from skipway.weights.keymap import Convert, KeyMap, KeyRule, module_rule
from skipway.weights.loader import LoadReport, Source, load, load_state, match, read_source
from skipway.weights.tables import register_keymap

__all__ = [
    "Convert",
    "KeyMap",
    "KeyRule",
    "LoadReport",
    "Source",
    "cait",
    "convnext",
    "export_names",
    "gpt",
    "load",
    "load_state",
    "match",
    "module_rule",
    "read_source",
    "read_weights",
    "register_keymap",
    "resnet",
    "swin",
    "vit",
]
