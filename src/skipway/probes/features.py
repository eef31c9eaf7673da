"""`features(model, example, taps)`: the tensors at connections and modules of any network, and a map per stage."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError, suggest
from skipway.nn import Residual, StageMap, StreamExit
from skipway.probes.observer import Observer, unseen
from skipway.tracing import Example, as_example, call_model, unwrap
from skipway.tracing.chain import WatchedConnection, chain
from skipway.tracing.containers import map_tensors, tensors_in
from skipway.tracing.watch import address

__all__ = ["features", "stage_features", "stage_maps"]

POINTS = ("before", "branch", "after")


@dataclass(frozen=True)
class Tap:
    """The input or output of the module `owner`, or an operand or the sum of the watched connection `owner`."""

    owner: str
    point: Literal["input", "output", "before", "branch", "after"]


class TapObserver(Observer):
    """Keeps the tensors at `taps`; copies, where the network writes into them afterwards."""

    def __init__(self, model: nn.Module, connections: Iterable[WatchedConnection], taps: dict[str, Tap]) -> None:
        modules = dict.fromkeys(tap.owner for tap in taps.values() if tap.point in ("input", "output"))
        super().__init__(model, connections, modules)
        # what TorchScript writes into, no call of Python tells
        self.copies = any(isinstance(module, torch.jit.ScriptModule) for module in self.model.modules())
        self.exit = next((module for module in self.model.modules() if isinstance(module, StreamExit)), None)
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[Tap, list[str]] = {}
        for name, tap in taps.items():
            self.names.setdefault(tap, []).append(name)

    def operands(self, connection: WatchedConnection, skip: Tensor, branch: Tensor) -> None:
        self.keep(Tap(connection.name, "before"), skip)
        self.keep(Tap(connection.name, "branch"), branch)

    def stream(self, connection: WatchedConnection, stream: Tensor) -> None:
        self.in_place = False
        self.keep(Tap(connection.name, "after"), stream)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.tensors and writes(func, kwargs or {}):
            self.rescue((args, kwargs))
        return super().__torch_function__(func, types, args, kwargs)

    def rescue(self, given: Any) -> None:
        """Copy what is kept in the memory of the tensors that a call is given and may write into."""
        storages = {address(tensor)[0] for tensor in tensors_in(given)}
        with torch.enable_grad():  # also in an `autograd.Function`, where gradients are off
            for name, tensor in self.tensors.items():
                if address(tensor)[0] in storages:
                    self.tensors[name] = tensor.clone()

    def module_input(self, name: str, value: Any) -> None:
        self.keep(Tap(name, "input"), value)

    def module_output(self, name: str, value: Any) -> None:
        self.keep(Tap(name, "output"), value)

    def keep(self, tap: Tap, value: Any) -> None:
        if isinstance(value, tuple) and self.exit is not None and tap in self.names:  # earlier outputs
            value = self.exit.stream(value)
        for name in self.names.get(tap, ()):
            if not isinstance(value, Tensor):
                raise SkipwayError(
                    f"tap {name!r} yields a {type(value).__name__}: the rule is a module that yields a tensor"
                )
            self.tensors[name] = value.clone() if self.in_place or self.copies else value


def writes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call of Python may write into a tensor that it is given: `relu_`, `__iadd__`, `relu(inplace=True)`."""
    name = getattr(func, "__name__", "")
    special = name.startswith("__")
    in_place = name.startswith(("__i", "__set")) if special else name.endswith("_")
    return in_place or bool(kwargs.get("inplace")) or kwargs.get("out") is not None


