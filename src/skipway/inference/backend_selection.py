"""`optimize(model, example)`: a network for inference on the fastest backend that agrees with the original."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.inference.backends import BACKENDS, PRECISIONS, Backend, Run
from skipway.inference.inputs import call_for_tensor, single_tensor
from skipway.inference.timer import Candidate, Timing, error_line, median_seconds, time_interleaved
from skipway.surgery.fusion import fuse
from skipway.surgery.preconditions import require_operable
from skipway.surgery.verification import difference
from skipway.tracing.example import Example
from skipway.tracing.module_state import copy_module

__all__ = [
    "ORIGINAL",
    "ROUNDS",
    "TOLERANCES",
    "BackendComparison",
    "BackendResult",
    "OptimizedModel",
    "optimize",
    "with_timings",
]

TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}
"""The largest difference over the largest output: rounding through a hundred layers in each type."""
ROUNDS = 5
"""Timings of each backend; the backends are timed interleaved, and the median counts."""
SECONDS = 30.0
"""Time after which no timing is started: a network that takes seconds is judged by fewer rounds."""
ORIGINAL = "original"
"""Name of the model itself among the backends."""


@dataclass(frozen=True)
class BackendResult:
    """Time and accuracy of one backend.

    Args:
        backend: its name, or "original" for the model itself.
        precision: of the products.
        seconds: median of a call; NaN where it was not timed.
        difference: largest difference from the original's output over its largest value; NaN where it never ran.
        build_seconds: time until the first output.
        note: why the backend is out of the question; empty where it is not.
    """

    backend: str
    precision: str = "float32"
    seconds: float = math.nan
    difference: float = math.nan
    build_seconds: float = math.nan
    note: str = ""


@dataclass(eq=False)
class OptimizedModel:
    """A network for inference; called like the one it was made from, with tensors of any batch size.

    The backend is built for inputs of the example's shape, type and device. Others go through the folded network in
    plain torch.

    Args:
        backend: name of the chosen backend.
        precision: of the products.
        report: one result per backend, the original first.
        run: the chosen backend.
        folded: the folded network.
        example: the input that the backend was built for.
    """

    backend: str
    precision: str
    report: list[BackendResult]
    run: Run = field(repr=False)
    folded: nn.Module = field(repr=False)
    example: Tensor = field(repr=False)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        like = x.shape == self.example.shape and x.dtype == self.example.dtype and x.device == self.example.device
        return self.run(x) if like else self.folded(x)

    @property
    def speedup(self) -> float:
        """Seconds of the original over those of the chosen backend, on the example."""
        chosen = next(each for each in self.report if each.backend == self.backend)
        return self.report[0].seconds / chosen.seconds

    def __str__(self) -> str:
        lines = [f"{self.backend} in {self.precision}: {self.speedup:.2f} times as fast as the original"]
        for each in self.report:
            figures = (
                f"{each.seconds * 1e3:8.2f} ms, differs by {each.difference:.1e}, built in {each.build_seconds:.1f} s"
            )
            lines.append(f"  {each.backend:<12} {each.note or figures}")
        return "\n".join(lines)


def optimize(
    model: nn.Module,
    example: Example,
    *,
    precision: str = "float32",
    backends: Sequence[str] | None = None,
    tolerance: float | None = None,
) -> OptimizedModel:
    """Return a new network for inference on the fastest installed backend that agrees with the model; the model stays
    as it is.

    A copy of the model is put into eval mode and folded (`skipway.fuse`: norms and gains multiplied into the weights).
    Every backend is built for the example's shape, compared with the original on the example and on random input of its
    shape, and timed interleaved with the others; the fastest that agrees is chosen. A backend that fails or differs is
    in the report with the reason, and the others go on.

    Args:
        model: any module that takes one tensor and returns one.
        example: an input of the batch size to optimize for, on the model's device: a tensor, or a `DataLoader` whose
            first batch is one.
        precision: "float32" or "bfloat16", of the products; inputs and outputs keep their type.
        backends: names from `skipway.inference.BACKENDS`; by default all that are installed.
        tolerance: largest difference allowed over the largest output; by default 1e-3 in float32 and 5e-2 in bfloat16.

    Raises:
        MissingExtraError: a backend given by name is not installed.
        SkipwayError: an unknown precision or backend, an input or output that is not one tensor, or no backend that
            agrees.

    >>> import skipway as sw
    >>> fast = optimize(sw.build("resnet20"), torch.randn(2, 3, 32, 32), backends=["eager"])
    >>> fast.backend, fast(torch.randn(2, 3, 32, 32)).shape
    ('eager', torch.Size([2, 10]))
    """
    if precision not in PRECISIONS:
        raise SkipwayError(f"precision={precision!r}: the rule is one of {', '.join(PRECISIONS)}")
    given = single_tensor(example)
    comparison = BackendComparison(model, given)
    for name in BACKENDS if backends is None else backends:
        problem = BACKENDS[name].obstacle(given, precision)
        if problem is not None and backends is not None:
            raise problem
        comparison.add(name, BACKENDS[name], precision, tolerance)
    comparison.time()
    best = comparison.fastest()
    return OptimizedModel(
        best.backend,
        precision,
        list(comparison.results.values()),
        comparison.runs[best.backend, precision],
        comparison.folded,
        given,
    )


def with_timings(
    results: Mapping[tuple[str, str], BackendResult], timings: Iterable[Timing]
) -> dict[tuple[str, str], BackendResult]:
    """Return results by backend and precision with the median seconds of timings named "BACKEND PRECISION"."""
    timed, made = dict(results), list(timings)
    for timing in made:
        if timing.error:
            backend, precision = timing.name.split(" ")
            timed[backend, precision] = replace(timed[backend, precision], note=f"failed: {timing.error}")
    for name, seconds in median_seconds(made).items():
        backend, precision = name.split(" ")
        timed[backend, precision] = replace(timed[backend, precision], seconds=seconds)
    return timed


def in_type(kind: torch.dtype, run: Run) -> Run:
    """A backend whose output has the type that the original's has."""
    return lambda x: run(x).to(kind)


