"""The curves of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipway.errors import MissingExtraError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["summary_writer", "write_tensorboard"]

# metrics that become curves
CURVES = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "lr")


def summary_writer() -> type[SummaryWriter]:
    """The class that writes event files.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tensorboard", "tensorboard=True") from error
    return SummaryWriter


def write_tensorboard(
    folder: Path, steps: Sequence[Mapping[str, Any]], epoch: Mapping[str, Any] | None = None, *, again: bool = False
) -> None:
    """Add step losses, and the row of an epoch that ends with them, to the event files in `folder`.

    Args:
        folder: of the event files.
        steps: rows of `steps.jsonl`.
        epoch: a row of `metrics.jsonl`.
        again: hide what was written from the first of these steps on. TensorBoard reads the files of one second in any
            order, so only where a run goes on from a checkpoint.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    purged, row = steps[0]["step"] if again and steps else None, epoch or {}
    with summary_writer()(str(folder), purge_step=purged) as writer:
        for each in steps:
            writer.add_scalar("step/loss", each["loss"], each["step"])
            writer.add_scalar("step/gradient norm", each["norm"], each["step"])
        for name in CURVES:
            if row.get(name) is not None:
                writer.add_scalar(f"epoch/{name}", row[name], row["step"])
