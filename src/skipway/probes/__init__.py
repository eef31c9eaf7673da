"""Looking into a running network: the signal and the gradient at every residual connection of any network.

| module | holds |
|---|---|
| `measures` | what can be measured: functions of tensors, and the objects that say where they are taken |
| `observer` | the one mechanism: an addition of a watched chain, a module's input and output, as they happen |
| `signals` | `probe(model, example)` and `with Probe(model, connections): …`, with a table as the result |
| `objective` | the loss of any model's output |
| `features` | the tensors themselves, and a map per stage for dense tasks |
| `mixing_matrix` | what each connection carries of the stem and of the branches before it, and the gradient |
| `stream_health` | gains, difference and likeness of several streams |
| `nonfinite` | the first value of a step that is not finite |
| `signal_check` | what an untrained network does to the size of the signal, stage by stage |
"""

from skipway.probes.measures import MEASURES, SIGNALS, Measure
from skipway.probes.objective import compute_loss
from skipway.probes.observer import Observer
from skipway.probes.signals import Probe, Signals, probe

__all__ = ["MEASURES", "SIGNALS", "Measure", "Observer", "Probe", "Signals", "compute_loss", "probe"]
