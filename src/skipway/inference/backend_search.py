"""Search among backends, precisions, layouts, pieces and streams for the fastest that agrees, within a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from skipway.errors import counted
from skipway.hardware.device import choose_precision
from skipway.inference.backend_selection import ROUNDS, TOLERANCES, BackendComparison, BackendResult
from skipway.inference.backends import BACKENDS, INT8, ORIGINAL, Choice, first_tensor
from skipway.inference.batch_pieces import piece_choices
from skipway.surgery.operation import abbreviate
from skipway.tracing.containers import tensors_in

__all__ = ["LATE", "BackendSearch"]

NEAR = 1.5
"""Choices up to this many times slower than the fastest in a single timing take part in the rounds that decide."""
BUILDING = 0.8
"""Share of the time of a search after which nothing more is built."""
LATE = "not tried"
"""How the note begins of a choice for which there was no time."""
CONFIRMATIONS = 3
"""Timings of a remembered choice and of the original."""
TIMED = 4
"""Calls with which a choice is judged and timed, its rival's among them."""
HOPE = 3.0
"""How many times as fast pieces may make a backend: ViT-S in bfloat16 by OpenVINO, 2.8 on two cores. What takes as many
times the fastest call when it is compared with the original is not timed at all.
"""


@dataclass
class BackendSearch:
    """Search for the fastest choice: each whole batch once, pieces and streams of those that may win, then rounds.

    Backends that build quickly come before those that build slowly, of each the precision that is expected to be the
    fastest on the device, then the order of `BACKENDS`. What is expected to take longer than there is time is left out
    with a note; `missing` says what, and how much time it takes.

    A choice that is more than `NEAR` times slower than the fastest in its single timing is out of the running, and its
    memory is released. The others are timed interleaved in the time that is left. The original takes part throughout.
    Where answers are checked, which is done to the fastest at the end, the fastest of each precision stays in it.

    Args:
        comparison: builds, compares and times.
        names: of backends; "original" may be among them.
        precisions: names of them.
        seconds: time of the search; four fifths of it for building.
        tolerance: largest difference allowed over the largest output.
        pieces: whether batches are also cut.
        progress: called with a line about each step.
    """

    comparison: BackendComparison
    names: Sequence[str]
    precisions: Sequence[str]
    seconds: float
    tolerance: float | None = None
    pieces: bool = True
    progress: Callable[[str], None] = lambda line: None
    times: dict[Choice, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.begun, self.explored = self.comparison.clock(), 0.0

    def run(self) -> BackendResult:
        """Search, and return the fastest.

        Raises:
            SkipwayError: no backend agrees.
        """
        self.explore()
        return self.decide()

    def explore(self) -> None:
        """Try choices by a single timing each."""
        plain = Choice(ORIGINAL)
        self.times[plain] = self.comparison.time_once(plain)
        later: list[Choice] = []
        for name, precision in self.order():
            later += self.try_backend(name, precision)
        for choice in sorted(
            later, key=lambda each: self.comparison.results[replace(each, pieces=1, streams=1)].seconds
        ):
            self.attempt(choice)
        self.explored = self.spent

    def order(self) -> list[tuple[str, str]]:
        """Backends and precisions in the order in which they are tried."""
        coarse = choose_precision("auto", first_tensor(self.comparison.example).device)[0] != "float32"
        precisions = sorted(self.precisions, key=list(TOLERANCES).index, reverse=coarse)
        known = list(BACKENDS)
        names = sorted((name for name in self.names if name != ORIGINAL), key=known.index)
        precisions = sorted(precisions, key=lambda each: each != INT8)  # what was quantised is tried
        offered = [name for name in names if BACKENDS[name].build_quantized is not None]
        pairs = [(name, each) for each in precisions for name in (offered if each == INT8 else names)]
        return sorted(pairs, key=lambda pair: BACKENDS[pair[0]].slow)

    def missing(self) -> str:
        """What there was no time for, and how many seconds it takes; empty where everything was tried."""
        late = [each.choice for each in self.comparison.results.values() if each.note.startswith(LATE)]
        if not late:
            return ""
        building = sum(self.expected_build(choice) + TIMED * self.best for choice in late)
        seconds = 10 * math.ceil((self.explored + building) / BUILDING / 10)
        return f"not tried in {self.seconds:g} s: {abbreviate(list(map(str, late)))}; seconds={seconds} gives the time"

    def confirm(self, choice: Choice) -> bool:
        """Build a choice of an earlier search; return whether it agrees, and is still no slower than the original."""
        comparison = self.comparison
        if not self.is_asked(choice) or (choice.backend != ORIGINAL and choice.backend not in BACKENDS):
            return False
        self.progress(f"{choice}: remembered, being verified")
        if choice.backend != ORIGINAL:
            comparison.add(choice, self.tolerance)
        if choice not in comparison.runs:
            return False
        comparison.time(CONFIRMATIONS, self.seconds)
        plain, found = (comparison.results[each].seconds for each in (Choice(ORIGINAL), choice))
        return not comparison.results[choice].note and (ORIGINAL not in self.names or found <= plain)

    @property
    def complete(self) -> bool:
        """Whether nothing was left out for want of time, and there was something to choose from."""
        notes = [each.note for each in self.comparison.results.values() if each.choice.backend != ORIGINAL]
        return len(notes) > 1 and not any(note.startswith(LATE) for note in notes)

    @property
    def best(self) -> float:
        """The seconds of the fastest so far."""
        return min(self.times.values())

    def best_beside(self, choice: Choice) -> float:
        """The seconds of the fastest so far among those that a choice is given up for; infinite where there is none.

        Where answers are checked, another precision may still be refused, so that nothing is given up for it.
        """
        if self.comparison.check is None:
            return self.best
        rivals = [each for each in self.times if each.backend == ORIGINAL or each.precision == choice.precision]
        return min((self.times[each] for each in rivals if self.is_asked(each)), default=math.inf)

    @property
    def spent(self) -> float:
        """Seconds since the search began."""
        return self.comparison.clock() - self.begun

    def try_backend(self, name: str, precision: str) -> list[Choice]:
        """Try whole batches, then pieces; return the choices that take long to build, to be tried at the end."""
        backend, image = BACKENDS[name], any(tensor.ndim == 4 for tensor in tensors_in(self.comparison.example))
        whole = [Choice(name, precision, layout=layout) for layout in backend.layouts[: None if image else 1]]
        seconds = {choice: self.attempt(choice) for choice in whole}
        start = min(seconds, key=seconds.__getitem__)
        hopeful = math.isfinite(seconds[start]) and seconds[start] <= HOPE * self.best_beside(start)
        if not self.pieces or not hopeful:
            return []
        if backend.slow:
            return list(self.cuts(start))[:1]
        self.climb(start)
        return []

    def cuts(self, whole: Choice) -> Iterator[Choice]:
        """Choices with pieces in place of the whole batch."""
        batch = self.comparison.axes.size if self.comparison.axes is not None else 1
        device = first_tensor(self.comparison.example).device
        alone = device.type != "cpu" or self.comparison.shares_state(whole)
        cores = 1 if alone else torch.get_num_threads()
        return piece_choices(whole, batch, cores)

    def climb(self, whole: Choice) -> None:
        """Try cuts as long as one of the last two was no slower than all before by more than a quarter."""
        misses = 0
        for choice in self.cuts(whole):
            before = self.best_beside(choice)
            misses = 0 if self.attempt(choice) < 1.25 * before else misses + 1
            if misses == 2:
                return

    def attempt(self, choice: Choice) -> float:
        """Build and time a choice once, and the fastest so far with it, since machines are slow for a while; return its
        seconds by those of that one, infinite where it is out of the question.
        """
        comparison, expected = self.comparison, self.expected_build(choice)
        first = len(comparison.runs) == 1 and ORIGINAL not in self.names  # something of what was asked for is tried
        if not first and self.spent + expected > BUILDING * self.seconds:
            comparison.results[choice] = BackendResult(choice, note=self.late(expected))
            return math.inf
        self.progress(f"{self.spent:.0f} of {self.seconds:g} s: {choice}")
        comparison.add(choice, self.tolerance)
        if choice not in comparison.runs:
            return math.inf
        if comparison.judged[choice] > HOPE * self.best_beside(choice):
            comparison.results[choice] = replace(comparison.results[choice], seconds=comparison.judged[choice])
            self.times[choice] = comparison.judged[choice]
            self.prune()
            return self.times[choice]
        rivals = [each for each in self.times if each in comparison.runs]  # the original may have failed
        rival = min(rivals, key=self.times.__getitem__, default=choice)
        seconds = comparison.time_once(choice)
        again = comparison.time_once(rival) if choice in comparison.runs else math.inf
        if choice not in comparison.runs:
            return math.inf
        if math.isfinite(again):
            self.times[choice] = self.times.get(rival, again) * seconds / (again or 1e-9)
        else:
            self.times.pop(rival, None)
            self.times[choice] = seconds
        self.prune()
        return self.times[choice]

    def expected_build(self, choice: Choice) -> float:
        """Seconds that a choice takes to build: as long as the last one of the same backend, pieces as long as pieces
        where a conversion is kept; before there is one, by the number of modules. What was quantised is converted
        already, and tells nothing about what is not.
        """
        backend, quantized = BACKENDS[choice.backend], choice.precision == INT8
        again = backend.alters or backend.slow
        results = [each for each in self.comparison.results.values() if each.backend == choice.backend]
        same = [each for each in results if (each.precision == INT8) == quantized]
        kept = not again and not quantized and any(math.isfinite(each.build_seconds) for each in same)
        built = [each.build_seconds for each in same if not kept or each.choice.pieces > 1]
        holders = sum(
            next(module.parameters(recurse=False), None) is not None for module in self.comparison.folded.modules()
        )
        guess = 0.0 if kept or quantized else backend.patience * holders / 100
        return next((each for each in reversed(built) if math.isfinite(each)), guess)

    def late(self, expected: float) -> str:
        """Why a choice is not tried."""
        building = f", and it takes some {expected:.0f} s to build" if expected >= 1 else ""
        return f"{LATE}: {self.spent:.0f} of {self.seconds:g} s are spent{building}"

    def prune(self) -> None:
        """Release the choices that are far from the fastest; the original stays for comparison, and one that was asked
        for.
        """
        comparison = self.comparison
        asked = [choice for choice in comparison.runs if self.is_asked(choice)]
        fastest = min(asked, key=lambda each: self.times.get(each, math.inf), default=None)
        for choice in [each for each in comparison.runs if each.backend != ORIGINAL and each != fastest]:
            if self.times.get(choice, math.inf) > NEAR * self.best_beside(choice):
                del comparison.runs[choice]

    def is_asked(self, choice: Choice) -> bool:
        """Whether a choice may be the result."""
        return choice.backend in self.names and choice.precision in self.precisions

    def decide(self) -> BackendResult:
        """Time those that are left interleaved, and return the fastest."""
        self.progress(
            f"{self.spent:.0f} of {self.seconds:g} s: {counted(len(self.comparison.runs), 'choice')} in turns"
        )
        self.comparison.time(ROUNDS, max(0.0, self.seconds - self.spent))
        while True:
            fastest = self.comparison.fastest(self.names, self.precisions)
            if self.comparison.keeps_answers(fastest.choice):
                self.align(fastest)
                return fastest

    def align(self, fastest: BackendResult) -> None:
        """Give choices that were timed once as many times the seconds of the fastest as they took beside it: a machine
        is faster at some times than at others.
        """
        results, pace = self.comparison.results, fastest.seconds / self.times.get(fastest.choice, fastest.seconds)
        for choice, result in results.items():
            if choice in self.times and not result.in_turns:
                results[choice] = replace(result, seconds=self.times[choice] * pace)
