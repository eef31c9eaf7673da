"""SIGINT, SIGTERM and SIGUSR1 in the phases of a run: the documented end, and the same command goes on exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_signal_in_each_of_eight_phases_and_three_in_a_save():
    """One handler records all three signals, so they take turns. In a process of its own, which forks the cases: a fork
    of pytest's would have its threads' locks.
    """
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults.signals", "--rotate"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    *cases, counts = map(json.loads, ran.stdout.splitlines())
    assert len(cases) == 8 + 2, "data, batch, forward, evaluation, save, test, report, page"
    for case in cases:
        assert case["status"] == case["documented"], case
        assert case["seconds"] < 5, case
        assert case["resumed"] == 0, case
        assert case["equal"], case
        assert case["report"], case
        assert not case["left"], case
    assert counts["as documented, resumed and equal"] == len(cases)
