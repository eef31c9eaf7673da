"""`fold_gains(model, example)`: modules that operations inserted around maps, multiplied into the weights again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.nn import Multiply, ResidualWarmup
from skipway.surgery.fusion import (
    MAPS,
    NORMS,
    Affine,
    absorb,
    affine_of,
    describe_running,
    has_own_weights,
    is_idle,
    parts,
)
from skipway.surgery.insertion import BRANCH, INPUT, OUTPUT, WEIGHT, computes_like, has_slots, remove
from skipway.surgery.insertion_point import find_insertion_points
from skipway.surgery.operation import Operation
from skipway.surgery.preconditions import require_operable
from skipway.surgery.transaction import Transaction, transaction
from skipway.tracing import Example, as_example, watch
from skipway.tracing.chain import chain_from_program
from skipway.validation import check_call, check_tolerance

__all__ = ["fold_gains"]


@check_call
def fold_gains(model: nn.Module, example: Example, *, tolerance: float = 1e-5) -> Operation:
    """Multiply the gains, constants and standardisations that operations inserted into somebody's network into the
    preceding weights, for inference, in place: W ← g W, b ← g b. (`remove_norm(…, how="fold")` does it with
    BatchNorms.)

    Each is checked by itself on the example, and stays if the output would change.

    Args:
        model: a network after `rescheme` or `remove_norm`.
        example: what it is called with.
        tolerance: bound on the difference of the outputs, relative to their largest value.

    Returns:
        the operation: for each slot where its effect went, or why it stayed; after all are gone the keys of the state
        dict are those of the network before (apart from a bias that a shift needed).

    Raises:
        SkipwayError: nothing was inserted into the network.

    >>> from skipway.surgery import rescheme
    >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True).eval()
    >>> keys, x = list(layer.state_dict()), torch.randn(2, 5, 16)
    >>> _ = rescheme(layer, x, "layerscale")
    >>> dict(fold_gains(layer, x).touched)
    {'dropout1.residual_scale': 'self_attn.out_proj', 'dropout2.residual_scale': 'linear2'}
    >>> list(layer.state_dict()) == keys
    True
    """
    wrapped, model, example = model, require_operable(model), as_example(example)
    check_tolerance("tolerance", tolerance)
    names = [name for name, module in model.named_modules() if has_slots(module)]
    if not names:
        raise SkipwayError(
            f"nothing was inserted into {type(model).__name__}, so there is nothing to fold; see rescheme"
        )
    closing = closing_modules(model, example)
    title = f"gains of {type(model).__name__} folded"
    with transaction(model, example, title=title, tolerance=len(names) * tolerance, wrapped=wrapped) as change:
        for slot in (WEIGHT, INPUT, OUTPUT, BRANCH):
            for name in names:
                host = model.get_submodule(name)
                if slot not in host._modules:
                    continue
                itself = slot in (WEIGHT, INPUT) or (slot == OUTPUT and computes_like(host, (*MAPS, *NORMS)))
                into = name if itself else closing.get(name) if slot == OUTPUT else None
                try:
                    with change.savepoint():
                        fold_slot(change, host, slot, into, tolerance)
                    change.touched[f"{name}.{slot}"] = str(into)
                except SkipwayError as problem:
                    change.refused[f"{name}.{slot}"] = str(problem)
        return change.commit()


def closing_modules(model: nn.Module, example: Example) -> dict[str, str]:
    """The norm or map that closes a branch, by the module after which the branch is multiplied."""
    program = watch(model, example)
    closing: dict[str, str] = {}
    for connection in chain_from_program(model, program):
        try:
            points = find_insertion_points(model, program, connection)
        except SkipwayError:
            continue
        if len(points) == len(connection.seen.ends) and all(point.call is None for point in points):
            for point, end in zip(points, connection.seen.ends, strict=True):
                closing[point.name] = end.removesuffix(f".{WEIGHT}")  # a standardised weight is made in the slot
    return closing


def fold_slot(change: Transaction, host: nn.Module, slot: str, into: str | None, tolerance: float) -> None:
    """Empty a slot and let a map or norm do the same, in place.

    Raises:
        SkipwayError: the module in the slot cannot be folded, or the output would change.
    """
    if into is None:
        raise SkipwayError("no map or norm before it")
    fold_into_weight(change, change.model.get_submodule(into), host._modules[slot], slot)
    remove(change, host, slot)
    gap = change.compare()
    if not gap <= tolerance:
        raise SkipwayError(f"folded into {into} the output changes by {gap:.3g}")


@torch.no_grad()
def fold_into_weight(change: Transaction, host: nn.Module, inserted: nn.Module | None, slot: str) -> None:
    """Let a map or norm do what an inserted module does, in place.

    Raises:
        SkipwayError: it cannot; says why.
    """
    assert inserted is not None
    if isinstance(host, nn.MultiheadAttention):
        host = host.out_proj
    weight = host.weight
    if not computes_like(host, (*MAPS, *NORMS)) or not isinstance(weight, Tensor):
        raise SkipwayError(f"no weight of {type(host).__name__} could take it")
    if not has_own_weights(host):
        raise SkipwayError(f"weight or bias of {type(host).__name__} is computed from other parameters in every pass")
    effects = [] if slot == WEIGHT else channel_effects(inserted, slot)
    if any(effect.scale.ndim and effect.scale.shape != weight.shape[:1] for effect in effects):
        raise SkipwayError("it has another number of channels")
    bias: Any = host.bias
    change.keep_values([weight] if bias is None else [weight, bias])
    change.set_parameter(host, "bias", bias)
    if bias is not None:
        change.record(partial(bias.requires_grad_, bias.requires_grad))
    if slot == WEIGHT:
        weight.copy_(inserted(weight))
    for effect in effects:
        if slot == INPUT:
            weight.mul_(float(effect.scale))
        else:
            absorb(host, effect)


def channel_effects(inserted: nn.Module, slot: str) -> list[Affine]:
    """Factors and shifts that an inserted module applies to channels."""
    modules = [part for part in parts(inserted) if not is_idle(part)]
    if slot == INPUT and not all(isinstance(part, Multiply) for part in modules):
        raise SkipwayError("a shift before a map is none after it where the map pads")
    for warmup in (part for part in modules if isinstance(part, ResidualWarmup) and affine_of(part) is None):
        raise SkipwayError(
            describe_running(warmup) if warmup.running else "it has hooks, or another forward than its class"
        )
    if any(isinstance(part, Multiply) and part.branch_factors is not None for part in modules):
        raise SkipwayError("the rates that it gives the parameters of its branch would go with it")
    effects = [effect for part in modules if (effect := affine_of(part)) is not None]
    if len(effects) != len(modules):
        raise SkipwayError("it is more than factors and shifts")
    return effects
