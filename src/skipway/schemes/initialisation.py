"""Idempotent initialisation: a full reset by role, then the scheme's whole-network step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from skipway.errors import SkipwayError
from skipway.nn.computed_weights import computed_names, computed_weight, set_weight, temporary_weights
from skipway.schemes.scheme import Scheme
from skipway.schemes.scheme import parse_scheme as read_scheme
from skipway.tracing import preserved_state
from skipway.tracing.chain import chain
from skipway.tracing.module_state import copy_module

__all__ = ["initialise_"]


def initialise_(
    model: nn.Module, scheme: str | Scheme | None = None, *, device: torch.device | str | None = None
) -> nn.Module:
    """Put every parameter and buffer of `model` into its starting state, in place, and return the model.

    Every module is reset by its own `reset_parameters`, then the scheme takes its whole-network step. Twice is the same
    as once (from the same random state), and a model built on the meta device comes to life here. Weights that are
    computed from others, as under weight norm, get the values that the module draws for plain ones.

    Args:
        model: any network with `skipway.nn.Residual` connections.
        scheme: what the connections are dressed in; by default what they were built with.
        device: where a model on the meta device goes; by default torch's default device.

    Raises:
        SkipwayError: a module holds parameters but no `reset_parameters`, or the connections were built with
            different schemes and none was given; or a weight is computed from others which do not give it the values
            that are drawn, as under spectral norm or pruning.

    >>> import skipway as sw
    >>> with torch.device("meta"):
    ...     block = sw.BasicBlock(16, 16, scheme="fixup")
    >>> bool(initialise_(block).branch.conv2.weight.any())
    False
    """
    connections = chain(model)
    dressing = read_scheme(scheme) if scheme is not None else common_scheme([c.residual.scheme for c in connections])
    modules = list(model.named_modules())
    held = (tensor for _, each in modules for tensor in (*each._parameters.values(), *each._buffers.values()))
    if any(tensor is not None and tensor.is_meta for tensor in held):
        target = torch.device(torch.get_default_device() if device is None else device)
        model._apply(lambda tensor: empty_on(tensor, target))
    with torch.no_grad():
        for name, module in modules:
            if computed_names(module):  # tried on a copy, so that the model is as before where it is refused
                with preserved_state(module):
                    reset(name, copy_module(module))
        for name, module in modules:
            reset(name, module)
        dressing.init_(connections)
    return model


def empty_on(tensor: Tensor, device: torch.device) -> Tensor:
    """Memory for a tensor; `torch.empty_like` of one on the meta device, as `to_empty` has it, imports SymPy."""
    if type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return torch.empty_like(tensor, device=device)


def reset(name: str, module: nn.Module) -> None:
    """Reset what the module itself owns, and what its weights are computed from, where some are."""
    if isinstance(module, ParametrizationList):  # it was reset with the weight that is computed from it
        return
    restart, computed = getattr(module, "reset_parameters", None), computed_names(module)
    if callable(restart) and not computed:
        restart()
    elif callable(restart):
        with temporary_weights(module) as drawn:
            restart()
        for weight, values in drawn.items():
            if values.is_meta or values.isnan().all():  # it fills what the weight is computed from itself, if anything
                continue
            if values.isnan().any() or not set_weight(module, weight, values):
                raise computed_weight(f"the {weight} of {name or 'the model'}")
    elif computed or any(parameter is not None for parameter in module._parameters.values()):
        raise SkipwayError(
            f"{name or 'the model'} ({type(module).__name__}) holds parameters but has no reset_parameters(), so its "
            "starting state is unknown; define it"
        )


def common_scheme(schemes: list[object]) -> Scheme:
    """The one scheme that all connections were built with."""
    distinct = {str(scheme): scheme for scheme in schemes}
    if len(distinct) != 1:
        raise SkipwayError(
            f"the connections were built with {', '.join(distinct)}; name one: initialise_(model, scheme)"
        )
    (only,) = distinct.values()
    if not isinstance(only, Scheme):
        raise SkipwayError("the connections know of no scheme; name one: initialise_(model, scheme='identity')")
    return only
