"""`load`: strict, with a word about every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from skipway.errors import CheckpointError
from skipway.nn import Cut, Gain, Multiply, ScaledActivation, ScaledShortcut
from skipway.weights.files import read
from skipway.weights.keymap import KeyMap
from skipway.weights.tables import find, looks_like

__all__ = ["Report", "export_names", "load", "match"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Report:
    """What becomes of every key of both sides.

    Args:
        tensors: what fits: our key and the tensor for it, in our shape.
        matched: our keys that have the same name and shape in the file.
        renamed: our key → their names.
        reshaped: our key → both shapes, where only axes of length 1 differ.
        absent: ours that a file may lack (a BatchNorm's batch counter); they keep their value.
        missing: ours that the file lacks → the names it should have there.
        unexpected: theirs that nothing of ours takes.
        misshapen: ours → both shapes.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    matched: list[str] = field(default_factory=list)
    renamed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reshaped: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    misshapen: dict[str, str] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether every key of both sides has its partner."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        missing = [f"{' + '.join(theirs)} (for {ours})" for ours, theirs in self.missing.items()]
        head = f"{len(self.tensors)} keys fit ({len(self.renamed)} renamed, {len(self.reshaped)} reshaped)"
        lines = [head, *group("missing from the file", missing), *group("not known to the model", self.unexpected)]
        return "\n".join(
            lines + group("of another shape", [f"{ours}: {both}" for ours, both in self.misshapen.items()])
        )


def group(title: str, rows: list[str], most: int = 8) -> list[str]:
    """A titled part of the report, cut after `most` rows."""
    if not rows:
        return []
    more = [f"  … and {len(rows) - most} more"] if len(rows) > most else []
    return [f"{len(rows)} {title}:", *(f"  {row}" for row in rows[:most]), *more]


def load(model: M, source: str | Path | Mapping[str, Tensor], *, names: str = "skipway") -> M:
    """Load weights into `model`, strictly: all keys of both sides have to fit, else nothing is changed.

    Args:
        model: a network or a block.
        source: a `.safetensors` or `.pth` file, or a state dict.
        names: whose names the file uses: "skipway", or a library that has a key map for the model ("torchvision",
            "timm", "huggingface").

    Returns:
        the model.

    Raises:
        CheckpointError: a file that cannot be read safely, or keys that do not fit, each named.

    >>> import skipway as sw
    >>> block = sw.BasicBlock(8, 8)
    >>> twin = sw.load(sw.BasicBlock(8, 8), export_names(block, "torchvision"), names="torchvision")
    >>> bool((twin.branch.conv1.weight == block.branch.conv1.weight).all())
    True
    """
    state = dict(source) if isinstance(source, Mapping) else read(source)
    report = match(model, state, names=names)
    if not report.fits:
        hint = looks_like(state)
        known = f"\nIts keys look like {hint}." if hint else ""
        raise CheckpointError(f"the weights do not fit this {type(model).__name__} (names={names!r}):\n{report}{known}")
    own = model.state_dict()
    with torch.no_grad():
        for key, tensor in report.tensors.items():
            own[key].copy_(tensor)
    return model


def match(model: nn.Module, state: Mapping[str, Tensor], *, names: str = "skipway") -> Report:
    """How the keys of `state` fit the model; nothing is changed."""
    keymap = find(model, names)
    report = Report()
    taken: set[str] = set()
    for ours, tensor in model.state_dict().items():
        theirs, found = fetch(keymap, ours, state)
        taken.update(theirs)
        if found is None and ours.endswith("num_batches_tracked"):
            report.absent.append(ours)
        elif found is None:
            report.missing[ours] = theirs
        else:
            enter(report, ours, theirs, found, tensor)
    report.unexpected.extend(key for key in state if key not in taken and not keymap.ignores(key))
    return report


def fetch(keymap: KeyMap, ours: str, state: Mapping[str, Tensor]) -> tuple[tuple[str, ...], Tensor | None]:
    """Their names for our key, and the tensor that they make; None where the file lacks one of them."""
    row, theirs = keymap.find(ours, state) or (None, (ours,))
    if any(name not in state for name in theirs):
        return theirs, None
    parts = [state[name] for name in theirs]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return theirs, tensor if row is None or row.convert is None else row.convert.to_ours(tensor)


def enter(report: Report, ours: str, theirs: tuple[str, ...], found: Tensor, wanted: Tensor) -> None:
    """Write one pair into the report."""
    shapes = f"{tuple(found.shape)} in the file, {tuple(wanted.shape)} in the model"
    if found.shape != wanted.shape and found.squeeze().shape != wanted.squeeze().shape:
        report.misshapen[ours] = shapes
        return
    report.tensors[ours] = found.reshape(wanted.shape)
    if found.shape != wanted.shape:
        report.reshaped[ours] = shapes
    if theirs == (ours,):
        report.matched.append(ours)
    else:
        report.renamed[ours] = theirs


def export_names(model: nn.Module, names: str) -> dict[str, Tensor]:
    """The model's state dict under another library's names (axes of length 1 as they are here).

    Raises:
        CheckpointError: a parameter that the other library has no name for (a scheme's gain, say).
    """
    keymap = find(model, names)
    if names != "skipway":
        refuse_constants(model, names)
    out: dict[str, Tensor] = {}
    for ours, tensor in model.state_dict().items():
        found = keymap.find(ours)
        if found is None:
            raise CheckpointError(f"{names} has no name for {ours!r}, so this model cannot be exported to it")
        row, theirs = found
        tensor = tensor if row.convert is None else row.convert.to_theirs(tensor)
        out.update(zip(theirs, tensor.chunk(len(theirs)) if len(theirs) > 1 else (tensor,), strict=True))
    return out


def refuse_constants(model: nn.Module, names: str) -> None:
    """Raise where the model computes with something that no state dict carries, and that the other library lacks."""
    for name, module in model.named_modules():
        constant = isinstance(module, Multiply | ScaledShortcut | ScaledActivation | Cut)
        if constant or (isinstance(module, Gain) and (module.factor != 1.0 or module.gain.ndim == 0)):
            raise CheckpointError(
                f"{names} has nothing like {name!r} ({module}), so this model would compute something else there; "
                "export to names='skipway'"
            )
