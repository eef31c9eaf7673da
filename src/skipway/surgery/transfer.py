"""Transfer of a scheme into somebody's branch: modules inserted at its maps, and the start of the whole network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.nn import Conv2d, Linear, LinearMap, Multiply, ScaledShortcut, ScaledStandardConv2d, ScaledStandardLinear
from skipway.nn.computed_weights import computed_weight, multiply_tensor, stored_weight
from skipway.nn.initial import Initial
from skipway.nn.kit import Kit
from skipway.nn.maps import standardise
from skipway.nn.placement import Part, Placement
from skipway.nn.role import Role
from skipway.schemes.scheme import Scheme, members_of
from skipway.surgery.fusion import MAPS
from skipway.surgery.insertion import INPUT, WEIGHT, computes_like, insert
from skipway.surgery.transaction import Transaction
from skipway.surgery.verification import forward_hooks, outputs
from skipway.tracing import Program
from skipway.tracing.chain import Chain, WatchedConnection
from skipway.tracing.walks import effective_part

__all__ = [
    "BlendedNorm",
    "BranchParts",
    "Standardise",
    "branch_parts",
    "has_global_start",
    "insert_parts",
    "start_network",
    "start_norms",
]

STANDARDISED = (ScaledStandardConv2d, ScaledStandardLinear)


@dataclass
class BranchParts:
    """Changes inside of one branch, and a factor after it beside the scheme's scale.

    Args:
        entries: modules inserted before maps, by the maps' names.
        standardised: names of maps whose weights are standardised in every pass.
        skip: α of a scheme that multiplies the skip before a norm; becomes 1/α on the branch.
        closes: whether a norm is added at the end.
    """

    entries: dict[str, nn.Module] = field(default_factory=dict)
    standardised: tuple[str, ...] = ()
    skip: float = 1.0
    closes: bool = False

    def __bool__(self) -> bool:
        return bool(self.entries or self.standardised or self.skip != 1 or self.closes)


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
        """Multiply the weight that is computed, in place."""
        self.gain.mul_(factor)
        self.mean.mul_(factor)


class BlendedNorm(nn.Module):
    """y = F + a (γ ⊙ F / rms(F) − F): a trained branch on its way to one with a norm at its end.

    No γ makes the norm leave a trained branch as it is, since rms(F) differs from token to token. So a starts at 0, and
    γ at the mean of rms(F) on the example, that both ends are near each other; a = 1 is the norm alone.

    Args:
        channels: C.
        spatial: axes after the channel axis.

    Decay and learning rate: a and γ are not decayed.

    >>> bool((BlendedNorm(3, spatial=0)(torch.ones(2, 3)) == 1).all())
    True
    """

    role = Role("norm")
    neutral_note = "as F + a (norm(F) − F) with a = 0"
    epsilon = 1e-6

    def __init__(self, channels: int, *, spatial: int) -> None:
        super().__init__()
        self.axis = -1 - spatial
        self.share = nn.Parameter(torch.zeros(()))
        self.weight = nn.Parameter(torch.ones(channels))

    def rms(self, f: Tensor) -> Tensor:
        """The root mean square over the channels."""
        return (f.square().mean(self.axis, keepdim=True) + self.epsilon).sqrt()

    def forward(self, f: Tensor) -> Tensor:
        weight = self.weight.view(-1, *(1,) * (-1 - self.axis))
        return f + self.share * (weight * f / self.rms(f) - f)


def start_norms(change: Transaction, *, neutral: bool) -> None:
    """Start the norms that were added at the ends of branches, in place: with γ as large as what the branches put out
    on the example, or as the norm alone.
    """
    norms = {name: module for name, module in change.model.named_modules() if isinstance(module, BlendedNorm)}
    added = {name: module for name, module in norms.items() if module.share not in change.versions}
    change.keep_values(parameter for module in added.values() for parameter in module.parameters())
    if not neutral:
        for module in added.values():
            nn.init.ones_(module.share)
    elif added and change.example is not None:

        def measure(name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: object) -> None:
            nn.init.constant_(norms[name].weight, float(norms[name].rms(args[0]).mean()))

        with forward_hooks(change.model, added, enter=measure):
            outputs(change.model, change.example)


def probe_kit(connection: WatchedConnection) -> Kit:
    """A kit of the library's own parts in the place of the branch's, to ask a scheme what it makes of it."""
    norm = nn.LayerNorm if connection.seen.norms else None
    return Kit(conv=Conv2d, linear=Linear, norm=norm, act=nn.ReLU)


def branch_parts(scheme: Scheme, connection: WatchedConnection, program: Program, *, from_scratch: bool) -> BranchParts:
    """Return the parts that the scheme changes inside of a branch.

    Each hook is asked with what is there: a scheme that would move a norm moves nothing where there is none.

    Raises:
        SkipwayError: the scheme needs something that is impossible from outside.
    """

    def refuse(need: str) -> SkipwayError:
        return SkipwayError(f"{scheme} means {need}, which cannot be added to a network that exists already")

    site, seen = connection.site, connection.seen
    if scheme.join(site) is not None:
        raise refuse("another join than the addition, which is written in the forward of the module that adds")
    norms: dict[str, tuple[Part, ...]] = dict.fromkeys(seen.norms, ("norm",))
    placement = Placement(**norms)
    moved = scheme.place(site, placement)
    closes = moved == replace(placement, end=("norm",)) != placement and "pre" in norms
    if moved != placement and not closes:
        new = "+".join(where for where in ("pre", "inside", "end", "post") if getattr(moved, where)) or "none"
        raise refuse(
            f"norms or activations in other places ({'+'.join(seen.norms)} → {new}): their order is written in the "
            "forward of the module that adds"
        )
    kit = probe_kit(connection)
    other = scheme.kit(site, kit)
    if kit.norm is not None and other.norm is not kit.norm:
        raise refuse("other norms inside of the branch (remove_norm takes BatchNorms out)")
    if other.head_norm is not None:
        raise refuse("norms of queries, keys and values, which are computed in the forward of the attention")
    if other.act is not kit.act and from_scratch:
        raise refuse(
            'factors on the activations inside of the branch, called in its forward (start="identity" needs none)'
        )
    entry, parts = scheme.enter(site), BranchParts(closes=closes)
    entered, whole = entered_maps(program, connection)
    if entry is not None:
        if not whole and any(isinstance(each, Multiply) for each in entry.modules()):
            raise refuse(
                "a factor on all that enters the branch, a part of which is multiplied, added or put out as it is, "
                "without a map before that"
            )
        parts.entries |= {name: scheme.enter(site) or entry for name in entered}
    if other.before is not None:
        parts.entries |= {name: other.before() for name in seen.maps if name not in parts.entries}
    if isinstance(other.conv(1, 1, 1), STANDARDISED):
        parts.standardised = seen.maps
    for name in dict.fromkeys((*parts.entries, *parts.standardised)):
        module = connection.model.get_submodule(name)
        if not computes_like(module, MAPS) or program.runs.get(name) != 1:
            raise refuse(f"something at {name} ({type(module).__name__}), which is no map of torch's that runs once")
    carried = scheme.carry(site, None)
    if isinstance(carried, ScaledShortcut) and "post" in seen.norms:
        parts.skip = carried.factor  # norm(αx + F) = norm(x + F/α) but for the norm's epsilon
    elif carried is not None:
        raise refuse("another shortcut: the skip runs in no module, and no norm after the addition rescales the sum")
    return parts


def entered_maps(program: Program, connection: WatchedConnection) -> tuple[list[str], bool]:
    """The maps that read what enters a branch, behind its norm and activation, in order; and whether nothing else of
    the branch does.
    """
    seen = connection.seen
    _, branch, _, start = seen.numbers if seen.streams is None else (0, seen.streams.branch, 0, seen.streams.read)
    names: list[str] = []
    reached, mapped, whole = {start}, set[int](), True
    for value in program.between(start, branch):
        operands = reached.intersection(program.signals(value))
        reached.add(value.number)
        if operands.isdisjoint(mapped) and effective_part(value) == "map":
            names.append(program.weight_owner(value))
        elif operands.isdisjoint(mapped):
            continue
        elif not operands <= mapped:
            whole = False
        mapped.add(value.number)
    return list(dict.fromkeys(names)), whole and branch in mapped


def insert_parts(change: Transaction, connection: WatchedConnection, parts: BranchParts, *, divide: bool) -> None:
    """Insert the parts into a branch, in place; with `divide` constants are divided out of the maps after them."""
    standardised: dict[str, Standardise] = {}
    for name in parts.standardised:
        host = connection.model.get_submodule(name)
        standardised[name] = Standardise(host.weight)  # type: ignore[arg-type]
        insert(change, host, WEIGHT, standardised[name].train(host.training))
    for name, entry in parts.entries.items():
        host = connection.model.get_submodule(name)
        weight = host.weight
        assert isinstance(weight, Tensor)
        insert(change, host, INPUT, entry.to(weight.device, weight.dtype).train(host.training))
        if isinstance(entry, Multiply) and divide:
            if name not in standardised:
                raise SkipwayError(f"the constant before {name} could not be divided out of it")
            standardised[name].multiply_(1 / entry.factor)


def has_global_start(scheme: Scheme) -> bool:
    """Whether a scheme initialises the network as a whole."""
    return any(type(member).init_ is not Scheme.init_ for member in members_of(scheme))


@dataclass(frozen=True)
class ValueRows(LinearMap):
    """The rows of torch's packed attention weight that make the values."""

    @property
    def name(self) -> str:
        return "in_proj_weight"


