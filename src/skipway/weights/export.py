"""`export_names`: a state dict under the names of another library."""

from __future__ import annotations

from torch import Tensor, nn

from skipway.errors import CheckpointError
from skipway.nn import ResidualWarmup
from skipway.tracing import unwrap
from skipway.weights.extra_state import extra_state_owners
from skipway.weights.prefixes import names_of_same, own_name, own_state
from skipway.weights.tables import find_keymap

__all__ = ["export_names"]


def export_names(model: nn.Module, names: str) -> dict[str, Tensor]:
    """The model's state dict under another library's names (axes of length 1 as they are here).

    Raises:
        CheckpointError: a parameter that the other library has no name for (a scheme's gain, for example), two that it
            has one name for, or something without parameters that it does not compute.
    """
    model = unwrap(model)
    keymap = find_keymap(model, names)
    warmups = (name for name, module in model.named_modules() if isinstance(module, ResidualWarmup))
    ended = set(map(own_name, warmups))  # others are refused
    own, out, origin = own_state(model), dict[str, Tensor](), dict[str, str]()
    same = names_of_same(own, extra_state_owners(model))
    for ours, tensor in own.items():
        if names != "skipway" and ours.rpartition(".")[0] in ended:
            continue
        found = keymap.find(ours)
        if found is None:
            raise CheckpointError(f"{names} has no name for {ours!r}, so this model cannot be exported to it")
        row, theirs = found
        for name in theirs:
            other = origin.setdefault(name, ours)
            if other not in same[ours]:
                raise CheckpointError(
                    f"{names} has one name, {name!r}, for {other!r} and {ours!r}, so this model would compute "
                    "something else there; export to names='skipway'"
                )
        out.update(zip(theirs, row.divide(tensor, model), strict=True))
    return out | {copy: out[first] for copy, first in keymap.copies.items() if first in out}
