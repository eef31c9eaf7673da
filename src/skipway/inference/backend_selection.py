"""Backends built for one network and one example: compared with the original, timed in turn, the fastest searched."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.inference.answer_check import AnswerChange, AnswerCheck
from skipway.inference.backends import BACKENDS, INT8, ORIGINAL, Backend, Choice, Run, call_with
from skipway.inference.batch_pieces import BatchAxes, build_run, find_batch_axes, halve, halve_whole, randomize
from skipway.inference.hooks import copy_network, share_hooks
from skipway.inference.inputs import root_cause
from skipway.inference.outputs import (
    has_numbers,
    in_container,
    in_type,
    is_rounding,
    output_difference,
    whole_share,
)
from skipway.inference.quantization import QuantizedNetwork, quantize_checked
from skipway.inference.timer import Candidate, Timing, error_line, median_seconds, time_candidate, time_interleaved
from skipway.surgery.fusion import fuse
from skipway.surgery.preconditions import require_values
from skipway.tracing.containers import map_tensors, tensors_in
from skipway.tracing.example import copy_example
from skipway.tracing.foreign_hooks import foreign_hook
from skipway.tracing.module_state import differing_state, is_changed
from skipway.tracing.samples import is_coarse
from skipway.tracing.watch import watch

__all__ = ["ROUNDS", "TOLERANCES", "BackendComparison", "BackendResult", "quickest", "with_timings"]

TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, INT8: 1e-1}
"""The largest difference over the largest output: rounding through a hundred layers in each type; in int8, between
builds of one quantised network, where a last bit before a layer may round to the next integer.
"""
ROUNDS = 5
"""Timings of each backend; the backends are timed interleaved, and the median counts."""
SECONDS = 30.0
"""Time after which no timing is started: a network that takes seconds is judged by fewer rounds."""
BRIEF = 0.1
"""Seconds of a call below which it is run once before it is timed, for the caches."""
SHORT, REPEATS = 0.02, 5
"""Seconds of a call below which it is timed more often, since it is easily disturbed: five times in place of once, and
in five times as many rounds.
"""


WRITES = "the model writes into its arguments"
WITHOUT_WRITES = "if that is not needed, wrap it in a module that calls it with copies"
WITHOUT_STATE = "leave that out of its forward if it is not needed"
WITHOUT_HOOK = "remove it if it is not needed"


@dataclass(frozen=True)
class BackendResult:
    """Time and accuracy of one choice.

    Args:
        choice: what was built; the backend "original" is the model itself.
        seconds: median of a call in turns with others; of a choice that was given up early, as many times
            those of the fastest as it took then; NaN where it was not timed.
        difference: largest difference from the original's output over its largest value; NaN where it never ran.
        build_seconds: time until the first output.
        note: why the choice is out of the question; empty where it is not.
        tolerance: largest difference that was asked for; None for that of `TOLERANCES`.
        in_turns: whether it was timed in turns with the fastest.
    """

    choice: Choice
    seconds: float = math.nan
    difference: float = math.nan
    build_seconds: float = math.nan
    note: str = ""
    tolerance: float | None = None
    in_turns: bool = False

    @property
    def backend(self) -> str:
        """The name of the backend."""
        return self.choice.backend

    @property
    def precision(self) -> str:
        """The precision of the products."""
        return self.choice.precision


def quickest(results: Iterable[BackendResult]) -> BackendResult:
    """The result of least time; those that were not timed come last."""
    return min(results, key=lambda each: each.seconds if math.isfinite(each.seconds) else math.inf)


def with_timings(
    results: Mapping[Choice, BackendResult], timings: Iterable[Timing], *, in_turns: bool = False
) -> dict[Choice, BackendResult]:
    """Return results with the median seconds of timings that are named by the text of a choice."""
    timed, made, named = dict(results), list(timings), {str(choice): choice for choice in results}
    for timing in made:
        if timing.error:
            timed[named[timing.name]] = replace(timed[named[timing.name]], note=f"failed: {timing.error}")
    for name, seconds in median_seconds(made).items():
        timed[named[name]] = replace(timed[named[name]], seconds=seconds, in_turns=in_turns)
    return timed


def vary(tensor: Tensor) -> Tensor:
    """A tensor of other values that a network is likely to take: halves of floating numbers, of others the largest."""
    if tensor.is_floating_point() or tensor.is_complex():
        return halve(tensor)
    return tensor.amax().expand_as(tensor) if tensor.numel() else tensor


def vary_constant(tensor: Tensor) -> Tensor:
    """A tensor of other values than one that `vary` leaves as it is: random numbers in place of floating zeros, of
    integers the halves, and 1 in place of 0. Truth values stay.
    """
    if not tensor.numel():
        return tensor
    return randomize(tensor) if tensor.is_floating_point() or tensor.is_complex() else halve_whole(tensor)


def end_otherwise(tensor: Tensor) -> Tensor:
    """A mask that is the opposite along the end of its last axis; another tensor stays."""
    if tensor.dtype != torch.bool or not tensor.ndim:
        return tensor
    return torch.cat([tensor[..., :-1], ~tensor[..., -1:]], -1)


def call_copied(network: nn.Module, example: Any) -> Any:
    """What a network returns for a copy of an example: itself a copy, since the next call may write into it."""
    return map_tensors(torch.clone, call_with(network, map_tensors(torch.clone, example)))


class BackendComparison:
    """Backends built for one model and one example, compared with the original and timed interleaved.

    Args:
        model: the original; it stays as it is.
        example: what it is called with: a tensor, a tuple of arguments or a dict of them; a copy is kept.
        check: held-out images on which answers have to be kept.
        quantized: the network in int8; see also `quantize`.
        clock: returns seconds.

    Raises:
        SkipwayError: the model cannot be copied and folded, fails on the example, or returns no tensor, or NaN alone.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        check: AnswerCheck | None = None,
        quantized: QuantizedNetwork | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        model, self.clock = require_values(model, "optimize"), clock
        # a file holds the whole storage of what it holds part of: the example may be a view of all images
        self.example = example = copy_example(example)
        self.check, self.quantized, self.refusal = check, quantized, ""
        self.answers: dict[Choice, AnswerChange] = {}
        self.changed: dict[Choice, float] = {}
        self.pristine = copy_network(model).eval()
        self.original = copy_network(self.pristine)
        self.expected: list[tuple[Any, Any, Any]] = []
        self.writes = False
        self.overwritten: list[str] = []
        self.written = self.call_original()
        self.state = self.find_state()
        self.folded = share_hooks(fuse(model), model)  # after the copies that `find_state` makes for a while
        if not self.state:  # one copy is as good as the other
            self.pristine = self.original
        hooked = foreign_hook(self.original)
        obstacles = (
            (self.writes, WRITES, WITHOUT_WRITES),
            (self.state, self.state, WITHOUT_STATE),
            (hooked, f"{hooked} has a forward hook", WITHOUT_HOOK),
        )
        self.whole, self.remedy = next(((what, remedy) for found, what, remedy in obstacles if found), ("", ""))
        self.axes: BatchAxes | None = None
        if not self.whole:
            self.axes = find_batch_axes(self.original, example, self.expected[0][1])
        plain = Choice(ORIGINAL)
        self.runs: dict[Choice, Run] = {plain: self.original}
        self.results = {plain: BackendResult(plain, difference=0.0, build_seconds=0.0)}
        self.judged: dict[Choice, float] = {}
        device = next(tensors_in(example)).device
        self.finish = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None

    @torch.no_grad()
    def call_original(self) -> list[str]:
        """Call the original with the example and, if it takes that, with random input; keep what it returns and what
        it leaves in its arguments. Return what then differs from the model that was never called.

        Raises:
            SkipwayError: it fails on the example, or returns no tensor, or NaN alone.
        """
        kind, written = type(self.original).__name__, list[str]()
        for given in (self.example, *self.other_examples()):
            fresh = map_tensors(torch.clone, given)
            try:
                output = call_with(self.original, fresh)
            except Exception as error:  # a network raises whatever it likes
                if self.expected and given is not self.example:
                    continue  # it takes no random numbers: indices, or a range that it asserts
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(given))
                why = f"this {kind} fails on its example of shape {shapes}: {root_cause(error)}"
                if isinstance(error, TypeError) and isinstance(given, Mapping):
                    why += "; a dict gives arguments by name, and one for a network that takes a dict is (dict,)"
                raise SkipwayError(why) from error
            if not any(True for _ in tensors_in(output)):
                raise SkipwayError(f"this {kind} returns no tensor that could be compared")
            self.writes |= is_changed(given, fresh)
            written = written or differing_state(self.pristine, self.original)
            if written:  # it may return what the next call writes into
                output = map_tensors(torch.clone, output)
            if has_numbers(output):
                self.expected.append((given, output, fresh))
            elif not self.expected:
                raise SkipwayError(
                    f"this {kind} returns no values, or nothing but NaN, on its example, so that nothing could be "
                    "compared; give an example like the data that is to come"
                )
        return written

    @torch.no_grad()
    def find_state(self) -> str:
        """What of earlier calls later ones may depend on, in words; empty where they depend on nothing.

        What a call writes may be what any call writes, a table for example, or what the next call overwrites before it
        reads it. So another copy is called with other inputs in another order, and more often, and both with the
        example at the end: where they come to the same state and return the same, nothing is kept. `overwritten` is
        what then differed before that last call.
        """
        wrote = f"a call writes into {self.written[0]}" if self.written else ""
        expected, coarse = self.expected[0][1], is_coarse(self.original, self.example)
        try:
            if not wrote:
                same = is_rounding(expected, call_copied(self.original, self.example), coarse)
                return "" if same else "a second call with one input returns something else"
            other = map_tensors(vary, self.example)
            if not is_changed(self.example, other):
                other = map_tensors(vary_constant, self.example)
            if not is_changed(self.example, other):
                return wrote
            network = copy_network(self.pristine)
            outputs = [call_copied(network, given) for given in (other, self.example, other)]
            last = call_copied(self.original, self.example)
            overwritten = differing_state(self.original, network)
            outputs.append(call_copied(network, self.example))
            same = is_rounding(expected, outputs[1], coarse) and is_rounding(last, outputs[-1], coarse)
            if same and is_changed(last, outputs[-1]):  # rounding, unless first calls return the same to the bit
                same = is_changed(expected, call_copied(copy_network(self.pristine), self.example))
        except Exception as error:  # a network raises whatever it likes, and may return other tensors
            return wrote or f"a second call with one input fails or returns something else ({error_line(error)})"
        if found := differing_state(self.original, network):
            self.written = list(dict.fromkeys((*self.written, *found)))
            return f"a call writes into {found[0]}"
        self.overwritten = overwritten
        return "" if same else wrote

    def other_examples(self) -> Iterator[Any]:
        """Inputs of the same shapes that the model need not take: random ones for a floating tensor, and masks that
        end otherwise, since a network may read them (`torch.nn.TransformerEncoder` writes zeros where a mask hides).
        """
        x = self.example
        if isinstance(x, Tensor) and x.is_floating_point():
            yield torch.randn(x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x)
        if any(each.dtype == torch.bool and each.ndim for each in tensors_in(x)):
            yield map_tensors(end_otherwise, x)

    def fresh(self, example: Any) -> Any:
        """The example, or a copy of it for a model that writes into its input."""
        return map_tensors(torch.clone, example) if self.writes else example

    @cached_property
    def reader(self) -> str | None:
        """The part of the model that reads values of what depends on the input, so that Python can decide by them."""
        try:
            program = watch(self.original, map_tensors(torch.clone, self.example))
            readers = program.readers + program.selectors  # shapes that follow may be kept, too
        except SkipwayError:  # what cannot be watched is compared like everything else
            return None
        return (
            f"{readers[0] or 'the model'} ({type(self.original.get_submodule(readers[0])).__name__})"
            if readers
            else None
        )

    @property
    def writes_packed(self) -> bool:
        """Whether calls write into the weight of a `torch.nn.Linear`."""
        owners = [(self.original.get_submodule(name.rpartition(".")[0]), name.split(".")[-1]) for name in self.written]
        return any(isinstance(owner, nn.Linear) and name == "weight" for owner, name in owners)

    def shares_state(self, choice: Choice) -> bool:
        """Whether threads that compute at once would write into one network: one thread may read what another wrote."""
        return bool(self.written) and (choice.backend == ORIGINAL or BACKENDS[choice.backend].runs_python)

    @property
    def lost(self) -> str:
        """What backends lose that run no Python, and the way out."""
        return f"{self.whole}, which is lost in this backend; {self.remedy}"

    def add(self, choice: Choice, tolerance: float | None = None, backend: Backend | None = None) -> None:
        """Build a choice and compare its output with the original's; what goes wrong becomes its result's note.

        Args:
            choice: what to build.
            tolerance: largest difference allowed over the largest output.
            backend: that builds it; by default the one that the choice names.
        """
        backend, start = backend or BACKENDS[choice.backend], self.clock()
        result = self.results[choice] = BackendResult(choice, tolerance=tolerance)
        others = [*self.original.parameters(), *tensors_in(self.expected[0][1])]
        problem = backend.obstacle(self.example, choice, self.quantized is not None or self.refusal != "", others)
        refused = problem or (self.refusal if choice.precision == INT8 else "")
        if not refused and not backend.runs_python and self.whole:
            refused = self.lost
        if not refused and self.state and (backend.frozen or (backend.packs and self.writes_packed)):
            refused = f"{self.state}, and this backend makes constants of what a network holds; {WITHOUT_STATE}"
        if not refused and choice.streams > 1 and self.shares_state(choice):
            refused = f"a call writes into {self.written[0]}, which the threads of streams would share; {WITHOUT_STATE}"
        if refused:
            self.results[choice] = replace(result, note=str(refused))
            return
        if backend.keeps_path and self.reader is not None:
            why = f"{self.reader} reads values of its input, and this backend keeps what the example led to"
            self.results[choice] = replace(result, note=why)
            return
        try:
            with torch.no_grad():
                run = self.build(choice, backend)
                gap, note = self.judge(choice, run, tolerance)
        except Exception as error:  # other libraries raise errors of their own
            self.results[choice] = replace(result, note=f"failed: {error_line(error)}")
            return
        if not note:
            self.runs[choice] = run
        self.results[choice] = replace(result, difference=gap, build_seconds=self.clock() - start, note=note)

    def build(self, choice: Choice, backend: Backend) -> Run:
        """Build a choice of the folded network, of a copy of it where that or calls change it."""
        if choice.precision == INT8 and self.quantized is not None:
            backend = self.quantized.on(backend)
        expected = self.expected[0][1]
        if not backend.any_call:
            one = backend.build
            backend = replace(backend, build=lambda net, given, asked: in_container(expected, one(net, given, asked)))
        model = copy_network(self.folded) if backend.alters or self.state else self.folded
        run = build_run(backend, model, self.fresh(self.example), choice, self.axes, self.original)
        return in_type(expected, run)

    @torch.no_grad()
    def at_start(self, choice: Choice) -> tuple[Run, nn.Module]:
        """A choice that was built, and the original, in the state of the model: both anew where calls change it."""
        if not self.state:
            return self.runs[choice], self.original
        original = copy_network(self.pristine)
        return original if choice.backend == ORIGINAL else self.build(choice, BACKENDS[choice.backend]), original

    def judge(self, choice: Choice, run: Run, tolerance: float | None) -> tuple[float, str]:
        """Return the largest difference from the original, in int8 from the network that was checked, and why it is too
        large; empty where it is not. What the original writes into its arguments counts as what it returns.
        """
        allowed, gap, share = TOLERANCES[choice.precision] if tolerance is None else tolerance, 0.0, 0.0
        where = ""
        pairs = self.expected
        if choice.precision == INT8 and self.quantized is not None:
            allowed, pairs = TOLERANCES[INT8], [(self.quantized.example, self.quantized.outputs, None)]
        for given, expected, written in pairs:
            fresh = self.fresh(given)
            start = self.clock()
            output = call_with(run, fresh)
            self.finish()
            self.judged[choice] = self.clock() - start  # of the last one: the first may compile
            found = output_difference(expected, output)
            if found > max(gap, allowed) and given is not self.example and not isinstance(given, Tensor):
                where = ", where a mask ends otherwise than the example's"
            gap, share = max(gap, found), max(share, whole_share(expected, output))
            if self.writes and written is not None and (lost := output_difference(written, fresh)) > allowed:
                return lost, f"{WRITES}, and this choice writes something else, or into a copy; {WITHOUT_WRITES}"
        self.changed[choice] = share
        if gap <= allowed:
            return gap, ""
        if gap == share:
            found = f"{gap:.1%} of the whole numbers that it returns (classes, tokens)"
            return gap, f"{found} are not the original's, more than {allowed:.1%}"
        return gap, f"differs by {gap:.1e} of the largest output, more than {allowed:g}{where}"

    def remarks(self, choice: Choice) -> list[str]:
        """What there is to know about a choice that agrees."""
        found = []
        if share := self.changed.get(choice, 0.0):
            found.append(f"{share:.2%} of the whole numbers that it returns (classes, tokens) are not the original's")
        if self.state:
            found.append(f"{self.state}: what is returned may depend on the calls before; it starts as the model was")
        elif self.overwritten and self.shares_state(choice):
            found.append(f"every call writes into {self.overwritten[0]}: one thread at a time may call it")
        return found

    def quantize(self, calibration: Tensor, tell: Callable[[str], None], patience: float = math.inf) -> None:
        """Quantise the network for choices in int8; where that fails, costs answers, or takes longer than `patience`
        seconds once all layers are in integers, `refusal` says so.
        """
        assert self.check is not None
        try:
            if self.whole:
                raise SkipwayError(f"precision='int8': {self.lost}")
            if self.reader is not None:
                raise SkipwayError(f"precision='int8': {self.reader} reads values of its input")
            given = self.folded, self.example, self.axes, calibration, self.check, tell, patience
            self.quantized = quantize_checked(*given)
        except SkipwayError as error:
            self.refusal = str(error)

    def keeps_answers(self, choice: Choice) -> bool:
        """Whether a choice gives the original's answers on held-out images; the change is kept, and why it does not."""
        if self.check is None or choice not in self.runs:
            return True
        change = self.answers[choice] = self.check.change(self.at_start(choice)[0])
        if not change.kept:
            self.results[choice] = replace(self.results[choice], note=change.refusal)
            del self.runs[choice]
        return change.kept

    def candidate(self, choice: Choice) -> Candidate:
        """What the timer calls."""
        run = self.runs[choice]
        return Candidate(str(choice), lambda: call_with(run, self.fresh(self.example)), finish=self.finish)

    @torch.no_grad()
    def time_once(self, choice: Choice) -> float:
        """Time a choice that agrees by a single call, and return the seconds; infinite where it fails."""
        last = self.results[choice].seconds
        last = last if math.isfinite(last) else self.judged.get(choice, 0.0)
        timing = time_candidate(self.candidate(choice), 0, self.clock, warm_up=last < BRIEF)
        for _ in range(REPEATS - 1 if timing.seconds < SHORT else 0):
            again = time_candidate(self.candidate(choice), 0, self.clock, warm_up=False)
            timing = min(timing, again, key=lambda each: -1.0 if each.error else each.seconds)
        self.results = with_timings(self.results, [timing])
        if timing.error:
            del self.runs[choice]
        return math.inf if timing.error else timing.seconds

    @torch.no_grad()
    def time(self, rounds: int = ROUNDS, seconds: float = SECONDS) -> None:
        """Time those that agree, up to `rounds` times each within `seconds`; much slower ones are dropped early."""
        brief = all(self.results[choice].seconds < SHORT for choice in self.runs)
        candidates, rounds = [self.candidate(choice) for choice in self.runs], rounds * (REPEATS if brief else 1)
        timings = time_interleaved(candidates, rounds, limit=seconds, clock=self.clock)
        self.results = with_timings(self.results, timings, in_turns=True)

    def fastest(self, names: Sequence[str], precisions: Sequence[str]) -> BackendResult:
        """Return the fastest result that agrees, of some backends and precisions.

        Raises:
            SkipwayError: none agrees.
        """
        results = [each for each in self.results.values() if each.backend in names and each.precision in precisions]
        agreeing = [each for each in results if not each.note and each.choice in self.runs]
        if not agreeing:
            notes = "; ".join(f"{each.choice}: {each.note}" for each in results if each.note)
            raise SkipwayError(f"no backend agrees with the model: {notes}")
        return quickest(agreeing)
