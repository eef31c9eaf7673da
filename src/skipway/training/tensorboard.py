"""The curves of a run for TensorBoard, where somebody asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skipway.errors import MissingExtraError

__all__ = ["write_board"]

# rows of the metrics that are curves
CURVES = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "lr")


def write_board(folder: Path, row: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> None:
    """Add an epoch, and the losses of its steps, to the event files in `folder`.

    Rows that a run writes again after it went back stand there twice, and TensorBoard shows the later ones.

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
