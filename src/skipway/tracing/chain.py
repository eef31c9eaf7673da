"""`chain(model)`: the ordered residual connections of a network, ours by type, anyone's by watching a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError, counted
from skipway.nn import Branch, Classifier, LinearMap, Residual
from skipway.nn.computed_weights import computed_weight, multiply_tensor, stored_weight
from skipway.nn.site import Kind, Site
from skipway.tracing import Example, Program, Refusal, ResidualAdd, find_residual_adds, unwrap, watch
from skipway.tracing.paths import condense_paths
from skipway.tracing.residual_slots import find_residual_slots

__all__ = [
    "Chain",
    "Connection",
    "WatchedConnection",
    "chain",
    "chain_from_program",
    "read_chain",
]


@dataclass(frozen=True)
class Connection:
    """One residual connection of a network.

    Args:
        name: path of the module that owns it, as in `model.get_submodule(name)`.
        residual: that module.
        site: where it stands in this chain.
    """

    name: str
    residual: Residual
    site: Site

    @property
    def summary(self) -> tuple[str, str, str]:
        """Classes of the shortcut and of the branch, and the number of channels."""
        classes = type(self.residual.shortcut).__name__, type(self.residual.branch).__name__
        return *classes, f"{self.site.dim} channels"

    @property
    def branch(self) -> Branch:
        """The branch, which has to declare its path for schemes to work on it."""
        branch = self.residual.branch
        if not isinstance(branch, Branch):
            raise SkipwayError(
                f"the branch of connection {self.name!r} is a {type(branch).__name__}, which does not declare its "
                "linear maps; subclass skipway.nn.Branch and define path()"
            )
        return branch

    @property
    def path(self) -> list[LinearMap]:
        """The linear maps of the branch, in the order in which the signal crosses them."""
        return self.branch.path()

    @property
    def signal_maps(self) -> list[LinearMap]:
        """The same, for schemes to which their order does not matter."""
        return self.path

    @torch.no_grad()
    def multiply_(self, factor: float, done: set[Any] | None = None) -> None:
        """Multiply what the branch puts out, in place: at its closing norm where it has one, else at its last map.

        In front of a norm a factor would be without effect. Biases are left alone: they start at 0.

        Args:
            factor: that it is multiplied by.
            done: tells weights that were multiplied for other connections, which are left alone.

        Raises:
            SkipwayError: the closing norm has no gain; or the weight is computed from others, which do not multiply it.
        """
        norm, done = self.branch.closing_norm(), set() if done is None else done
        if norm is None:
            last = self.path[-1]
            if is_first(done, last.module, last.name, last.rows):
                last.multiply_(factor)
        elif not isinstance(norm.weight, Tensor):
            raise SkipwayError(
                f"connection {self.name!r} closes with a norm that has no gain; use one with affine=True"
            )
        elif is_first(done, norm, "weight") and not multiply_tensor(norm, "weight", factor):
            raise computed_weight(f"the weight of the closing norm of connection {self.name!r}")


@dataclass(frozen=True)
class WatchedConnection:
    """One residual connection of any network, as found in one watched forward pass.

    Args:
        name: path of the module whose forward adds, with ":2" for the second connection that it adds.
        site: where it stands in this chain.
        seen: what was seen of it: skip, branch, norms, scale.
        model: the network.
    """

    name: str
    site: Site
    seen: ResidualAdd
    model: nn.Module = field(repr=False)

    @property
    def summary(self) -> tuple[str, str, str, str]:
        """Kind of the skip and its streams, where they are several, and of the branch; norms; kind of the scale."""
        scale = "" if self.seen.scale is None else "scale per channel" if self.seen.scale.per_channel else "scalar"
        return (
            f"{self.seen.skip}{self.seen.several}",
            self.seen.kind,
            f"{'+'.join(self.seen.norms) or 'no'} norm",
            scale,
        )

    @property
    def observable(self) -> bool:
        """Whether a later pass can find the addition: Python calls it, or it is between slots of ours."""
        return self.seen.slots or self.seen.call is not None

    @property
    def owner(self) -> nn.Module:
        """The module whose forward adds."""
        return self.model.get_submodule(self.seen.owner)

    @property
    def residual(self) -> Residual | None:
        """The owner if it is a `skipway.nn.Residual`, else None."""
        owner = self.owner
        return owner if isinstance(owner, Residual) else None

    @property
    def path(self) -> list[LinearMap]:
        """The linear maps of the branch; all that were crossed in somebody else's, queries and keys among them."""
        residual = self.residual
        if residual is not None and isinstance(residual.branch, Branch):
            return residual.branch.path()
        return [LinearMap(self.model.get_submodule(name)) for name in self.seen.maps]

    @property
    def signal_maps(self) -> list[LinearMap]:
        """The same, for schemes to which their order does not matter."""
        return self.path

    @property
    def end_modules(self) -> list[nn.Module]:
        """The closing norms or last maps of what is added."""
        modules = [self.model.get_submodule(name) for name in self.seen.ends]
        return [module.out_proj if isinstance(module, nn.MultiheadAttention) else module for module in modules]

    @torch.no_grad()
    def multiply_(self, factor: float, done: set[Any] | None = None) -> None:
        """Multiply what the branch puts out, in place: at its closing norm where it has one, else at its last map; of a
        sum of branches, at the end of each.

        The bias goes with the weight: what was trained stays what it was, times the factor.

        Args:
            factor: that it is multiplied by.
            done: tells weights that were multiplied for other connections, which are left alone.

        Raises:
            SkipwayError: the branch ends in neither, so nothing can be multiplied without changing its code; or in a
                weight that is computed from others, which do not multiply it.
        """
        modules, done = self.end_modules, set() if done is None else done
        if not modules or not all(isinstance(getattr(module, "weight", None), Tensor) for module in modules):
            raise SkipwayError(
                f"the branch of connection {self.name!r} ends in no linear map and no norm with a gain, so what it "
                "puts out cannot be multiplied in place"
            )
        for module in modules:
            for name in (LinearMap(module).name, "bias"):
                if is_first(done, module, name) and not multiply_tensor(module, name, factor):
                    raise computed_weight(f"the {name} of the last map of connection {self.name!r}")

    def __str__(self) -> str:
        scale = "" if self.seen.scale is None else f" · scale {', '.join(self.seen.scale.parameters)}"
        norms = "+".join(self.seen.norms) or "no"
        branch = f"{'−' if self.seen.sign < 0 else '+'} {self.seen.kind}({condense_paths(self.seen.maps)})"
        return f"{self.name}: {self.seen.skip}{self.seen.several} {branch} · {norms} norm{scale}"


