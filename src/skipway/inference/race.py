"""Several ways of doing the same work, timed in one run: they take turns, and what counts is the ratio in each round.

A machine that is busy for a while slows all of a round alike, so ratios of one round hold where seconds do not. A turn
is one call that is not timed, which brings back caches and freed memory that the one before took away, and those that
are.
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

__all__ = ["SLACK", "TRIED", "Entrant", "Spread", "Turn", "medians", "race", "ratios", "reason", "rotated", "spread"]

SLACK = 2.0
"""An entrant that takes so many times as long as the best of its group leaves after `TRIED` rounds."""
TRIED = 2


@dataclass(frozen=True)
class Entrant:
    """One way of doing the work.

    Args:
        name: of the entrant, unique in a race.
        run: does the work once.
        group: the fastest of each group stays to the end, others that are much slower than it leave.
        within: what its turns happen in, entered before the clock runs.
        calls: of `run` while the clock runs; the seconds of a turn are those of one.
        finish: waits until what `run` began is done.
    """

    name: str
    run: Callable[[], object]
    group: str = ""
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    calls: int = 1
    finish: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Turn:
    """What came of one turn.

    Args:
        name: of the entrant.
        round: counted from 0.
        seconds: of a timed call; NaN where there is none.
        error: why it failed, in one line.
        dropped: why it takes no more turns although it works.
    """

    name: str
    round: int
    seconds: float = math.nan
    error: str = ""
    dropped: str = ""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of one or more values.

    >>> print(spread([1.0, 2.0, 3.0, 4.0, 100.0]))
    3.00 (2.00 to 4.00)
    >>> print(spread([1.5]))
    1.50 (1.50 to 1.50)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: each goes first once, before any goes first twice.

    >>> [rotated(["a", "b", "c"], number) for number in range(2)]
    [['a', 'b', 'c'], ['b', 'c', 'a']]
    """
    start = number % max(1, len(names))
    return [*names[start:], *names[:start]]


def ratios(
    seconds: Mapping[str, Mapping[int, float]], name: str, reference: str, rounds: Iterable[int] | None = None
) -> list[float]:
    """How many times as fast `name` was as `reference`, in each round that both took part in.

    Args:
        seconds: of each entrant, by round.
        name: whose speed is asked for.
        reference: in units of whose speed.
        rounds: these alone.

    >>> ratios({"ours": {0: 1.0, 1: 2.0}, "theirs": {0: 2.0, 1: 5.0, 2: 4.0}}, "ours", "theirs")
    [2.0, 2.5]
    """
    ours, theirs = seconds[name], seconds[reference]
    both = sorted(ours.keys() & theirs.keys() if rounds is None else ours.keys() & theirs.keys() & set(rounds))
    return [theirs[number] / ours[number] for number in both]


def medians(turns: Iterable[Turn]) -> dict[str, float]:
    """Median seconds of each entrant that has any.

    >>> medians([Turn("a", 0, 1.0), Turn("a", 1, 3.0), Turn("b", 0, error="broken")])
    {'a': 2.0}
    """
    taken: dict[str, list[float]] = {}
    for turn in turns:
        if math.isfinite(turn.seconds):
            taken.setdefault(turn.name, []).append(turn.seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


def reason(error: BaseException) -> str:
    """An exception in one short line.

    >>> reason(ValueError("no such thing"))
    'ValueError: no such thing'
    """
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"


def race(
    entrants: Sequence[Entrant],
    rounds: int,
    *,
    known: Sequence[Turn] = (),
    limit: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Turn]:
    """Turns as they are taken, interleaved: each entrant once a round, the order rotated.

    An entrant that fails, or is `SLACK` times slower than the best of its group after `TRIED` rounds, takes no more
    turns; the others go on.

    Args:
        entrants: who takes part.
        rounds: how many.
        known: turns of an interrupted race, which are not taken again.
        limit: seconds after which no more turns begin; one round is always made.
        clock: gives seconds.

    >>> ticks = iter(range(100))
    >>> [(turn.name, turn.round, turn.seconds) for turn in race([Entrant("a", int)], 2, clock=lambda: next(ticks))]
    [('a', 0, 1.0), ('a', 1, 1.0)]
    """
    taken = list(known)
    racing = {entrant.name: entrant for entrant in entrants}
    for turn in known:
        if turn.error or turn.dropped:
            racing.pop(turn.name, None)
    begun = clock() if limit is not None else 0.0
    names = [entrant.name for entrant in entrants]
    # who leaves is let go of with the memory that it holds
    del entrants
    for number in range(rounds):
        had = {turn.name for turn in taken if turn.round == number}
        for name in rotated(names, number):
            if name not in racing or name in had:
                continue
            if limit is not None and number > 0 and clock() - begun > limit:
                return
            turn = one_turn(racing[name], number, clock)
            taken.append(turn)
            if turn.error:
                del racing[name]
            yield turn
        for turn in slow_ones(list(racing.values()), taken, number) if number + 1 >= TRIED else ():
            del racing[turn.name]
            yield turn


def one_turn(entrant: Entrant, number: int, clock: Callable[[], float]) -> Turn:
    """One call that is not timed, and those that are."""
    try:
        with entrant.within():
            entrant.run()
            gc.collect()
            entrant.finish()
            begun = clock()
            for _ in range(entrant.calls):
                entrant.run()
            entrant.finish()
            return Turn(entrant.name, number, (clock() - begun) / entrant.calls)
    except Exception as error:
        return Turn(entrant.name, number, error=reason(error))


def slow_ones(racing: Sequence[Entrant], taken: Sequence[Turn], number: int) -> list[Turn]:
    """Those that are much slower than the best of their group."""
    middle = medians(taken)
    best: dict[str, float] = {}
    for entrant in racing:
        if entrant.name in middle:
            best[entrant.group] = min(middle[entrant.name], best.get(entrant.group, math.inf))
    return [
        Turn(entrant.name, number, dropped=f"{middle[entrant.name] / best[entrant.group]:.1f}x the time of its best")
        for entrant in racing
        if middle.get(entrant.name, 0.0) > SLACK * best.get(entrant.group, math.inf)
    ]
