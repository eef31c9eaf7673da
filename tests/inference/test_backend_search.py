"""The search of `optimize`: on a clock that only fake backends move; pieces, streams, threads, files."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import random
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import skipway as sw
from skipway.errors import SkipwayError
from skipway.inference.answer_check import AnswerCheck
from skipway.inference.backend_search import LATE, BackendSearch
from skipway.inference.backend_selection import BackendComparison, BackendResult
from skipway.inference.backends import BACKENDS, ORIGINAL, Backend, Choice, compile_openvino, convert_openvino_for
from skipway.inference.batch_pieces import PieceRun, find_batch_axes, stream_threads
from skipway.inference.optimized_model import OptimizedModel, assemble, load_optimized, optimize

X = torch.linspace(-1, 1, 16 * 4).view(16, 4)


class Clock:
    """Seconds that pass when somebody says so."""

    now = 0.0

    @classmethod
    def read(cls) -> float:
        return cls.now


class Timed(nn.Linear):
    """A network whose call takes a second."""

    def forward(self, x):
        Clock.now += 1.0
        return super().forward(x)


class Fakes:
    """Backends by name, whose call takes as long as a table says; all that were built."""

    def __init__(self, monkeypatch, seconds, building=0.0, plus=0.0):
        self.seconds, self.built = seconds, []
        # other tables: entries that are taken out and put back would be the last ones in the tests that follow
        monkeypatch.setattr(BACKENDS, "entries", {})
        monkeypatch.setattr(BACKENDS, "_names", {})
        for name in dict.fromkeys(choice.backend for choice in seconds):
            BACKENDS.add(name, Backend(self.build(building, plus), alters=False))

    def build(self, building, plus):
        def build(model, example, choice):
            self.built.append(choice)
            Clock.now += building

            def run(x):
                Clock.now += self.seconds.get(choice, 9.0) / choice.pieces
                return nn.functional.linear(x, model.weight, model.bias) + plus

            return run

        return build


def search(names, precisions=("float32",), seconds=math.inf, model=None):
    comparison = BackendComparison(model or Timed(4, 3), X, clock=Clock.read)
    return BackendSearch(comparison, names, precisions, seconds)


def choices_of(name):
    return [Choice(name, pieces=pieces) for pieces in (1, 2, 4, 8, 16)]


@pytest.mark.parametrize("number", range(20))
def test_nothing_that_was_tried_is_faster_and_every_whole_batch_is_tried(number, monkeypatch):
    """Of random tables of times; noise moves a timing, but there is none on this clock."""
    draw = random.Random(number)
    table = {choice: draw.uniform(0.1, 3) for name in ("a", "b", "c") for choice in choices_of(name)}
    fakes = Fakes(monkeypatch, table)
    best = search([ORIGINAL, "a", "b", "c"]).run()
    seconds = {**table, Choice(ORIGINAL): 1.0}
    assert {Choice(name) for name in "abc"} <= set(fakes.built)
    assert seconds[best.choice] == min(seconds[choice] for choice in [Choice(ORIGINAL), *fakes.built])
    assert best.seconds == pytest.approx(seconds[best.choice])


def test_pieces_win_where_whole_batches_are_slow(monkeypatch):
    """As ViT-S by OpenVINO: the whole batch is behind another backend, pieces of it are ahead."""
    Fakes(monkeypatch, {Choice("a"): 0.5, Choice("b"): 0.9, Choice("b", pieces=4): 0.3})
    assert search([ORIGINAL, "a", "b"]).run().choice == Choice("b", pieces=4)


def test_what_is_far_behind_is_released(monkeypatch):
    fakes = Fakes(monkeypatch, {Choice("a"): 0.2, Choice("b"): 0.9})
    looked = search([ORIGINAL, "a", "b"])
    looked.run()
    assert set(looked.comparison.runs) == {Choice(ORIGINAL), Choice("a")}
    assert not [choice for choice in fakes.built if choice.backend == "b" and choice.pieces > 1]
    assert looked.comparison.results[Choice("b")].seconds == pytest.approx(0.9)


def test_a_machine_that_slows_down_leaves_no_table_against_the_choice(monkeypatch):
    """What was given up in a quick hour would else stand there with less time than the fastest of a slow one."""
    fakes = Fakes(monkeypatch, {Choice("a"): 0.2, Choice("b"): 0.5, Choice("c"): 0.21})
    looked = search(["a", "b", "c"])
    looked.explore()
    fakes.seconds = {choice: 10 * seconds for choice, seconds in fakes.seconds.items()}
    assert looked.decide().choice == Choice("a")
    results = looked.comparison.results
    assert results[Choice("a")].in_turns
    assert not results[Choice("b")].in_turns
    assert results[Choice("b")].seconds == pytest.approx(5)
    asked = [each for choice, each in results.items() if choice.backend != ORIGINAL and not each.note]
    assert all(each.seconds >= results[Choice("a")].seconds for each in asked)


@pytest.mark.parametrize("names", [["a", "b"], [ORIGINAL, "a", "b"]])
def test_the_fastest_that_keeps_the_answers_wins(names, monkeypatch):
    """A coarse precision that is far ahead is refused at the end, when the fast exact choices have to be there yet."""
    monkeypatch.setattr("skipway.inference.backend_search.choose_precision", lambda setting, device: ("bfloat16", ""))
    coarse, exact, slow = Choice("a", "bfloat16"), Choice("a"), Choice("b")
    fakes = Fakes(monkeypatch, {coarse: 0.1, exact: 0.5, slow: 0.9})
    plain = BACKENDS["a"].build

    def build(model, example, choice):
        run = plain(model, example, choice)
        return (lambda x: (run(x) * 16).round() / 16) if choice.precision == "bfloat16" else run

    monkeypatch.setitem(BACKENDS.entries, "a", replace(BACKENDS["a"], build=build))
    model, held = Timed(4, 4, bias=False), 0.5 + 0.01 * torch.eye(4).repeat(4, 1)
    nn.init.eye_(model.weight)
    comparison = BackendComparison(model, X, clock=Clock.read)
    comparison.check = AnswerCheck(held, held.argmax(1), limit=0)
    comparison.check.watch(comparison.original)
    looked = BackendSearch(comparison, names, ("float32", "bfloat16"), math.inf, pieces=False)
    assert looked.run().choice == exact
    assert "top-1 100.00 % → 25.00 %" in comparison.results[coarse].note
    assert slow not in comparison.runs  # of one precision, what is far behind is released as ever
    assert coarse in fakes.built


def test_a_spent_budget_is_in_the_report(monkeypatch):
    fakes = Fakes(monkeypatch, {Choice("a"): 0.9, Choice("b"): 0.1}, building=50.0)
    looked = search([ORIGINAL, "a", "b"], seconds=60.0)
    assert looked.run().choice == Choice("a")
    assert [choice.backend for choice in fakes.built] == ["a"]
    assert looked.comparison.results[Choice("b")].note.startswith(f"{LATE}: 5")
    assert not looked.complete
    late = [choice for choice, result in looked.comparison.results.items() if result.note.startswith(LATE)]
    assert Choice("b") in late
    # cuts of a were not tried either; each takes four calls of the fastest, in four fifths of the time
    needed = 10 * math.ceil((looked.explored + len(late) * 4 * 0.9) / 0.8 / 10)
    assert looked.missing() == f"not tried in 60 s: {', '.join(map(str, late))}; seconds={needed} gives the time"
    # what was asked for by name is tried whatever it takes
    assert search(["b"], seconds=1.0).run().choice == Choice("b")


def test_expected_gain_decides_who_comes_first_and_who_does_not_fit(monkeypatch):
    """Coarse products before exact ones where the device has them, what builds slowly last; the estimate of what was
    never built comes from the network's size, and the time that the remark names is enough.
    """
    table = {Choice(name, precision): 0.5 for name in ("slow", "a", "b") for precision in ("float32", "bfloat16")}
    Fakes(monkeypatch, table)
    for name, patience in (("slow", 1e5), ("a", 0.0), ("b", 0.0)):
        monkeypatch.setitem(BACKENDS.entries, name, replace(BACKENDS[name], slow=name == "slow", patience=patience))
    for native, first in (("bfloat16", "bfloat16"), ("float32", "float32")):
        monkeypatch.setattr(
            "skipway.inference.backend_search.choose_precision", lambda setting, device, native=native: (native, "")
        )
        looked = search([ORIGINAL, "b", "slow", "a"], ("float32", "bfloat16"), 500.0)
        second = ({"float32", "bfloat16"} - {first}).pop()
        pairs = [(name, precision) for precision in (first, second) for name in ("a", "b")]
        assert looked.order() == [*pairs, ("slow", first), ("slow", second)]
        looked.explore()
        late = [str(choice) for choice, result in looked.comparison.results.items() if result.note.startswith(LATE)]
        assert late == [f"slow {first}", f"slow {second}"]  # a layer is a hundredth of 1e5 s
        seconds = float(looked.missing().partition("seconds=")[2].split()[0])
        again = search([ORIGINAL, "b", "slow", "a"], ("float32", "bfloat16"), seconds)
        again.run()
        assert not again.missing()


def test_what_was_quantized_needs_no_conversion_and_makes_none(monkeypatch):
    """A layer is a hundredth of the patience: 61 s for a conversion."""
    Fakes(monkeypatch, {Choice("a"): 0.1})
    monkeypatch.setitem(BACKENDS.entries, "a", replace(BACKENDS["a"], patience=6100.0))
    looked = search([ORIGINAL, "a"], ("float32", "int8"), 60.0)
    small, plain, results = Choice("a", "int8"), Choice("a"), looked.comparison.results
    assert (looked.expected_build(small), looked.expected_build(plain)) == (0.0, pytest.approx(61.0))
    results[small] = BackendResult(small, build_seconds=2.0)
    assert (looked.expected_build(small), looked.expected_build(plain)) == (2.0, pytest.approx(61.0))
    results[plain] = BackendResult(plain, build_seconds=30.0)
    assert looked.expected_build(small) == 2.0
    assert looked.expected_build(replace(plain, pieces=2)) == 0.0  # of the conversion that is kept


def test_what_is_hopeless_when_it_is_judged_is_not_timed(monkeypatch):
    calls = []
    Fakes(monkeypatch, {Choice("a"): 0.1, Choice("b"): 0.9})
    looked = search([ORIGINAL, "a", "b"])
    once = looked.comparison.time_once
    monkeypatch.setattr(looked.comparison, "time_once", lambda choice: calls.append(choice.backend) or once(choice))
    looked.explore()
    assert "b" not in calls
    assert looked.comparison.results[Choice("b")].seconds == pytest.approx(0.9)


def test_all_backends_fail(monkeypatch):
    Fakes(monkeypatch, {Choice("a"): 0.1}, plus=1.0)
    looked = search([ORIGINAL, "a"])
    assert looked.run().choice == Choice(ORIGINAL)
    assert "of the largest output, more than" in looked.comparison.results[Choice("a")].note
    with pytest.raises(SkipwayError, match="no backend agrees with the model: a bfloat16: differs"):
        search([ORIGINAL, "a"], precisions=("bfloat16",)).run()


def test_an_original_that_fails_when_it_is_timed_ends_no_search(monkeypatch):
    time_once = BackendComparison.time_once

    def fail(comparison, choice):
        if choice.backend == ORIGINAL:
            comparison.runs.pop(choice, None)
            return math.inf
        return time_once(comparison, choice)

    monkeypatch.setattr(BackendComparison, "time_once", fail)
    assert optimize(nn.Linear(4, 2), torch.randn(2, 4), backends="torch", cache=False).backend == "torch"


class WearsOut(nn.Linear):
    """Fails from its fourth call on."""

    def __init__(self):
        super().__init__(4, 2)
        self.held = SimpleNamespace(calls=0)

    def forward(self, x):
        self.held.calls += 1
        if self.held.calls > 3:
            raise RuntimeError("worn out")
        return super().forward(x)


def test_what_fails_when_it_is_timed_is_said():
    with pytest.raises(SkipwayError, match="no backend agrees with the model: torch float32: failed: RuntimeError"):
        optimize(WearsOut(), X, backends="torch", cache=False)


def test_a_coarser_precision_is_taken_where_it_is_allowed_only(monkeypatch):
    table = {Choice("a", precision): seconds for precision, seconds in (("float32", 0.5), ("bfloat16", 0.2))}
    Fakes(monkeypatch, table)
    for asked, expected in ((None, "float32"), ("bfloat16", "bfloat16"), ("any", "bfloat16")):
        fast = optimize(nn.Linear(4, 3), X, backends=["a"], precisions=asked, cache=False)
        assert asked == "any" or fast.precision == expected


def test_choices_are_remembered_and_verified(monkeypatch, tmp_path):
    monkeypatch.setenv("SKIPWAY_CACHE", str(tmp_path))
    monkeypatch.setattr("skipway.inference.optimized_model.REMEMBERED_FROM", math.inf)
    optimize(nn.Linear(4, 3), X, backends=["torch"])
    assert not list(tmp_path.iterdir())  # of a search that is over at once nothing is kept
    monkeypatch.setattr("skipway.inference.optimized_model.REMEMBERED_FROM", 0.0)
    fakes = Fakes(monkeypatch, dict.fromkeys([*choices_of("a"), *choices_of("b")], 0.0))
    model, given = nn.Linear(4, 3), {"backends": ["a", "b"]}
    first = optimize(model, X, **given)
    searched = len(fakes.built)
    assert searched > 1
    again = optimize(model, X, **given)
    assert fakes.built[searched:] == [first.choice] == [again.choice]
    assert "remembered from an earlier search" in str(again)
    for case in ("cut", "another machine", "another choice", "no agreement"):
        (file,) = (tmp_path / "optimize").iterdir()
        stored = json.loads(file.read_text())
        if case == "another machine":
            stored["facts"]["processor"] = ["Z80"]
        if case == "another choice":
            stored["choice"]["pieces"] = 0
        if case == "no agreement":
            stored["choice"]["pieces"] = 3
        file.write_text(json.dumps(stored)[: -40 if case == "cut" else None])
        begun = len(fakes.built)
        assert not optimize(model, X, **given).remark
        assert {Choice("a"), Choice("b")} <= set(fakes.built[begun:]), case
    begun = len(fakes.built)
    optimize(model, X, cache=False, **given)
    optimize(nn.Linear(4, 5), X, **given)
    assert fakes.built[begun:].count(Choice("b")) == 2


class Dependent(nn.Module):
    """Centres a batch."""

    def forward(self, x):
        return x - x.mean()


class Pair(nn.Module):
    def forward(self, x, scale, flag=True):
        return {"y": x * scale, "norm": x.norm(dim=1)}


def test_axes_of_samples():
    assert find_batch_axes(nn.Linear(4, 3), X).outputs == (0,)
    lstm = find_batch_axes(nn.LSTM(4, 2), X.view(2, 8, 4))
    assert (lstm.size, lstm.inputs, lstm.outputs) == (8, (1,), (1, 1, 1))
    pair = find_batch_axes(Pair(), {"x": X, "scale": torch.ones(1), "flag": True})
    assert pair.size == 16
    assert pair.outputs == (0, 0)
    assert find_batch_axes(Dependent(), X) is None
    assert find_batch_axes(Dependent(), X[:1]) is None
    assert find_batch_axes(nn.BatchNorm1d(4, track_running_stats=False).eval(), X) is None
    assert find_batch_axes(Pair(), {"x": X, "scale": torch.ones(1), "flag": [X]}) is None


class Lag(nn.Linear):
    """Differences of a series from what lies a third of the example before."""

    def forward(self, x):
        return super().forward(x - x.roll(5, 0))


def test_dependence_on_samples_far_away():
    assert find_batch_axes(Lag(4, 3), X) is None
    assert find_batch_axes(nn.Sequential(Lag(4, 3), Argmax()), X) is None
    assert find_batch_axes(nn.Sequential(nn.Linear(4, 9), Argmax()), X).outputs == (0,)


class Neighbours(nn.Module):
    """Takes a hundredth from four samples before, which neither one sample nor two of them show."""

    def forward(self, x):
        x = x + 0.01 * x.roll(4, 0)
        return x, x.argmax(1)


class Tokens(nn.Module):
    """A hundred whole numbers for each sample, of which the first one counts the batch."""

    def forward(self, x):
        tokens = (50 * x[:, :1] * torch.arange(100)).long()
        return torch.cat([tokens[:, :1] + len(x), tokens[:, 1:]], 1)


def test_whole_numbers_beside_it_excuse_no_dependence():
    """Nor do the others of them, where it is a hundredth of the whole numbers that depends on the batch."""
    assert find_batch_axes(Neighbours(), X) is None
    assert find_batch_axes(Tokens(), X) is None


class Argmax(nn.Module):
    def forward(self, x):
        return x.argmax(-1)


class Flips(nn.Module):
    """Whole numbers, one in a hundred of which follows from the size of the batch, as close decisions may."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 100, dtype=dtype))

    def forward(self, x):
        names = (x.to(self.weight) @ self.weight > 0).long()
        return torch.cat([names[:, :99], names[:, :1] + len(x)], 1)


