"""A survey of a model for the lint rules: its connections, the roles of its parameters, its optimizer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from skipway.diagnosis.lint.means import MeasuredProgram, measured_program
from skipway.diagnosis.lint.stream_matrices import StreamMatrix, find_stream_matrices
from skipway.diagnosis.settings import require_optimizers
from skipway.nn import Branch, Carry, Cut, Gain, Multiply, Residual, ScaledShortcut
from skipway.optim.roles import parameter_roles, role_of
from skipway.tracing import Example, Program, ResidualAdd, watch
from skipway.tracing.chain import Chain, Connection, WatchedConnection, chain, chain_from_program

__all__ = ["DEEP", "Link", "Survey"]

DEEP = 24
"""Connections, or units of variance, up to which networks train from any start: ViT-B/16 has as many."""
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
NORM = re.compile(r"norm", re.IGNORECASE)
SCALE = re.compile(r"layer_?scale|skip_?init|re_?zero", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Link:
    """A connection as the rules see it, traced or read from Skipway modules.

    Args:
        name: of the connection.
        kind: of the branch: "attention", "conv" or "mlp".
        identity: whether the skip is x itself.
        norms: places of the norms: "pre", "inside" or "end" of the branch, "post" after the addition.
        maps: paths of the linear maps of the branch, in order.
        last: path of the linear map that makes the branch's output.
        closing: path of the norm at the end of the branch.
        after: paths of the norms through which the whole sum passes, part of the connection or not.
        scales: names of the parameters that multiply the branch.
        modules: paths of the modules that the branch runs in.
        constant: constant factor of the branch, as far as a Skipway module states it.
        carry: the number that multiplies the skip.
        entry: the number that multiplies what enters the branch, before its first map.
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
    carry: float = 1.0
    entry: float = 1.0


@dataclass
class Survey:
    """A model under lint, with all that the rules ask about it.

    Args:
        model: any module.
        example: what the model is called with; None: only `skipway.nn.Residual` connections are known, by type.
        optimizer: used for training, or several for parts of the model.
        pretrained: its weights are trained.
    """

    model: nn.Module
    example: Example | None = None
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None
    pretrained: bool = False

    @cached_property
    def program(self) -> Program | None:
        """The program that the model runs on the example."""
        return None if self.example is None else watch(self.model, self.example)

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """The connections in order."""
        if self.program is not None:
            return tuple(link_of_traced(self.model, self.program, connection) for connection in self.watched)
        if not any(isinstance(module, Residual) for module in self.model.modules()):
            return ()
        paths = {id(module): path for path, module in self.model.named_modules()}
        ours = [connection for connection in chain(self.model) if not isinstance(connection.residual.shortcut, Cut)]
        return tuple(link_of_residual(paths, connection) for connection in ours)

    @cached_property
    def watched(self) -> Chain[WatchedConnection]:
        """The connections as they were watched; there is a program."""
        assert self.program is not None
        return chain_from_program(self.model, self.program)

    @cached_property
    def measured(self) -> MeasuredProgram | None:
        """The program with the means of its values on random inputs, where the model has values."""
        return None if self.example is None else measured_program(self.model, self.example)

    @cached_property
    def stream_matrices(self) -> tuple[StreamMatrix, ...]:
        """The matrices of parameters that mix streams; none without an example."""
        if self.program is None or self.example is None:
            return ()
        return find_stream_matrices(self.model, self.example, self.program)

    @cached_property
    def static_weights(self) -> tuple[str, ...]:
        """The parameters that hold a matrix of mixing, and those of their modules that are no larger."""
        found: dict[str, None] = {}
        for matrix in self.stream_matrices:
            path, count = matrix.name.rpartition(".")[0], len(matrix.values)
            beside = self.model.get_submodule(path).named_parameters(path, recurse=False)
            if not matrix.is_dead and (matrix.keeps_streams or self.parameters[matrix.name].ndim == 1):
                found[matrix.name] = None
                found |= {name: None for name, value in beside if count <= value.numel() <= count * (count + 2)}
        return tuple(name for name in self.parameters if name in found)

    @cached_property
    def blocks(self) -> float:
        """The depth as papers on transformers count it: two branches to a block."""
        attention = any(link.kind == "attention" for link in self.links)
        return len(self.links) / 2 if attention else float(len(self.links))

    @cached_property
    def bare(self) -> bool:
        """Whether the network is norm-free: no norm in a branch, and hardly any elsewhere."""
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
        """The role of each parameter: "scale", "norm", "bias", "weight" or "embedding".

        The roles of `param_groups`, corrected by the connections and by the names of classes.
        """
        scales = {name for link in self.links for name in link.scales}
        known = parameter_roles(self.model, self.program)
        found: dict[str, str] = {}
        for name in self.parameters:
            owner, own = self.owner(name), name.rpartition(".")[2]
            role = known[name].name
            if name in scales or role_of(owner, own).name == "gain" or SCALE.search(type(owner).__name__):
                role = "scale"
            elif role == "unknown" and is_norm(owner):
                role = "norm"
            elif role == "unknown" and own == "bias":
                role = "bias"
            found[name] = role
        return found

    @cached_property
    def branch_scales(self) -> tuple[str, ...]:
        """The parameters that multiply a branch; without known connections, those of modules with such a class name."""
        if self.links:
            names = dict.fromkeys(name for link in self.links for name in link.scales)
            return tuple(name for name in names if name in self.parameters)
        return tuple(name for name in self.parameters if SCALE.search(type(self.owner(name)).__name__))

    @cached_property
    def groups(self) -> dict[str, dict[str, Any]]:
        """The optimizer's group of each parameter that it holds."""
        if self.optimizer is None:
            return {}
        parts = require_optimizers(self.optimizer)
        found = {id(each): group for part in parts for group in part.param_groups for each in group["params"]}
        return {name: found[id(value)] for name, value in self.parameters.items() if id(value) in found}

    def value(self, name: str) -> Tensor | None:
        """The value of a parameter; None where there is no such parameter, or it has no values (meta device)."""
        value = self.parameters.get(name)
        return None if value is None or value.is_meta else value.detach()

    def is_zero(self, name: str) -> bool:
        """Whether a parameter is known to be 0 and multiplies the signal as it is, or times a constant."""
        value = self.value(name)
        return value is not None and not bool(value.any()) and passage(self.program, name) is not None

    def is_absent(self, name: str) -> bool:
        """Whether a bias is missing, or known to be 0."""
        value = self.value(name)
        return name not in self.parameters if value is None else not bool(value.any())

    def zeros(self, link: Link) -> tuple[bool, bool, bool]:
        """Whether the last map, the closing norm and the scale of a branch are 0."""
        last = link.last is not None and self.is_zero(f"{link.last}.weight")
        closing = link.closing is not None and self.is_zero(f"{link.closing}.weight")
        return last, closing, any(self.is_zero(name) for name in link.scales)

    def factor(self, name: str) -> float | None:
        """The present factor of a scale; None where its channels differ (so it was trained), it has no values (meta
        device), or it reaches the signal through a function (1 + γ, a sigmoid).
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
        """The factor of a branch, where one parameter states it."""
        return self.factor(link.scales[0]) if len(link.scales) == 1 else None

    @cached_property
    def factors(self) -> dict[str, float]:
        """The factor of each scale that is the only one of its branch."""
        return {link.scales[0]: factor for link in self.links if (factor := self.link_factor(link)) is not None}


def link_of_traced(model: nn.Module, program: Program, connection: WatchedConnection) -> Link:
    """The link of a traced connection."""
    seen = connection.seen
    norms = {program[user].norm: None for user in program.users[seen.numbers[2]] if program[user].signal}
    return Link(
        name=connection.name,
        kind=seen.kind,
        identity=seen.skip == "identity" and not seen.carry and seen.weights[0] == 1,
        norms=seen.norms,
        maps=seen.maps,
        last=seen.last,
        closing=seen.closing,
        after=() if None in norms else tuple(norm for norm in norms if norm is not None),
        scales=() if seen.scale is None else seen.scale.parameters,
        modules=seen.modules,
        constant=1.0 if connection.residual is None else constant(connection.residual),
        carry=seen.weights[0],
        entry=entry_factor(model, program, seen),
    )


def entry_factor(model: nn.Module, program: Program, seen: ResidualAdd) -> float:
    """The product of the numbers, held by buffers or given as they are, between a stream and a branch's first map."""
    crossed = list(program.between(seen.numbers[3], seen.numbers[1]))
    first = next((value.number for value in crossed if value.part == "map"), 0)
    factor = 1.0
    for value in crossed:
        if value.number >= first:
            break
        factor *= value.factor
        if value.part == "scale" and value.operator == "mul":
            factor *= math.prod(held_numbers(model, value.parameters))
    return factor


