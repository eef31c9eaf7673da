"""Kind: an error of torch, of the model or of Python leaves our doors raw.

Every door (`diagnose`, `lint`, `chain`, `probe`, `check_signal`, `param_groups`) raises `SkipwayError`, which says
what, where and the way out.

| trial | input | right value |
|---|---|---|
| 4 | an example of another type (float64, float16, whole numbers, complex) or device | both named, and which to move |
| 4 | an example of another shape, tokens beyond the table, real tokens | the module's path and what to check |
| 4 | keywords that forward does not take | the names that it takes |
| 4 | a model that raises inside: RuntimeError, AttributeError, in backward, a module of a module | path and error |
| 4 | no parameters, frozen completely, TorchScript, lazy layers, meta device | refused before anything runs |
| 4 | data-dependent control flow | works |
| 4 | sparse and nested examples | refused: samples cannot be taken |
| 4 | a model that is a name, class, function, None | the rule |
| 4 | lr −1, nan, a text, True; steps 0; warmup −1; weight decay nan; a seed that is text | argument, value, rule |
| 4 | a loss that is no function, takes one argument, raises, returns None | the rule of a loss |
| 4 | `load` of or into something else | argument, value, rule |
| — | an error of the caller's own code inside the context | passes as it is |
| — | minutes of passes on a terminal | a line with the share and the time left; nothing elsewhere |
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import skipway as sw
from skipway.diagnosis.lint import lint
from skipway.diagnosis.progress import PassCounter
from skipway.probes import probe
from skipway.probes.signal_check import check_signal
from skipway.tracing.foreign_errors import ForeignErrors

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 3)))


class Own(nn.Module):
    """A parameter of unknown class, so that every door runs the model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.factor = inner, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.inner(x)


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("boom")


class Missing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.missing


class Branching(nn.Module):
    """Adds or subtracts, as the values have it."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.map(x) if bool(x.detach().sum() > 0) else x - self.map(x))


DOORS: dict[str, Callable[[Any, Any], Any]] = {
    "diagnose": sw.diagnose,
    "lint": lint,
    "chain": sw.chain,
    "probe": probe,
    "check_signal": check_signal,
    "param_groups": lambda model, example: sw.param_groups(model, example, lr=0.1),
}
IDS = torch.full((16, 4), 9)
CASES: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "float64": (network, X.double(), r"in inner\.0: .*; the example is torch\.float64 and the model torch\.float32"),
    "float16": (network, X.half(), r"give example\.to\(torch\.float32\)"),
    "complex": (network, X.to(torch.complex64), r"the example is torch\.complex64 and the model torch\.float32"),
    "whole numbers": (network, X.long(), r"whole numbers where the model takes real ones: give example\.float\(\)"),
    "device": (network, X.to("meta"), "the example is on meta and the model on cpu: move one of them"),
    "shape": (network, torch.randn(16, 9), r"float32 \(\d+, 9\).* in inner\.0: .*check the shape of the example"),
    "tokens": (lambda: nn.Embedding(5, 4), IDS, "in inner: IndexError.*each below the size of the table"),
    "real tokens": (lambda: nn.Embedding(5, 4), IDS.float(), r"in inner: .*whole numbers \(int64\)"),
    "keywords": (network, {"foo": X, "bar": X}, r"foo: float32 .*forward takes \(x\)"),
    "raises": (lambda: nn.Sequential(network(), Raising()), X, r"in inner\.1: RuntimeError: boom"),
    "attribute": (lambda: nn.Sequential(network(), Missing()), X, r"in inner\.1: AttributeError: 'Missing'"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", CASES)
def test_errors_of_the_model_are_told_at_every_door(door, case):
    make, example, words = CASES[case]
    if door in WATCHING and case in VALUES:
        pytest.skip("only shapes matter where a model is watched")
    with pytest.raises(sw.SkipwayError, match=words):
        DOORS[door](Own(make()), example)


WATCHING = {"lint", "chain", "param_groups"}
VALUES = {"float64", "float16", "complex", "whole numbers", "device", "tokens", "real tokens"}
NO_MODELS = {"name": "resnet18", "class": nn.Linear, "function": lambda x: x, "none": None}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", NO_MODELS)
def test_what_is_no_model_is_refused(door, kind):
    with pytest.raises(sw.SkipwayError, match=r"model=.*: the rule is a torch\.nn\.Module"):
        DOORS[door](NO_MODELS[kind], X)


class Backward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x).exp().add_(1)  # exp needs its output in the backward pass


class Separate(nn.Module):
    """Takes a list of samples of unlike sizes."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, samples):
        return torch.stack([self.scale * sample.mean() for sample in samples])


