"""Speed of one network on this machine: inference on every backend, and a training step, in every precision."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from skipway.hardware.device import choose_precision
from skipway.inference.backend_search import BackendSearch
from skipway.inference.backend_selection import ROUNDS, BackendComparison, BackendResult, with_timings
from skipway.inference.backends import BACKENDS, ORIGINAL, Backend, Choice, Run
from skipway.inference.timer import Candidate, error_line, time_interleaved
from skipway.surgery.acceleration import accelerate
from skipway.surgery.verification import difference
from skipway.tracing.module_state import copy_module
from skipway.tracing.restoration import generator_devices, own_tensors, seed_generators, seeded_generators

__all__ = ["TrainingStep", "time_inference", "time_training"]

SEARCH, LEAST_SEARCH = 12.0, 120.0
"""Time for building backends and for single timings, over that for timing in turns; and the least, in seconds."""


def native_precisions(device: torch.device) -> list[str]:
    """Return the precisions in which the device multiplies natively.

    >>> native_precisions(torch.device("cpu"))[0]
    'float32'
    """
    return ["float32", *(["bfloat16"] if choose_precision("auto", device)[0] == "bfloat16" else [])]


def time_inference(
    model: nn.Module, example: Tensor, seconds: float = 10.0, backends: Sequence[str] | None = None
) -> list[BackendResult]:
    """Time inference on every backend in every native precision, whole batches and pieces; the model stays as it is.

    Those near the fastest are timed interleaved, the others once.

    Args:
        model: any module that takes one tensor and returns one.
        example: the input, on the model's device.
        seconds: time after which no timing is started; each backend is timed once at least.
        backends: names from `skipway.inference.BACKENDS`; by default all.

    Returns:
        one result per choice, the model as it is in float32 first; a backend that is not installed, does
        not offer the precision, fails or differs is among them, with the reason as its note.

    Raises:
        SkipwayError: the model cannot be copied and folded, or its output is not a tensor.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> sorted({each.backend for each in time_inference(model, torch.randn(2, 4), seconds=0.0, backends=["eager"])})
    ['eager', 'original']
    """
    names = list(BACKENDS if backends is None else map(BACKENDS.name_of, backends))
    comparison, precisions = BackendComparison(model, example), native_precisions(example.device)
    autocast = Backend(partial(build_autocast, model), any_call=True, alters=False)
    for precision in precisions[1:]:
        comparison.add(Choice(ORIGINAL, precision), backend=autocast)
    search = BackendSearch(comparison, names, precisions, max(LEAST_SEARCH, SEARCH * seconds))
    search.explore()
    comparison.time(ROUNDS, seconds)
    return list(comparison.results.values())


def build_autocast(model: nn.Module, folded: nn.Module, example: Tensor, choice: Choice) -> Run:
    """Return a copy of the model as it is, under autocast; the folded network is not used."""
    original = copy_module(model).eval()

    def run(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return original(x)

    return run


class TrainingStep:
    """A step of SGD with momentum on the mean square of the output, at learning rate 0 so that all steps are equal.

    Args:
        model: trained in place, in training mode.
        example: its input.
        precision: "float32", or "bfloat16" by autocast.

    >>> step = TrainingStep(nn.Linear(2, 1), torch.ones(3, 2), "float32")
    >>> [tuple(gradient.shape) for gradient in step()]
    [(1, 2), (1,)]
    """

    def __init__(self, model: nn.Module, example: Tensor, precision: str) -> None:
        self.model, self.example, self.precision = model.train(), example, precision
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def __call__(self) -> list[Tensor]:
        """Take the step and return the gradients."""
        with torch.autocast(self.example.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            output = self.model(self.example)
        output.float().square().mean().backward()
        self.optimizer.step()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)
        return gradients


def time_training(model: nn.Module, example: Tensor, seconds: float = 10.0) -> list[BackendResult]:
    """Time a training step of the model and of an accelerated copy in every native precision; the model stays as it is.

    Args:
        model: any module that takes one tensor and returns one.
        example: the input, on the model's device.
        seconds: time after which no timing is started; each is timed once at least.

    Returns:
        one result each, the model as it is in float32 first; `difference` is the norm of the difference of all
        gradients over the norm of the gradients.

    >>> [each.backend for each in time_training(nn.Linear(2, 2), torch.randn(3, 2), seconds=0.0)][:2]
    ['original', 'accelerate']
    """
    devices = generator_devices((example, *own_tensors(model)))
    with seeded_generators(devices, 0):
        results: dict[Choice, BackendResult] = {}
        steps: dict[Choice, Callable[[], object]] = {}
        expected: Tensor | None = None
        for precision in native_precisions(example.device):
            for name in (ORIGINAL, "accelerate"):
                choice, started = Choice(name, precision), time.perf_counter()
                try:
                    trained = copy_module(model)
                    if name == "accelerate":
                        accelerate(trained)
                    step = TrainingStep(trained, example, precision)
                    seed_generators(devices, 0)
                    gradients = step()
                    flat = torch.cat([gradient.flatten() for gradient in gradients])
                    expected = flat if expected is None else expected
                    gap, built = difference([expected], [flat], mean=True), time.perf_counter() - started
                except Exception as error:  # networks raise errors of their own
                    results[choice] = BackendResult(choice, note=f"failed: {error_line(error)}")
                    continue
                results[choice] = BackendResult(choice, difference=gap, build_seconds=built)
                steps[choice] = step
        finish = partial(torch.cuda.synchronize, example.device) if example.is_cuda else lambda: None
        candidates = [Candidate(str(choice), step, finish=finish) for choice, step in steps.items()]
        return list(with_timings(results, time_interleaved(candidates, ROUNDS, limit=seconds)).values())
