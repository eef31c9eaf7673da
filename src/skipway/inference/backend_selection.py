"""`optimize(model, example)`: a network for inference on the fastest backend that agrees with the original."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from skipway.errors import SkipwayError
from skipway.inference.backends import BACKENDS, PRECISIONS, Backend, Run, call_with
from skipway.inference.inputs import root_cause
from skipway.inference.timer import Candidate, Timing, error_line, median_seconds, time_interleaved
from skipway.surgery.fusion import fuse
from skipway.surgery.preconditions import require_operable
from skipway.surgery.verification import difference
from skipway.tracing.containers import tensors_in
from skipway.tracing.example import Example, as_example
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
    """A network for inference; called like the one it was made from, with inputs of any batch size, and it returns what
    that returns.

    The backend is built for arguments like the example's: tensors of the same shapes, types and devices, and equal
    other values. All others, a further mask or a cache, go through the folded network in plain torch.

    Args:
        backend: name of the chosen backend.
        precision: of the products.
        report: one result per backend, the original first.
        run: the chosen backend.
        folded: the folded network.
        example: what the backend was built for.
    """

    backend: str
    precision: str
    report: list[BackendResult]
    run: Run = field(repr=False)
    folded: nn.Module = field(repr=False)
    example: Any = field(repr=False)

    def __post_init__(self) -> None:
        self.kinds = call_with(lambda *args, **kwargs: kinds_of(args, kwargs), self.example)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.run if kinds_of(args, kwargs) == self.kinds else self.folded)(*args, **kwargs)

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
        model: any module.
        example: what the model is called with, in the batch size to optimize for, on the model's device. openvino and
            onnxruntime take one tensor and return one; the others take and return whatever the model does.
        precision: "float32" or "bfloat16", of the products; inputs and outputs keep their type, and caches that are
            returned have that of the products.
        backends: names from `skipway.inference.BACKENDS`; by default all that are installed.
        tolerance: largest difference allowed over the largest output; by default 1e-3 in float32 and 5e-2 in bfloat16.

    Raises:
        MissingExtraError: a backend given by name is not installed.
        SkipwayError: an unknown precision or backend, a backend given by name that takes one tensor only, an output
            without tensors, or no backend that agrees.

    >>> import skipway as sw
    >>> fast = optimize(sw.build("resnet20"), torch.randn(2, 3, 32, 32), backends=["eager"])
    >>> fast.backend, fast(torch.randn(2, 3, 32, 32)).shape
    ('eager', torch.Size([2, 10]))
    """
    if precision not in PRECISIONS:
        raise SkipwayError(f"precision={precision!r}: the rule is one of {', '.join(PRECISIONS)}")
    given = as_example(example)
    given = given[0] if isinstance(given, tuple) and len(given) == 1 and isinstance(given[0], Tensor) else given
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


def kinds_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments with shape, type and device in place of each tensor; of two that are equal, a backend takes both."""
    return tree_map_only(Tensor, lambda x: (tuple(x.shape), x.dtype, x.device), (args, kwargs))


def in_type(expected: Any, run: Run) -> Run:
    """A backend whose output has the types that the original's has: those of its tensors, one by one where there are as
    many.
    """
    types = [leaf.dtype for leaf in tree_leaves(expected) if isinstance(leaf, Tensor)]

    def typed(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten(run(*args, **kwargs))
        held = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        wanted = iter(types if len(types) == len(held) else [leaf.dtype for leaf in held])
        return tree_unflatten(
            [leaf.to(next(wanted)) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure
        )

    return typed


def output_difference(expected: Any, output: Any) -> float:
    """Largest difference of two outputs over the largest value of each tensor.

    Raises:
        SkipwayError: they hold other tensors.
    """
    before, after = list(tensors_in(expected)), list(tensors_in(output))
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        raise SkipwayError(f"it returns {len(after)} tensors, or of other shapes, for the original's {len(before)}")
    return difference(before, after)


class BackendComparison:
    """Backends built for one model and one example, compared with the original and timed interleaved.

    Args:
        model: the original; it stays as it is.
        example: what it is called with: a tensor, a tuple of arguments or a dict of them.

    Raises:
        SkipwayError: the model cannot be copied and folded, fails on the example, or returns no tensor.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        model = require_operable(model)
        self.example, self.folded = example, fuse(model)
        original = copy_module(model).eval()
        self.expected = []
        with torch.no_grad():
            for given in (example, self.other_example()):
                try:
                    output = call_with(original, given)
                except Exception as error:  # a network raises whatever it likes
                    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(given))
                    raise SkipwayError(
                        f"this {type(model).__name__} fails on its example of shape {shapes}: {root_cause(error)}"
                    ) from error
                if not any(True for _ in tensors_in(output)):
                    raise SkipwayError(f"this {type(model).__name__} returns no tensor that could be compared")
                self.expected.append((given, output))
        self.runs: dict[tuple[str, str], Run] = {(ORIGINAL, "float32"): original}
        self.results = {(ORIGINAL, "float32"): BackendResult(ORIGINAL, difference=0.0, build_seconds=0.0)}

    def other_example(self) -> Any:
        """Random input of the same shape; the example itself where it is no floating tensor."""
        x = self.example
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)

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
            run = in_type(self.expected[0][1], backend.build(copy_module(self.folded), self.example, precision))
            gap = max(output_difference(expected, call_with(run, given)) for given, expected in self.expected)
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
        device = next(tensors_in(self.example)).device
        finish = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
        candidates = [
            Candidate(" ".join(key), partial(call_with, run, self.example), finish=finish)
            for key, run in self.runs.items()
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
