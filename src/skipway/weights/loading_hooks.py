"""Code of others that torch runs when weights are loaded: hooks before and after, and methods in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from skipway.errors import CheckpointError, first_line, printable
from skipway.weights.prefixes import own_state, strip_prefixes

__all__ = ["after_loading", "before_loading"]


def before_loading(network: nn.Module, state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], list[str]]:
    """A state dict as the hooks of `register_load_state_dict_pre_hook` leave it, renamed or with other values, and a
    remark if prefixes were dropped, without which they find nothing.

    Args:
        network: a network whose modules may have such hooks.
        state: names of the network's and tensors; stays as it is.

    Raises:
        CheckpointError: a hook fails or reports an error, or a module loads by a method of its own.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        method = type(module)._load_from_state_dict
        if method is not nn.Module._load_from_state_dict and not method.__module__.startswith("torch."):
            raise CheckpointError(
                f"{place(name)} ({type(module).__name__}) loads its weights by a method of its own, "
                "_load_from_state_dict; load them by network.load_state_dict(torch.load(path)) in place of sw.load"
            )
    if not any(module._load_state_dict_pre_hooks for module in modules.values()):
        return state, []
    found, remarks = strip_prefixes(state, own_state(network).keys())
    described: Mapping[str, Any] = getattr(state, "_metadata", {})
    for name, module in modules.items():
        for hook in module._load_state_dict_pre_hooks.values():
            errors: list[str] = []
            given = (found, f"{name}." if name else "", described.get(name, {}), True, [], [], errors)
            call_hook(name, module, hook, *given)
            if errors:
                raise CheckpointError(f"a loading hook of {place(name)} reports: {first_line(ValueError(errors[0]))}")
    return found, remarks


def place(name: str) -> str:
    """A module in words."""
    return printable(name) or "the network"


def after_loading(network: nn.Module) -> None:
    """Call the hooks of `register_load_state_dict_post_hook`, those of a module after those of its children.

    Raises:
        CheckpointError: one fails.
    """
    for name, module in reversed(list(network.named_modules())):
        for hook in module._load_state_dict_post_hooks.values():
            call_hook(name, module, hook, module, _IncompatibleKeys([], []))


def call_hook(name: str, module: nn.Module, hook: Any, *given: Any) -> None:
    """Call somebody's hook."""
    try:
        hook(*given)
    except Exception as problem:
        raise CheckpointError(
            f"a loading hook of {place(name)} ({type(module).__name__}) raises "
            f"{type(problem).__name__}: {first_line(problem)}"
        ) from problem