def is_first(done: set[Any], module: nn.Module, name: str, rows: slice | None = None) -> bool:
    """Whether a weight is none of those that were done, to which it is added. Modules may share a parameter or buffer;
    a weight that is computed is known by its module.
    """
    stored = stored_weight(module, name)
    key = (id(module), name) if stored is None else (id(stored), str(rows))
    known = key in done
    done.add(key)
    return not known


AnyConnection = TypeVar("AnyConnection", Connection, WatchedConnection)


class Chain(Sequence[AnyConnection], Generic[AnyConnection]):
    """The residual connections of `model` in order, and its classifier.

    Args:
        model: the network.
        connections: in the order in which the signal meets them.
        classifier: the last linear map, None where there is none.
        refused: additions of a watched forward pass that are no residual connections, each with its reason.
    """

    def __init__(
        self,
        model: nn.Module,
        connections: Sequence[AnyConnection],
        classifier: LinearMap | None,
        refused: Sequence[Refusal] = (),
    ) -> None:
        self.model, self.connections, self.classifier = model, tuple(connections), classifier
        self.refused = tuple(refused)

    def __len__(self) -> int:
        return len(self.connections)

    def __getitem__(self, index):  # type: ignore[override]
        return self.connections[index]

    def __iter__(self) -> Iterator[AnyConnection]:
        return iter(self.connections)

    def multiply_(self, factor: float) -> None:
        """Multiply what every branch puts out, in place: each weight once, though several connections share it.

        Raises:
            SkipwayError: a branch ends in nothing that can be multiplied; those before it are multiplied by then.
        """
        done: set[Any] = set()
        for connection in self:
            connection.multiply_(factor, done)

    @torch.no_grad()
    def multiply_maps_(self, factors: Iterable[tuple[LinearMap, float]]) -> None:
        """Multiply maps of the branches, each by its factor, in place: each weight once, though several connections
        share it.

        Raises:
            SkipwayError: a weight is computed from others, which do not multiply it.
        """
        done: set[Any] = set()
        for each, factor in factors:
            if is_first(done, each.module, each.name, each.rows):
                each.multiply_(factor)

    def __repr__(self) -> str:
        refused = f", {counted(len(self.refused), 'other addition')}" if self.refused else ""
        return f"Chain of {counted(len(self), 'connection')} in {type(self.model).__name__}{refused}"

    def __str__(self) -> str:
        """A line for each connection; of more than 12, the first 8 and the last 3."""
        shown = self.connections if len(self) <= 12 else (*self.connections[:8], *self.connections[-3:])
        cells = [(connection.name, *connection.summary) for connection in shown]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        if len(shown) < len(self):
            lines.insert(8, f"⋮ {len(self) - len(shown)} more")
        return "\n".join([repr(self), *(f"  {line}" for line in lines)])


@overload
def chain(model: nn.Module) -> Chain[Connection]: ...
@overload
def chain(model: nn.Module, example: Example) -> Chain[WatchedConnection]: ...


