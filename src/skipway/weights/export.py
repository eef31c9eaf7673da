"""`export_names`: a state dict under the names of another library."""

from __future__ import annotations

from torch import Tensor, nn

from skipway.errors import CheckpointError
from skipway.nn import Cut, Gain, Multiply, ResidualWarmup, ScaledActivation, ScaledShortcut
from skipway.tracing import unwrap
from skipway.weights.prefixes import own_name, own_state
from skipway.weights.tables import find_keymap

__all__ = ["export_names"]


def export_names(model: nn.Module, names: str) -> dict[str, Tensor]:
    """The model's state dict under another library's names (axes of length 1 as they are here).

    Raises:
        CheckpointError: a parameter that the other library has no name for (a scheme's gain, for example).
    """
    model = unwrap(model)
    keymap = find_keymap(model, names)
    if names != "skipway":
        refuse_constants(model, names)
    warmups = (name for name, module in model.named_modules() if isinstance(module, ResidualWarmup))
    ended = set(map(own_name, warmups))  # others are refused
    out: dict[str, Tensor] = {}
    for ours, tensor in own_state(model).items():
        if names != "skipway" and ours.rpartition(".")[0] in ended:
            continue
        found = keymap.find(ours)
        if found is None:
            raise CheckpointError(f"{names} has no name for {ours!r}, so this model cannot be exported to it")
        row, theirs = found
        out.update(zip(theirs, row.divide(tensor, model), strict=True))
    return out | {copy: out[first] for copy, first in keymap.copies.items() if first in out}


def refuse_constants(model: nn.Module, names: str) -> None:
    """Raise where the model computes with something that no state dict carries, and that the other library lacks."""
    for name, module in model.named_modules():
        constant = isinstance(module, Multiply | ScaledShortcut | ScaledActivation | Cut)
        constant |= isinstance(module, ResidualWarmup) and module.running
        if constant or (isinstance(module, Gain) and (module.factor != 1.0 or module.gain.ndim == 0)):
            raise CheckpointError(
                f"{names} has nothing like {name!r} ({module}), so this model would compute something else there; "
                "export to names='skipway'"
            )
