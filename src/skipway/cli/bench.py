"""`skipway bench`: the speed of a network on this machine, on every backend and in every precision."""

from __future__ import annotations

import json as json_format
import math
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from skipway.cli.rescheme import parse_shape
from skipway.cli.table import print_table
from skipway.errors import SkipwayError, counted
from skipway.json_values import finite

if TYPE_CHECKING:
    from torch import Tensor

    from skipway.inference.backend_selection import BackendResult
    from skipway.zoo import LoadedModel

__all__ = ["bench"]

MODEL, TIMING, OUTPUT = (Group(name, sort_key=number) for number, name in enumerate(("Model", "Timing", "Output")))
INFERENCE, TRAINING = "inference", "training step"
COLUMNS = ("work", "backend", "precision", "layout and pieces", "ms", "samples/s", "speed", "difference", "note")
NUMBERS = ("ms", "samples/s", "speed", "difference")


def bench(
    model: str,
    /,
    *,
    input: Annotated[str | None, Parameter(group=MODEL)] = None,
    batch: Annotated[int, Parameter(group=MODEL)] = 16,
    seconds: Annotated[float, Parameter(group=TIMING)] = 10.0,
    training: Annotated[bool, Parameter(group=TIMING)] = True,
    device: Annotated[str, Parameter(group=TIMING)] = "auto",
    json: Annotated[bool, Parameter(group=OUTPUT, negative=())] = False,
) -> None:
    """Time a network on this machine: inference on every installed backend, and a training step.

    Backends, and pieces of the batch on them, are timed in turns and compared with the model as it is. Weights are
    random; speed does not depend on them. The last lines name the fastest and the Python that uses it.

    Args:
        model: A model of ours, timm:NAME, torchvision:NAME, or FILE.py:NAME.
        input: Shape of a sample, 3,224,224. [the model's]
        batch: Samples per call.
        seconds: Time for each of inference and training.
        training: Also time a training step.
        device: auto, cpu, cuda or cuda:1.
        json: Print JSON instead of a table.
    """
    if batch < 1:
        raise SkipwayError(f"--batch {batch}: the rule is a whole number from 1 on")
    if not seconds > 0:
        raise SkipwayError(f"--seconds {seconds:g}: the rule is more than 0")
    # idle threads sleep instead of spinning; see `skipway train`
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    loaded, example = load_for_bench(model, input, batch, device)
    results: dict[str, list[BackendResult]] = {}
    from skipway.inference.speed import time_inference, time_training

    with status_line(f"{model}: building backends, then timing inference"):
        results[INFERENCE] = time_inference(loaded.model, example, seconds)
    if training:
        with status_line(f"{model}: timing a training step"):
            results[TRAINING] = time_training(loaded.model, example, seconds)
    if json:
        sys.stdout.write(json_format.dumps(encode_speeds(model, loaded, example, results), indent=1) + "\n")
    else:
        print_speeds(model, loaded, example, results)


def load_for_bench(model: str, shape: str | None, batch: int, device: str) -> tuple[LoadedModel, Tensor]:
    """Load a model with random weights, and a random batch for it, onto the device."""
    import torch

    from skipway.hardware.device import choose_device
    from skipway.inference.inputs import single_tensor
    from skipway.zoo import ModelRequest, load_model

    torch.manual_seed(0)
    chosen = choose_device(device)
    loaded = load_model(model, ModelRequest(shape=parse_shape(shape)))
    example = single_tensor(loaded.random(batch))
    loaded.model.to(chosen)
    return loaded, example.to(chosen)


