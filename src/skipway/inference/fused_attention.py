"""Attention in the graph of an exported network: torch's function, or two products with a softmax in between."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from math import isclose, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from skipway.inference.fused_operators import FusedAttention
from skipway.inference.graph_nodes import Replacement, named_arguments, shape_of

if TYPE_CHECKING:
    from skipway.inference.fused_graph import GraphBuilder

__all__ = ["attention_in_steps", "bias_of", "replace_attention"]

aten = torch.ops.aten

HIDDEN = -1e4
"""A summand at which, or below, a logit counts for nothing."""
SCALES = (aten.mul.Tensor, aten.div.Tensor)
CASTS = (aten.to.dtype, aten._to_copy.default)
LOGITS = (*SCALES, aten.add.Tensor, aten.masked_fill.Scalar, aten.reshape.default)
"""What may come between the product of queries and keys and the softmax."""


def replace_attention(builder: GraphBuilder, node: fx.Node, given: dict[str, Any]) -> Replacement:
    """Attention over all keys with no bias or a constant one, or over those that are not later."""
    inputs = tuple(given[name] for name in ("query", "key", "value"))
    mask, (q, k, v) = builder.constant(given["attn_mask"]), inputs
    if (mask is None and given["attn_mask"] is not None) or given["dropout_p"] or not is_attention(q, k, v):
        return None, ()
    causal, (rows, dims), keys = given["is_causal"], shape_of(q)[-2:], shape_of(k)[-2]
    if causal and rows != keys:  # torch counts from the first key, the kernel from the last
        return None, ()
    bias = None if mask is None else bias_of(mask, (rows, keys), q.meta["val"].dtype)
    scale = 1.0 if given["scale"] is None else given["scale"] * dims**0.5
    return FusedAttention(bias, causal), (multiplied(builder, node, q, [scale]), k, v)


def attention_in_steps(builder: GraphBuilder, node: fx.Node) -> Replacement:
    """The attention softmax(s q kᵀ + B) v that a product ends, B constant and s a number for each head; None where it
    ends none.
    """
    weights, v = (each for each in node.args if isinstance(each, fx.Node))
    softmax, _ = follow(builder, weights, CASTS)
    if softmax is None or softmax.target is not aten.softmax.int:
        return None, ()
    given = named_arguments(softmax)
    if given["dim"] not in (-1, len(shape_of(softmax)) - 1):
        return None, ()
    product, steps = follow(builder, given["self"], (*CASTS, *LOGITS))
    if product is None or product.target is not aten.matmul.default:
        return None, ()
    q: Any = product.args[0]
    keys: Any = product.args[1]
    with builder.graph.inserting_before(node):
        k = builder.graph.call_function(aten.transpose.int, (keys, -2, -1))
        k.meta["val"] = keys.meta["val"].transpose(-2, -1)
    shape = shape_of(product)
    if shape_of(softmax) != shape or not is_attention(q, k, v) or not all(map(keeps_logits, steps)):
        return None, ()
    factors = [factor_of(builder, each) for each in steps]
    if any(
        each is None or (isinstance(each, Tensor) and shape_of(step) != shape)
        for each, step in zip(factors, steps, strict=True)
    ):
        return None, ()
    bias = None
    if any(each.target in (aten.add.Tensor, aten.masked_fill.Scalar) for each in steps):
        added, beside = (logits_after(builder, steps, torch.full(shape, each)) for each in (0.0, 1.0))
        if bool((added.amax(-1) <= HIDDEN).any()):  # a row of hidden keys: NaN, or the mean of all values
            return None, ()
        if bool(((added == beside) & (added > HIDDEN)).any()):  # logits are replaced by others, which are not hidden
            return None, ()
        bias = bias_of(added, (shape[2], shape[3]), q.meta["val"].dtype)
    source, scales = follow(builder, q, SCALES, most=1)
    factor = factor_of(builder, scales[0]) if scales else None
    if source is not None and factor is not None and not isinstance(factor, Tensor):
        q, factors = source, [*factors, factor]
    return FusedAttention(bias, False), (multiplied(builder, node, q, [*factors, shape_of(q)[-1] ** 0.5]), k, v)


def keeps_logits(step: fx.Node) -> bool:
    """Whether what a step makes of logits are floating-point numbers, and no multiple of what it adds."""
    return step.meta["val"].is_floating_point() and step.kwargs.get("alpha", 1) == 1  # type: ignore[return-value]


def follow(
    builder: GraphBuilder, node: Any, targets: Collection[Any], most: int = 16
) -> tuple[fx.Node | None, list[fx.Node]]:
    """The node that calls of one varying argument begin with, and these calls, the first one first; None for the node
    where something else uses what is in between.
    """
    steps: list[fx.Node] = []
    while isinstance(node, fx.Node) and len(node.users) == 1:
        varying = [each for each in node.args if isinstance(each, fx.Node) and builder.constant(each) is None]
        if node.target not in targets or len(varying) != 1 or len(steps) == most:
            return node, steps[::-1]
        steps.append(node)
        node = varying[0]
    return None, []


def factor_of(builder: GraphBuilder, step: fx.Node) -> Any:
    """The factor that a step multiplies logits by, a number or a tensor (..., 1, 1), and 1 where it does something
    else; None where it divides by them, or has a factor for each logit.
    """
    if step.target not in SCALES:
        return 1.0
    first, second = step.args
    varies = isinstance(first, fx.Node) and builder.constant(first) is None
    other: Any = second if varies else first
    if step.target is aten.div.Tensor and not varies:
        return None
    factor = other if (constant := builder.constant(other)) is None else constant.detach()
    if isinstance(factor, Tensor):
        factor = factor.item() if factor.numel() == 1 else factor if factor.shape[-2:] == (1, 1) else None
    return factor if factor is None or step.target is aten.mul.Tensor else 1 / factor


def logits_after(builder: GraphBuilder, steps: list[fx.Node], logits: Tensor) -> Tensor:
    """What steps make of logits."""
    value: Any = logits
    for step in steps:
        args, kwargs = fx.map_arg((step.args, step.kwargs), partial(known_or, builder, value))
        value = step.target(*args, **kwargs)  # type: ignore[operator]
    return value.detach()


def known_or(builder: GraphBuilder, value: Tensor, node: fx.Node) -> Tensor:
    """The tensor of a constant, and a value for another node."""
    constant = builder.constant(node)
    return value if constant is None else constant


def is_attention(q: fx.Node, k: fx.Node, v: fx.Node) -> bool:
    """Whether queries, keys and values are those of the same images and heads, (N, heads, T, d)."""
    shapes, types = [shape_of(each) for each in (q, k, v)], {each.meta["val"].dtype for each in (q, k, v)}
    same = len({tuple(each[:2]) for each in shapes}) == len(types) == 1 and all(len(each) == 4 for each in shapes)
    return same and types.pop().is_floating_point and all(each.numel() for each in shapes)


def multiplied(builder: GraphBuilder, at: fx.Node, q: fx.Node, factors: list[Any]) -> fx.Node:
    """Queries times factors, before a node."""
    number = prod(each for each in factors if not isinstance(each, Tensor))
    tensors = [each.to(q.meta["val"].dtype) for each in factors if isinstance(each, Tensor)]
    with builder.graph.inserting_before(at):
        others = [builder.graph.get_attr(builder.add_constant(each)) for each in tensors]
        for other in (*others, *[number] * (not isclose(number, 1))):
            value = q.meta["val"]
            q = builder.graph.call_function(aten.mul.Tensor, (q, other))
            q.meta["val"] = value
    return q


def bias_of(mask: Tensor, sides: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A mask as numbers to be added, (W, heads or 1, T, S) for the fewest W images after which it repeats itself."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
    whole = mask.to(dtype)[(None,) * (4 - mask.ndim)].expand(-1, -1, *sides)
    whole = whole[:, :1] if torch.equal(whole, whole[:, :1].expand_as(whole)) else whole
    periods = (count for count in range(1, len(whole) + 1) if len(whole) % count == 0)
    period = next(count for count in periods if torch.equal(whole[count:], whole[: len(whole) - count]))
    return whole[:period].contiguous()