def features(model: nn.Module, example: Example, taps: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Run any network once and return the tensors at the taps, with gradients. The model is left alone.

    | tap | yields |
    |---|---|
    | `"stages.0.1:before"` | the stream x before that connection |
    | `"stages.0.1:branch"` | its branch's output F(h), before it is scaled or dropped |
    | `"stages.0.1:after"` | the stream y after it |
    | `"3:branch"` | the same, by the connection's index in the chain from 0 (from the end: `"-1:after"`) |
    | `"stages.0"` | the output of any submodule, by its path |

    In a network without connections of ours they are those of `chain(model, example)`, by its names, so the second
    one of a timm block is tapped as `"blocks.0:2:after"`. Their points are then taken at the addition: x and F(x) as
    they are added, and the sum.

    The mode is left as it is (call `model.eval()` first for inference), and no hook remains. The tensors are those of
    the pass; copies where the network writes into them afterwards. Of a module that runs several times the last run is
    kept.

    Args:
        model: any network.
        example: what it is called with, images for instance.
        taps: names as above; by default the stream after every connection.

    Returns:
        tap → tensor, in the order of `taps`.

    Raises:
        SkipwayError: an unknown tap (with the closest), one that yields no tensor or was not passed, a connection whose
            addition cannot be observed.

    >>> import torch, skipway as sw
    >>> model = sw.build("resnet20")
    >>> streams = features(model, torch.zeros(1, 3, 32, 32), ["stages.0.1:before", "-1:branch", "stages.1"])
    >>> [tuple(stream.shape[1:]) for stream in streams.values()]
    [(16, 32, 32), (64, 8, 8), (32, 16, 16)]
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> list(features(layer, torch.zeros(1, 5, 8)))
    [':1:after', ':2:after']
    """
    model, example = unwrap(model), as_example(example)
    names = None if taps is None else [taps] if isinstance(taps, str) else list(taps)
    ours = any(isinstance(module, Residual) for module in model.modules())
    watched: tuple[WatchedConnection, ...] = ()
    owners: list[str] = []
    if names is None or any(":" in name for name in names):
        watched = () if ours else tuple(chain(model, example))
        owners = [each.name for each in (chain(model) if ours else watched)]
    names = [f"{owner}:after" for owner in owners] if names is None else names
    modules = dict(model.named_modules())
    found = {name: connection_tap(name, owners, ours) if ":" in name else module_tap(name, modules) for name in names}
    tapped = {tap.owner for tap in found.values() if tap.point in POINTS}
    for each in watched:
        if each.name in tapped and not each.observable:
            raise unseen(each)
    observer = TapObserver(model, watched, found)
    with observer:
        call_model(model, map_tensors(torch.clone, example))  # which it may write into; gradients pass
    silent = [name for name in found if name not in observer.tensors]
    if silent:
        raise SkipwayError(
            f"the pass did not meet {', '.join(map(repr, silent))}: the model does not call that module, or it is "
            "compiled and skips hooks (give the model that was compiled)"
        )
    return {name: observer.tensors[name] for name in found}


def stage_features(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Run a network once and return one map per stage, channels first, for detection and segmentation heads.

    The model is left alone. The maps are the raw stream after the last connection of each stage, without the head's
    norm; `stage_maps(model)` tells the channels and the reduction of each without running the model. A family without
    stages (ViT, CaiT) yields the stream after each quarter of its blocks, as the dense heads of DPT and DINOv2 take it.

    Args:
        model: a network of ours, or any that declares its `stage_maps()`.
        x: images (N, channels, H, W).

    Returns:
        maps (N, C, H', W'), in the order of the stages.

    Raises:
        SkipwayError: the model does not declare its stages.

    >>> import torch, skipway as sw
    >>> maps = stage_features(sw.build("vit-tiny-16", image=64), torch.zeros(1, 3, 64, 96))
    >>> [tuple(each.shape) for each in maps]
    [(1, 192, 4, 6), (1, 192, 4, 6), (1, 192, 4, 6), (1, 192, 4, 6)]
    """
    stages = stage_maps(model)
    streams = features(model, x, [stage.path for stage in stages])
    exits = [module for module in model.modules() if isinstance(module, StreamExit)]
    one = {path: exits[0].stream(state) if exits else state for path, state in streams.items()}
    return [stage.to_map(one[stage.path], x) for stage in stages]


def stage_maps(model: nn.Module) -> tuple[StageMap, ...]:
    """Return the modules at which the stages of a network end, with the channels and the reduction of each map.

    Raises:
        SkipwayError: the model does not declare them.

    >>> import skipway as sw
    >>> [(stage.path, stage.channels, stage.reduction) for stage in stage_maps(sw.build("resnet50", device="meta"))]
    [('stages.0', 256, 4), ('stages.1', 512, 8), ('stages.2', 1024, 16), ('stages.3', 2048, 32)]
    """
    declared = getattr(model, "stage_maps", None)
    if not callable(declared):
        raise SkipwayError(
            f"{type(model).__name__} does not say where its stages end; define stage_maps(), a tuple of "
            "skipway.nn.StageMap, or tap submodules by their paths: features(model, x, taps=[…])"
        )
    return tuple(declared())


def connection_tap(name: str, owners: list[str], ours: bool) -> Tap:
    """The tap at a connection, which is given by its name or, where no connection has that name, by its index."""
    owner, _, point = name.rpartition(":")
    if point not in POINTS:
        raise SkipwayError(f"tap {name!r}: {suggest('point', point, POINTS)}")
    if owner not in owners and re.fullmatch(r"-?\d+", owner) and -len(owners) <= int(owner) < len(owners):
        owner = owners[int(owner)]
    if owner not in owners:
        others = "no residual connections"
        if owners:
            others = f"connections {owners[0]!r} to {owners[-1]!r}, or their numbers 0 to {len(owners) - 1}"
        raise unknown(name, [f"{each}:{point}" for each in owners], others)
    if not ours:
        return Tap(owner, point)  # type: ignore[arg-type]
    if point == "branch":
        return Tap(f"{owner}.branch" if owner else "branch", "output")
    return Tap(owner, "input" if point == "before" else "output")


def module_tap(name: str, modules: dict[str, nn.Module]) -> Tap:
    """The tap at the output of a submodule, which is given by its path."""
    if name not in modules:
        top = ", ".join(path for path in modules if path and "." not in path)
        raise unknown(name, modules, f"submodules of {top}; at a connection, {', '.join(map(':{}'.format, POINTS))}")
    return Tap(name, "output")


def unknown(tap: str, known: Iterable[str], others: str) -> SkipwayError:
    """The error for a tap that does not exist."""
    close = difflib.get_close_matches(tap, list(known), n=3, cutoff=0.6)
    return SkipwayError(suggest("tap", tap, close) if close else f"unknown tap {tap!r}; there are {others}")
