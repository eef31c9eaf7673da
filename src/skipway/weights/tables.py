"""Registry of key maps by module type and library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from skipway.errors import CheckpointError, spell, suggest
from skipway.weights.keymap import KeyMap, KeyRule

__all__ = ["find_keymap", "guess_architecture", "known_libraries", "register_keymap"]

OWN = KeyMap("skipway", (KeyRule("{leaf}", "{leaf}"),))
TABLES: dict[type[nn.Module], list[tuple[KeyMap, Callable[[Any], bool]]]] = {}


def register_keymap(kind: type[nn.Module], keymap: KeyMap, *, when: Callable[[Any], bool] = lambda model: True) -> None:
    """Register a library's names for the parameters of a module type and its subclasses.

    Args:
        kind: the module type.
        keymap: the library's names.
        when: for which models of the type, where the library has several classes for it; by default for all.
    """
    TABLES.setdefault(kind, []).append((keymap, when))


def known_keymaps(model: nn.Module) -> dict[str, KeyMap]:
    """The key maps for a model by library."""
    known = {OWN.library: OWN}
    for kind in reversed(type(model).__mro__):
        known |= {keymap.library: keymap for keymap, when in TABLES.get(kind, ()) if when(model)}
    return known


def known_libraries(model: nn.Module) -> list[str]:
    """The libraries that have names for the parameters of a model."""
    return list(known_keymaps(model))


def find_keymap(model: nn.Module, library: str) -> KeyMap:
    """The key map for a model and a library."""
    known = known_keymaps(model)
    if library not in known:
        raise CheckpointError(
            f"{spell('names', library)} for a {type(model).__name__}: {suggest('set of names', library, known)}"
        )
    return known[library]


def guess_architecture(keys: Iterable[str]) -> tuple[type[nn.Module], str] | None:
    """The architecture and library whose table matches most of the keys; None below three quarters."""
    keys = list(keys)
    tables = [(kind, keymap) for kind, entries in TABLES.items() for keymap, _ in entries]
    # of two tables that match all keys, the one with fewer unused rows
    kind, best = max(tables, key=lambda table: (round(table[1].known(keys), 2), table[1].busy(keys)))
    return (kind, best.library) if best.known(keys) >= 0.75 else None
