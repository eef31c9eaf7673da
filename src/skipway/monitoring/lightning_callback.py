"""`LightningMonitor`: a monitor as a callback of Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from skipway.errors import SkipwayError
from skipway.monitoring.watch import Watch, monitor


def callback_class() -> Any:
    """The class of callbacks of whichever package of Lightning is there; a plain class where none is."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return import_module(name).Callback
        except ImportError:
            continue
    return object


Callback: Any = callback_class()

__all__ = ["LightningMonitor"]


class LightningMonitor(Callback):
    """Watches the training of a LightningModule: `Trainer(callbacks=[LightningMonitor(sink="watch.jsonl")])`.

    Args:
        network: path of the module that `training_step` calls; None: the only child with trainable parameters, else the
            LightningModule itself.
        choices: those of `skipway.monitor`.

    Raises:
        SkipwayError: Lightning is not installed.
    """

    def __init__(self, network: str | None = None, **choices: Any) -> None:
        if Callback is object:
            raise SkipwayError("LightningMonitor needs Lightning, which is not installed: pip install lightning")
        super().__init__()
        self.network, self.choices = network, choices
        self.watch: Watch | None = None

    def on_train_start(self, trainer: Any, module: nn.Module) -> None:
        """Begin to watch."""
        scaler = getattr(getattr(trainer, "precision_plugin", None), "scaler", None)
        choices: dict[str, Any] = {"step": trainer.global_step, "scaler": scaler, **self.choices}
        self.watch = monitor(self.find_network(module), trainer.optimizers, **choices).start()

    def find_network(self, module: nn.Module) -> nn.Module:
        """The module that is called.

        Raises:
            SkipwayError: there is none of that name.
        """
        if self.network is None:
            trained = [c for c in module.children() if any(p.requires_grad for p in c.parameters())]
            return trained[0] if len(trained) == 1 else module
        try:
            return module.get_submodule(self.network)
        except AttributeError as problem:
            raise SkipwayError(f"network={self.network!r}: {type(module).__name__} has no such module") from problem

    def on_train_batch_end(self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the loss that `training_step` has returned, which Lightning divides by the accumulated batches."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self.watch is not None and loss is not None:
            self.watch.log(loss=loss * trainer.accumulate_grad_batches)

    def on_train_end(self, trainer: Any, module: nn.Module) -> None:
        """Stop watching."""
        if self.watch is not None:
            self.watch.stop()

    def on_exception(self, trainer: Any, module: nn.Module, exception: BaseException) -> None:
        """Stop watching."""
        if self.watch is not None:
            self.watch.stop()
