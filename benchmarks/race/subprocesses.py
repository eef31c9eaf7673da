"""Measurements in a fresh process: peak memory, import and build time."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.race.devices import DEVICES
from skipway.errors import SkipwayError

if TYPE_CHECKING:
    from benchmarks.race.contenders import Contender, TrainingWork, Workload

__all__ = ["SubprocessError", "measure_memory", "measure_startup", "run_in_subprocess"]

LIMIT = 1800.0
MEMORY = """
import json, sys
from benchmarks.race.subprocesses import memory_here
print(json.dumps(memory_here(**json.loads(sys.argv[1]))))
"""
# modules other than the library's own are imported between the timed parts; what they import too helps peers
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
from benchmarks.race.architectures import aliases, config_of, make_model
from skipway.zoo import import_library
config_of(network, size), aliases(network)
if library != "skipway":
    begun = time.perf_counter()
    import_library(library, library)
    seconds += time.perf_counter() - begun
begun = time.perf_counter()
make_model(library, network, size)
print(json.dumps({"import_seconds": seconds, "build_seconds": time.perf_counter() - begun}))
"""


class SubprocessError(SkipwayError):
    """A measuring process ended without a result."""


def run_in_subprocess(code: str, order: dict[str, Any], limit: float = LIMIT) -> dict[str, Any]:
    """Run code in a fresh process and return its result.

    Args:
        code: prints one JSON object as its last line.
        order: its argument, `sys.argv[1]`, as JSON.
        limit: seconds after which it is stopped.

    Raises:
        SubprocessError: it failed, with the last line of its errors, or took too long.

    >>> code = "import json, sys; print(json.dumps({'half': json.loads(sys.argv[1])['whole'] / 2}))"
    >>> run_in_subprocess(code, {"whole": 3})
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
        raise SubprocessError(f"no result in {limit:.0f} s") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        complaint = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise SubprocessError(complaint[-1][:200])
    return json.loads(lines[-1])


def measure_startup(library: str, network: str, size: int) -> dict[str, Any]:
    """Time the import of a library, torch included, and the build of a network in a fresh process.

    Args:
        library: one of `benchmarks.race.architectures.LIBRARIES`.
        network: see `benchmarks.race.architectures.config_of`.
        size: side of its images, in pixels.

    >>> sorted(measure_startup("skipway", "resnet20", 32))
    ['build_seconds', 'import_seconds']
    """
    return run_in_subprocess(STARTUP, {"library": library, "network": network, "size": size})


def measure_memory(contender: Contender, workload: Workload) -> dict[str, Any]:
    """Measure a training step in a fresh process: peak memory beyond model and optimizer, and the bytes that
    autograd keeps between forward and backward.

    Args:
        contender: library and mode.
        workload: network, batch and precision.
    """
    return run_in_subprocess(MEMORY, {"contender": asdict(contender), "workload": asdict(workload)})


def memory_here(contender: dict[str, Any], workload: dict[str, Any]) -> dict[str, Any]:
    """Measure in this process, after a first step that makes the optimizer's state."""
    from benchmarks.race.contenders import Contender, TrainingWork, Workload

    prepared = Contender(**contender).prepare(Workload(**workload))
    step = prepared.run
    assert isinstance(step, TrainingWork)
    with prepared.within():
        step()
        peak = DEVICES[step.images.device.type].peak(step)
    return {"peak_bytes": peak, "saved_bytes": saved_bytes(step)}


def saved_bytes(step: TrainingWork) -> float:
    """Return the bytes that autograd keeps between forward and backward: each storage once, parameters not counted."""
    from skipway.surgery.saved_tensors import SavedTensors

    own = SavedTensors(parameter for group in step.optimizer.param_groups for parameter in group["params"])
    with own.counting():
        step.loss()
    return own.total
