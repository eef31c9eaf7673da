"""Putting modules around another one in somebody's network, in place: its keys stay, some are added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from skipway.errors import SkipwayError

__all__ = ["ENTRY", "SLOT", "STANDARD", "behind", "is_dressed", "is_plain", "on_slow_path", "put", "remove"]

SLOT = "residual_scale"
"""Name under which what stands behind a module is registered in it."""
ENTRY = "residual_entry"
"""Name under which what stands in front of a map is registered in it."""
STANDARD = "residual_standard"
"""Name under which what makes a map's weight from the weight that it holds is registered in it."""
SLOTS = (SLOT, ENTRY, STANDARD)


@cache
def dressed(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `kind` whose input, weight and output pass through the modules in its slots; of a tuple that is put
    out the first tensor does.

    A subclass keeps `isinstance`, attributes, hooks and state-dict keys, and `torch.compile` traces through it.
    """

    def forward(self: nn.Module, *given: Any, **named: Any) -> Any:
        entry, standard, scale = getattr(self, ENTRY, None), getattr(self, STANDARD, None), getattr(self, SLOT, None)
        if entry is not None:
            given = (entry(given[0]), *given[1:])
        out = kind.forward(self, *given, **named) if standard is None else mapped(self, given[0], standard(self.weight))
        if scale is None:
            return out
        if isinstance(out, tuple | list):
            first = scale(out[0])
            if isinstance(out, tuple) and hasattr(out, "_replace"):
                return out._replace(**{out._fields[0]: first})  # type: ignore[attr-defined]
            return type(out)((first, *out[1:]))
        return scale(out)

    body: dict[str, Any] = {"forward": forward, "__module__": kind.__module__, "undressed": kind}
    return type(f"{kind.__name__}WithScale", (kind,), body)


def mapped(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """What a convolution or linear map computes with another weight."""
    if isinstance(module, nn.Linear):
        return functional.linear(x, weight, module.bias)
    return module._conv_forward(x, weight, module.bias)


def is_dressed(module: nn.Module) -> bool:
    """Whether something stands around a module already."""
    return hasattr(type(module), "undressed")


def is_plain(module: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether a module, but for what stands around it, computes what one of the kinds does; see `folding.computes`."""
    kind = getattr(type(module), "undressed", type(module))
    return any(
        isinstance(module, known)
        and kind.forward is known.forward
        and getattr(kind, "_conv_forward", None) is getattr(known, "_conv_forward", None)
        for known in kinds
    )


def behind(target: nn.Module, inserted: nn.Module) -> Callable[[], None]:
    """Let the output of `target` pass through `inserted`, in place; what is returned takes it back."""
    return put(target, SLOT, inserted)


def put(target: nn.Module, slot: str, inserted: nn.Module) -> Callable[[], None]:
    """Register `inserted` in a slot of `target`, in place; what is returned takes it back.

    Raises:
        SkipwayError: something stands there already, or the forward of `target` is an attribute of the instance.
    """
    kind = type(target)
    if slot in target._modules and is_dressed(target):
        raise SkipwayError(f"behind this {kind.undressed.__name__} stands a scale already; undo that first")  # type: ignore[attr-defined]
    if "forward" in target.__dict__:
        raise SkipwayError(f"the forward of this {kind.__name__} was replaced on the instance")
    if hasattr(target, slot):
        raise SkipwayError(f"this {kind.__name__} has a {slot} of its own")
    if not is_dressed(target):
        try:
            target.__class__ = dressed(kind)
        except TypeError as problem:
            raise SkipwayError(f"the class {kind.__name__} cannot be derived from: {problem}") from problem
    target.add_module(slot, inserted)
    return partial(remove, target, slot)


def remove(target: nn.Module, slot: str) -> None:
    """Take away what is in a slot; with the last one the module is of its own class again."""
    target._modules.pop(slot, None)
    if is_dressed(target) and not any(other in target._modules for other in SLOTS):
        target.__class__ = type(target).undressed  # type: ignore[attr-defined]


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