@dataclass(frozen=True)
class StartedConnection(WatchedConnection):
    """A connection with the maps that a scheme initialises: of attention values and outputs, of others those that the
    signal crosses, without the maps of gates.
    """

    @property
    def path(self) -> list[LinearMap]:
        if self.seen.kind != "attention" and self.seen.maps and not self.seen.path:
            raise SkipwayError(
                f"connection {self.name!r}: {', '.join(self.seen.maps)} do not follow one another (branches in "
                "it are added, joined, or multiplied at its end), and a scheme that starts the last map of a branch, "
                "or counts its maps, says nothing of those"
            )
        return self.signal_maps

    @property
    def signal_maps(self) -> list[LinearMap]:
        found: list[LinearMap] = []
        for name in self.seen.maps if self.seen.kind == "attention" else self.seen.signal_maps:
            module = self.model.get_submodule(name)
            if isinstance(module, nn.MultiheadAttention):
                found.append(ValueRows(module, slice(2 * module.embed_dim, 3 * module.embed_dim)))
            else:
                found.append(LinearMap(module))
        return found


@torch.no_grad()
def start_network(change: Transaction, chain: Chain[WatchedConnection], scheme: Scheme) -> None:
    """Initialise the whole network as a scheme does, in place.

    A scheme that changes what branches are built from brings a distribution: maps start from it, biases from 0. Other
    schemes multiply what is there.

    Raises:
        SkipwayError: a map on a branch is none of torch's, belongs to attention whose values cannot be told apart, or
            has a weight that is computed in every pass; or the scheme asks for their order, and they do not follow one
            another.
    """
    model = chain.model
    connections = [StartedConnection(c.name, c.site, c.seen, model) for c in chain]
    on_branches = {name for connection in connections for name in connection.seen.maps}
    last = chain.classifier
    own = last is not None and any(model.get_submodule(name) is last.module for name in on_branches)
    change.keep_module(model)
    for connection in connections:
        kit = probe_kit(connection)
        other = scheme.kit(connection.site, kit)
        if other != kit:
            check_maps(connection)
            for name in connection.seen.maps:
                restart(model.get_submodule(name), other.conv(1, 1, 1), other.linear(1, 1))
    scheme.init_(Chain(model, connections, None if own else last))
    silenced = last is not None and not own and not last.weight.any()
    if last is not None and silenced and not multiply_tensor(last.module, "bias", 0.0):
        raise computed_weight("the bias of the classifier")


