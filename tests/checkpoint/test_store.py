"""Checkpoints: what comes back is what was saved, which ones are kept, the lock, and the run folder around them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tests.process_group import one_rank
from torch import nn

from benchmarks import mutations
from skipway.checkpoint import files as storage
from skipway.checkpoint.lock import describe_holder, hold_lock
from skipway.checkpoint.state import (
    all_finite,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from skipway.checkpoint.store import Checkpoints, Snapshot
from skipway.errors import CheckpointError, SkipwayError
from skipway.training.run_folder import RunFolder

KINDS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)


def one(step: int, value: float = 1.0) -> Snapshot:
    return Snapshot(step, {"model": {"w": torch.full((2,), value)}}, {"step": step, "value": value})


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_every_kind_and_layout_of_tensor_comes_back_bit_for_bit(tmp_path):
    raw = torch.randint(0, 256, (96,), dtype=torch.uint8)
    tensors = {str(kind): raw.view(torch.uint8 if kind is torch.bool else kind) for kind in KINDS}
    tensors["torch.bool"] = raw > 100
    picture = torch.randn(2, 3, 4, 4)
    tied = torch.randn(3)
    tensors |= {
        "channels last": picture.to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 5).t(),
        "stretched": torch.randn(1, 3).expand(4, 3),
        "part": torch.randn(10)[2:9:3],
        "tied": tied,
        "tied too": tied,
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "conjugate": torch.randn(2, dtype=torch.complex64).conj(),
        "trained": torch.randn(2, requires_grad=True),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    Checkpoints(tmp_path).save(Snapshot(1, {"model": tensors}, {}))
    found = Checkpoints(tmp_path).newest()[0].tensors["model"]
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        there, here = (each.detach().resolve_conj().contiguous() for each in (found[name], tensor))
        assert there.flatten().view(torch.uint8).equal(here.flatten().view(torch.uint8)), name


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(2).to_sparse(), torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.complex128)],
    ids=["sparse", "meta", "complex128"],
)
def test_what_cannot_be_stored_is_named_and_leaves_nothing(tmp_path, tensor):
    with pytest.raises(CheckpointError, match="step 1"):
        Checkpoints(tmp_path).save(Snapshot(1, {"model": {"w": tensor}}, {}))
    assert names(tmp_path) == []


def test_the_state_comes_back_exactly(tmp_path):
    state = {
        "pi": 3.141592653589793,
        "tiny": 5e-324,
        "big": 2**200,
        "inf": float("inf"),
        "text": "é\x1b<b>",
        "list": [None],
    }
    Checkpoints(tmp_path).save(Snapshot(7, {}, state))
    assert Checkpoints(tmp_path).newest()[0].state == state


@pytest.mark.parametrize("state", [{1: "a"}, {"a": {2.5: 1}}, {"a": object()}, {"a": {1, 2}}])
def test_a_state_that_json_would_change_is_refused(tmp_path, state):
    with pytest.raises(CheckpointError, match="not JSON"):
        Checkpoints(tmp_path).save(Snapshot(7, {}, state))


@pytest.mark.parametrize(("step", "stem"), [(-1, "model"), (10**15, "model"), (1, "../model"), (1, "Model"), (1, "")])
def test_steps_and_names_that_are_refused(tmp_path, step, stem):
    with pytest.raises(CheckpointError, match="the rule is"):
        Checkpoints(tmp_path).save(Snapshot(step, {stem: {}}, {}))


def test_the_newest_are_kept_and_their_files_are_what_the_manifest_says(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (10, 20, 30, 40):
        checkpoints.save(one(step))
    assert names(tmp_path) == ["step-00000020", "step-00000030", "step-00000040"]
    assert names(tmp_path / "step-00000040") == ["MANIFEST.json", "model.safetensors", "state.json"]
    manifest = json.loads((tmp_path / "step-00000040" / "MANIFEST.json").read_text())
    assert manifest["files"]["state.json"]["size"] == (tmp_path / "step-00000040" / "state.json").stat().st_size
    assert checkpoints.steps() == [20, 30, 40]
    assert checkpoints.newest(before=40)[0].step == 30
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.newest(before=20)


def test_a_save_of_the_same_step_replaces_the_first(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for value in (1.0, 2.0, 3.0):
        checkpoints.save(one(5, value))
        assert checkpoints.newest()[0].state["value"] == value
        assert len(names(tmp_path)) == 1


def test_a_run_that_went_back_ends_the_other_course(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20):
        checkpoints.save(one(step))
    Checkpoints(tmp_path).save(one(15))
    assert checkpoints.newest()[0].step == 15
    assert names(tmp_path) == ["step-00000010", "step-00000015"]


def test_a_damaged_one_does_not_count_among_those_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20):
        checkpoints.save(one(step))
    (tmp_path / "step-00000020" / "state.json").unlink()
    later = Checkpoints(tmp_path)
    snapshot, damaged = later.newest()
    assert snapshot.step == 10
    assert damaged == [f"{tmp_path / 'step-00000020'} lacks state.json; skipped"]
    later.save(one(30))
    assert names(tmp_path) == ["step-00000010", "step-00000030"]


def test_what_is_found_is_independent_of_the_files(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(one(1, 5.0))
    found = checkpoints.newest()[0].tensors["model"]["w"]
    checkpoints.save(one(2, 6.0))
    assert found.tolist() == [5.0, 5.0]


def test_nothing_and_nothing_good_are_told_apart(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.newest()
    checkpoints.sweep()
    checkpoints.save(one(1))
    (tmp_path / "none" / "step-00000001" / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of 1 checkpoints can be used.*lacks MANIFEST.json"):
        checkpoints.newest()
    with pytest.raises(CheckpointError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_a_thread_writes_while_training_goes_on(tmp_path, monkeypatch):
    may_write, threads = threading.Event(), []

    def reached(point: str) -> None:
        if point == "folder made":
            threads.append(threading.current_thread())
            may_write.wait(10)

    monkeypatch.setattr(storage, "fault_point", reached)
    checkpoints = Checkpoints(tmp_path, background=True)
    weight = torch.ones(2)
    checkpoints.save(Snapshot(1, {"model": {"w": weight}}, {}))
    weight += 1  # what training does meanwhile
    may_write.set()
    checkpoints.finish()
    assert checkpoints.newest()[0].tensors["model"]["w"].tolist() == [1, 1]
    assert threads[0] is not threading.main_thread()


def test_a_failure_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def full(point: str) -> None:
        if point == "file written" and not (tmp_path / "free").exists():
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "fault_point", full)
    checkpoints = Checkpoints(tmp_path / "run", background=True)
    checkpoints.save(one(1))
    checkpoints._wait()
    (tmp_path / "free").touch()
    with pytest.raises(CheckpointError, match=r"step 1 was not written.*disk is full"):
        checkpoints.save(one(2))
    checkpoints.finish()
    assert checkpoints.newest()[0].step == 2


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(one(1))
    (tmp_path / ".tmp-00000002-1-abc").mkdir()
    (tmp_path / ".tmp-00000002-1-abc" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints.sweep()
    assert names(tmp_path) == ["notes.txt", "step-00000001"]


@pytest.mark.parametrize("seed", range(4))
def test_no_mutation_of_a_checkpoint_goes_unnoticed(seed):
    counts, missed = mutations.run(250, seed)
    assert not missed
    assert sum(counts.values()) == 250


def make() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
    for step in range(begin, end):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(3, 1, 4, 4)).square().mean().backward()
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(tmp_path, name):
    whole, first, second = make(), make(), make()
    optimizer = OPTIMIZERS[name](whole.parameters())
    take_steps(whole, optimizer, 0, 6)
    optimizer = OPTIMIZERS[name](first.parameters())
    take_steps(first, optimizer, 0, 3)
    tensors = {"model": model_state(first), "optimizer": optimizer_state(first, optimizer)}
    Checkpoints(tmp_path).save(Snapshot(3, tensors, {}))
    found = Checkpoints(tmp_path).newest()[0].tensors
    for parameter in second.parameters():
        nn.init.constant_(parameter, 0.5)
    optimizer = OPTIMIZERS[name](second.parameters())
    take_steps(second, optimizer, 0, 1)  # state of its own, which has to go
    load_model_state(second, found["model"])
    load_optimizer_state(second, optimizer, found["optimizer"])
    take_steps(second, optimizer, 3, 6)
    for there, here in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(there, here)


class Counting(torch.optim.SGD):
    """An optimizer that counts steps as Python numbers, for a parameter and for a group, as some libraries do."""

    def step(self, closure=None):
        result = super().step(closure)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                self.state[parameter] |= {
                    "count": group["step"],
                    "warm": True,
                    "rate": 0.25 * group["step"],
                    "none": None,
                }
        return result


def test_numbers_of_an_optimizer_come_back_as_numbers():
    first, second = make(), make()
    optimizer = Counting(first.parameters(), lr=0.1, momentum=0.9)
    take_steps(first, optimizer, 0, 3)
    state = optimizer_state(first, optimizer)
    assert {key.partition("/")[2] for key in state} == {
        *("momentum_buffer", "count!int", "warm!bool", "rate!float", "group_step!int"),
    }
    other = Counting([{"params": [p]} for p in second.parameters()], lr=0.1, momentum=0.9)  # other groups
    load_optimizer_state(second, other, state)
    assert [group["step"] for group in other.param_groups] == [3] * 6
    entry = other.state[next(second.parameters())]
    assert (entry["count"], entry["warm"], entry["rate"]) == (3, True, 0.75)
    assert isinstance(entry["warm"], bool)


def test_names_are_clean_in_every_wrapper():
    plain = make()
    expected = set(model_state(plain))
    compiled_part = make()
    compiled_part[0] = torch.compile(compiled_part[0])
    with one_rank():
        wrapped = nn.parallel.DistributedDataParallel(make())
        for model in (torch.compile(make()), compiled_part, wrapped, torch.compile(wrapped)):
            assert set(model_state(model)) == expected
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            state = {f"{name}/momentum_buffer": torch.ones_like(p) for name, p in plain.named_parameters()}
            load_model_state(model, {name: torch.ones_like(t) for name, t in model_state(plain).items()})
            load_optimizer_state(model, optimizer, state)
            assert set(optimizer_state(model, optimizer)) == set(state)
            assert all(bool((parameter == 1).all()) for parameter in model.parameters())


def test_memory_layout_is_that_of_the_model():
    model = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    load_optimizer_state(model, optimizer, {"weight/momentum_buffer": torch.randn(3, 2, 3, 3)})
    assert optimizer.state[model.weight]["momentum_buffer"].stride() == model.weight.stride()


class Remembering(nn.Linear):
    """A map with extra state, which state_dict makes anew each time."""

    seen = (0.0,)

    def get_extra_state(self):
        return torch.tensor(self.seen)

    def set_extra_state(self, state):
        self.seen = tuple(state.tolist())


def test_extra_state_goes_through_its_module():
    source, model = nn.Sequential(Remembering(2, 2)), nn.Sequential(Remembering(2, 2))
    source[0].seen = (2.0, 3.0)
    load_model_state(model, model_state(source))
    assert model[0].seen == (2.0, 3.0)
    assert torch.equal(model[0].weight, source[0].weight)


def test_extra_state_that_is_refused_changes_nothing():
    class Strict(Remembering):
        def set_extra_state(self, state):
            self.seen = ()
            if len(state) > 1:
                raise ValueError("one number")
            super().set_extra_state(state)

    model = nn.Sequential(Remembering(2, 2), Strict(2, 2))
    before = {name: tensor.clone() for name, tensor in model_state(model).items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    with pytest.raises(CheckpointError, match="'1._extra_state' .* set_extra_state of Strict raises ValueError"):
        load_model_state(model, {**state, "1._extra_state": torch.ones(2)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model_state(model).items())
    load_model_state(model, state)
    assert model[1].seen == (1.0,)


def test_extra_state_that_could_not_be_loaded_is_not_saved():
    class Unsettable(nn.Linear):
        def get_extra_state(self):
            return torch.zeros(1)

    with pytest.raises(CheckpointError, match="'0._extra_state' cannot be loaded: Unsettable has get_extra_state"):
        model_state(nn.Sequential(Unsettable(2, 2)))


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model = make()
    before = {name: tensor.clone() for name, tensor in model_state(model).items()}
    for change, words in [
        (lambda t: t.pop("0.bias"), "missing: '0.bias'$"),
        (lambda t: t.update(new=torch.zeros(1)), "unexpected: 'new'$"),
        (lambda t: t.update({"3.weight": torch.zeros(2, 2)}), r"3.weight is \[2, 2\]"),
        (lambda t: t.update({"3.weight": t["3.weight"].half()}), r"torch.float16 there and .* torch.float32 here"),
    ]:
        tensors = {name: torch.full_like(tensor, 2) for name, tensor in before.items()}
        change(tensors)
        with pytest.raises(CheckpointError, match=words):
            load_model_state(model, tensors)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for key in ("other/momentum_buffer", "momentum_buffer", "3.weight/count!os", "3.weight/count!int"):
        with pytest.raises(CheckpointError, match="optimizer state"):
            load_optimizer_state(model, optimizer, {key: torch.zeros(2)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model_state(model).items())
    assert all_finite(model)
    model[3].weight.data[0, 0] = float("nan")
    assert not all_finite(model)


def test_the_lock_keeps_a_second_run_out(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.lock() as note:
        assert note is None
        assert json.loads(folder.holder.read_text())["pid"] == os.getpid()
        folder.check_free(overwrite=False)  # the lock alone is no run
        with pytest.raises(SkipwayError, match=f"in use by process {os.getpid()} on"), RunFolder(folder.path).lock():
            pass
        assert folder.lock_file.exists()
        assert folder.holder.exists()
    assert not folder.path.exists()  # nothing came into it
    with folder.lock():
        folder.begin({}, None)
    assert names(folder.path) == ["config.json"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_lock_of_a_killed_run_is_taken_over_though_a_worker_lives_on(tmp_path):
    lock, holder = tmp_path / ".lock", tmp_path / "lock.json"
    script = f"""
