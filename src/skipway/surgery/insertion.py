"""Modules inserted around another one in somebody's network: its keys stay, some are added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from skipway.errors import SkipwayError
from skipway.surgery.block_call import BlockCall, forward_names
from skipway.surgery.class_factory import class_factory
from skipway.surgery.transaction import Transaction
from skipway.tracing.arguments import exchange_at, item_at
from skipway.tracing.paths import parents

__all__ = [
    "ARGUMENT",
    "BRANCH",
    "CALL",
    "INPUT",
    "OUTPUT",
    "STREAMED",
    "STREAMS",
    "WEIGHT",
    "Around",
    "carries_streams",
    "computes_like",
    "disable_fused_path",
    "has_slots",
    "insert",
    "insert_after",
    "insert_into_branch",
    "place_like_maps",
    "remove",
    "repeat",
]

OUTPUT = "residual_scale"
"""Slot of the module that a host's output passes through, and its name in the host."""
INPUT = "residual_entry"
"""Slot of the module that a map's input passes through."""
WEIGHT = "residual_standard"
"""Slot of the module that a map's weight passes through."""
BRANCH = "residual_branch"
"""Slot of the module that what a block adds to x passes through: x + residual_branch(block(x) − x), or x +
residual_branch(block(x)) if the block carries no x itself."""
STREAMS = "residual_streams"
"""Slot of the object that a block with several streams is run by; see `stream_slots.StreamedBlock`."""
STREAMED = "several streams run through it, which rescheme put in; undo that first"
"""Why nothing is found in a network with several streams."""
SLOTS = (OUTPUT, INPUT, WEIGHT, BRANCH, STREAMS)
ARGUMENT = "residual_argument"
"""Attribute of a module with its `BlockCall`, if another argument than the first passes through its entry slot."""
CALL = "residual_call"
"""Attribute of a block with how it is called, if what is in its output slot is called like the block itself."""
AROUND = "residual_around"
"""Attribute of a block with an `Around`, if something is in its slot for the branch."""


@dataclass(frozen=True)
class Around:
    """What a block whose branch passes through a slot does with x.

    Args:
        call: where x is in the arguments and the output of the block, and whether it writes into it.
        bare: whether its output is the branch alone, without x.
    """

    call: BlockCall
    bare: bool = False


