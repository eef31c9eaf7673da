"""Parameters that undoing an operation would write into, drop or put back, and whether they were trained since."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from skipway.hardware.precision import widest_type

__all__ = ["ParameterValues"]

Summary = tuple[str, ...]


@dataclass(frozen=True)
class ParameterValues:
    """What the parameters of a model were at the end of an operation, as far as undoing it concerns them.

    Args:
        own: those that the operation put in or wrote into, which undoing drops or writes into, by name.
        others: the others, if undoing puts parameters back that were not trained with them.
        put_back: names of these.
    """

    own: dict[str, Summary] = field(default_factory=dict)
    others: dict[str, Summary] = field(default_factory=dict)
    put_back: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, model: nn.Module, before: dict[str, nn.Parameter], written: Collection[nn.Parameter]
    ) -> ParameterValues:
        """The values now.

        Args:
            model: after the operation.
            before: its parameters before, by name.
            written: those that the operation wrote into.
        """
        now = named(model)
        old, new, overwritten = set(before.values()), set(now.values()), set(written)
        put_back = tuple(name for name, parameter in before.items() if parameter not in new)
        own = {name for name, parameter in now.items() if parameter not in old or parameter in overwritten}
        concerned = now if put_back else {name: now[name] for name in now if name in own}
        summaries = {name: summarise(parameter) for name, parameter in concerned.items()}
        others = {name: summary for name, summary in summaries.items() if name not in own}
        return cls({name: summaries[name] for name in now if name in own}, others, put_back)

    def changed_in(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """Names of the operation's own parameters that hold other values than at its end, and those of the others."""
        now = named(model)

        def changed(summaries: dict[str, Summary]) -> list[str]:
            return [name for name, old in summaries.items() if name not in now or summarise(now[name]) != old]

        return changed(self.own), changed(self.others)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, each once."""
    return dict(model.named_parameters())


@torch.no_grad()
def summarise(parameter: nn.Parameter) -> Summary:
    """Type, shape, sum and norm of a parameter: other values differ in them, save by a rare accident."""
    values = parameter.detach()
    form = (type(values).__name__, str(values.dtype), str(tuple(values.shape)))
    if type(values) is not Tensor or values.is_meta:
        return form
    values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    values = values.float() if values.element_size() == 1 else values
    values = values if widest_type(values.device) == torch.float64 else values.cpu()
    total, norm = values.sum(dtype=torch.float64), torch.linalg.vector_norm(values, dtype=torch.float64)
    return (*form, repr(float(total)), repr(float(norm)))
