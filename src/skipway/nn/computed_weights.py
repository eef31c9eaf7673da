"""Weights that are computed in every pass from other parameters: by weight norm and other parametrizations, by hooks.

Writing into such a weight itself would be without effect, since it is a temporary tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm

from skipway.errors import SkipwayError

__all__ = ["computed_names", "computed_weight", "multiply_tensor", "set_weight", "stored_weight", "temporary_weights"]


def stored_weight(module: nn.Module, name: str) -> Tensor | None:
    """A weight or bias that a module holds itself: a parameter, or a buffer of real numbers, as a frozen norm has it;
    None where there is none, or where it is computed from others.
    """
    parameter, buffer = module._parameters.get(name), module._buffers.get(name)
    return buffer if parameter is None and buffer is not None and buffer.is_floating_point() else parameter


@torch.no_grad()
def multiply_tensor(module: nn.Module, name: str, factor: float, rows: slice | None = None) -> bool:
    """Multiply a weight or bias, or some rows of it, in place, also one that weight norm or another parametrization
    computes in every pass; False if what it is computed from does not multiply it. A bias that is absent is multiplied.
    """
    value = getattr(module, name, None)
    if not isinstance(value, Tensor):
        return True
    stored = isinstance(value, nn.Parameter) or value is stored_weight(module, name)
    parts = None if stored else weight_norm_parts(module, name)
    source = value if stored else None if parts is None else parts[0]
    if source is not None and (rows is None or source.shape[:1] == value.shape[:1]):
        (source if rows is None else source[rows]).mul_(factor)
        if name in vars(module):  # where the hook leaves the weight
            setattr(module, name, multiplied(value, factor, rows))
        return True
    return parametrize.is_parametrized(module, name) and set_weight(module, name, multiplied(value, factor, rows))


@torch.no_grad()
def set_weight(module: nn.Module, name: str, values: Tensor) -> bool:
    """Write a weight or bias in place: into the parameter or buffer, or into those that weight norm or another
    parametrization computes it from in every pass; False if these do not give such values, which leaves them as they
    were.
    """
    stored = stored_weight(module, name)
    if stored is not None:
        stored.copy_(values)
    elif (parts := weight_norm_parts(module, name)) is not None:
        gain, direction = parts
        axes = [axis for axis in range(direction.ndim) if gain.ndim == 0 or gain.shape[axis] == 1]
        gain.copy_(torch.linalg.vector_norm(values, dim=axes, keepdim=gain.ndim > 0))
        direction.copy_(torch.where(gain > 0, values, direction))  # a row of zeros keeps the direction that it has
        if name in vars(module):  # where the hook leaves the weight
            setattr(module, name, values.detach().to(direction, copy=True))
    elif parametrize.is_parametrized(module, name):
        return set_parametrized(module, name, values)
    else:
        return False
    return True


def weight_norm_parts(module: nn.Module, name: str) -> tuple[Tensor, Tensor] | None:
    """g and v of a weight W = g v / ‖v‖, by a hook or by a parametrization; None of others."""
    if parametrize.is_parametrized(module, name):
        sources: Any = module.get_submodule(f"parametrizations.{name}")
        return (sources.original0, sources.original1) if [*map(type, sources)] == [_WeightNorm] else None
    gain, direction = (module._parameters.get(f"{name}_{part}") for part in "gv")
    return None if gain is None or direction is None else (gain, direction)


def multiplied(value: Tensor, factor: float, rows: slice | None) -> Tensor:
    """A copy, of which some rows are multiplied, or all."""
    result = value.detach().clone()
    (result if rows is None else result[rows]).mul_(factor)
    return result


def set_parametrized(module: nn.Module, name: str, values: Tensor) -> bool:
    """Write a weight by the inverses of its parametrizations, which may put other tensors in the place of those that
    they hold; False if the weight is not what was written then, which leaves all as it was.
    """
    owners = list(module.get_submodule(f"parametrizations.{name}").modules())
    tables: list[dict[str, Any]] = [table for each in owners for table in (each._parameters, each._buffers)]
    entries = [dict(table) for table in tables]
    held = [(each, each.clone()) for table in entries for each in table.values() if each is not None]
    written = False
    try:
        before = getattr(module, name)
        wanted = values.to(before)
        setattr(module, name, wanted)
        written = is_written(before, wanted, getattr(module, name))
    except (NotImplementedError, RuntimeError, ValueError):  # it has no inverse, or the values are out of its range
        pass
    finally:
        if not written:
            for table, old in zip(tables, entries, strict=True):
                table.clear()
                table.update(old)
            for each, old_values in held:
                each.copy_(old_values)
    return written


def is_written(before: Tensor, wanted: Tensor, now: Tensor) -> bool:
    """Whether a weight is what it should be: by roundings, and much nearer to it than it was before."""
    gap, change, largest = (float(each.abs().max()) for each in (now - wanted, wanted - before, wanted))
    rounding = torch.finfo(wanted.dtype).eps
    if not gap <= max(1e-3, 4 * rounding) * largest:
        return False
    return change <= rounding * largest or gap <= max(change / 4, rounding * largest)


def computed_names(module: nn.Module) -> list[str]:
    """The names of the weights of a module that parametrizations, weight norm, spectral norm or pruning compute."""
    sources = (name.removesuffix("_g").removesuffix("_orig") for name in module._parameters)
    hooked = [name for name in dict.fromkeys(sources) if isinstance(vars(module).get(name), Tensor)]
    return [*parametrized_names(module), *hooked]


def parametrized_names(module: nn.Module) -> list[str]:
    """The names of the weights of a module that torch's parametrizations compute."""
    if "parametrizations" not in module._modules:  # so it is of nearly all, and torch looks longer
        return []
    return list(module.get_submodule("parametrizations")._modules) if parametrize.is_parametrized(module) else []


@contextmanager
def temporary_weights(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Context in which the weights of a module that are computed are plain parameters, which its `reset_parameters`
    fills, by name or as those of torch's recurrent layers does, whatever is in `parameters()`; gives them by name, NaN
    where they were not filled.
    """
    kind: Any = type(module)
    weights: dict[str, Tensor] = {name: getattr(module, name) for name in computed_names(module)}
    held = (*module.parameters(), *module.buffers()) if weights else ()  # on whose device what a hook left need not be
    drawn = {name: torch.full_like(weight, torch.nan, device=held[0].device) for name, weight in weights.items()}
    names = parametrized_names(module)
    left = {name: vars(module).pop(name) for name in drawn if name in vars(module)}  # by a hook
    try:
        # the subclass that torch made computes them in properties
        module.__class__ = next(each for each in kind.__mro__ if not any(hasattr(each, name) for name in names))
        module._parameters.update({name: nn.Parameter(values, False) for name, values in drawn.items()})
        yield drawn
        drawn.update({name: module.get_parameter(name).detach() for name in drawn})  # the reset may have exchanged it
    finally:
        for name in drawn:
            module._parameters.pop(name, None)
        module.__class__ = kind
        vars(module).update(left)


def computed_weight(what: str) -> SkipwayError:
    """The error for a weight that `set_weight` cannot write."""
    return SkipwayError(
        f"{what} is computed in every pass from other parameters, which do not give it other values; take the "
        "parametrization away first (torch.nn.utils.parametrize.remove_parametrizations, "
        "torch.nn.utils.remove_spectral_norm, torch.nn.utils.prune.remove)"
    )
