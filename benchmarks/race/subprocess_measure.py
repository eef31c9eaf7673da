"""What needs a process of its own to be measured: peak memory, and how long a library takes to be there."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.race.devices import DEVICES
from skipway.errors import SkipwayError

if TYPE_CHECKING:
    from benchmarks.race.contenders import Cell, Contender, Step

__all__ = ["ApartError", "apart", "memory", "startup"]

LIMIT = 1800.0
MEMORY = """
import json, sys
from benchmarks.race.subprocess_measure import memory_here
print(json.dumps(memory_here(**json.loads(sys.argv[1]))))
"""
# what is not the library's own is imported between the clocks; what that brings along speeds a peer up, not us
STARTUP = """
import json, sys, time
order = json.loads(sys.argv[1])
library, network, size = order["library"], order["network"], order["size"]
begun = time.perf_counter()
import torch
seconds = time.perf_counter() - begun
if library == "skipway":
    begun = time.perf_counter()
    import skipway
    skipway.build
    seconds += time.perf_counter() - begun
from benchmarks.race.architectures import aliases, config_of, made
from skipway.zoo import with_torchvision
config_of(network, size), aliases(network)
if library != "skipway":
    begun = time.perf_counter()
    with_torchvision(library, library)
    seconds += time.perf_counter() - begun
begun = time.perf_counter()
made(library, network, size)
print(json.dumps({"import_seconds": seconds, "build_seconds": time.perf_counter() - begun}))
"""


class ApartError(SkipwayError):
    """A process that measured something ended without a result."""


def apart(code: str, order: dict[str, Any], limit: float = LIMIT) -> dict[str, Any]:
    """Measure in a fresh process.

    Args:
        code: prints one JSON object as its last line.
        order: what it finds in `sys.argv[1]`, as JSON.
        limit: seconds that it gets.

    Raises:
        ApartError: it failed, with its last line, or took too long.

    >>> apart("import json, sys; print(json.dumps({'half': json.loads(sys.argv[1])['whole'] / 2}))", {"whole": 3})
    {'half': 1.5}
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(order)],
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        raise ApartError(f"no result in {limit:.0f} s") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        complaint = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise ApartError(complaint[-1][:200])
    return json.loads(lines[-1])


def startup(library: str, network: str, size: int) -> dict[str, Any]:
    """Import a library and build a network in a fresh process: seconds of each, torch's import with the first.

    Args:
        library: one of `benchmarks.race.architectures.LIBRARIES`.
        network: see `benchmarks.race.architectures.config_of`.
        size: side of its images, in pixels.

    >>> sorted(startup("skipway", "resnet20", 32))
    ['build_seconds', 'import_seconds']
    """
    return apart(STARTUP, {"library": library, "network": network, "size": size})


def memory(contender: Contender, cell: Cell) -> dict[str, Any]:
    """A training step in a fresh process: the most memory it takes beyond model and optimiser, and what of it autograd
    keeps between forward and backward, both in bytes.

    Args:
        contender: who trains.
        cell: what.
    """
    return apart(MEMORY, {"contender": asdict(contender), "cell": asdict(cell)})


def memory_here(contender: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """The same in this process; a first step brings the optimiser's state about. Gradients are the step's own."""
    from benchmarks.race.contenders import Cell, Contender, Step

    prepared = Contender(**contender).prepare(Cell(**cell))
    step = prepared.run
    assert isinstance(step, Step)
    with prepared.within():
        step()
        peak = DEVICES[step.images.device.type].peak(step)
    return {"peak_bytes": peak, "saved_bytes": saved(step)}


def saved(step: Step) -> float:
    """Bytes that autograd keeps between forward and backward, each storage once, parameters not counted."""
    from skipway.surgery.saved_tensors import SavedTensors

    own = SavedTensors(parameter for group in step.optimiser.param_groups for parameter in group["params"])
    with own.counting():
        step.loss()
    return own.total
