"""SIGKILL at random moments and at every named point of a save: the same command goes on and ends in the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_six_kills_and_every_point():
    """In a process of its own, which forks the cases: a fork of pytest's would have its threads' locks."""
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults.kills", "--count", "6", "--cases", "resnet", "vit"],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["kills"] >= 6 + 12, "the named points of a save are among them"
    assert told["resumed"] == told["equal"] == told["kills"]
