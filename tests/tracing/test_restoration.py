"""What a pass changes is put back to the bit, wherever an interrupt arrives."""

from __future__ import annotations

import dis
import linecache
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from skipway.surgery.training_pass import run_training_pass
from skipway.tracing import preserved_state, restoration
from skipway.tracing.restoration import TRACELESS, generator_devices, random_states


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