def chain(model: nn.Module, example: Example | None = None) -> Chain[Connection] | Chain[WatchedConnection]:
    """The residual connections of a network, in order.

    Without an example: those of a Skipway network, found by type, in order of registration. Where they were
    built without a place in a network (`BasicBlock(64, 64)` in somebody's own model), their sites are counted here.

    With an example: those of any network. One forward pass in evaluation mode is watched at the dispatcher, on a copy
    on the meta device, so nothing is computed and no weights are allocated. An addition y = u + v is a connection
    where u is a tensor x carried on (or pooled, or projected by linear maps alone) and v was computed from the same x
    by more than that, and by more than elementwise operators, which are an activation. One tensor may carry several
    streams, s'ⱼ = Σₖ Aⱼₖ sₖ + wⱼ F(x) with x read from all of them, as in hyper-connections; `seen.streams` tells how
    many and where. In whatever form it is written (`x - f(x)`, `torch.lerp`, `addcmul`, `index_add`, a sum over a
    stack, …), an addition is read as a x + b F(x); `seen.weights` holds the numbers a and b. All other additions are in
    `refused`, each with its reason, and so are operators that are not known and join two signals of one shape.

    Args:
        model: a Skipway network, or, with an example, any `torch.nn.Module`.
        example: what the model is called with: a tensor, a tuple of arguments, a dict of keyword arguments. Only
            shapes and types matter; it may be on the meta device.

    Raises:
        SkipwayError: without an example: the model holds no `skipway.nn.Residual`. With one: the forward pass failed,
            or the model is a TorchScript module, which cannot be watched.

    >>> import skipway as sw
    >>> [connection.name for connection in sw.chain(sw.build("resnet20"))][:2]
    ['stages.0.0', 'stages.0.1']
    >>> layer = torch.nn.TransformerEncoderLayer(32, 4, norm_first=True, batch_first=True)
    >>> for connection in sw.chain(layer, torch.zeros(1, 5, 32)):
    ...     print(connection)
    :1: identity + attention(self_attn, self_attn.out_proj) · pre norm
    :2: identity + mlp(linear1, linear2) · pre norm
    >>> print(sw.chain(torch.nn.TransformerEncoder(layer, 50, enable_nested_tensor=False), torch.zeros(1, 5, 32)))
    Chain of 100 connections in TransformerEncoder
      layers.0:1   identity  attention  pre norm
      layers.0:2   identity  mlp        pre norm
      layers.1:1   identity  attention  pre norm
      layers.1:2   identity  mlp        pre norm
      layers.2:1   identity  attention  pre norm
      layers.2:2   identity  mlp        pre norm
      layers.3:1   identity  attention  pre norm
      layers.3:2   identity  mlp        pre norm
      ⋮ 89 more
      layers.48:2  identity  mlp        pre norm
      layers.49:1  identity  attention  pre norm
      layers.49:2  identity  mlp        pre norm
    """
    if example is not None:
        program = watch(model, example)
        return chain_from_program(unwrap(model), program)
    modules = list(model.named_modules())
    named = [(name, module) for name, module in modules if isinstance(module, Residual)]
    if not named:
        raise SkipwayError(
            f"{type(model).__name__} holds no skipway.nn.Residual, so its connections cannot be read by type; give an "
            "example of what it is called with, and they are found by watching: chain(model, example)"
        )
    connections = [
        Connection(name, module, site_in_chain(module, index, len(named))) for index, (name, module) in enumerate(named)
    ]
    classifiers = [module for _, module in modules if isinstance(module, Classifier)]
    return Chain(model, connections, LinearMap(classifiers[-1]) if classifiers else None)


def read_chain(model: nn.Module, example: Example) -> Chain[Connection] | Chain[WatchedConnection]:
    """The chain of any network: by type, if it holds connections of ours, else by watching. The model is left alone.

    >>> len(read_chain(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2)))
    0
    """
    ours = any(isinstance(module, Residual) for module in model.modules())
    return chain(model) if ours else chain(model, example)


def chain_from_program(model: nn.Module, program: Program) -> Chain[WatchedConnection]:
    """The chain of a model whose forward pass was watched."""
    sums, refused = find_residual_adds(program, find_residual_slots(model, program))
    connections, since, kinds = [], 0, tuple(seen.kind for seen in sums)
    for index, seen in enumerate(sums):
        since = 0 if seen.skip == "projection" else since
        connections.append(WatchedConnection(seen.name, site_of(seen, index, kinds, since), seen, model))
        since += 1
    maps = [value for value in program.values if value.part == "map" and value.norm is None]
    owner = program.weight_owner(maps[-1]) if maps else None
    return Chain(model, connections, None if owner is None else LinearMap(model.get_submodule(owner)), refused)


def site_of(seen: ResidualAdd, index: int, kinds: tuple[Kind, ...], since: int) -> Site:
    """The place of a watched connection; where no weight says which axis holds the channels, the last one is taken."""
    axis = len(seen.shape) - 1 if seen.channel is None else seen.channel
    spatial = len(seen.shape) - 1 - axis
    place = {"index": index, "depth": len(kinds), "since": since}
    return Site(dim=seen.shape[axis], **place, spatial=spatial, kind=seen.kind, kinds=kinds)


def site_in_chain(residual: Residual, index: int, depth: int) -> Site:
    """The site of a connection: its own where that agrees with the chain, else one counted from the chain."""
    own = residual.site
    if own is not None and (own.index, own.depth) == (index, depth):
        return own
    if own is None:
        return Site(dim=1, index=index, depth=depth)
    return replace(own, index=index, depth=depth, since=min(index, own.since))
