"""Whether a decoder that goes on from a cache computes what it computes from all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.nn import decoding
from skipway.surgery.checks import Check, ComparisonRule, NotComparedError
from skipway.surgery.verification import difference
from skipway.tracing import Example, as_example, preserved_state
from skipway.tracing.containers import tensors_in
from skipway.tracing.example import copy_example

__all__ = ["decoding_checks"]

CLOSE = 1e-4
"""Difference of logits with and without a cache, relative to the largest, that is rounding."""

STACKS = (
    "; a network of two stacks may make the cache of one for as many blocks as the other has: change both by as many"
)


def decoding_checks(model: nn.Module) -> tuple[Check, ...]:
    """The check of decoding, for a network that decodes: one with `generate`, or with causal attention of ours."""
    generates = callable(getattr(model, "generate", None)) and getattr(model, "can_generate", lambda: True)()
    return (Decoding(),) if generates or decodes(model) else ()


def decodes(model: nn.Module) -> bool:
    """Whether a network decodes with a cache of ours."""
    return any(hasattr(module, "decoding_state") for module in model.modules())


class Decoding(Check):
    """A step that goes on from a cache computes what a pass over all tokens computes."""

    name = "decoding with a cache"
    awake = True

    def measure(self, model: nn.Module, example: Example, before: Any = None) -> float:
        given = copy_example(as_example(example))
        with preserved_state(model), torch.no_grad():
            model.eval()
            try:
                pair = step_of_ours(model, given) if decodes(model) else generated(model, given)
            except Exception as problem:  # whatever a network raises that does not decode from this example
                text = " ".join(str(problem).split())
                hint = "" if before is None else STACKS
                raise NotComparedError(f"it does not run ({type(problem).__name__}: {text[:200]}{hint})") from problem
        return difference([pair[0]], [pair[1]])

    def compare(self, before: float, after: float, how: ComparisonRule) -> str:
        if not before <= CLOSE:
            return f"differed before from a pass over all tokens, by {before:.3g} of the largest logit"
        if not after <= 10 * CLOSE:
            raise SkipwayError(
                f"with a cache the next tokens differ from those without by {after:.3g} of the largest logit"
            )
        return f"a step from a cache equals a pass over all tokens (difference {after:.3g})"


def generated(model: Any, given: Any) -> tuple[Tensor, Tensor]:
    """Logits of two new tokens without and with a cache, by the network's own `generate`; of the second one only where
    the first is the same.
    """
    arguments = dict(given) if isinstance(given, Mapping) else {}
    for name in ("decoder_input_ids", "labels", "use_cache"):
        arguments.pop(name, None)
    if "input_ids" in arguments and "attention_mask" in signature(model.forward).parameters:
        arguments.setdefault("attention_mask", torch.ones_like(arguments["input_ids"]))  # as by default, which warns
    first = () if isinstance(given, Mapping) else (next(tensors_in(given)),)
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "num_beams": 1}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    whole, cached = (model.generate(*first, **arguments, **options, use_cache=use) for use in (False, True))
    count = 2 if torch.equal(whole.logits[0].argmax(-1), cached.logits[0].argmax(-1)) else 1
    return torch.stack(whole.logits[:count]), torch.stack(cached.logits[:count])


def step_of_ours(model: nn.Module, given: Any) -> tuple[Tensor, Tensor]:
    """Logits at the last token in a pass over all tokens, and from a cache of the others."""
    ids = next(tensors_in(given))
    whole = model(ids)[:, -1]
    with decoding(model, ids.shape[1]) as state:
        model(ids[:, :-1])
        state.advance(ids.shape[1] - 1)
        return whole, model(ids[:, -1:])[:, -1]