def test_whole_numbers_of_16_bits_may_flip():
    assert find_batch_axes(Flips(torch.float32), X) is None
    assert find_batch_axes(Flips(torch.bfloat16), X).outputs == (0,)


class Largest(nn.Module):
    """Divides by the largest number of a batch, as a quantisation of whole tensors does."""

    def __init__(self, before):
        super().__init__()
        self.before = before

    def forward(self, x):
        x = self.before(x)
        return x / x.amax()


@pytest.mark.parametrize(
    ("before", "example"),
    [
        (nn.Identity(), X),  # the largest number is in the second sample
        (nn.Identity(), X.flip(0)),
        (nn.Identity(), torch.ones(16, 4)),
        (nn.Identity(), torch.ones(1, 4)),
        (nn.LayerNorm(4), torch.ones(16, 4)),  # halves are the same behind it
        (nn.LayerNorm(4), X[:1]),
        (nn.LayerNorm(4), torch.zeros(1, 4)),
        (nn.Embedding(9, 4), torch.arange(8).view(1, 8)),
        (nn.Embedding(9, 4), torch.full((2, 3), 5)),
        (nn.Embedding(9, 4), torch.zeros(4, 3, dtype=torch.long)),
    ],
)
def test_samples_that_are_alike_hide_no_dependence(before, example):
    with torch.no_grad():
        for parameter in before.parameters():  # no sample is left with the largest number by chance alone
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    assert find_batch_axes(Largest(before), example) is None
    assert find_batch_axes(before, example) is not None


