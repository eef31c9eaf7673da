"""What a scheme asks of the inside of somebody's branch, and how much of it can be had from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.nn import Conv2d, Linear, LinearMap, Multiply, ScaledShortcut, ScaledStandardConv2d, ScaledStandardLinear
from skipway.nn.initial import Initial
from skipway.nn.kit import Kit
from skipway.nn.maps import standardise
from skipway.nn.placement import Part, Placement
from skipway.nn.role import Role
from skipway.schemes.scheme import Scheme, members_of
from skipway.surgery.fusion import MAPS
from skipway.surgery.insertion import ENTRY, STANDARD, is_plain, put
from skipway.tracing import Program
from skipway.tracing.chain import Chain, WatchedConnection

__all__ = ["Inside", "Standardise", "inside_of", "put_inside", "step_over", "takes_step"]

STANDARDISED = (ScaledStandardConv2d, ScaledStandardLinear)


@dataclass
class Inside:
    """What is done to the maps of one branch, and what stands behind it beside the scheme's scale.

    Args:
        fronts: what stands in front of maps, by the maps' names.
        standardised: names of maps whose weights are standardised in every pass.
        skip: α where the scheme multiplies the skip in front of a norm, by 1/α on the branch.
    """

    fronts: dict[str, nn.Module] = field(default_factory=dict)
    standardised: tuple[str, ...] = ()
    skip: float = 1.0

    def __bool__(self) -> bool:
        return bool(self.fronts or self.standardised or self.skip != 1)


class Standardise(nn.Module):
    """Ŵ = g (W − μ) / √max(σ²·fan_in, ε) + m, with g and m learned, one of each per output channel.

    Scaled weight standardisation (Brock et al. 2021, eq. 2) of a trained map. g starts at √max(σ²·fan_in, ε) and m at
    μ, so that Ŵ = W at the start. m is not in the paper: the mean part m Σᵢ xᵢ of a trained map depends on its input,
    so that no bias could take it on without changing what is computed. m = 0 is the paper's map.

    >>> weight = torch.randn(4, 3, 2, 2)
    >>> bool(torch.allclose(Standardise(weight)(weight), weight, atol=1e-6))
    True
    """

    epsilon = ScaledStandardConv2d.epsilon

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.role = Role("gain")
        rows = weight.detach().flatten(1)
        variance, mean = torch.var_mean(rows, dim=1, correction=0)
        self.gain = nn.Parameter((variance * rows.shape[1]).clamp(min=self.epsilon).sqrt())
        self.mean = nn.Parameter(mean.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return standardise(weight, self.gain, self.epsilon) + self.mean.view(-1, *(1,) * (weight.ndim - 1))

    @torch.no_grad()
    def multiply_(self, factor: float) -> None:
        """Multiply the weight that is made."""
        self.gain.mul_(factor)
        self.mean.mul_(factor)


def probe(connection: WatchedConnection) -> Kit:
    """A kit of the library's own parts, to see what a scheme makes of it: the parts that are known to be there."""
    norm = nn.LayerNorm if connection.seen.norms else None
    return Kit(conv=Conv2d, linear=Linear, norm=norm, act=nn.ReLU)


def inside_of(scheme: Scheme, connection: WatchedConnection, program: Program, *, preserve: bool) -> Inside | str:
    """What the scheme changes in a branch, or why that cannot be put on from outside.

    Each hook is asked with what stands there: a scheme that would move a norm that is not there moves nothing.
    """
    site, seen = connection.site, connection.seen
    parts: dict[str, tuple[Part, ...]] = dict.fromkeys(seen.norms, ("norm",))
    placement = Placement(**parts)
    moved = scheme.place(site, placement)
    if moved != placement:
        wanted = [where for where in ("pre", "inside", "end", "post") if getattr(moved, where)]
        return (
            f"norms or activations in other places ({'+'.join(seen.norms)} → {'+'.join(wanted) or 'none'}): their "
            "order is written in the forward of the module that adds"
        )
    kit = probe(connection)
    other = scheme.kit(site, kit)
    if kit.norm is not None and other.norm is not kit.norm:
        return "other norms inside of the branch (remove_norm takes BatchNorms out)"
    if other.act is not kit.act and not preserve:
        return "factors on the activations inside of the branch, called in its forward; preserve=True needs none"
    enter, inside = scheme.enter(site), Inside()
    if enter is not None and seen.maps:
        inside.fronts[seen.maps[0]] = enter
    if other.before is not None:
        inside.fronts |= {name: other.before() for name in seen.maps[1:]}
    if isinstance(other.conv(1, 1, 1), STANDARDISED):
        inside.standardised = seen.maps
    for name in dict.fromkeys((*inside.fronts, *inside.standardised)):
        module = connection.model.get_submodule(name)
        if not is_plain(module, MAPS) or program.runs.get(name) != 1:
            return f"something at {name} ({type(module).__name__}), which is no plain map that runs once"
    carried = scheme.carry(site, None)
    if isinstance(carried, ScaledShortcut) and "post" in seen.norms:
        inside.skip = carried.factor  # norm(αx + F) = norm(x + F/α) but for the norm's epsilon
    elif carried is not None:
        return "another shortcut: the skip runs in no module, and no norm behind the addition makes up for its size"
    return inside


