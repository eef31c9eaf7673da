"""What an earlier search chose for a network on this machine, kept in the cache folder, one small file per search."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from skipway.data.cache.store import cache_folder, replace_file
from skipway.hardware.processor import cpu_name, cpu_precisions
from skipway.inference.backends import BACKENDS, LAYOUTS, Choice

__all__ = ["describe_machine_and_versions", "load_choice", "save_choice", "search_facts"]

FORMAT = 1


def describe_machine_and_versions() -> dict[str, Any]:
    """What a choice depends on besides the network: processor, threads, versions."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "format": FORMAT,
        "processor": [cpu_name(), *cpu_precisions(), card],
        "threads": torch.get_num_threads(),
        "versions": dict(package_versions()),
    }


def package_versions() -> Iterator[tuple[str, str]]:
    """The versions of Skipway, torch and what backends need, as far as they are installed."""
    needed = {package for backend in BACKENDS.entries.values() for package in backend.needs}
    for package in sorted({"skipway", "torch", *needed}):
        with suppress(PackageNotFoundError):
            yield package, version(package)


def search_facts(model: nn.Module, example: Any, asked: Sequence[Any]) -> dict[str, Any]:
    """What a search depends on: machine and versions, the network's structure, the example's shapes, the request."""
    structure = hashlib.sha256(repr(model).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        structure.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device}".encode())
    for module in model.modules():
        structure.update(f"{type(module).__module__}.{type(module).__qualname__}".encode())
    shapes = tree_map_only(Tensor, lambda x: f"{tuple(x.shape)} {x.dtype} {x.device}", example)
    described = {"structure": structure.hexdigest(), "example": repr(shapes), "asked": repr(asked)}
    return {**describe_machine_and_versions(), **described}


def memory_file(facts: dict[str, Any]) -> Path:
    """The file of a search.

    Raises:
        OSError: there is no home folder.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder(None) / "optimize" / f"{digest}.json"


def load_choice(facts: dict[str, Any]) -> Choice | None:
    """Return what an equal search chose; None where there was none, or its file is damaged or of other facts."""
    try:
        stored = json.loads(memory_file(facts).read_text(encoding="utf-8"))
        choice = Choice(**stored["choice"])
        counts = (choice.pieces, choice.streams)
        valid = choice.layout in LAYOUTS and all(type(count) is int and count >= 1 for count in counts)
        return choice if valid and stored["facts"] == facts else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def save_choice(facts: dict[str, Any], choice: Choice) -> str:
    """Keep a choice for equal searches; return why that is impossible, empty where it is not."""
    try:
        path = memory_file(facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [json.dumps({"facts": facts, "choice": asdict(choice)}, indent=1).encode()])
    except OSError as error:
        return f"not remembered: {error}"
    return ""
