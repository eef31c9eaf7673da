"""`chain(model)`: the ordered residual connections of a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.nn import Branch, Classifier, LinearMap, Residual
from skipway.site import Site

__all__ = ["Chain", "Connection", "chain"]


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

    @torch.no_grad()
    def multiply_(self, factor: float) -> None:
        """Multiply what the branch puts out, in place: at its closing norm where it has one, else at its last map.

        In front of a norm a factor would be without effect. Biases are left alone: they start at 0.
        """
        norm = self.branch.closing_norm()
        if norm is None:
            self.path[-1].multiply_(factor)
        elif isinstance(norm.weight, Tensor):
            norm.weight.mul_(factor)
        else:
            raise SkipwayError(
                f"connection {self.name!r} closes with a norm that has no gain; use one with affine=True"
            )


class Chain(Sequence[Connection]):
    """The residual connections of `model` in order, and its classifier.

    Args:
        model: the network.
        connections: in the order in which the signal meets them.
        classifier: the last linear map, None where there is none.
    """

    def __init__(self, model: nn.Module, connections: Sequence[Connection], classifier: LinearMap | None) -> None:
        self.model, self.connections, self.classifier = model, tuple(connections), classifier

    def __len__(self) -> int:
        return len(self.connections)

    def __getitem__(self, index):  # type: ignore[override]
        return self.connections[index]

    def __iter__(self) -> Iterator[Connection]:
        return iter(self.connections)

    def __repr__(self) -> str:
        return f"Chain of {len(self)} connections in {type(self.model).__name__}"


def chain(model: nn.Module) -> Chain:
    """The residual connections of a network of ours, found by type, in the order of their registration.

    Where the connections were built without a place in a network (`BasicBlock(64, 64)` in somebody's own model),
    their sites are counted here.

    Raises:
        SkipwayError: the model holds no `skipway.nn.Residual`.

    >>> import skipway as sw
    >>> [connection.name for connection in sw.chain(sw.build("resnet20"))][:2]
    ['stages.0.0', 'stages.0.1']
    """
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, Residual)]
    if not named:
        raise SkipwayError(
            f"{type(model).__name__} holds no skipway.nn.Residual, so its connections cannot be read; build it with "
            "skipway.build or from skipway's blocks"
        )
    connections = [
        Connection(name, module, place(module, index, len(named))) for index, (name, module) in enumerate(named)
    ]
    classifiers = [module for module in model.modules() if isinstance(module, Classifier)]
    return Chain(model, connections, LinearMap(classifiers[-1]) if classifiers else None)


def place(residual: Residual, index: int, depth: int) -> Site:
    """The site of a connection: its own where that agrees with the chain, else one counted from the chain."""
    own = residual.site
    if own is not None and (own.index, own.depth) == (index, depth):
        return own
    if own is None:
        return Site(dim=1, index=index, depth=depth)
    return replace(own, index=index, depth=depth, since=min(index, own.since))