def test_samples_that_a_network_refuses_are_passed_over():
    """Those that are made in place of samples that are alike: below zero, or no probabilities."""

    class Shares(nn.Linear):
        def forward(self, x):
            assert (x >= 0).all()
            return super().forward(x.sqrt())

    assert find_batch_axes(Shares(4, 3), torch.ones(16, 4)).outputs == (0,)

    class Roots(nn.Linear):
        def forward(self, x):
            return super().forward(x.sqrt())

    assert find_batch_axes(Roots(4, 3), torch.ones(1, 4)).outputs == (0,)


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 7, 8, 16])
def test_batches_of_any_size_in_pieces_of_one(streams, count):
    """The run takes 4 samples and nothing else; less than half a piece is left to plain torch, with a remark, once."""
    model, sizes = nn.Linear(4, 3), []

    def run(x):
        sizes.append(len(x))
        return model(x)

    pieces = PieceRun(run, find_batch_axes(model, X), 4, streams, any_size=False, rest=model)
    if count % 4 == 1:
        with pytest.warns(UserWarning, match=f"a batch of {count}: .* so 1 of it run in plain torch"):
            pieces(X[:count])
    for _ in range(2):
        assert torch.allclose(pieces(X[:count]), model(X[:count]), atol=1e-6)
    assert set(sizes) <= {4}


