"""Races in parts: heats in processes of their own, each with the same pacemaker, and a final of the fastest.

A field whose networks take minutes to compile does not fit one process, nor one turn on a machine that is shared.
Seconds of different heats do not compare, since the machine changes its speed; how many times as fast as the pacemaker
somebody was in the same rounds does. The final decides: there all take turns, prepared as the heats found them fastest.

Where each may use any precision, those count that keep the accuracy (`benchmarks.race.accuracy`), and the heats in
bfloat16 count too: they have the same pacemaker.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from statistics import median

from benchmarks.race.accuracy import loses_accuracy
from benchmarks.race.contenders import ANY, Contender, Workload
from benchmarks.race.journal import Journal
from benchmarks.race.modes import OURS
from skipway.inference.timer import round_speedups

__all__ = ["find_finalists", "pacemaker"]

PACE = "bfloat16"


def pacemaker(workload: Workload) -> Contender:
    """Who takes part in each heat of a workload: our network in torch's own operators, which is ready at once."""
    named = workload.precision == ANY
    precision = PACE if named else workload.precision
    return Contender(library=OURS, mode="channels-last", what=workload.what, precision=precision, named=named)


def find_finalists(journal: Journal, workload: Workload, count: int) -> list[Contender]:
    """The fastest of each side in the heats of a workload.

    Args:
        journal: what was measured.
        workload: of the heats.
        count: of contenders on each side.
    """
    named = workload.precision == ANY
    counted = [workload, *([replace(workload, precision=PACE)] if named else [])]
    known, speeds = {field.name for field in fields(Contender)}, dict[Contender, float]()
    for race in journal.races():
        pace = str(pacemaker(race.workload))
        if race.stage != "heat" or race.workload not in counted or pace not in race.seconds:
            continue
        for name in race.seconds:
            row = {key: value for key, value in race.prepared[name].items() if key in known}
            contender = Contender(**{**row, "named": named})
            if not (named and loses_accuracy(journal.of("accuracy"), workload.network, asdict(contender))):
                speeds[contender] = median(round_speedups(race.seconds, name, pace) or [0.0])
    ranked = sorted(speeds, key=lambda contender: -speeds[contender])
    sides = ("peer", "switched", "engine", "ours")
    return [each for side in sides for each in [each for each in ranked if each.side == side][:count]]
