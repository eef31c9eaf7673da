"""What a pass changes is put back to the bit, wherever an interrupt arrives."""

from __future__ import annotations

import dis
import linecache
import random
import sys
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import skipway as sw
from skipway.depth_transfer import runs
from skipway.depth_transfer.batches import KeptBatches
from skipway.depth_transfer.coordinates import read_signals
from skipway.depth_transfer.design import Design
from skipway.inference.speed import time_training
from skipway.probes import probe
from skipway.surgery.training_pass import run_training_pass
from skipway.tracing import preserved_state, restoration
from skipway.tracing.restoration import TRACELESS, devices_in_use, generator_devices, random_states, seeded_generators


@contextmanager
def interrupted_line(number: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at the n-th line that runs in the module.

    At the end of a `with` statement Python does not look for signals.
    """
    lines: list[int] = []

    def line(frame, event, argument):
        code = frame.f_code
        text = linecache.getline(code.co_filename, frame.f_lineno).lstrip()
        ends_with = dis.opname[code.co_code[frame.f_lasti]] in ("LOAD_CONST", "PUSH_EXC_INFO")
        if event == "line" and not (ends_with and text.startswith("with ")):
            lines.append(frame.f_lineno)
            if len(lines) == number:
                raise KeyboardInterrupt
        return line

    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename == restoration.__file__ else None)
    try:
        yield lines
    finally:
        sys.settrace(None)


def states(model: nn.Module) -> list[object]:
    drawn = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    modules = [(module.training, *map(id, module._buffers.values())) for module in model.modules()]
    return [*drawn, modules, *(buffer.tolist() for buffer in model.buffers())]


class Replacing(nn.Module):
    """Gives its buffer another object in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return x + torch.rand(()) + random.random() + np.random.rand()


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Replacing(), nn.Dropout(), nn.BatchNorm1d(4)).eval()
    net[1].train()
    return net


def run(net: nn.Module) -> None:
    with preserved_state(net):
        net.train()(torch.randn(5, 3))


def test_every_kind_of_state_is_put_back():
    net = network()
    before = states(net)
    run(net)
    assert states(net) == before


def test_an_interrupt_at_any_line_leaves_everything_as_it_was():
    net = network()
    before = states(net)
    with interrupted_line(-1) as lines:
        run(net)
    assert len(lines) > 60
    for number in range(1, len(lines) + 1):
        with interrupted_line(number), pytest.raises(KeyboardInterrupt):
            run(net)
        assert states(net) == before, lines[number - 1]
        assert not TRACELESS.get(), lines[number - 1]


def test_a_pass_that_raises_leaves_everything_as_it_was():
    net = network()
    before = states(net)

    def fail() -> None:
        with preserved_state(net):
            net.train()(torch.randn(5, 3))
            net(torch.randn(5, 2))

    with pytest.raises(RuntimeError):
        fail()
    assert states(net) == before


# Accelerators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws_by_shape", [False, True])
def test_no_generator_is_seeded_that_nobody_puts_back(monkeypatch, draws_by_shape):
    """`torch.manual_seed` seeds every device, those of other networks, too."""

    def refuse(seed):
        raise AssertionError("every device would be seeded")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch, "manual_seed", refuse)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout())
    before = states(net)
    assert run_training_pass(net, torch.ones(2, 3), draws_by_shape=draws_by_shape) is not None
    assert states(net) == before


def begin_training(net):
    with runs.seeded(0, torch.device("cpu")):
        net.train()(torch.ones(2, 3))


MEASUREMENTS = {
    "a diagnosis": lambda net: sw.diagnose(net, torch.eye(8, 3), targets=torch.eye(8, 4), steps=2),
    "signals": lambda net: read_signals(net.train(), (), torch.ones(2, 3), 0),
    "the start of a training": begin_training,
    "batches": lambda net: KeptBatches([(torch.ones(2, 3), torch.ones(2, 4))]).take(0),
    "the speed of a training": lambda net: time_training(net, torch.ones(2, 3), seconds=0.0),
}


