"""Exact resume of loops of others: killed anywhere, resumed, equal bit for bit; what does not fit is an error."""

from __future__ import annotations

import os
import random
import re
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import skipway as sw
from skipway.checkpoint.loop import random_state, set_random_state

PAGE = Path(__file__).parents[2] / "docs" / "own-loop.md"
STEPS = 12


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))


def loop(folder: Path, killed_at: int | None = None) -> dict[str, torch.Tensor]:
    """A loop with all that people have in one: every source of randomness, schedule, averages, a scaler."""
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
        ],
        milestones=[3],
    )
    averaged = torch.optim.swa_utils.AveragedModel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    own, numpys, pythons = torch.Generator().manual_seed(1), np.random.default_rng(2), random.Random(3)
    checkpoints = sw.LoopCheckpoints(
        folder, model=model, optimizer=optimizer, schedule=schedule, averaged=averaged, scaler=scaler,
        own=own, numpys=numpys, pythons=pythons,
    )  # fmt: skip
    for step in range(checkpoints.resume(), STEPS):
        scale = 1 + np.random.rand() + random.random() + numpys.random() + pythons.random()
        x = torch.randn(16, 4) * scale + torch.randn(4, generator=own)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), torch.arange(16) % 2)).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        averaged.update_parameters(model)
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save(step + 1)
    return {**model.state_dict(), **{f"averaged {key}": value for key, value in averaged.state_dict().items()}}


def test_a_killed_loop_ends_with_the_same_bits(tmp_path):
    whole = loop(tmp_path / "whole")
    for kill in (0, 4, 5, 11):
        child = os.fork()
        if child == 0:  # pragma: no cover - the process is killed
            warnings.simplefilter("ignore")
            loop(tmp_path / "killed", kill)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    resumed = loop(tmp_path / "killed")
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path):
    model = network()
    checkpoints = sw.LoopCheckpoints(tmp_path, model=model)
    checkpoints.save(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight.add_(1)
    checkpoints.save(2)
    newest = tmp_path / "step-00000002" / "parts.safetensors"
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match="step-00000002"):
        assert sw.LoopCheckpoints(tmp_path, model=model).resume() == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [(torch.compile, lambda model: model), (lambda model: model, torch.compile), (nn.DataParallel, torch.compile)],
)
def test_wrappers_come_and_go(tmp_path, wrap, unwrap):
    model = network()
    sw.LoopCheckpoints(tmp_path, model=wrap(model)).save(1)
    other = network()
    assert sw.LoopCheckpoints(tmp_path, model=unwrap(other)).resume() == 1
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_values_that_json_lacks_come_back(tmp_path):
    class Part:
        def __init__(self, state):
            self.state = state

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    state = {
        "best": float("inf"), "nan": float("nan"), "pair": (1, (2.5, None)), 3: "key", "rows": [{"a": True}],
        "array": np.arange(3, dtype=np.int16), "number": np.float32(0.1), "text": {"__skipway__": 1}, "half": 0.1,
        "tensor": torch.tensor(2, dtype=torch.bfloat16), "a.b": torch.ones(1), "a": {"b": torch.zeros(1)},
    }  # fmt: skip
    sw.LoopCheckpoints(tmp_path, part=Part(state)).save(0)
    empty = Part({})
    sw.LoopCheckpoints(tmp_path, part=empty).resume()
    assert str(empty.state) == str(state)
    assert empty.state["number"] == state["number"]
    assert torch.equal(empty.state["tensor"], state["tensor"])


def test_what_does_not_fit_is_an_error_before_anything_changes(tmp_path):
    model = network()
    sw.LoopCheckpoints(tmp_path, model=model).save(1)
    other = nn.Sequential(nn.Linear(4, 9), *network()[1:])
    before = other[0].weight.clone()
    with pytest.raises(sw.CheckpointError, match=re.escape("0.bias, 0.weight")):
        sw.LoopCheckpoints(tmp_path, model=other).resume()
    assert torch.equal(other[0].weight, before)
    with pytest.raises(sw.CheckpointError, match="the parts here are model, optimizer"):
        sw.LoopCheckpoints(tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).resume()


def test_a_part_that_refuses_leaves_the_others_as_they_were(tmp_path):
    model = torch.nn.Linear(2, 2)
    sw.LoopCheckpoints(tmp_path, model=model, optimizer=torch.optim.Adam(model.parameters())).save(1)
    other = torch.nn.Linear(2, 2)
    before = other.weight.clone()
    for optimizer, words in (
        (torch.optim.Adam([{"params": [other.weight]}, {"params": [other.bias]}]), "does not fit optimizer"),
        (torch.optim.SGD(other.parameters(), lr=0.1), "optimizer was a Adam and is a SGD"),
        (torch.optim.AdamW(other.parameters()), "optimizer was a Adam and is a AdamW"),
    ):
        with pytest.raises(sw.CheckpointError, match=words):
            sw.LoopCheckpoints(tmp_path, model=other, optimizer=optimizer).resume()
        assert torch.equal(other.weight, before)


