"""SIGKILL at random moments and at every named point of a save, and SIGINT, SIGTERM and SIGUSR1 in the phases of a run:
the documented end, and the same command goes on and ends in the same bits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from benchmarks.faults import kills, signals
from skipway.data import loader
from tests.training.few_digits import every_ninth

loader.digits = every_ninth
kills.COMMON = tuple("14" if word == "128" else word for word in kills.COMMON)  # as many steps
for part, arguments in ((kills, ["--count", "2", "--cases", "resnet", "vit"]), (signals, ["--rotate"])):
    sys.argv[1:] = arguments
    part.start()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_kills_at_every_point_and_signals_in_every_phase():
    """One handler records all three signals, so they take turns. In a process of its own, which forks the cases: a fork
    of pytest's would have its threads' locks.
    """
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    killed, *cases, counts = map(json.loads, ran.stdout.splitlines())
    assert killed["kills"] >= 2 + 12, "the named points of a save are among them"
    assert killed["resumed"] == killed["equal"] == killed["kills"]
    assert len(cases) == 8 + 2, "data, batch, forward, evaluation, save, test, report, page; three in a save"
    for case in cases:
        assert case["status"] == case["documented"], case
        assert case["seconds"] < 5, case
        assert case["resumed"] == 0, case
        assert case["equal"], case
        assert case["report"], case
        assert not case["left"], case
    assert counts["as documented, resumed and equal"] == len(cases)
