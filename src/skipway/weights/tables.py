"""Registry of key maps by module type and library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from skipway.errors import CheckpointError, spell, suggest
from skipway.nn import Cut, Gain, Multiply, OrthogonalSum, ResidualWarmup, ScaledActivation, ScaledShortcut
from skipway.weights.keymap import KeyMap, KeyRule

__all__ = [
    *("find_config_check", "find_keymap", "guess_architecture", "known_libraries"),
    *("register_config", "register_keymap", "register_misfit"),
]

OWN = KeyMap("skipway", (KeyRule("{leaf}", "{leaf}"),))
TABLES: dict[type[nn.Module], list[tuple[KeyMap, Callable[[Any], bool]]]] = {}
MISFITS: dict[tuple[type[nn.Module], str], Callable[[Any], str | None]] = {}
CONFIGS: dict[tuple[type[nn.Module], str], Callable[[Any, Mapping[str, Any]], list[str]]] = {}


def register_keymap(kind: type[nn.Module], keymap: KeyMap, *, when: Callable[[Any], bool] = lambda model: True) -> None:
    """Register a library's names for the parameters of a module type and its subclasses.

    Args:
        kind: the module type.
        keymap: the library's names.
        when: for which models of the type, where the library has several classes for it; by default for all.
    """
    TABLES.setdefault(kind, []).append((keymap, when))


def register_misfit(kind: type[nn.Module], library: str, misfit: Callable[[Any], str | None]) -> None:
    """Register what tells why no class of a library computes what a model of a type does; None: one does."""
    MISFITS[kind, library] = misfit


def register_config(
    kind: type[nn.Module], library: str, differences: Callable[[Any, Mapping[str, Any]], list[str]]
) -> None:
    """Register what tells how a model of a type differs from the one that a library's `config.json` describes."""
    CONFIGS[kind, library] = differences


def find_config_check(model: nn.Module, library: str) -> Callable[[Any, Mapping[str, Any]], list[str]] | None:
    """What tells how a model differs from the one that a library's `config.json` describes; None: nothing does."""
    rows = (each for (kind, name), each in CONFIGS.items() if name == library and isinstance(model, kind))
    return next(rows, None)


def known_keymaps(model: nn.Module) -> dict[str, KeyMap]:
    """The key maps for a model by library."""
    known = {OWN.library: OWN}
    for kind in reversed(type(model).__mro__):
        known |= {keymap.library: keymap for keymap, when in TABLES.get(kind, ()) if when(model)}
    return {library: keymap for library, keymap in known.items() if find_misfit(model, library) is None}


def find_misfit(model: nn.Module, library: str) -> str | None:
    """Why no class of a library computes what a model does; None: one does, or it is not known."""
    misfits = (misfit(model) for (kind, each), misfit in MISFITS.items() if each == library and isinstance(model, kind))
    named = any(keymap.library == library for kind in type(model).__mro__ for keymap, _ in TABLES.get(kind, ()))
    return next(filter(None, misfits), None) or (describe_constant(model, library) if named else None)


def describe_constant(model: nn.Module, library: str) -> str | None:
    """What a model computes with that no state dict carries and no class of a library has; None: there is nothing."""
    for name, module in model.named_modules():
        constant = isinstance(module, Multiply | OrthogonalSum | ScaledShortcut | ScaledActivation | Cut)
        constant |= isinstance(module, ResidualWarmup) and module.running
        if constant or (isinstance(module, Gain) and (module.factor != 1.0 or module.gain.ndim == 0)):
            return (
                f"{library} has nothing like {name!r} ({module}), so the same weights compute something else there; "
                "export to names='skipway', and load such weights into a network without its scheme, which "
                "skipway.rescheme puts on afterwards"
            )
    return None


def known_libraries(model: nn.Module) -> list[str]:
    """The libraries that have names for the parameters of a model."""
    return list(known_keymaps(model))


def find_keymap(model: nn.Module, library: str) -> KeyMap:
    """The key map for a model and a library."""
    known = known_keymaps(model)
    reason = find_misfit(model, library)
    if reason is not None:
        raise CheckpointError(f"{spell('names', library)} for this {type(model).__name__}: {reason}")
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
