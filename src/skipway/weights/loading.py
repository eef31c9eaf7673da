"""`load`: strict, with a word about every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from skipway.errors import CheckpointError
from skipway.weights.files import read
from skipway.weights.tables import find

__all__ = ["Report", "export_names", "load", "match"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Report:
    """What became of every key: ours → theirs for the pairs, plain lists for the rest.

    Args:
        matched: pairs that fit.
        absent: ours that the file may lack (a BatchNorm's batch counter); they keep their value.
        missing: ours that the file lacks, with the name it should have there.
        unexpected: theirs that nothing of ours takes.
        misshapen: ours with both shapes.
    """

    matched: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    misshapen: dict[str, str] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether every key of both sides has its partner."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} keys fit"]
        lines += group("missing from the file", [f"{theirs} (for {ours})" for ours, theirs in self.missing.items()])
        lines += group("not known to the model", self.unexpected)
        lines += group("of another shape", [f"{ours}: {shapes}" for ours, shapes in self.misshapen.items()])
        return "\n".join(lines)


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
        names: whose names the file uses: "skipway", or a library that has a key map for the model ("torchvision").

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
        raise CheckpointError(f"the weights do not fit this {type(model).__name__} (names={names!r}):\n{report}")
    own = model.state_dict()
    with torch.no_grad():
        for ours, theirs in report.matched.items():
            own[ours].copy_(state[theirs])
    return model


def match(model: nn.Module, state: Mapping[str, Tensor], *, names: str = "skipway") -> Report:
    """How the keys of `state` fit the model; nothing is changed."""
    keymap = find(model, names)
    report = Report()
    taken = set()
    for ours, tensor in model.state_dict().items():
        theirs = keymap.to_theirs(ours) or ours
        taken.add(theirs)
        if theirs in state and state[theirs].shape == tensor.shape:
            report.matched[ours] = theirs
        elif theirs in state:
            report.misshapen[ours] = f"{tuple(state[theirs].shape)} in the file, {tuple(tensor.shape)} in the model"
        elif ours.endswith("num_batches_tracked"):
            report.absent.append(ours)
        else:
            report.missing[ours] = theirs
    report.unexpected.extend(key for key in state if key not in taken)
    return report


def export_names(model: nn.Module, names: str) -> dict[str, Tensor]:
    """The model's state dict under another library's names.

    Raises:
        CheckpointError: a parameter that the other library has no name for (a scheme's gain, say).
    """
    keymap = find(model, names)
    out: dict[str, Tensor] = {}
    for ours, tensor in model.state_dict().items():
        theirs = keymap.to_theirs(ours)
        if theirs is None:
            raise CheckpointError(f"{names} has no name for {ours!r}, so this model cannot be exported to it")
        out[theirs] = tensor
    return out