def check_maps(connection: StartedConnection) -> None:
    """Refuse a branch that holds other maps than those that a scheme initialises, or weights that are computed."""
    for name in connection.seen.maps:
        module = connection.model.get_submodule(name)
        for weight in ("weight", "in_proj_weight"):
            if stored_weight(module, weight) is None and isinstance(getattr(module, weight, None), Tensor):
                raise computed_weight(f"the weight of {name}")
        packed = isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
        output = isinstance(connection.model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
        if not (packed or output) and (connection.seen.kind == "attention" or not computes_like(module, MAPS)):
            raise SkipwayError(
                f"connection {connection.name!r}: {name} ({type(module).__name__}) is started with factors of its own "
                "for values and outputs, and which of its rows are values cannot be told from outside"
            )


def restart(module: nn.Module, conv: nn.Module, linear: nn.Module) -> None:
    """Initialise a map like the scheme's own maps, and its biases with 0, in place."""
    if isinstance(module, nn.MultiheadAttention):
        assert module.in_proj_weight is not None
        weights, biases = list(module.in_proj_weight.chunk(3)), [module.in_proj_bias]
    else:
        weights, biases = [module.weight], [module.bias]
    initial: Initial = (linear if isinstance(module, nn.Linear | nn.MultiheadAttention) else conv).initial  # type: ignore[assignment]
    for weight in weights:
        initial(weight)  # type: ignore[arg-type]
    for bias in biases:
        if isinstance(bias, Tensor):
            bias.zero_()
