"""What the rules see: a model, its optimizer, its connections, and what the parameters of both are for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from skipway.nn import Branch, Carry, Cut, Gain, Multiply, Residual
from skipway.optim.groups import role_of
from skipway.tracing import Example, Program, watch
from skipway.tracing.chain import Connection, WatchedConnection, chain, chain_from_program

__all__ = ["DEEP", "Link", "Survey"]

DEEP = 24
"""Connections, or units of variance, up to which networks train from any start: ViT-B/16 has as many (P6, P8)."""
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
NORM = re.compile(r"norm", re.IGNORECASE)
SCALE = re.compile(r"layer_?scale|skip_?init|re_?zero", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Link:
    """What the rules know of a connection, watched or read from our types.

    Args:
        name: of the connection.
        kind: what its branch does: "attention", "conv" or "mlp".
        identity: whether the skip is x itself.
        norms: where norms stand: "pre", "inside" or "end" of the branch, "post" behind the sum.
        maps: paths of the linear maps of the branch, in order.
        last: path of the linear map that makes what the branch puts out.
        closing: path of the norm at the end of the branch.
        after: paths of the norms that all of the sum passes, be they part of the connection or not.
        scales: names of the parameters that multiply the branch.
        modules: paths of the modules that the branch runs in.
        constant: number that multiplies the branch, as far as a module of ours says it.
    """

    name: str
    kind: str
    identity: bool
    norms: tuple[str, ...]
    maps: tuple[str, ...]
    last: str | None
    closing: str | None
    after: tuple[str, ...]
    scales: tuple[str, ...]
    modules: tuple[str, ...]
    constant: float


@dataclass
class Survey:
    """A model under lint, with what the rules ask of it.

    Args:
        model: any module.
        example: what it is called with; None: connections of ours are read by type, other models have none.
        optimizer: that will train it.
        pretrained: whether its weights were trained before.
    """

    model: nn.Module
    example: Example | None = None
    optimizer: torch.optim.Optimizer | None = None
    pretrained: bool = False

    @cached_property
    def program(self) -> Program | None:
        """What the model runs on the example."""
        return None if self.example is None else watch(self.model, self.example)

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """The connections in order."""
        if self.program is not None:
            return tuple(
                watched(self.program, connection) for connection in chain_from_program(self.model, self.program)
            )
        if not any(isinstance(module, Residual) for module in self.model.modules()):
            return ()
        paths = {id(module): path for path, module in self.model.named_modules()}
        ours = [connection for connection in chain(self.model) if not isinstance(connection.residual.shortcut, Cut)]
        return tuple(typed(paths, connection) for connection in ours)

    @cached_property
    def blocks(self) -> float:
        """The depth as papers on transformers count it: two branches to a block."""
        attention = any(link.kind == "attention" for link in self.links)
        return len(self.links) / 2 if attention else float(len(self.links))

    @cached_property
    def bare(self) -> bool:
        """Whether the branches go without norms: none is in one, and at most a final one or so in the network."""
        norms = sum(is_norm(module) for module in self.model.modules())
        return bool(self.links) and not any(link.norms for link in self.links) and 2 * norms <= len(self.links)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters; shared ones under their first name."""
        return dict(self.model.named_parameters())

    def owner(self, name: str) -> nn.Module:
        """The module that holds a parameter."""
        return self.model.get_submodule(name.rpartition(".")[0])

    @cached_property
    def roles(self) -> dict[str, str]:
        """What each parameter is for: "scale", "norm", "bias", "weight" or "embedding".

        The roles of `param_groups`, and what the connections and the classes' names say beyond them.
        """
        behind = {name for link in self.links for name in link.scales}
        found: dict[str, str] = {}
        for name in self.parameters:
            owner, own = self.owner(name), name.rpartition(".")[2]
            role = role_of(owner, own).name
            if name in behind or role == "gain" or SCALE.search(type(owner).__name__):
                role = "scale"
            elif role == "embedding" and is_norm(owner):
                role = "norm"
            elif role == "embedding" and own == "bias":
                role = "bias"
            found[name] = role
        return found

    @cached_property
    def branch_scales(self) -> tuple[str, ...]:
        """The parameters that multiply a branch; without known connections those of modules that are called so."""
        if self.links:
            names = dict.fromkeys(name for link in self.links for name in link.scales)
            return tuple(name for name in names if name in self.parameters)
        return tuple(name for name in self.parameters if SCALE.search(type(self.owner(name)).__name__))

    @cached_property
    def groups(self) -> dict[str, dict[str, Any]]:
        """The optimizer's group of each parameter that it holds."""
        if self.optimizer is None:
            return {}
        found = {id(member): group for group in self.optimizer.param_groups for member in group["params"]}
        return {name: found[id(value)] for name, value in self.parameters.items() if id(value) in found}

    def value(self, name: str) -> Tensor | None:
        """What a parameter holds; None where there is no such parameter, or no values (meta device)."""
        value = self.parameters.get(name)
        return None if value is None or value.is_meta else value.detach()

    def is_zero(self, name: str) -> bool:
        """Whether a parameter is known to be 0 and multiplies the signal as it is, or times a constant."""
        value = self.value(name)
        return value is not None and not bool(value.any()) and passage(self.program, name) is not None

    def is_absent(self, name: str) -> bool:
        """Whether a bias is not there, or known to be 0."""
        value = self.value(name)
        return name not in self.parameters if value is None else not bool(value.any())

    def zeros(self, link: Link) -> tuple[bool, bool, bool]:
        """Whether the last map, the closing norm and the scale of a branch are 0."""
        last = link.last is not None and self.is_zero(f"{link.last}.weight")
        closing = link.closing is not None and self.is_zero(f"{link.closing}.weight")
        return last, closing, any(self.is_zero(name) for name in link.scales)

    def factor(self, name: str) -> float | None:
        """By what number a scale multiplies now: None where it differs from channel to channel (so it was trained),
        has no values (meta device), or reaches the signal through a function (1 + γ, a sigmoid).
        """
        value = self.value(name)
        if value is None or not value.numel() or not value.is_floating_point():
            return None
        low, high = (float(limit) for limit in torch.aminmax(value))
        if low != high:
            return None
        owner = self.owner(name)
        if isinstance(owner, Gain):
            return low * owner.factor
        return low if passage(self.program, name) == "exact" else None

    def link_factor(self, link: Link) -> float | None:
        """By what number a branch is multiplied, where one parameter says it."""
        return self.factor(link.scales[0]) if len(link.scales) == 1 else None

    @cached_property
    def factors(self) -> dict[str, float]:
        """By what number each scale multiplies its branch, where it alone says it."""
        return {link.scales[0]: factor for link in self.links if (factor := self.link_factor(link)) is not None}