def held_numbers(model: nn.Module, names: Iterable[str]) -> Iterator[float]:
    """Those of some parameters and buffers that are buffers of one number."""
    for path, _, own in (name.rpartition(".") for name in names):
        buffer = model.get_submodule(path)._buffers.get(own)
        if buffer is not None and buffer.numel() == 1 and not buffer.is_meta:
            yield float(buffer)


def link_of_residual(paths: Mapping[int, str], connection: Connection) -> Link:
    """The link of a Skipway connection, read from its modules.

    Args:
        paths: of the network's modules, by identity.
        connection: of the network.
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
        norms=tuple(position for position, there in present.items() if there),
        maps=names,
        last=names[-1] if names else None,
        closing=None if closing is None else paths[id(closing)],
        after=after,
        scales=tuple(f"{paths[id(part)]}.gain" for part in residual.scale.modules() if isinstance(part, Gain)),
        modules=tuple(paths[id(part)] for part in (*branch.modules(), *residual.scale.modules())),
        constant=constant(residual),
        carry=math.prod(part.factor for part in residual.shortcut.modules() if isinstance(part, ScaledShortcut)),
        entry=math.prod(part.factor for part in residual.pre.modules() if isinstance(part, Multiply)),
    )


def constant(residual: Residual) -> float:
    """The constant factor of a Skipway branch."""
    return math.prod(part.factor for part in residual.scale.modules() if isinstance(part, Multiply))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: a class of torch, or a class named so with parameters of at most one axis."""
    if isinstance(module, NORMS):
        return True
    small = all(parameter.ndim <= 1 for parameter in module.parameters())
    return NORM.search(type(module).__name__) is not None and small and not list(module.children())


def passage(program: Program | None, name: str) -> str | None:
    """How a parameter reaches the signal: "exact" unchanged, "multiple" times constants, None through a function.

    Without a program it is "exact", as for the parameters of Skipway modules.
    """
    if program is None:
        return "exact"
    waiting = list(program.leaves.get(name, ()))
    if not waiting:
        return None
    kind = "exact"
    while waiting:
        for user in program.users[waiting.pop()]:
            value = program[user]
            if value.signal:
                continue
            if value.part not in {"carry", "scale"}:
                return None
            kind = "multiple" if value.part == "scale" else kind
            waiting.append(user)
    return kind
