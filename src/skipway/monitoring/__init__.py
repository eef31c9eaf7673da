"""Measurements of a network while it trains, which leave the training as it is.

| module | holds |
|---|---|
| `watch` | `monitor(model, optimizer)`: signals and early warnings in anybody's loop |
| `sample` | a pass over a few samples of the last batch, with the training's own gradient at the output |
| `call_record` | the last call of the model: arguments, precision, gradient of the output |
| `attention`, `updates` | logits of attention; relative updates and gradient norms |
| `schedule` | when samples are taken, so that they stay within their share of the time |
| `step_log`, `spikes` | loss and gradient norm of every step, and spikes |
| `rules` | early warnings, each with its source |
| `history`, `journal`, `sinks` | the records: in memory, in files, for loggers |
| `trainer_callback`, `lightning_callback` | for transformers' Trainer, for Lightning |
| `health` | samples of a run of `skipway train` |
"""

from skipway.monitoring.health import Health, sample_health
from skipway.monitoring.history import WatchHistory, read_history
from skipway.monitoring.last_batch import DeepReading
from skipway.monitoring.rules import EarlyWarning
from skipway.monitoring.watch import Watch, monitor

__all__ = ["DeepReading", "EarlyWarning", "Health", "Watch", "WatchHistory", "monitor", "read_history", "sample_health"]
