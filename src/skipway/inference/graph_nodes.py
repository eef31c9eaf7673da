"""Calls of operators in the graph of an exported network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["Replacement", "is_random", "named_arguments", "permutation", "same_kind", "shape_of"]

aten = torch.ops.aten

Replacement = tuple[nn.Module | None, tuple[fx.Node, ...]]
"""The module that computes a call, and its inputs; None where none does."""


def is_random(target: Any) -> bool:
    """Whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in target.tags


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, with the operator's defaults."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    defaults = {each.name: each.default_value for each in schema.arguments if each.has_default_value()}
    given = dict(zip((each.name for each in schema.arguments), node.args, strict=False))
    return {**defaults, **given, **node.kwargs}


def permutation(node: Any) -> list[int] | None:
    """The order of axes that a call brings its argument into; None of another call."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    axes: Any = node.args[1] if len(node.args) == 2 else node.args[1:]
    if node.target is aten.permute.default:
        return [axis % len(axes) for axis in axes]
    if node.target is aten.transpose.int:
        order = list(range(node.meta["val"].ndim))
        first, second = (axis % len(order) for axis in axes)
        order[first], order[second] = second, first
        return order
    return None


def same_kind(*nodes: Any) -> bool:
    """Whether all are tensors of one shape and type."""
    values = [each.meta.get("val") if isinstance(each, fx.Node) else None for each in nodes]
    kinds = {(each.shape, each.dtype) if isinstance(each, Tensor) else None for each in values}
    return len(kinds) == 1 and None not in kinds


def shape_of(node: fx.Node) -> torch.Size:
    """The shape of what a node computes."""
    return node.meta["val"].shape