def status_line(message: str) -> AbstractContextManager[Any]:
    """Show a status line on the terminal within the context: compilers take a minute."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(message)


def fastest_of(results: list[BackendResult]) -> BackendResult | None:
    """Return the fastest result without an objection; None where nothing was timed."""
    timed = [each for each in results if not each.note and math.isfinite(each.seconds)]
    return min(timed, key=lambda each: each.seconds, default=None)


def python_line(work: str, best: BackendResult, device: str) -> str:
    """Return the line of Python that uses the fastest way of working.

    >>> from skipway.inference import BackendResult, Choice
    >>> python_line("inference", BackendResult(Choice("openvino", "bfloat16")), "cpu")
    'fast = sw.optimize(model, example, backends=["openvino"], precisions="bfloat16")'
    >>> python_line("training step", BackendResult(Choice("accelerate")), "cpu")
    'sw.accelerate(model, example)'
    """
    autocast = f'with torch.autocast("{device}", torch.bfloat16): …'
    half = best.precision == "bfloat16"
    if work == INFERENCE and best.backend != "original":
        precision = ', precisions="bfloat16"' if half else ""
        return f'fast = sw.optimize(model, example, backends=["{best.backend}"]{precision})'
    steps = ["sw.accelerate(model, example)"] if best.backend == "accelerate" else []
    return "; ".join([*steps, *([autocast] if half else [])]) or "the model as it is"


def print_speeds(model: str, loaded: LoadedModel, example: Tensor, results: dict[str, list[BackendResult]]) -> None:
    """Print the machine, the table, and the fastest of each work with the Python that uses it."""
    facts = describe_setting(model, loaded, example)
    sys.stdout.write(
        f"{model}: {counted(facts['parameters'], 'parameter')}, input {'x'.join(map(str, facts['input']))}, "
        f"{facts['processor']}, {counted(facts['threads'], 'thread')}, torch {facts['torch']}\n"
    )
    rows, lines = [], []
    for work, measured in results.items():
        best = fastest_of(measured)
        rows += [format_result(work, each, measured[0], len(example), each is best) for each in measured]
        if best is not None:
            gain = f"{best.choice}, {speedup_of(best, measured[0])}"
            lines.append(f"{work:<15}{gain}: {python_line(work, best, example.device.type)}\n")
    print_table(COLUMNS, rows, NUMBERS)
    sys.stdout.write("\n" * (not sys.stdout.isatty()) + "".join(lines))


def speedup_of(best: BackendResult, plain: BackendResult) -> str:
    """Return the speed against the model as it is as text."""
    return "the fastest" if best is plain else f"{plain.seconds / best.seconds:.2f} times the original"


def format_result(work: str, result: BackendResult, plain: BackendResult, batch: int, fastest: bool) -> tuple[str, ...]:
    """Return a row of the table; empty cells where nothing was measured."""
    known = math.isfinite(result.seconds)
    speed = f"{plain.seconds / result.seconds:.2f}" if known and math.isfinite(plain.seconds) else ""
    return (
        work,
        result.backend,
        result.precision,
        str(result.choice).partition(", ")[2],
        f"{1e3 * result.seconds:.2f}" if known else "",
        f"{batch / result.seconds:,.0f}" if known else "",
        speed,
        f"{result.difference:.0e}" if math.isfinite(result.difference) else "",
        "fastest" if fastest else result.note,
    )


def describe_setting(model: str, loaded: LoadedModel, example: Tensor) -> dict[str, Any]:
    """Return what was timed on which machine."""
    import torch

    from skipway.hardware.processor import cpu_name

    is_cuda = example.device.type == "cuda"
    return {
        "model": model,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "input": list(example.shape),
        "device": str(example.device),
        "processor": torch.cuda.get_device_name(example.device) if is_cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def encode_speeds(
    model: str, loaded: LoadedModel, example: Tensor, results: dict[str, list[BackendResult]]
) -> dict[str, Any]:
    """Return the results for JSON; what was not measured is null."""
    from dataclasses import asdict

    rows, fastest = [], {}
    for work, measured in results.items():
        best, plain = fastest_of(measured), measured[0]
        for each in measured:
            row = {"work": work, **asdict(each.choice)}
            row |= {key: value for key, value in asdict(each).items() if key != "choice"}
            row |= {"samples_per_second": len(example) / each.seconds, "speedup": plain.seconds / each.seconds}
            rows.append(finite(row))
        if best is not None:
            line = python_line(work, best, example.device.type)
            fastest[work] = {**asdict(best.choice), "python": line}
    return {**describe_setting(model, loaded, example), "results": rows, "fastest": fastest}