import os, sys, time
from pathlib import Path
from skipway.checkpoint.lock import hold_lock
with hold_lock(Path({str(lock)!r}), Path({str(holder)!r})):
    worker = os.fork()
    if worker == 0:
        os.close(1)
        time.sleep(30)
        os._exit(0)
    print(worker, flush=True)
    os.kill(os.getpid(), 9)
"""
    child = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False)
    worker = int(child.stdout)
    try:
        os.kill(worker, 0)
        assert holder.exists()
        with hold_lock(lock, holder) as note:
            assert note is not None
            assert "which has ended" in note
            assert json.loads(holder.read_text())["pid"] == os.getpid()
    finally:
        os.kill(worker, 9)
    assert not list(tmp_path.iterdir())


HOLDER = """
import fcntl, os, sys
from pathlib import Path
def flock(*_): raise OSError(37, "no locks available")
fcntl.flock = flock
from skipway.checkpoint.lock import hold_lock
with hold_lock(Path(sys.argv[1]), Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
    os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs fcntl and its error numbers")
def test_where_the_file_system_has_no_locks_a_marker_counts_while_its_process_lives(tmp_path, monkeypatch):
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock, holder = tmp_path / ".lock", tmp_path / "lock.json"
    command = [sys.executable, "-c", HOLDER, str(lock), str(holder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        words = f"in use by process {child.pid} on .*delete .*lock.pid if it has ended"
        with pytest.raises(SkipwayError, match=words), hold_lock(lock, holder):
            pass
        child.communicate(b"")
    assert (tmp_path / ".lock.pid").exists()  # the process ended without releasing it
    with hold_lock(lock, holder) as note:
        assert note is not None
        assert f"process {child.pid} on" in note
        with pytest.raises(SkipwayError, match=f"in use by process {os.getpid()} on"), hold_lock(lock, holder):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["damaged", "[1]", '{"pid": "1\\u001b[31m"}', '{"host": 3}'])
def test_a_damaged_holder_file_is_replaced(tmp_path, content):
    lock, holder = tmp_path / ".lock", tmp_path / "lock.json"
    holder.write_text(content)
    with hold_lock(lock, holder) as note:
        assert note is None
        assert json.loads(holder.read_text())["pid"] == os.getpid()


def test_the_name_of_a_holder_is_printable():
    words = describe_holder({"pid": 3, "host": "other\x1b[31m", "since": "now"})
    assert words == r"process 3 on other\x1b[31m (since now)"


def test_the_rows_of_steps_and_what_a_new_run_removes(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin({"recipe": {}}, None)
    folder.append_steps([{"step": step, "loss": 1 / step} for step in range(1, 6)])
    folder.append_steps([{"step": 6, "loss": 0.1}])
    with folder.steps.open("a") as file:
        file.write('{"step": 7, "lo')  # a crash in the middle
    assert [row["step"] for row in folder.read_steps()] == [1, 2, 3, 4, 5, 6]
    folder.keep_steps(4)
    folder.append_steps([{"step": 5, "loss": 0.2}])
    assert [row["step"] for row in folder.read_steps()] == [1, 2, 3, 4, 5]
    Checkpoints(folder.checkpoints).save(one(1))
    folder.bundle.mkdir()
    (folder.bundle / "batch.json").write_text("{}")
    (folder.path / "mine.txt").write_text("mine")
    folder.begin({"recipe": {}}, None)
    assert names(folder.path) == ["config.json", "mine.txt"]


SHARDED = """
import os
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from skipway.errors import CheckpointError
from skipway.checkpoint import files as storage
from skipway.checkpoint.store import Checkpoints, Snapshot
from skipway.checkpoint.shards import load_sharded, save_sharded
from skipway.checkpoint.state import load_model_state, load_optimizer_state, model_state, optimizer_state

torch.set_num_threads(1)
place, world = Path(sys.argv[1]), 2
rank = 0 if os.fork() else 1  # what is imported above is imported once
dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=world)

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 3), nn.Linear(3, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)

def take_steps(model, optimizer, begin, end):
    for step in range(begin, end):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 3, 4, 4)).square().sum().backward()
        optimizer.step()

def everything(model, optimizer, gather):
    return {"model": model_state(model, gather=gather), "optimizer": optimizer_state(model, optimizer, gather=gather)}

checkpoints = Checkpoints(place / "sharded")
model, optimizer = make()
take_steps(model, optimizer, 0, 3)
save_sharded(checkpoints, Snapshot(3, everything(model, optimizer, False), {"epoch": 1}))
whole = everything(model, optimizer, True)
if rank == 0:
    Checkpoints(place / "whole").save(Snapshot(3, whole, {"epoch": 1}))
dist.barrier()
take_steps(model, optimizer, 3, 5)
expected = everything(model, optimizer, True)
if rank == 0:
    Checkpoints(place / "expected").save(Snapshot(5, expected, {}))

for folder in ("sharded", "whole"):  # 2 -> 2 and 1 -> 2
    again, other = make()
    snapshot, damaged = load_sharded(Checkpoints(place / folder), again)
    assert snapshot.state == {"epoch": 1} and damaged == []
    load_model_state(again, snapshot.tensors["model"])
    load_optimizer_state(again, other, snapshot.tensors["optimizer"])
    take_steps(again, other, 3, 5)
    for stem, tensors in everything(again, other, True).items():
        assert tensors.keys() == expected[stem].keys()
        assert all(torch.equal(tensor, expected[stem][name]) for name, tensor in tensors.items()), folder

def full(point):  # the disk of rank 0 is full: both hear of it
    if rank == 0 and point == "file written":
        raise OSError(28, "No space left on device")
storage.fault_point = full
try:
    save_sharded(checkpoints, Snapshot(5, everything(model, optimizer, False), {}))
except CheckpointError as error:
    assert "disk is full" in str(error) or "No space left" in str(error), error
else:
    raise AssertionError("no error")
storage.fault_point = lambda point: None
if rank == 0:
    assert [entry.name for entry in (place / "sharded").iterdir()] == ["step-00000003"]
    shard = next((place / "sharded" / "step-00000003").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    (place / "damaged").mkdir()
    (place / "sharded" / "step-00000003").rename(place / "damaged" / "step-00000003")
    (place / "damaged" / "step-00000003" / shard.name).write_bytes(content)
dist.barrier()
try:
    load_sharded(Checkpoints(place / "damaged"), model)
except CheckpointError as error:
    assert "SHA-256" in str(error), error
else:
    raise AssertionError("no error")
dist.barrier()
print("done", flush=True)
os._exit(0)  # threads of gloo now and then abort while the interpreter goes down
"""


def test_two_processes_write_their_pieces_and_any_number_reads_them(tmp_path):
    pytest.importorskip("torch.distributed.fsdp")
    command = [sys.executable, "-c", SHARDED, str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert told.stdout == "done\ndone\n", told
    (tmp_path / "damaged").rename(tmp_path / "sharded 2")
    # one process reads what two wrote: put together by us, and by torch
    expected = Checkpoints(tmp_path / "whole").newest()[0]
    folder = tmp_path / "sharded 2" / "step-00000003"
    shard = next(folder.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    from skipway.checkpoint.shards import load_sharded

    one_process = Checkpoints(tmp_path / "sharded 2")
    for found in (one_process.newest()[0], load_sharded(one_process, nn.Identity())[0]):
        assert found.state == expected.state
        for stem, tensors in expected.tensors.items():
            assert found.tensors[stem].keys() == tensors.keys()
            assert all(torch.equal(found.tensors[stem][name], tensor) for name, tensor in tensors.items())