class BackendComparison:
    """Backends built for one model and one example, compared with the original and timed interleaved.

    Args:
        model: the original; it stays as it is.
        example: the input.

    Raises:
        SkipwayError: the model cannot be copied and folded, or its output is not a tensor.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        model = require_operable(model)
        self.example, self.folded = example, fuse(model)
        generator = torch.Generator().manual_seed(0)
        other = torch.randn(example.shape, generator=generator).to(example) if example.is_floating_point() else example
        original = copy_module(model).eval()
        self.expected = []
        with torch.no_grad():
            for given in (example, other):
                self.expected.append((given, call_for_tensor(original, given)))
        self.runs: dict[tuple[str, str], Run] = {(ORIGINAL, "float32"): original}
        self.results = {(ORIGINAL, "float32"): BackendResult(ORIGINAL, difference=0.0, build_seconds=0.0)}

    @torch.no_grad()
    def add(self, name: str, backend: Backend, precision: str, tolerance: float | None = None) -> None:
        """Build a backend and compare its output with the original's; what goes wrong becomes its result's note."""
        key, start = (name, precision), time.perf_counter()
        allowed = TOLERANCES[precision] if tolerance is None else tolerance
        result = self.results[key] = BackendResult(name, precision)
        if (problem := backend.obstacle(self.example, precision)) is not None:
            self.results[key] = replace(result, note=str(problem))
            return
        try:
            run = in_type(self.expected[0][1].dtype, backend.build(copy_module(self.folded), self.example, precision))
            gap = max(difference([expected], [run(given)]) for given, expected in self.expected)
        except Exception as error:  # other libraries raise errors of their own
            self.results[key] = replace(result, note=f"failed: {error_line(error)}")
            return
        result = replace(result, difference=gap, build_seconds=time.perf_counter() - start)
        if gap <= allowed:
            self.runs[key] = run
        else:
            result = replace(result, note=f"differs by {gap:.1e} of the largest output, more than {allowed:g}")
        self.results[key] = result

    @torch.no_grad()
    def time(self, rounds: int = ROUNDS, seconds: float = SECONDS) -> None:
        """Time those that agree, up to `rounds` times each within `seconds`; much slower ones are dropped early."""
        finish = partial(torch.cuda.synchronize, self.example.device) if self.example.is_cuda else lambda: None
        candidates = [
            Candidate(" ".join(key), partial(run, self.example), finish=finish) for key, run in self.runs.items()
        ]
        self.results = with_timings(self.results, time_interleaved(candidates, rounds, limit=seconds))

    def fastest(self) -> BackendResult:
        """Return the fastest backend that agrees, the original not counted.

        Raises:
            SkipwayError: none agrees.
        """
        agreeing = [each for each in self.results.values() if each.backend != ORIGINAL and not each.note]
        if not agreeing:
            notes = "; ".join(f"{each.backend}: {each.note}" for each in self.results.values() if each.note)
            raise SkipwayError(f"no backend agrees with the model: {notes}")
        return min(agreeing, key=lambda each: each.seconds)