def put_inside(
    connection: WatchedConnection, inside: Inside, steps: list[Callable[[], None]], *, preserve: bool
) -> None:
    """Do it; what takes it back is noted in `steps`."""
    made: dict[str, Standardise] = {}
    for name in inside.standardised:
        target = connection.model.get_submodule(name)
        made[name] = Standardise(target.weight)  # type: ignore[arg-type]
        steps.append(put(target, STANDARD, made[name].train(target.training)))
    for name, front in inside.fronts.items():
        target = connection.model.get_submodule(name)
        weight = target.weight
        assert isinstance(weight, Tensor)
        steps.append(put(target, ENTRY, front.to(weight.device, weight.dtype).train(target.training)))
        if isinstance(front, Multiply) and preserve:
            if name not in made:
                raise SkipwayError(f"the constant in front of {name} could not be divided out of it")
            made[name].multiply_(1 / front.factor)


def takes_step(scheme: Scheme) -> bool:
    """Whether a scheme has a step over the whole network at the start."""
    return any(type(member).init_ is not Scheme.init_ for member in members_of(scheme))


@dataclass(frozen=True)
class Values(LinearMap):
    """The rows of torch's packed attention that make the values."""

    @property
    def weight(self) -> Tensor:
        packed = self.module.in_proj_weight
        assert isinstance(packed, Tensor)
        return packed[self.rows]


@dataclass(frozen=True)
class Reached(WatchedConnection):
    """A connection whose path holds the maps that a scheme's start is about: of attention values and outputs."""

    @property
    def path(self) -> list[LinearMap]:
        found: list[LinearMap] = []
        for name in self.seen.maps:
            module = self.model.get_submodule(name)
            if isinstance(module, nn.MultiheadAttention):
                found.append(Values(module, slice(2 * module.embed_dim, 3 * module.embed_dim)))
            else:
                found.append(LinearMap(module))
        return found


@torch.no_grad()
def step_over(chain: Chain[WatchedConnection], scheme: Scheme) -> Callable[[], None]:
    """Take a scheme's step over the whole network, started anew where the scheme says from what; returns what puts all
    values back.

    A scheme that changes what branches are built from has a distribution that its step begins with: maps start from
    it, biases from 0. Other schemes multiply what is there.

    Raises:
        SkipwayError: a map on a branch is none of torch's, or one of attention whose values cannot be told apart; all
            values are as before.
    """
    model = chain.model
    connections = [Reached(c.name, c.site, c.seen, model) for c in chain]
    on_branches = {name for connection in connections for name in connection.seen.maps}
    last = chain.classifier
    own = last is not None and any(model.get_submodule(name) is last.module for name in on_branches)
    kept = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]

    @torch.no_grad()
    def put_back() -> None:
        for parameter, old in kept:
            parameter.copy_(old)

    try:
        for connection in connections:
            kit = probe(connection)
            other = scheme.kit(connection.site, kit)
            if other != kit:
                check_path(connection)
                for name in connection.seen.maps:
                    restart(model.get_submodule(name), other.conv(1, 1, 1), other.linear(1, 1))
        scheme.init_(Chain(model, connections, None if own else last))
        bias = None if last is None else last.module._parameters.get("bias")
        if last is not None and bias is not None and not own and not last.weight.any():
            bias.zero_()  # a classifier that is silenced
    except Exception:
        put_back()
        raise
    return put_back


def check_path(connection: Reached) -> None:
    """Refuse a path that holds more than the maps that a start is about."""
    for name in connection.seen.maps:
        module = connection.model.get_submodule(name)
        packed = isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
        output = isinstance(connection.model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
        if not (packed or output) and (connection.seen.kind == "attention" or not is_plain(module, MAPS)):
            raise SkipwayError(
                f"connection {connection.name!r}: {name} ({type(module).__name__}) is started with factors of its own "
                "for values and outputs, and which of its rows are values cannot be told from outside"
            )


def restart(module: nn.Module, conv: nn.Module, linear: nn.Module) -> None:
    """Start a map from the distribution that the scheme's own maps start from, its biases from 0."""
    if isinstance(module, nn.MultiheadAttention):
        assert module.in_proj_weight is not None
        weights, biases = list(module.in_proj_weight.chunk(3)), [module.in_proj_bias]
    else:
        weights, biases = [module.get_parameter("weight")], [module.bias]
    initial: Initial = (linear if isinstance(module, nn.Linear | nn.MultiheadAttention) else conv).initial  # type: ignore[assignment]
    for weight in weights:
        initial(weight)
    for bias in biases:
        if isinstance(bias, Tensor):
            bias.zero_()
