"""Feature taps: the stream around every connection, every branch's output, and a map per stage for dense tasks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from skipway.errors import SkipwayError, suggest
from skipway.nn import StageMap
from skipway.tracing.chain import Connection, chain

__all__ = ["features", "stage_features", "stage_maps"]

POINTS = ("before", "branch", "after")


@dataclass(frozen=True)
class Tap:
    """A place of a network: what goes into a module, or what comes out of it."""

    module: nn.Module
    entry: bool = False


@dataclass
class Basket:
    """What the taps yield in one forward pass.

    Args:
        copies: keep copies, since a module of the network overwrites what it is given.
    """

    copies: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def listen(self, name: str, tap: Tap) -> RemovableHandle:
        """A hook that keeps the tensor at `tap` under `name`."""
        if tap.entry:
            return tap.module.register_forward_pre_hook(partial(self.keep_input, name), with_kwargs=True)
        return tap.module.register_forward_hook(partial(self.keep_output, name))

    def keep_input(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.keep(name, (*args, *kwargs.values())[0])

    def keep_output(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.keep(name, output)

    def keep(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise SkipwayError(
                f"tap {name!r} yields a {type(value).__name__}: the rule is a module that yields a tensor"
            )
        self.tensors[name] = value.clone() if self.copies else value


def features(model: nn.Module, x: Tensor, taps: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Run `model` on `x` once and return what passes at the taps. Gradients flow through all of it.

    | tap | yields |
    |---|---|
    | `"stages.0.1:before"` | the stream x in front of that connection |
    | `"stages.0.1:branch"` | its branch's output F(h), before it is scaled or dropped |
    | `"stages.0.1:after"` | the stream y behind it |
    | `"3:branch"` | the same, by the connection's place in the chain from 0 (from the end: `"-1:after"`) |
    | `"stages.0"` | the output of any submodule, by its path |

    The mode is left as it is (call `model.eval()` first for inference), and no hook stays behind. The tensors are
    those of the pass, not copies, unless a module of the network works in place. Of a module that runs several times
    the last run is kept.

    Args:
        model: a network, ours or one that holds our connections (submodule taps: any module).
        x: its input.
        taps: names as above; by default the stream after every connection.

    Returns:
        tap → tensor, in the order of `taps`.

    Raises:
        SkipwayError: an unknown tap (with the closest), one that yields no tensor or was not passed.

    >>> import torch, skipway as sw
    >>> model = sw.build("resnet20")
    >>> streams = features(model, torch.zeros(1, 3, 32, 32), ["stages.0.1:before", "-1:branch", "stages.1"])
    >>> [tuple(stream.shape[1:]) for stream in streams.values()]
    [(16, 32, 32), (64, 8, 8), (32, 16, 16)]
    """
    found = {f"{c.name}:after": Tap(c.residual) for c in chain(model)} if taps is None else find(model, taps)
    basket = Basket(copies=any(getattr(module, "inplace", False) is True for module in model.modules()))
    with ExitStack() as hooks:
        for name, tap in found.items():
            hooks.enter_context(basket.listen(name, tap))
        model(x)
    silent = [name for name in found if name not in basket.tensors]
    if silent:
        raise SkipwayError(
            f"the pass did not meet {', '.join(map(repr, silent))}: the model does not call that module, or it is "
            "compiled and skips hooks (give the model that was compiled)"
        )
    return {name: basket.tensors[name] for name in found}


def stage_features(model: nn.Module, x: Tensor) -> list[Tensor]:
    """One map per stage, channels first in every family: what detection and segmentation heads start from.

    The maps are the raw stream behind the last connection of each stage, without the head's norm; `stage_maps(model)`
    tells the channels and the reduction of each before anything is run. A family without stages (ViT, CaiT) yields
    the stream behind each quarter of its blocks, as DPT and DINOv2's dense heads take it.

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
    return [stage.to_map(streams[stage.path], x) for stage in stages]


def stage_maps(model: nn.Module) -> tuple[StageMap, ...]:
    """Where the stages of `model` end, with the channels and the reduction of each map.

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


def find(model: nn.Module, taps: Iterable[str]) -> dict[str, Tap]:
    """The places that the names mean."""
    names = [taps] if isinstance(taps, str) else list(taps)
    connections = {c.name: c for c in chain(model)} if any(":" in name for name in names) else {}
    modules = dict(model.named_modules())
    return {name: around(name, connections) if ":" in name else behind(name, modules) for name in names}


def around(tap: str, connections: dict[str, Connection]) -> Tap:
    """A place of a connection, told by its name or, where no connection has that name, by its number."""
    owner, _, point = tap.rpartition(":")
    if point not in POINTS:
        raise SkipwayError(f"tap {tap!r}: {suggest('point', point, POINTS)}")
    names = list(connections)
    if owner not in connections and re.fullmatch(r"-?\d+", owner) and -len(names) <= int(owner) < len(names):
        owner = names[int(owner)]
    if owner not in connections:
        others = f"connections {names[0]!r} to {names[-1]!r}, or their numbers 0 to {len(names) - 1}"
        raise unknown(tap, [f"{name}:{point}" for name in names], others)
    residual = connections[owner].residual
    return Tap(residual.branch) if point == "branch" else Tap(residual, entry=point == "before")


def behind(tap: str, modules: dict[str, nn.Module]) -> Tap:
    """The output of a submodule, told by its path."""
    if tap not in modules:
        top = ", ".join(name for name in modules if name and "." not in name)
        raise unknown(tap, modules, f"submodules of {top}; at a connection, {', '.join(map(':{}'.format, POINTS))}")
    return Tap(modules[tap])


def unknown(tap: str, known: Iterable[str], others: str) -> SkipwayError:
    """The error for a tap that there is not."""
    close = difflib.get_close_matches(tap, list(known), n=3, cutoff=0.6)
    return SkipwayError(suggest("tap", tap, close) if close else f"unknown tap {tap!r}; there are {others}")
