"""The curves of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skipway.errors import MissingExtraError

__all__ = ["write_tensorboard"]

# metrics that become curves
CURVES = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "lr")


def write_tensorboard(folder: Path, row: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> None:
    """Add an epoch and its step losses to the event files in `folder`.

    Rows that a run writes again after a restart appear twice; TensorBoard shows the later ones.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tensorboard", "tensorboard=True") from error
    with SummaryWriter(str(folder), purge_step=min((each["step"] for each in steps), default=row["step"])) as writer:
        for each in steps:
            writer.add_scalar("step/loss", each["loss"], each["step"])
            writer.add_scalar("step/gradient norm", each["norm"], each["step"])
        for name in CURVES:
            if row.get(name) is not None:
                writer.add_scalar(f"epoch/{name}", row[name], row["step"])