@class_factory
def with_slots(kind: type[nn.Module]) -> tuple[str, dict[str, Any]]:
    """A subclass of `kind` whose input, weight, branch and output pass through the modules in its slots; of a tuple
    that is returned the first tensor does.

    A subclass keeps `isinstance`, attributes, hooks and state-dict keys, and `torch.compile` traces through it.
    """
    usual = BlockCall((0,), (), forward_names(kind))

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        streams = getattr(self, STREAMS, None)
        if streams is None:
            return forward_one(self, *args, **kwargs)
        return streams.run(partial(forward_one, self), args, kwargs)

    def forward_one(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        entry, standard, scale = getattr(self, INPUT, None), getattr(self, WEIGHT, None), getattr(self, OUTPUT, None)
        around: Around | None = getattr(self, AROUND, None)
        argument: BlockCall = getattr(self, ARGUMENT, usual)
        if entry is not None:
            args, kwargs = argument.given(args, kwargs, entry(argument.take(args, kwargs)))
        x = None if around is None else around.call.take(args, kwargs)
        if around is not None and x is not None and around.call.writes_stream:
            args, kwargs = around.call.given(args, kwargs, x.clone())
        if standard is None:
            output = kind.forward(self, *args, **kwargs)
        else:
            output = apply(self, usual.take(args, kwargs), standard(self.weight))
        if around is not None and x is not None:
            y = item_at(output, around.call.output)
            added = getattr(self, BRANCH)(y if around.bare else y - x)
            output = exchange_at(output, around.call.output, x + added)
        if scale is None:
            return output
        if (call := getattr(self, CALL, None)) is not None:
            return call.follow(output, scale, args, kwargs)
        if isinstance(output, tuple | list):
            first = scale(output[0])
            if isinstance(output, tuple) and hasattr(output, "_replace"):
                return output._replace(**{output._fields[0]: first})  # type: ignore[attr-defined]
            return type(output)((first, *output[1:]))
        return scale(output)

    return f"{kind.__name__}WithScale", {"forward": forward, "without_slots": kind}


def apply(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The output of a convolution or linear map with another weight."""
    if isinstance(module, nn.Linear):
        return functional.linear(x, weight, module.bias)
    return module._conv_forward(x, weight, module.bias)


def has_slots(module: nn.Module) -> bool:
    """Whether something was inserted around a module."""
    return hasattr(type(module), "without_slots")


def carries_streams(model: nn.Module) -> bool:
    """Whether several streams were put into a network."""
    return any(STREAMS in module._modules and has_slots(module) for module in model.modules())


def computes_like(module: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether a module, apart from its slots, computes what one of the kinds does; see `fusion.computes`."""
    kind = getattr(type(module), "without_slots", type(module))
    return any(
        isinstance(module, known)
        and kind.forward is known.forward
        and getattr(kind, "_conv_forward", None) is getattr(known, "_conv_forward", None)
        for known in kinds
    )


def place_like_maps(model: nn.Module, name: str, inserted: nn.Module) -> None:
    """Give what is inserted into a module the device and type of the maps in it, or in the innermost module around it
    that has one, in place: norms and gains may be kept in a wider type than the stream has.
    """
    around = [model.get_submodule(each) for each in (name, *parents(name), "")]
    numbers = [[each for each in module.parameters() if each.is_floating_point()] for module in around]
    maps = (parameter for own in numbers for parameter in own if parameter.ndim > 1)
    like = next(maps, next((parameter for own in numbers for parameter in own), None))
    if like is not None:
        inserted.to(like.device, like.dtype)


def insert_after(change: Transaction, host: nn.Module, inserted: nn.Module) -> None:
    """Let the output of `host` pass through `inserted`, in place."""
    insert(change, host, OUTPUT, inserted)


def insert_into_branch(change: Transaction, host: nn.Module, inserted: nn.Module, around: Around) -> None:
    """Let what `host` adds to x pass through `inserted`, in place."""
    insert(change, host, BRANCH, inserted)
    change.set_attribute(host, AROUND, around)


def repeat(change: Transaction, host: nn.Module, twin: nn.Module, call: BlockCall) -> None:
    """Let `twin` run after `host`, on what that puts out and with the host's own other arguments, in place."""
    insert(change, host, OUTPUT, twin)
    change.set_attribute(host, CALL, call)


def insert(change: Transaction, host: nn.Module, slot: str, inserted: nn.Module) -> None:
    """Register `inserted` in a slot of `host`, in place.

    Raises:
        SkipwayError: the slot is taken, or the forward of `host` is an attribute of the instance.
    """
    kind = type(host)
    if slot in host._modules and has_slots(host):
        raise SkipwayError(
            f"this {kind.without_slots.__name__} has a {slot} already; undo that first"  # type: ignore[attr-defined]
        )
    if "forward" in vars(host):
        raise SkipwayError(f"the forward of this {kind.__name__} was replaced on the instance")
    if hasattr(host, slot):
        raise SkipwayError(f"this {kind.__name__} has a {slot} of its own")
    if not has_slots(host):
        try:
            change.set_class(host, with_slots(kind))
        except TypeError as problem:
            raise SkipwayError(f"the class {kind.__name__} cannot be derived from: {problem}") from problem
    change.add_module(host, slot, inserted)
    if slot == WEIGHT:
        change.recast.update(host.parameters(recurse=False))


def remove(change: Transaction, host: nn.Module, slot: str) -> None:
    """Empty a slot; after the last one the module is of its own class again, in place."""
    change.remove_module(host, slot)
    if has_slots(host) and not any(other in host._modules for other in SLOTS):
        change.set_class(host, type(host).without_slots)  # type: ignore[attr-defined]


def disable_fused_path(change: Transaction, name: str) -> None:
    """Keep torch's transformer layers around a module from running as one fused operator, in place.

    In evaluation without gradients `nn.TransformerEncoderLayer` reads the weights of its parts and computes the whole
    layer itself, without calling what was inserted after one of them.
    """
    for around in ("", *parents(name)):
        module = change.model.get_submodule(around)
        for kind, attribute in FUSED.items():
            if isinstance(module, kind) and getattr(module, attribute, None):
                change.set_attribute(module, attribute, False)


# the attribute that allows a layer to run as one fused operator
FUSED: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