@pytest.mark.parametrize("measure", MEASUREMENTS.values(), ids=MEASUREMENTS)
def test_no_measurement_seeds_a_device_that_is_not_its_own(monkeypatch, measure):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *given: True)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("every device would be seeded"))
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout())
    before = torch.get_rng_state()
    measure(net)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_numbers_are_those_of_the_devices_that_were_named(monkeypatch):
    states = {"cuda:0": torch.zeros(16, dtype=torch.uint8), "cuda:1": torch.ones(16, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda where: states[str(where)])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, where: states.update({str(where): state}))
    real, before = torch.Generator, dict(states)
    monkeypatch.setattr(torch, "Generator", lambda device: real())
    with seeded_generators([torch.device("cpu"), torch.device("cuda:1")], 0):
        assert states["cuda:0"] is before["cuda:0"]
        assert states["cuda:1"] is not before["cuda:1"]
    assert states["cuda:1"] is before["cuda:1"]


def test_what_is_not_in_use_has_no_generators(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert devices_in_use() == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert devices_in_use() == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_the_devices_of_buffers_have_generators_too(monkeypatch):
    device, put_back = torch.device("cuda:1"), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda where: f"the state of {where}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, where: put_back.append((state, where)))
    module = nn.Module()
    module._buffers["table"] = SimpleNamespace(device=device)  # a tensor there
    for step in random_states(module):
        step()
    assert put_back == [("the state of cuda:1", device)]
    assert generator_devices([torch.zeros(1), torch.zeros(1, device="meta")]) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_random_numbers_of_a_gpu_go_on_as_if_nothing_had_happened(place):
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout()).to(place)
    torch.cuda.manual_seed(7)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(7)
    one, two = (run_training_pass(net, torch.ones(2, 3, device=place)) for _ in range(2))
    assert torch.equal(one.outputs[0], two.outputs[0])
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_entries_of_containers_are_put_back():
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)
            self.state, self.states, self.nested = {"h": torch.zeros(4)}, [torch.zeros(4)], {"a": [torch.zeros(4)]}

        def forward(self, x):
            self.state["h"] = self.states[0] = self.nested["a"][0] = self.layer(x)
            return self.states[0]

    model = Remembering()
    kept = model.state["h"], model.states[0], model.nested["a"][0]
    with preserved_state(model):
        model(torch.ones(2, 3))
    assert model.state["h"] is kept[0]
    assert model.states[0] is kept[1]
    assert model.nested["a"][0] is kept[2]


class Keeping(nn.Module):
    """Writes, fills, replaces and deletes all that a module may keep."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.codes = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.seen, self.table, self.cache = torch.zeros(4), {"mean": torch.zeros(4)}, torch.ones(4)
        self.rare, self.length = torch.ones(1), 3
        self.log, self.counts, self.last, self.words = [], Counter(), deque([1.0], maxlen=1), {"b", "c"}
        self.register_buffer("mask", None)
        self.views = [self.layer.weight.detach()]

    def forward(self, x):
        self.seen += x.mean(0)
        self.table["mean"].data.add_(1)
        self.log.append(1.0)
        self.counts["calls"] += 1
        self.last.append(2.0)
        self.words.add("a")
        self.cache = None
        del self.rare, self.length
        self.grown = 7
        self.mask = x > 0
        self.codes = nn.Parameter(self.codes.detach() * 0.5)
        return x + self.layer(x).relu() * self.codes


def kept_by(net: Keeping) -> list[object]:
    held = [net.seen, net.table["mean"], net.cache, net.rare, net.codes]
    filled = [net.log, dict(net.counts), list(net.last), net.words, net.length, net.mask, hasattr(net, "grown")]
    return [*map(id, held), *(each.tolist() for each in held), repr(filled)]


def test_what_a_pass_writes_fills_replaces_or_deletes_is_put_back():
    net = Keeping()
    before = kept_by(net)
    for _ in range(2):
        probe(net, torch.ones(2, 4))
        assert kept_by(net) == before


def test_what_is_computed_from_weights_is_left_to_whoever_writes_them():
    net = Keeping()
    with preserved_state(net), torch.no_grad():
        net.layer.weight.fill_(2.0)
    assert bool((net.views[0] == 2).all())


def test_what_a_pass_did_not_write_is_not_written():
    """A write into what a graph has saved would end somebody's backward pass."""
    norm, net = nn.BatchNorm1d(4).eval(), nn.utils.weight_norm(nn.Linear(4, 4))
    loss = norm(net(torch.ones(2, 4))).sum()
    for module in (norm, net):
        probe(module, torch.ones(2, 4))
    loss.backward()
    assert net.weight_v.grad is not None


