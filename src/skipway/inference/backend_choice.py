"""`optimize(model, example)`: a network for inference, by the quickest backend that agrees with the original."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.inference.backends import BACKENDS, PRECISIONS, Backend, Run
from skipway.inference.race import Entrant, medians, race, reason
from skipway.surgery.fusion import folding
from skipway.surgery.preconditions import require_operable
from skipway.surgery.verification import difference

__all__ = ["Attempt", "Optimized", "optimize"]

TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}
"""The largest difference over the largest output: rounding through a hundred layers in each type."""
ROUNDS = 5
"""How often each backend is timed; backends take turns, and the median counts."""
SECONDS = 30.0
"""After which no more turns begin: a network that takes seconds is judged by fewer rounds."""


@dataclass(frozen=True)
class Attempt:
    """What became of one backend.

    Args:
        backend: its name.
        seconds: the median of a call, NaN where it was not timed.
        difference: its largest difference from the original over the largest output, NaN where it never ran.
        build: seconds until its first output.
        note: why it was not taken into account; empty where it was.
    """

    backend: str
    seconds: float = float("nan")
    difference: float = float("nan")
    build: float = float("nan")
    note: str = ""


@dataclass(eq=False)
class Optimized:
    """A network for inference; called like the one that it was made from, with tensors of any batch.

    The backend is made for inputs of the example's shape and type; others go through the folded network in plain torch.

    Args:
        backend: the name of the one that was taken.
        precision: what products are computed in.
        report: one attempt per backend that was asked for, the original ("original") first.
    """

    backend: str
    precision: str
    report: list[Attempt]
    run: Run = field(repr=False)
    folded: nn.Module = field(repr=False)
    example: Tensor = field(repr=False)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        like = x.shape == self.example.shape and x.dtype == self.example.dtype and x.device == self.example.device
        return self.run(x) if like else self.folded(x)

    @property
    def speedup(self) -> float:
        """How many times as quick as the original, on the example."""
        taken = next(each for each in self.report if each.backend == self.backend)
        return self.report[0].seconds / taken.seconds

    def __str__(self) -> str:
        lines = [f"{self.backend}, {self.precision}: {self.speedup:.2f} times as quick as the original"]
        for each in self.report:
            figures = f"{each.seconds * 1e3:8.2f} ms, differs by {each.difference:.1e}, ready in {each.build:.1f} s"
            lines.append(f"  {each.backend:<12} {each.note or figures}")
        return "\n".join(lines)


def optimize(
    model: nn.Module,
    example: Tensor,
    *,
    precision: str = "float32",
    backends: Sequence[str] | None = None,
    tolerance: float | None = None,
) -> Optimized:
    """A network for inference: folded, laid out and packed for the machine, by the quickest backend that is installed.

    A copy of the model goes to eval and is folded (`skipway.fold`: norms and gains multiplied into the weights). Every
    backend is built for the example's shape, compared with the original on the example and on other random input, and
    timed in turn with the others; of those that agree the quickest is taken. What fails or differs is in the report
    with its reason, and never ends the search while one is left. The model itself stays as it is.

    Args:
        model: any module that takes one tensor and puts one out.
        example: an input as it will be called with, of the batch size that counts; on the model's device.
        precision: "float32" or "bfloat16", what products are computed in; inputs and outputs keep their type.
        backends: names from `speed.BACKENDS`; by default all that are installed. A single one is taken if it agrees.
        tolerance: the largest difference allowed over the largest output; by default 1e-3 in float32 and 5e-2 in
            bfloat16.

    Raises:
        MissingExtraError: a backend that was asked for by name is not installed.
        SkipwayError: an unknown precision or backend, an output that is no tensor, or no backend that agrees.

    >>> import skipway as sw
    >>> fast = optimize(sw.build("resnet20"), torch.randn(2, 3, 32, 32), backends=["eager"])
    >>> fast.backend, fast(torch.randn(2, 3, 32, 32)).shape
    ('eager', torch.Size([2, 10]))
    """
    if precision not in PRECISIONS:
        raise SkipwayError(f"precision={precision!r}: the rule is one of {', '.join(PRECISIONS)}")
    allowed = TOLERANCES[precision] if tolerance is None else tolerance
    model = require_operable(model)
    folded = folding(model, copy=True).model
    trial = Trial(model, folded, example, precision, allowed)
    for name in BACKENDS if backends is None else backends:
        backend = BACKENDS[name]
        if (problem := backend.obstacle(example, precision)) is None:
            trial.enter(name, backend)
        elif backends is not None:
            raise problem
        else:
            trial.attempts[name] = Attempt(name, note=str(problem))
    trial.time()
    best = trial.best()
    return Optimized(best, precision, list(trial.attempts.values()), trial.runs[best], folded, example)


class Trial:
    """Backends that agree with the original, timed in turn.

    Args:
        model: the original.
        folded: what backends are built from; each takes a copy.
        example: what is called.
        precision: of the products.
        tolerance: how far outputs may differ.
    """

    def __init__(self, model: nn.Module, folded: nn.Module, example: Tensor, precision: str, tolerance: float) -> None:
        self.folded, self.example, self.precision, self.tolerance = folded, example, precision, tolerance
        generator = torch.Generator().manual_seed(0)
        other = torch.randn(example.shape, generator=generator).to(example) if example.is_floating_point() else example
        original = copy.deepcopy(model).eval()
        self.cases = []
        with torch.no_grad():
            for given in (example, other):
                output = original(given)
                if not isinstance(output, Tensor):
                    raise SkipwayError(
                        f"{type(model).__name__} puts out a {type(output).__name__}: the rule is a tensor"
                    )
                self.cases.append((given, output))
        self.runs: dict[str, Run] = {"original": original}
        self.attempts = {"original": Attempt("original", difference=0.0, build=0.0)}

    @torch.no_grad()
    def enter(self, name: str, backend: Backend) -> None:
        """Build a backend and compare it with the original."""
        start = time.perf_counter()
        try:
            run = backend.build(copy.deepcopy(self.folded), self.example, self.precision)
            gap = max(difference([expected], [run(given)]) for given, expected in self.cases)
        except Exception as error:  # whatever another library raises
            self.attempts[name] = Attempt(name, note=f"failed: {reason(error)}")
            return
        attempt = Attempt(name, difference=gap, build=time.perf_counter() - start)
        if not gap <= self.tolerance:
            attempt = replace(attempt, note=f"differs by {gap:.1e} of the largest output, over {self.tolerance:g}")
        else:
            self.runs[name] = run
        self.attempts[name] = attempt

    @torch.no_grad()
    def time(self) -> None:
        """The median of up to `ROUNDS` turns of each in `SECONDS`, interleaved; the much slower ones leave early."""
        finish = partial(torch.cuda.synchronize, self.example.device) if self.example.is_cuda else lambda: None
        entrants = [Entrant(name, partial(run, self.example), finish=finish) for name, run in self.runs.items()]
        turns = list(race(entrants, ROUNDS, limit=SECONDS))
        for turn in turns:
            if turn.error:
                self.attempts[turn.name] = replace(self.attempts[turn.name], note=f"failed: {turn.error}")
        for name, middle in medians(turns).items():
            self.attempts[name] = replace(self.attempts[name], seconds=middle)

    def best(self) -> str:
        """The quickest that agrees."""
        agreeing = [name for name in self.runs if name != "original" and not self.attempts[name].note]
        if not agreeing:
            notes = "; ".join(f"{each.backend}: {each.note}" for each in self.attempts.values() if each.note)
            raise SkipwayError(f"no backend agrees with the model: {notes}")
        return min(agreeing, key=lambda name: self.attempts[name].seconds)
