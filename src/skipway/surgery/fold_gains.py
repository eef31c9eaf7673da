"""`fold_gains(model, example)`: what operations put around maps, multiplied into their weights again, for inference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.nn import Multiply
from skipway.surgery.fusion import IDLE, MAPS, NORMS, Affine, absorb, affine_of, parts
from skipway.surgery.insertion import ENTRY, SLOT, STANDARD, is_dressed, is_plain, put, remove
from skipway.surgery.insertion_point import Place, place_behind
from skipway.surgery.operation import Operation
from skipway.surgery.preconditions import admitted
from skipway.surgery.verification import difference, outputs
from skipway.tracing import Example, watch
from skipway.tracing.chain import chain_from_program

__all__ = ["fold_gains"]


def fold_gains(model: nn.Module, example: Example, *, tolerance: float = 1e-5) -> Operation:
    """Multiply the gains, constants and standardisations that operations put on somebody's network into the weights in
    front of them, in place: W ← g W, b ← g b. For inference; `remove_norm(…, how="fold")` does it with BatchNorms.

    Each is checked by itself on the example, and stays where the output would change.

    Args:
        model: a network that `rescheme` or `remove_norm` has dressed; it is put into evaluation mode for checking only.
        example: what it is called with.
        tolerance: by how much the output may differ, relative to its largest value.

    Returns:
        the operation: for each slot where its effect is now, or why it stayed; after all are gone the keys of the state
        dict are those of the network before it was dressed (beside a bias that a shift needed).

    Raises:
        SkipwayError: nothing was put on the network.

    >>> from skipway.surgery import rescheme
    >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True).eval()
    >>> keys, x = list(layer.state_dict()), torch.randn(2, 5, 16)
    >>> _ = rescheme(layer, "layerscale", x)
    >>> fold_gains(layer, x).touched
    {'dropout1.residual_scale': 'self_attn.out_proj', 'dropout2.residual_scale': 'linear2'}
    >>> list(layer.state_dict()) == keys
    True
    """
    model = admitted(model)
    dressed = [name for name, module in model.named_modules() if is_dressed(module)]
    if not dressed:
        raise SkipwayError(f"nothing was put on this {type(model).__name__}, so there is nothing to fold; see rescheme")
    hosts = hosts_of(model, example)
    operation = Operation(model, f"gains of {type(model).__name__} folded", {}, {}, {})
    before = outputs(model, example)
    touched: dict[str, str] = {}
    refused: dict[str, str] = {}
    for slot in (STANDARD, ENTRY, SLOT):
        for name in dressed:
            target = model.get_submodule(name)
            inserted = target._modules.get(slot)
            if inserted is None:
                continue
            own = name if slot != SLOT or is_plain(target, (*MAPS, *NORMS)) else hosts.get(name)
            key, steps = f"{name}.{slot}", list[Callable[[], None]]()
            reason = "no map or norm in front of it" if own is None else None
            if own is not None:
                reason = absorbed(model.get_submodule(own), inserted, slot, steps)
            if reason is None:
                remove(target, slot)
                steps.append(partial(put_again, target, slot, inserted))
                gap = difference(before, outputs(model, example))
                reason = None if gap <= tolerance else f"with it in {own} the output changes by {gap:.3g}"
            if reason is None:
                touched[key] = str(own)
                operation.steps += steps
            else:
                refused[key] = reason
                while steps:
                    steps.pop()()
    operation.touched, operation.refused = touched, refused
    operation.report = {"difference": difference(before, outputs(model, example))}
    return operation


def put_again(target: nn.Module, slot: str, inserted: nn.Module) -> None:
    """Put into a slot what was in it."""
    put(target, slot, inserted)


def hosts_of(model: nn.Module, example: Example) -> dict[str, str]:
    """For a module behind which a branch is multiplied, the norm or map that makes what passes it."""
    program = watch(model, example)
    found = {}
    for connection in chain_from_program(model, program):
        place = place_behind(model, program, connection)
        host = connection.seen.closing or connection.seen.last
        if isinstance(place, Place) and host is not None:
            # the longest name among what a standardised weight is made of is in the slot
            found[place.name] = host.removesuffix(f".{STANDARD}")
    return found


@torch.no_grad()
def absorbed(host: nn.Module, inserted: nn.Module, slot: str, steps: list[Callable[[], None]]) -> str | None:
    """Let a map or norm do what stands around it; notes what takes it back, and returns why it could not."""
    if isinstance(host, nn.MultiheadAttention):
        host = host.out_proj
    weight, bias = host.weight, host.bias
    if not is_plain(host, (*MAPS, *NORMS)) or not isinstance(weight, Tensor):
        return f"a {type(host).__name__} has no weight that could take it"
    made = [part for part in parts(inserted) if not isinstance(part, IDLE)]
    effects: list[Affine] = [affine for part in made if slot != STANDARD and (affine := affine_of(part)) is not None]
    if slot == ENTRY and not all(isinstance(part, Multiply) for part in made):
        return "a shift in front of a map is none behind it where the map pads"
    if slot != STANDARD and len(effects) != len(made):
        return "it is more than factors and shifts"
    if any(effect.scale.ndim and effect.scale.shape != weight.shape[:1] for effect in effects):
        return "it has another number of channels"
    old = weight.detach().clone()

    @torch.no_grad()
    def put_back() -> None:
        weight.copy_(old)
        host.bias = bias  # type: ignore[assignment]

    steps.append(put_back)
    if slot == STANDARD:
        weight.copy_(inserted(weight))
    elif slot == ENTRY:
        for effect in effects:
            weight.mul_(float(effect.scale))
    else:
        for effect in effects:
            absorb(host, effect)
    return None
