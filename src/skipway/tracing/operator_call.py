"""`OperatorCall`: an operator with its arguments, which can be run again on other tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["Operand", "OperatorCall"]

MOVING = frozenset({"_to_copy", "lift_fresh", "alias", "detach"})
"""Operators whose result is their operand, in another place or type."""
VIEWS = frozenset({"view", "_unsafe_view", "_reshape_alias"})
"""Operators that need the strides that their operand had; of another tensor they are a reshape."""


@dataclass(frozen=True)
class Operand:
    """Stands for the tensor that a value holds."""

    number: int


@dataclass(frozen=True)
class OperatorCall:
    """An operator of the dispatcher with its arguments, in which values stand for tensors.

    Args:
        function: what is called.
        leaves: the arguments without their containers.
        spec: those containers.
    """

    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: TreeSpec

    @classmethod
    def on(cls, function: Callable[..., Any], *arguments: Operand | float) -> OperatorCall:
        """The operation of a function that no operator of the dispatcher has run in this form."""
        leaves, spec = tree_flatten((arguments, {}))
        return cls(function, tuple(leaves), spec)

    @classmethod
    def of(cls, function: Callable[..., Any], arguments: Any, number: Callable[[Tensor], int]) -> OperatorCall:
        """The operation of a call; `number` tells which value a tensor holds."""
        leaves, spec = tree_flatten(arguments)
        held = (Operand(number(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls(function, tuple(held), spec)

    def run(self, tensor: Callable[[int], Tensor], output: int = 0) -> Tensor:
        """The output of the operator, where `tensor` gives what a value holds now."""
        leaves = [tensor(leaf.number) if isinstance(leaf, Operand) else leaf for leaf in self.leaves]
        name = getattr(self.function, "__name__", "").partition(".")[0]
        first = leaves[0] if leaves else None
        if isinstance(first, Tensor) and name in MOVING:
            return first
        if isinstance(first, Tensor) and name in VIEWS:
            return first.reshape(tree_unflatten(leaves, self.spec)[0][1])
        schema = getattr(self.function, "_schema", None)
        if schema is not None and schema.is_mutable:
            leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        results = [leaf for leaf in tree_flatten(self.function(*args, **kwargs))[0] if isinstance(leaf, Tensor)]
        return results[output]