def test_streams_share_the_threads(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert {stream_threads(2).submit(torch.get_num_threads).result() for _ in range(4)} == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def small_network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


def built(choice):
    comparison = BackendComparison(small_network(), torch.randn(4, 3, 8, 8))
    comparison.add(choice)
    assert not comparison.results[choice].note
    return comparison, assemble(comparison, choice)


@pytest.mark.parametrize("backend", ["torch", "eager", "openvino"])
@pytest.mark.parametrize(("pieces", "streams"), [(1, 1), (2, 1), (2, 2)])
def test_two_threads_at_once(backend, pieces, streams):
    choice = Choice(backend, pieces=pieces, streams=streams, layout=BACKENDS[backend].layouts[0])
    if BACKENDS[backend].obstacle(torch.zeros(1), choice):
        pytest.skip("not installed")
    comparison, fast = built(choice)
    batches = [torch.randn(size, 3, 8, 8) for size in (4, 8, 4, 12)]
    with torch.no_grad():
        expected = [comparison.original(x) for x in batches]
    wrong = []

    def call(at):
        for _ in range(10):
            if not torch.allclose(fast(batches[at]), expected[at], atol=1e-4):
                wrong.append(at)

    threads = [threading.Thread(target=call, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Alternating(nn.Module):
    """Computes the same by other operators every other time, as torchvision's Swin does."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        Alternating.calls += 1
        return self.layer(x) * 2 if Alternating.calls % 2 else self.layer(x) + self.layer(x)


class MaskOfAll(nn.Module):
    """Attention with a mask for each image, which a conversion for one batch makes a constant of."""

    def forward(self, x):
        mask = torch.zeros(1, 1, 4, 4).repeat(x.shape[0], 1, 1, 1)
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def test_openvino_converts_twice_for_batches_of_all_sizes(monkeypatch):
    openvino = pytest.importorskip("openvino")
    convert, shapes = openvino.convert_model, []
    monkeypatch.setattr(
        openvino, "convert_model", lambda *given, **named: shapes.append(named["input"]) or convert(*given, **named)
    )
    model = MaskOfAll()
    for size in (8, 4, 2, 1):
        x = torch.randn(size, 1, 4, 4)
        found = BACKENDS["openvino"].build(model, x, Choice("openvino"))(x)
        assert torch.allclose(found, model(x), atol=1e-5)
    assert shapes == [[(8, 1, 4, 4)], [(-1, 1, 4, 4)]]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_openvino_runs_in_a_forked_process():
    """Which has none of the engine's threads."""
    pytest.importorskip("openvino")
    run = BACKENDS["openvino"].build(nn.Linear(4, 3).eval(), X, Choice("openvino"))
    expected = run(X).numpy()
    child = os.fork()
    if not child:
        try:
            os._exit(int(not np.allclose(run(X).numpy(), expected)))
        finally:
            os._exit(2)
    done, until = (0, 0), time.monotonic() + 30
    while not done[0] and time.monotonic() < until:
        time.sleep(0.01)
        done = os.waitpid(child, os.WNOHANG)
    if not done[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0)


def test_an_interrupted_request_of_openvino_is_awaited_and_not_used_again(monkeypatch):
    """The engine goes on reading the memory of the input."""
    openvino = pytest.importorskip("openvino")
    made, begun = [], []

    class Request:
        waits = 0

        def start_async(self, inputs):
            begun.append(self)
            if len(begun) == 3:
                raise KeyboardInterrupt

        def wait(self):
            self.waits += 1

        def get_output_tensor(self, place):
            return SimpleNamespace(data=np.zeros(1))

    compiled = SimpleNamespace(create_infer_request=lambda: made.append(Request()) or made[-1])
    monkeypatch.setattr(openvino, "Core", lambda: SimpleNamespace(compile_model=lambda *given: compiled))
    run = compile_openvino(None, Choice("openvino"))
    for _ in range(2):
        run(X)
    assert len(made) == 1
    with pytest.raises(KeyboardInterrupt):
        run(X)
    assert made[0].waits == 3
    run(X)
    assert len(made) == 2


def test_openvino_takes_what_is_traced_differently_every_time():
    pytest.importorskip("openvino")
    comparison = BackendComparison(Alternating(), X)
    for choice in (Choice("openvino"), Choice("openvino", pieces=4)):
        comparison.add(choice)
        assert not comparison.results[choice].note


class AlternatingConvolution(Alternating):
    """Makes constants of height and width besides."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = super().forward(x)
        return y + torch.ones(1, 4, int(y.shape[2]), int(y.shape[3]))


@pytest.mark.parametrize(("shape", "expected"), [((2, 3, 8, 8), "[2,3,8,8]"), ((-1, 3, -1, -1), "[?,3,8,8]")])
def test_openvino_keeps_sides_closed_of_what_is_traced_differently_every_time(shape, expected):
    pytest.importorskip("openvino")
    converted = convert_openvino_for(AlternatingConvolution().eval(), torch.randn(2, 3, 8, 8), shape)
    assert str(converted.inputs[0].partial_shape) == expected


@pytest.mark.parametrize("choice", [Choice(ORIGINAL), Choice("torch", "bfloat16", pieces=2, streams=2)])
def test_saved_and_loaded(choice, tmp_path):
    comparison = BackendComparison(small_network(), torch.randn(4, 3, 8, 8))
    if choice.backend != ORIGINAL:
        comparison.add(choice)
    comparison.time(1)
    fast = assemble(comparison, choice)
    loaded = load_optimized(fast.save(tmp_path / "fast.pt"))
    x = torch.randn(6, 3, 8, 8)
    assert loaded.choice == choice
    assert torch.allclose(loaded(x), fast(x), atol=1e-5)
    assert loaded.report == fast.report
    assert not loaded.remark
    stored = torch.load(tmp_path / "fast.pt", weights_only=False)
    torch.save({**stored, "machine": {**stored["machine"], "threads": 99}}, tmp_path / "moved.pt")
    assert "chosen with another threads" in load_optimized(tmp_path / "moved.pt").remark


def test_a_file_is_loaded_by_the_tolerance_that_it_was_made_with(monkeypatch, tmp_path):
    lying = replace(BACKENDS["torch"], build=lambda model, example, choice: lambda x: model(x) * 1.1)
    monkeypatch.setitem(BACKENDS.entries, "torch", lying)
    comparison, x = BackendComparison(small_network(), torch.randn(4, 3, 8, 8)), torch.randn(4, 3, 8, 8)
    comparison.add(Choice("torch"))
    assert "differs by 1.0e-01" in comparison.results[Choice("torch")].note
    fast = optimize(small_network(), x, backends="torch", tolerance=0.2, seconds=1, cache=False)
    loaded = load_optimized(fast.save(tmp_path / "fast.pt"))
    assert torch.equal(loaded(x), fast(x))
    stored = torch.load(tmp_path / "fast.pt", weights_only=False)
    for row in stored["report"]:
        row["tolerance"] = 0.05
    torch.save(stored, tmp_path / "strict.pt")
    with pytest.raises(SkipwayError, match=r"differs by 1\.0e-01 of the largest output, more than 0\.05"):
        load_optimized(tmp_path / "strict.pt")


def test_a_remark_is_kept_beside_one_that_contains_its_words(monkeypatch, tmp_path):
    comparison = BackendComparison(nn.Linear(4, 3), X)
    path = assemble(comparison, Choice(ORIGINAL), "10.5% of the tokens; first").save(tmp_path / "fast.pt")
    monkeypatch.setattr(BackendComparison, "remarks", lambda self, choice: ["0.5% of the tokens", "first"])
    assert load_optimized(path).remark == "10.5% of the tokens; first; 0.5% of the tokens"


def test_files_that_are_none(tmp_path):
    with pytest.raises(SkipwayError, match="there is no such file"):
        load_optimized(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(SkipwayError, match="no file that optimized.save"):
        load_optimized(tmp_path / "text.pt")
    _, fast = built(Choice("torch"))
    fast.original.hook = lambda x: x
    with pytest.raises(SkipwayError, match="cannot be pickled"):
        fast.save(tmp_path / "lambda.pt")
    assert not (tmp_path / "lambda.pt").exists()
    with pytest.raises(SkipwayError, match="there is no folder"):
        fast.save(tmp_path / "nowhere" / "fast.pt")


def test_an_optimized_model_is_a_module_that_stays_as_it_is():
    _, fast = built(Choice("torch"))
    assert isinstance(fast, nn.Module)
    assert isinstance(fast, OptimizedModel)
    assert fast.eval() is fast
    assert fast.to("cpu") is fast
    assert fast.float() is fast
    for change in (fast.train, fast.double, lambda: fast.to("meta"), lambda: fast.load_state_dict({})):
        with pytest.raises(SkipwayError, match="optimize the model that it was made from again"):
            change()
    for copied in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(SkipwayError, match=r"optimized\.save\(path\)"):
            copied(fast)


def test_latency_is_of_one_sample():
    model = nn.Linear(4, 3)
    fast = sw.optimize(model, X, goal="latency", backends=["torch"], cache=False)
    assert fast.example.shape == (1, 4)
    assert torch.allclose(fast(X), model(X), atol=1e-6)
    with pytest.raises(SkipwayError, match="goal='latency': the samples of this model's batches depend on each other"):
        sw.optimize(Dependent(), X, goal="latency", backends=["torch"], cache=False)
    with pytest.raises(SkipwayError, match="unknown goal 'speed'"):
        sw.optimize(model, X, goal="speed")
    with pytest.raises(SkipwayError, match="seconds=0: the rule is seconds > 0"):
        sw.optimize(model, X, seconds=0)


def test_pieces_that_cannot_be(monkeypatch):
    comparison = BackendComparison(Dependent(), X)
    comparison.add(Choice("torch", pieces=2))
    assert "samples depend on each other" in comparison.results[Choice("torch", pieces=2)].note
    comparison = BackendComparison(nn.Linear(4, 3), X)
    comparison.add(replace(Choice("torch"), pieces=3))
    assert "the rule is a divisor of the 16 samples" in comparison.results[Choice("torch", pieces=3)].note
