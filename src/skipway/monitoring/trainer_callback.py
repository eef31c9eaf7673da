"""`TrainerMonitor`: a monitor as a callback of transformers' Trainer."""

from __future__ import annotations

from typing import Any

from skipway.errors import MissingExtraError
from skipway.monitoring.watch import Watch, monitor

try:
    from transformers import TrainerCallback as Callback
except ImportError:
    Callback: Any = object

__all__ = ["TrainerMonitor"]


class TrainerMonitor(Callback):
    """Watches the training of a `transformers.Trainer`: `Trainer(…, callbacks=[TrainerMonitor(sink="watch.jsonl")])`.

    The losses are those that the model returns: their mean over accumulated batches, or their sum where the Trainer
    tells the model the number of items of all of them, by which it divides. Where the Trainer computes another one from
    their outputs, the loss is unknown until you tell it by `callback.watch.log(loss=loss)` in `compute_loss`.

    Args:
        choices: those of `skipway.monitor`.

    Raises:
        MissingExtraError: transformers is not installed.
    """

    def __init__(self, **choices: Any) -> None:
        if Callback is object:
            raise MissingExtraError("transformers", "transformers", "TrainerMonitor")
        self.choices = choices
        self.watch: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch."""
        self.watch = monitor(
            kwargs["model"], kwargs["optimizer"], **{"step": state.global_step, **self.choices}
        ).start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the losses of accumulated batches, each of which is divided by the items of all."""
        recorder = None if self.watch is None else self.watch.recorder
        if self.watch is None or recorder is None or recorder.last is None or self.watch.pending_losses:
            return
        if recorder.own_losses and recorder.last.kwargs.get("num_items_in_batch") is not None:
            self.watch.log(loss=sum(recorder.own_losses))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching."""
        if self.watch is not None:
            self.watch.stop()
