"""How much an optimizer's step changes the weights, and the size of the gradients that it is given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.probes.signals import to_floats
from skipway.tracing.chain import WatchedConnection

__all__ = ["WeightSample", "gradient_norms", "local", "parameters_by_connection"]

ELEMENTS = 1 << 16
"""Numbers of one parameter that are compared."""


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; another tensor itself."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def parameters_by_connection(
    model: nn.Module, connections: Iterable[WatchedConnection], modules: Iterable[str] = ()
) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of each connection's branch, its scale included, or of each listed module."""
    by_name = dict(model.named_parameters())
    found: dict[str, list[nn.Parameter]] = {}
    for connection in connections:
        seen = connection.seen
        own = [p for name in seen.modules for p in submodule_parameters(model, name)]
        own += [by_name[name] for name in (seen.scale.parameters if seen.scale else ()) if name in by_name]
        found[connection.name] = own
    for name in modules:
        found[name] = list(model.get_submodule(name).parameters())
    return {
        name: [each for each in {id(p): p for p in own}.values() if each.requires_grad] for name, own in found.items()
    }


def submodule_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that a module holds itself; none where there is no such module."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return []
    return list(module.parameters(recurse=isinstance(module, nn.MultiheadAttention)))


class WeightSample:
    """Some numbers of every weight before a step, evenly spaced, for |Δw| / |w| after it.

    At most 65,536 numbers of a parameter are compared: the ratio is exact for smaller ones, an estimate for larger
    ones, and costs a copy of those numbers and not of the weights. Of sharded weights it is that of this process.

    >>> weight = nn.Parameter(torch.full((4,), 2.0))
    >>> sample = WeightSample({"block": [weight]})
    >>> _ = weight.data.add_(0.02)
    >>> round(sample.relative_updates()["block"], 6)
    0.01
    """

    def __init__(self, parameters: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self.parameters = parameters
        self.before = {name: [spaced(each).clone() for each in own] for name, own in parameters.items()}

    def relative_updates(self) -> dict[str, float]:
        """|Δw| / |w| of each connection; NaN where all weights are 0 or there are none."""
        parts: list[Tensor] = []
        for name, own in self.parameters.items():
            change = size = torch.zeros(())
            for parameter, before in zip(own, self.before[name], strict=True):
                now, share = spaced(parameter), real_numbers(parameter).numel() / max(1, before.numel())
                change = change.to(now.device) + share * (now.float() - before.float()).square().sum()
                size = size.to(now.device) + share * before.float().square().sum()
            parts += [change, size]
        values = iter(to_floats(parts))
        return {
            name: math.sqrt(change / size) if size > 0 else math.nan
            for name, change, size in zip(self.parameters, values, values, strict=True)
        }


def real_numbers(parameter: Tensor) -> Tensor:
    """The numbers of a tensor in a row; of complex ones both parts."""
    held = local(parameter.detach())
    return (torch.view_as_real(held.resolve_conj()) if held.is_complex() else held).reshape(-1)


def spaced(parameter: Tensor) -> Tensor:
    """At most `ELEMENTS` numbers of a tensor, evenly spaced."""
    flat = real_numbers(parameter)
    return flat[:: max(1, math.ceil(flat.numel() / ELEMENTS))]


def gradient_norms(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """The norms of the parameters' gradients as one tensor, left on the device; 0 where there is none.

    None where no parameter has a gradient. Of sharded gradients these are the norms of this process's parts.

    Raises:
        SkipwayError: gradients on the meta device.
    """
    places = [number for number, each in enumerate(parameters) if each.grad is not None]
    if not places:
        return None
    grads = [local(parameters[place].grad).detach() for place in places]  # type: ignore[arg-type]
    if any(each.is_meta for each in grads):
        raise SkipwayError("the gradients are on the meta device and have no values")
    grads = [each.coalesce().values() if each.is_sparse else each for each in grads]
    norms = torch._foreach_norm(grads)
    device = norms[0].device
    stacked = torch.stack([each.to(device, torch.float32) for each in norms])
    if len(places) == len(parameters):
        return stacked
    every = torch.zeros(len(parameters), device=device)
    every[places] = stacked
    return every