@pytest.mark.parametrize("step", [-1, 1.5, "3", True, torch.tensor(3)])
def test_a_step_is_a_whole_number(tmp_path, step):
    with pytest.raises(sw.CheckpointError, match="step=.*whole number"):
        sw.LoopCheckpoints(tmp_path, model=torch.nn.Linear(2, 2)).save(step)


@pytest.mark.parametrize(
    ("part", "words"),
    [(3, "part=int"), ([], "part=list"), (None, "part=NoneType"), (type("Odd", (), {})(), "part=Odd")],
)
def test_a_part_without_a_state_is_refused(tmp_path, part, words):
    with pytest.raises(sw.CheckpointError, match=words):
        sw.LoopCheckpoints(tmp_path, part=part)


def test_an_object_in_a_state_is_named_with_its_path(tmp_path):
    class Part:
        def state_dict(self):
            return {"hook": [print]}

        def load_state_dict(self, state):
            pass

    with pytest.raises(sw.CheckpointError, match=r"part\.hook\.0: a builtin_function_or_method"):
        sw.LoopCheckpoints(tmp_path, part=Part()).save(0)
    assert not list(tmp_path.glob("step-*"))


def test_an_empty_folder_begins_at_zero_and_no_parts_are_refused(tmp_path):
    assert sw.LoopCheckpoints(tmp_path / "new", model=network()).resume() == 0
    with pytest.raises(sw.CheckpointError, match="parts=none"):
        sw.LoopCheckpoints(tmp_path)


def test_a_loop_that_forgot_to_resume_replaces_nothing(tmp_path):
    model = network()
    first = sw.LoopCheckpoints(tmp_path, model=model)
    for step in (100, 200):
        first.save(step)
    with pytest.raises(sw.CheckpointError, match=r"holds a checkpoint of step 200.*resume\(\)"):
        sw.LoopCheckpoints(tmp_path, model=model).save(10)
    assert len(list(tmp_path.glob("step-*"))) == 2
    newest = tmp_path / "step-00000200" / "parts.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    again = sw.LoopCheckpoints(tmp_path, model=model)
    with pytest.warns(UserWarning, match="step-00000200"):
        assert again.resume() == 100
    again.save(150)
    assert sw.LoopCheckpoints(tmp_path, model=model).resume() == 150


def test_another_type_of_numbers_is_another_network(tmp_path):
    sw.LoopCheckpoints(tmp_path, model=network().double()).save(1)
    with pytest.raises(sw.CheckpointError, match="types differ"):
        sw.LoopCheckpoints(tmp_path, model=network()).resume()


@pytest.mark.parametrize(("here", "put"), [(2, [0, 1]), (0, [])])
def test_random_states_of_gpus_that_are_not_here_are_warned_about(monkeypatch, here, put):
    given = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.extend)
    state = {**random_state(), "cuda": [0, 1, 2, 3]}
    with pytest.warns(UserWarning, match=f"random states of 4 GPUs, and {here} are here"):
        set_random_state(state)
    assert given == put
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    set_random_state(state)
    assert given[len(put) :] == [0, 1, 2, 3]


def test_a_loop_that_forgot_to_resume_replaces_no_equal_step(tmp_path):
    sw.LoopCheckpoints(tmp_path, model=network()).save(0)
    with pytest.raises(sw.CheckpointError, match=r"holds a checkpoint of step 0.*resume\(\)"):
        sw.LoopCheckpoints(tmp_path, model=network()).save(0)


class Versioned(nn.Linear):
    """A module that reads states by their version and has extra state that grows."""

    _version = 2

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.seen = torch.zeros(0)

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        self.read = local_metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_versions_and_extra_state_of_another_shape_come_back(tmp_path, monkeypatch):
    model = nn.Sequential(Versioned())
    model[0].seen = torch.ones(3)
    sw.LoopCheckpoints(tmp_path, model=model).save(1)
    monkeypatch.setattr(Versioned, "_version", 3)
    other = nn.Sequential(Versioned())
    assert sw.LoopCheckpoints(tmp_path, model=other).resume() == 1
    assert other[0].read == 2
    assert torch.equal(other[0].seen, torch.ones(3))


def test_several_processes_are_told_that_they_draw_the_same(tmp_path, monkeypatch):
    model = network()
    sw.LoopCheckpoints(tmp_path, model=model).save(1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.warns(UserWarning, match="2 processes resume with the random states of the one that saved"):
        sw.LoopCheckpoints(tmp_path, model=model).resume()
