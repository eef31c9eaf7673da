"""The `config.json` beside weights in Hugging Face's layout: a network may fit them and still be another one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from skipway.errors import CheckpointError, printable
from skipway.weights.decoder_classes import ACTIVATIONS
from skipway.weights.hub import local_path
from skipway.weights.tables import find_config_check

__all__ = ["CONFIG", "read_config", "refuse_other_config", "stated_differences"]

CONFIG = "config.json"
ALIKE = 1e-5
"""Epsilons up to this are alike beside variances near 1: classes of transformers state 1e-12 for weights of 1e-6."""
IMAGE_ACTIVATIONS = {**ACTIVATIONS, "quickgelu": ("quick_gelu",)}


def read_config(path: Path) -> dict[str, Any] | None:
    """The description of a network of transformers in a folder, or beside a file of weights; None: there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = (path if path.is_dir() else path.parent) / CONFIG
    if not file.is_file():
        return None
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{printable(file)} is damaged: {printable(str(error))}") from error
    return described if isinstance(described, dict) and "model_type" in described else None


def refuse_other_config(network: nn.Module, source: str | Path, names: str) -> None:
    """Raise where the `config.json` beside weights describes a network that computes something else with them."""
    compare = find_config_check(network, names)
    if compare is None:
        return
    described = read_config(local_path(source, (CONFIG,)))
    try:
        differences = [] if described is None else compare(network, described)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{printable(source)}: its {CONFIG} has a value of another kind: {error}") from error
    if differences:
        raise CheckpointError(
            f"{printable(source)}: its {CONFIG} describes another network than this {type(network).__name__}: "
            f"{'; '.join(differences)}; give build(…) the file's, where it has such an option"
        )


def stated_differences(
    ours: Mapping[str, Any],
    described: Mapping[str, Any],
    names: Mapping[str, str],
    defaults: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """What a network has otherwise than the `config.json` beside its weights states, in words.

    Args:
        ours: what the network has, by our names; "act" by our names of activations.
        described: content of the file.
        names: our name → theirs.
        defaults: model type → its fields that a file may lack, with the values of the class.

    >>> stated_differences({"heads": 2}, {"model_type": "vit", "num_heads": 4}, {"heads": "num_heads"}, {})
    ['heads=2 in the model, heads=4 in the file']
    """
    values = {**defaults.get(str(described["model_type"]), {}), **described}
    stated = {name: values[theirs] for name, theirs in names.items() if theirs in values}
    if "act" in stated:
        own = (name for name, theirs in IMAGE_ACTIVATIONS.items() if stated["act"] in theirs)
        stated["act"] = next(own, stated["act"])
    return [
        f"{name}={ours[name]!r} in the model, {name}={printable(repr(value))} in the file"
        for name, value in stated.items()
        if value != ours[name] and not (name == "epsilon" and max(value, ours[name]) <= ALIKE)
    ]
