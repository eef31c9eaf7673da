"""The `config.json` beside weights in Hugging Face's layout: a network may fit them and still be another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from skipway.errors import CheckpointError, printable
from skipway.weights.hub import local_path
from skipway.weights.tables import find_config_check

__all__ = ["CONFIG", "read_config", "refuse_other_config"]

CONFIG = "config.json"


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
    differences = [] if described is None else compare(network, described)
    if differences:
        raise CheckpointError(
            f"{printable(source)}: its {CONFIG} describes another network than this {type(network).__name__}: "
            f"{'; '.join(differences)}; give build(…) these options"
        )
