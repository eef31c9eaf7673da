"""Interleaved timing: candidates that do the same work are timed round by round and compared within each round.

A machine that is busy for a while slows all candidates of a round alike, so the ratios of a round hold where seconds do
not. A timing is one call without the clock, which refills the caches that the previous candidate emptied, and the timed
calls.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Candidate",
    "Quartiles",
    "Timing",
    "error_line",
    "median_seconds",
    "quartiles",
    "rotate",
    "round_speedups",
    "time_candidate",
    "time_interleaved",
]

SLOW_FACTOR = 2.0
"""A candidate this many times slower than the fastest of its group is dropped after `TRIAL_ROUNDS` rounds."""
TRIAL_ROUNDS = 2


@dataclass(frozen=True)
class Candidate:
    """One of several functions that do the same work.

    Args:
        name: unique among the candidates.
        run: does the work once.
        group: candidates much slower than the fastest of their group are dropped.
        within: context of each timing, entered before the clock starts.
        calls: of `run` in one timing; its seconds are those of one call.
        finish: waits until the work that `run` started is done.
    """

    name: str
    run: Callable[[], object]
    group: str = ""
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    calls: int = 1
    finish: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Timing:
    """One candidate in one round.

    Args:
        name: the candidate's.
        round: counted from 0.
        seconds: of one call; NaN where none was timed.
        error: the exception in one line, where it failed.
        dropped: the reason, where it works but is not timed any more.
    """

    name: str
    round: int
    seconds: float = math.nan
    error: str = ""
    dropped: str = ""


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return median and quartiles of one or more values.

    >>> print(quartiles([1.0, 2.0, 3.0, 4.0, 100.0]))
    3.00 (2.00 to 4.00)
    >>> print(quartiles([1.5]))
    1.50 (1.50 to 1.50)
    """
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median, low, high)


def rotate(names: Sequence[str], number: int) -> list[str]:
    """Return the order of a round: each name comes first once before any comes first twice.

    >>> [rotate(["a", "b", "c"], number) for number in range(2)]
    [['a', 'b', 'c'], ['b', 'c', 'a']]
    """
    start = number % max(1, len(names))
    return [*names[start:], *names[:start]]


def round_speedups(
    seconds: Mapping[str, Mapping[int, float]], name: str, reference: str, rounds: Iterable[int] | None = None
) -> list[float]:
    """Return the seconds of `reference` over those of `name` in each round in which both were timed.

    Args:
        seconds: of each candidate by round.
        name: of the faster candidate, usually.
        reference: of the candidate that it is compared with.
        rounds: that count; all by default.

    >>> round_speedups({"ours": {0: 1.0, 1: 2.0}, "theirs": {0: 2.0, 1: 5.0, 2: 4.0}}, "ours", "theirs")
    [2.0, 2.5]
    """
    ours, theirs = seconds[name], seconds[reference]
    both = sorted(ours.keys() & theirs.keys() if rounds is None else ours.keys() & theirs.keys() & set(rounds))
    return [theirs[number] / ours[number] for number in both]


def median_seconds(timings: Iterable[Timing]) -> dict[str, float]:
    """Return the median seconds of each candidate that was timed.

    >>> median_seconds([Timing("a", 0, 1.0), Timing("a", 1, 3.0), Timing("b", 0, error="broken")])
    {'a': 2.0}
    """
    taken: dict[str, list[float]] = {}
    for timing in timings:
        if math.isfinite(timing.seconds):
            taken.setdefault(timing.name, []).append(timing.seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


def error_line(error: BaseException) -> str:
    """Return an exception's type and message in one short line.

    >>> error_line(ValueError("no such thing"))
    'ValueError: no such thing'
    """
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"


def time_interleaved(
    candidates: Sequence[Candidate],
    rounds: int,
    *,
    known: Sequence[Timing] = (),
    limit: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Timing]:
    """Time the candidates interleaved, each once a round in rotated order, and yield each timing as it is made.

    A candidate that fails, or is `SLOW_FACTOR` times slower than the fastest of its group after `TRIAL_ROUNDS` rounds,
    is not timed any more; the others go on.

    Args:
        candidates: what is timed.
        rounds: number of rounds.
        known: timings of an interrupted run, which are not made again.
        limit: seconds after which no timing is started; one round is always made.
        clock: returns seconds.

    >>> ticks = iter(range(100))
    >>> timings = time_interleaved([Candidate("a", int)], 2, clock=lambda: next(ticks))
    >>> [(timing.name, timing.round, timing.seconds) for timing in timings]
    [('a', 0, 1.0), ('a', 1, 1.0)]
    """
    timings = list(known)
    active = {candidate.name: candidate for candidate in candidates}
    for timing in known:
        if timing.error or timing.dropped:
            active.pop(timing.name, None)
    started = clock() if limit is not None else 0.0
    names = [candidate.name for candidate in candidates]
    # a candidate that is dropped is released with the memory that it holds
    del candidates
    for number in range(rounds):
        done = {timing.name for timing in timings if timing.round == number}
        for name in rotate(names, number):
            if name not in active or name in done:
                continue
            if limit is not None and number > 0 and clock() - started > limit:
                return
            timing = time_candidate(active[name], number, clock)
            timings.append(timing)
            if timing.error:
                del active[name]
            yield timing
        for timing in find_slow(list(active.values()), timings, number) if number + 1 >= TRIAL_ROUNDS else ():
            del active[timing.name]
            yield timing


def time_candidate(candidate: Candidate, number: int, clock: Callable[[], float], *, warm_up: bool = True) -> Timing:
    """Run a candidate once without the clock unless `warm_up` is False, then time its calls."""
    try:
        with candidate.within():
            if warm_up:
                candidate.run()
            gc.collect()
            candidate.finish()
            started = clock()
            for _ in range(candidate.calls):
                candidate.run()
            candidate.finish()
            return Timing(candidate.name, number, (clock() - started) / candidate.calls)
    except Exception as error:
        return Timing(candidate.name, number, error=error_line(error))


def find_slow(active: Sequence[Candidate], timings: Sequence[Timing], number: int) -> list[Timing]:
    """Return a final timing, without seconds, for each candidate that is much slower than the fastest of its group."""
    medians = median_seconds(timings)
    fastest: dict[str, float] = {}
    for candidate in active:
        if candidate.name in medians:
            fastest[candidate.group] = min(medians[candidate.name], fastest.get(candidate.group, math.inf))
    return [
        Timing(candidate.name, number, dropped=f"{medians[candidate.name] / fastest[candidate.group]:.1f}x the fastest")
        for candidate in active
        if medians.get(candidate.name, 0.0) > SLOW_FACTOR * fastest.get(candidate.group, math.inf)
    ]
