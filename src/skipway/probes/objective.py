"""The loss of a model's output: the caller's, the model's own, or a default by the shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten

from skipway.errors import SkipwayError

__all__ = ["Loss", "compute_loss", "main_output"]

Loss = Callable[[Any, Any], Tensor]


def compute_loss(output: Any, targets: Any = None, loss: Loss | None = None) -> Tensor:
    """The loss of a model's output, a tensor with one element.

    Args:
        output: what the model returned.
        targets: what the loss compares it with.
        loss: (output, targets) → a number. None: the output's own `.loss` where it has one; else cross-entropy over
            the classes on axis 1; without targets against labels drawn at random, and for an output that is no row of
            classes the mean square to standard normal noise.

    Raises:
        SkipwayError: the loss is not one number, or the targets are no tensor and no loss is given.
    """
    if loss is not None:
        value = loss(output, targets)
    elif isinstance(getattr(output, "loss", None), Tensor):
        value = output.loss
    else:
        value = default_loss(main_output(output), targets)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise SkipwayError(
            f"loss(output, targets) gives a {type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}; "
            "the rule is a tensor of one number: average over the samples"
        )
    return value


def main_output(output: Any) -> Tensor:
    """The main tensor of an output: itself, its `logits`, `last_hidden_state` or `out`, else its first tensor."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state", "out"):
        inner = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(inner, Tensor):
            return inner
    tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors and isinstance(output, Sequence):
        tensors = [leaf for leaf in output if isinstance(leaf, Tensor)]
    if not tensors:
        raise SkipwayError(
            f"the model's output, a {type(output).__name__}, holds no tensor; give loss=(output, targets) → a scalar"
        )
    return tensors[0]


def default_loss(output: Tensor, targets: Any) -> Tensor:
    """Cross-entropy over the classes on axis 1, or the mean squared error for real targets in the output's shape.

    Real targets (N, C) whose rows are distributions, as label smoothing and mixup make them, are class probabilities.
    Without targets: labels drawn at random, or standard normal noise for an output that is no row of classes.
    """
    if targets is None and output.ndim == 2 and output.shape[1] > 1:
        targets = torch.randint(output.shape[1], (output.shape[0],), device=output.device)
    if targets is None:
        return F.mse_loss(output.float(), torch.randn_like(output, dtype=torch.float32))
    if not isinstance(targets, Tensor):
        raise SkipwayError(
            f"targets={type(targets).__name__}: the rule is a tensor where no loss is given; "
            "give loss=(output, targets) → a scalar"
        )
    if targets.is_floating_point() and targets.shape == output.shape and not are_distributions(targets):
        return F.mse_loss(output.float(), targets.float())
    classes = output.shape[1] if output.ndim > 1 else 1
    if not targets.is_floating_point() and targets.numel() and int(targets.max()) >= classes:
        raise SkipwayError(
            f"targets: the largest label is {int(targets.max())}, and the output has {classes} classes on axis 1; "
            "the rule is label < classes: build the model with more classes, or give a loss"
        )
    return F.cross_entropy(output.float(), targets)


def are_distributions(targets: Tensor) -> bool:
    """True if targets (N, C), C > 1, are non-negative and every row adds up to 1."""
    if targets.ndim != 2 or targets.shape[1] < 2 or targets.is_meta:
        return False
    return bool((targets >= 0).all()) and bool(((targets.double().sum(1) - 1).abs() < 1e-2).all())
