"""A batch with padding, made of an example that has none: what blocks are given then, an operation has to know, too."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from skipway.surgery.block_call import parameter_names
from skipway.surgery.class_factory import own_class
from skipway.tracing import Example, as_example, call_model, preserved_state
from skipway.tracing.example import copy_example

__all__ = ["padded_example"]

MASK = "attention_mask"
"""What transformers' networks call the argument that is 0 where tokens are padding."""


def padded_example(model: nn.Module, example: Example) -> dict[str, Any] | None:
    """The example with a padding mask that hides the last quarter of its first row; the model is left alone. None where
    the example has a mask, or the network takes none.

    >>> layer = nn.Linear(2, 2)
    >>> padded_example(layer, torch.zeros(1, 2)) is None
    True
    """
    given = as_example(example)
    if isinstance(given, Mapping):
        named = dict(given)
    else:
        values = given if isinstance(given, tuple) else (given,)
        named = dict(zip(parameter_names(model), values, strict=False))
    try:
        taken = inspect.signature(own_class(model).forward).parameters
    except (TypeError, ValueError):
        return None
    first = next((value for value in named.values() if isinstance(value, Tensor)), None)
    if MASK not in taken or named.get(MASK) is not None or first is None or first.ndim < 2:
        return None
    mask = torch.ones(first.shape[:2], dtype=torch.long, device=first.device)
    mask[:1, mask.shape[1] - mask.shape[1] // 4 :] = 0
    padded = {**named, MASK: mask}
    try:
        with preserved_state(model), torch.no_grad():
            call_model(model.eval(), copy_example(padded))
    except Exception:  # whatever a network raises that takes no mask of this shape
        return None
    return padded