def test_flags_and_handles_of_hooks_stay():
    class Lazy(nn.Linear):
        def forward(self, x):
            if not getattr(self, "hooked", False):
                self.hooked = True
                self.handles = [self.register_forward_pre_hook(lambda *_: None)]
            return super().forward(x)

    net = Lazy(4, 4)
    with preserved_state(net):
        net(torch.ones(2, 4))
    assert net.hooked
    assert len(net.handles) == len(net._forward_pre_hooks) == 1


@pytest.mark.parametrize("inference", [False, True])
def test_buffers_that_are_expanded_views_are_put_back(inference):
    with torch.inference_mode(inference):
        mask = torch.ones(1, 4).expand(8, 4)

    class Masked(nn.Linear):
        def forward(self, x):
            with torch.inference_mode(inference):
                self.mask[:1].mul_(2)
            return super().forward(x)

    net = Masked(4, 4)
    net.register_buffer("mask", mask, persistent=False)
    probe(net, torch.ones(2, 4))
    sw.diagnose(net, torch.eye(8, 4), targets=torch.eye(8, 4), steps=2)
    assert net.mask is mask
    assert net.mask.tolist() == [[1.0] * 4] * 8


def test_a_network_over_depth_seeds_no_device_that_is_not_its_own(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("every device would be seeded"))
    design = Design("net", lambda depth, scheme: nn.Linear(3, depth))
    one, two = (design.build(2, None, None, seed=0, device=torch.device("cpu")) for _ in range(2))
    assert torch.equal(one.weight, two.weight)


class Lazy(nn.Module):
    """Sets something at its first call, and a flag that says so."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.ready, self.handles, self.impl = kind, False, [], "auto"
        self.register_buffer("pos", None)
        self.scratch, self.codes = torch.empty(0), torch.zeros(0)
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        if not self.ready:
            if self.kind == "number":
                self.width = x.shape[-1] ** 0.5
            elif self.kind == "buffer":
                self.pos = torch.ones(4)
            elif self.kind == "hook":
                self.handles = [self.register_forward_hook(lambda module, given, out: out)]
                self.width = torch.ones(4)
            elif self.kind == "method":
                inner = self.lin.forward
                self.lin.forward = lambda x: 2 * inner(x)
            elif self.kind == "object":
                self.impl = Lazy("number")
            elif self.kind == "parameter":
                self.codes = nn.Parameter(torch.ones(4))
            self.ready = True
        if self.kind == "number":
            return x / self.width
        torch.mul(x, x, out=self.scratch)
        if self.kind == "method":
            return x + self.lin(x)
        return x + (self.pos if self.kind == "buffer" else self.codes if self.kind == "parameter" else 0)


@pytest.mark.parametrize("kind", ["number", "buffer", "hook", "method", "object", "parameter"])
def test_what_a_flag_vouches_for_is_put_back_with_it_or_stays_with_it(kind):
    net = Lazy(kind)
    with preserved_state(net), torch.no_grad():
        expected = net(torch.ones(2, 4))
    assert net.scratch.shape == (0,)
    assert kind == "object" or net.ready == (kind in {"hook", "method", "parameter"})
    assert (len(net.handles), len(net._forward_hooks)) == ((1, 1) if kind == "hook" else (0, 0))
    assert isinstance(net.codes, nn.Parameter) == (kind == "parameter") == ("codes" in net._parameters)
    with torch.no_grad():
        assert torch.equal(net(torch.ones(2, 4)), expected)


def test_a_scripted_part_is_put_back():
    net = nn.Sequential(torch.jit.script(nn.BatchNorm1d(4)), nn.Linear(4, 4))
    with preserved_state(net):
        net(torch.ones(2, 4))
    assert net[0].num_batches_tracked == 0