def frozen() -> nn.Module:
    return network().requires_grad_(False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "example", "words"),
    [
        (Backward, X, "Backward fails on this example .*modified by an inplace operation.*detach what it keeps"),
        (nn.ReLU, X, "no parameter has requires_grad=True"),
        (frozen, X, "no parameter has requires_grad=True"),
        (lambda: torch.jit.trace(network(), X), X, "is a TorchScript module"),
        (
            lambda: nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(3)),
            X,
            "1 is a lazy layer without weights",
        ),
        (lambda: network().to("meta"), X, "on the meta device it has no values"),
        (network, X.to_sparse(), "give a dense tensor"),
        (lambda: nn.BatchNorm1d(8), X[:4], "example of 4 samples: the rule is at least 8"),
        (Separate, ([torch.zeros(3, 8), torch.zeros(3, 9)],), "of 3 samples: .*a list of single samples is no batch"),
        (lambda: nn.LSTM(8, 4), pack_sequence([X, X]), "with a PackedSequence: .*give the padded tensor and the"),
        (lambda: nn.LSTM(8, 4), (pack_sequence([X, X]),), "with a PackedSequence: .*give the padded tensor and the"),
    ],
)
def test_what_cannot_be_diagnosed(make, example, words):
    with pytest.raises(sw.SkipwayError, match=words):
        sw.diagnose(make(), example)


@pytest.mark.filterwarnings("ignore")
def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    with pytest.raises(sw.SkipwayError, match="give a dense tensor"):
        sw.diagnose(network(), nested)


def test_control_flow_by_values():
    diagnosis = sw.diagnose(Branching(), X.abs())
    assert len(diagnosis.chain) == 1
    assert diagnosis.measurement.finite


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1}, "lr=-1: the rule is lr > 0"),
        ({"lr": math.nan}, "lr=nan: the rule is a finite number"),
        ({"lr": "fast"}, "lr='fast': the rule is a finite number"),
        ({"lr": True}, "lr=True: the rule"),
        ({"steps": 0}, "steps=0: the rule is a whole number of steps, at least 1"),
        ({"steps": "x"}, "steps='x': the rule is a whole number of steps, at least 1"),
        ({"warmup": -1}, "warmup=-1: the rule is a whole number of steps, at least 0"),
        ({"weight_decay": math.nan}, "weight_decay=nan: the rule"),
        ({"seed": "a"}, "seed='a': the rule is a whole number"),
        ({"targets": "labels"}, "targets=str: the rule is a tensor"),
        ({"loss": 5}, "loss=5: the rule is a function"),
        ({"loss": lambda output: output.sum()}, r"loss\(output, targets\) raises TypeError"),
        ({"loss": lambda output, targets: output.missing}, r"loss\(output, targets\) raises AttributeError"),
        ({"loss": lambda output, targets: None}, r"loss\(output, targets\) gives a NoneType"),
    ],
)
def test_arguments_of_diagnose(options, words):
    with pytest.raises(sw.SkipwayError, match=words):
        sw.diagnose(network(), X, **options)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1, math.nan, "a", None])
def test_arguments_of_param_groups(name, value):
    kind = "" if value == -1 else "a number, "
    with pytest.raises(sw.SkipwayError, match=rf"{name}={value!r}: the rule is {kind}{name} >= 0"):
        sw.param_groups(network(), **{"lr": 0.1, name: value})


@pytest.mark.parametrize(
    ("model", "source", "words"),
    [
        (network(), 5, "source=int: the rule is a path"),
        ("resnet8", None, "source=NoneType: the rule is a path"),
        (network(), network(), r"source=Sequential: .*give its state_dict\(\)"),
        (5, {}, "model=5: the rule is a torch.nn.Module"),
    ],
)
def test_arguments_of_load(model, source, words):
    with pytest.raises(sw.SkipwayError, match=words):
        sw.load(model, source)


def test_errors_of_the_caller_pass_as_they_are():
    with pytest.raises(ZeroDivisionError), ForeignErrors(network(), X):
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), ForeignErrors(network(), X):
        raise KeyboardInterrupt


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal():
    for stream in (Terminal(), io.StringIO()):
        counter = PassCounter(10, stream)
        counter.report(1)
        assert stream.getvalue() == ""  # most diagnoses are done by now
        counter.began -= 30
        counter.report(2.5)
        counter.report(2.6)  # too early for another line
        shown = stream.getvalue()
        assert ("diagnosing: 25 % after 30 s, about 90 s more" in shown) == stream.isatty()
        assert shown.count("diagnosing") == stream.isatty()
        counter.finish()
        assert stream.getvalue().endswith("\r\x1b[K") == stream.isatty()


def test_optimizers_that_need_a_closure_or_other_gradients():
    model, targets = network(), torch.zeros(16, dtype=torch.int64)
    with pytest.raises(sw.SkipwayError, match="optimizer=LBFGS: its steps evaluate the loss again"):
        sw.diagnose(model, X, targets=targets[: len(X)], optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(sw.SkipwayError, match="optimizer=SparseAdam: its step fails"):
        sw.diagnose(model, X, targets=targets[: len(X)], optimizer=torch.optim.SparseAdam(model.parameters()))


def test_values_that_are_not_finite_are_the_examples_fault():
    bad = X.clone()
    bad.view(-1)[0] = math.nan
    with pytest.raises(sw.SkipwayError, match="example with values that are not finite"):
        sw.diagnose(network(), bad)