def watched(program: Program, connection: WatchedConnection) -> Link:
    """The link of a watched connection."""
    seen = connection.seen
    behind = {program[user].norm: None for user in program.users[seen.numbers[2]] if program[user].signal}
    return Link(
        name=connection.name,
        kind=seen.kind,
        identity=seen.skip == "identity" and not seen.carry,
        norms=seen.norms,
        maps=seen.maps,
        last=seen.last,
        closing=seen.closing,
        after=() if None in behind else tuple(norm for norm in behind if norm is not None),
        scales=() if seen.scale is None else seen.scale.parameters,
        modules=seen.modules,
        constant=1.0 if connection.residual is None else constant(connection.residual),
    )


def typed(paths: Mapping[int, str], connection: Connection) -> Link:
    """The link of a connection of ours, read from its modules.

    Args:
        paths: of the network's modules, by identity.
        connection: one of the network's.
    """
    residual, branch = connection.residual, connection.residual.branch
    maps, end = (branch.path(), branch.closing_norm()) if isinstance(branch, Branch) else ([], None)
    names = tuple(paths[id(each.module)] for each in maps)
    closing = end if end is not None and is_norm(end) else None
    after = tuple(paths[id(module)] for module in residual.post.modules() if is_norm(module))
    present = {
        "pre": any(is_norm(module) for module in residual.pre.modules()),
        "inside": any(is_norm(module) for module in branch.modules() if module is not closing),
        "end": closing is not None,
        "post": bool(after),
    }
    return Link(
        name=connection.name,
        kind=connection.site.kind,
        identity=isinstance(residual.shortcut, Carry),
        norms=tuple(place for place, there in present.items() if there),
        maps=names,
        last=names[-1] if names else None,
        closing=None if closing is None else paths[id(closing)],
        after=after,
        scales=tuple(f"{paths[id(part)]}.gain" for part in residual.scale.modules() if isinstance(part, Gain)),
        modules=tuple(paths[id(part)] for part in (*branch.modules(), *residual.scale.modules())),
        constant=constant(residual),
    )


def constant(residual: Residual) -> float:
    """The number that stands behind a branch of ours."""
    return math.prod(part.factor for part in residual.scale.modules() if isinstance(part, Multiply))


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: torch's own classes, others by their name and parameters of at most one axis."""
    if isinstance(module, NORMS):
        return True
    small = all(parameter.ndim <= 1 for parameter in module.parameters())
    return NORM.search(type(module).__name__) is not None and small and not list(module.children())


def passage(program: Program | None, name: str) -> str | None:
    """How a parameter reaches the signal: "exact" as it is, "multiple" times constants, None through a function.

    Without a program it is taken to be exact: so are the parameters of our own modules.
    """
    if program is None:
        return "exact"
    waiting = [v.number for v in program.values if v.operator == "parameter" and v.parameters == frozenset({name})]
    if not waiting:
        return None
    way = "exact"
    while waiting:
        for user in program.users[waiting.pop()]:
            value = program[user]
            if value.signal:
                continue
            if value.part not in {"carry", "scale"}:
                return None
            way = "multiple" if value.part == "scale" else way
            waiting.append(user)
    return way
