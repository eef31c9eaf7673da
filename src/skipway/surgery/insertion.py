"""Putting a module behind another one in somebody's network, in place: its keys stay, one is added."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import nn

from skipway.errors import SkipwayError

__all__ = ["SLOT", "behind", "is_dressed", "on_slow_path", "remove_behind"]

SLOT = "residual_scale"
"""Name under which what stands behind a module is registered in it."""


@cache
def dressed(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `kind` whose output passes through the module in `SLOT`; of a tuple the first tensor does.

    A subclass keeps `isinstance`, attributes, hooks and state-dict keys, and `torch.compile` traces through it.
    """

    def forward(self: nn.Module, *given: Any, **named: Any) -> Any:
        out = kind.forward(self, *given, **named)
        scale = self.get_submodule(SLOT)
        if isinstance(out, tuple | list):
            first = scale(out[0])
            if isinstance(out, tuple) and hasattr(out, "_replace"):
                return out._replace(**{out._fields[0]: first})  # type: ignore[attr-defined]
            return type(out)((first, *out[1:]))
        return scale(out)

    body: dict[str, Any] = {"forward": forward, "__module__": kind.__module__, "undressed": kind}
    return type(f"{kind.__name__}WithScale", (kind,), body)


def is_dressed(module: nn.Module) -> bool:
    """Whether something stands behind a module already."""
    return hasattr(type(module), "undressed")


def behind(target: nn.Module, inserted: nn.Module) -> Callable[[], None]:
    """Let the output of `target` pass through `inserted`, in place; what is returned takes it back.

    Raises:
        SkipwayError: something stands behind it already, or its forward is an attribute of the instance.
    """
    if is_dressed(target):
        raise SkipwayError(f"behind this {type(target).undressed.__name__} stands a scale already; undo that first")  # type: ignore[attr-defined]
    if "forward" in target.__dict__:
        raise SkipwayError(f"the forward of this {type(target).__name__} was replaced on the instance")
    if hasattr(target, SLOT):
        raise SkipwayError(f"this {type(target).__name__} has a {SLOT} of its own")
    try:
        target.__class__ = dressed(type(target))
    except TypeError as problem:
        raise SkipwayError(f"the class {type(target).__name__} cannot be derived from: {problem}") from problem
    target.add_module(SLOT, inserted)
    return lambda: remove_behind(target)


def remove_behind(target: nn.Module) -> None:
    """Take away what stands behind a module."""
    if is_dressed(target):
        target.__class__ = type(target).undressed  # type: ignore[attr-defined]
        del target._modules[SLOT]


def on_slow_path(model: nn.Module, name: str) -> list[Callable[[], None]]:
    """Keep torch's transformer layers around a module from running as one fused operator, which calls no part of them.

    In evaluation without gradients `nn.TransformerEncoderLayer` reads the weights of its parts and computes the whole
    layer itself; what stands behind one of them would be left out. Returns what takes it back.
    """
    steps: list[Callable[[], None]] = []
    parts = name.split(".")
    for length in range(len(parts)):
        module = model.get_submodule(".".join(parts[:length]))
        for kind, attribute in FUSED.items():
            if isinstance(module, kind) and getattr(module, attribute, None):
                steps.append(partial(setattr, module, attribute, getattr(module, attribute)))
                setattr(module, attribute, False)
    return steps


# the attribute of a fused layer that says whether it may run as one operator
FUSED: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
