"""Two processes (gloo) have the numbers of one: DDP and FSDP2, stopped and resumed, also with fewer processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tests.training.distributed_job import FEW_ITERATIONS, FITTED, MIXED, RECIPE
from tests.training.few_digits import every_ninth
from tests.training.test_loop import assert_same, weights

from skipway.checkpoint.files import read_tensors
from skipway.data import loader
from skipway.training import mlp_head
from skipway.training.distributed import Ranks
from skipway.training.ema import ModelEMA
from skipway.training.loop import share_buffers, train
from skipway.training.run import Outcome
from skipway.training.run_folder import RunFolder

pytestmark = pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="gloo and torchrun are needed")


@pytest.fixture(scope="module", autouse=True)
def few_digits() -> Iterator[None]:
    """For the runs of one process, as in the job of two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "digits", every_ninth)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the runs of two processes."""
    out = tmp_path_factory.mktemp("many")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    ran = subprocess.run(
        [
            *launch,
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
            "-m",
            "tests.training.distributed_job",
            str(out),
        ],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return train(RECIPE, tmp_path_factory.mktemp("alone") / "run")


def assert_close(folder: Path, outcome: Outcome) -> None:
    """Losses of every noted step within 1e-6 of one process's, relatively; weights within what Adam makes of that."""
    theirs = RunFolder(folder)
    for mine, other in zip(outcome.folder.read_steps(), theirs.read_steps(), strict=True):
        assert other["loss"] == pytest.approx(mine["loss"], rel=1e-6), mine["step"]
    found = read_tensors(theirs.last)[0]
    for name, tensor in weights(outcome).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(runs, alone, case):
    assert_close(runs / case, alone)


def test_images_are_mixed_alike(runs, tmp_path):
    assert_close(runs / "mixed", train(MIXED, tmp_path / "run"))


def test_the_classifier_of_one_process_is_that_of_all(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(mlp_head, "ITERATIONS", FEW_ITERATIONS)
    assert_close(runs / "fitted", train(FITTED, tmp_path / "run"))


@pytest.mark.parametrize("case", ["ddp", "fsdp", "fitted"])
def test_two_processes_continue_bit_for_bit(runs, case):
    whole, again = (read_tensors(runs / name / "last.safetensors")[0] for name in (case, f"{case}-stopped"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_two_processes_go_on_as_one(runs, alone):
    """What FSDP2 had spread is put together; the result is that of the run that was never spread."""
    outcome = train(None, runs / "fsdp-half", resume=True)
    assert outcome.finished
    assert_close(runs / "fsdp-half", alone)


def test_one_process_writes_what_one_process_would(runs, alone):
    names = {path.name for path in (runs / "ddp").iterdir()}
    # several processes see a share of the test images each, so none looks for wrong labels
    assert names == {path.name for path in alone.folder.path.iterdir()} - {"findings.csv"}
    assert_same(alone, alone)


@pytest.mark.parametrize("world", [1, 2])
def test_running_statistics_and_their_averages_are_those_of_the_first_process(monkeypatch, world):
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: tensor.fill_(7 + source))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model.register_buffer("fresh", torch.zeros(2), persistent=False)
    averages = ModelEMA(model, 0.9)
    share_buffers(SimpleNamespace(model=model, ema=averages, ranks=Ranks(world=world)))
    changed = {name for name, tensor in averages.tensors.items() if (tensor == 7).any()}
    assert changed == ({"1.running_mean", "1.running_var"} if world == 2 else set())
    changed = {name for name, tensor in model.named_buffers() if (tensor == 7).all()}
    assert changed == ({"fresh", "1.running_mean", "1.running_var"} if world == 2 else set())
    assert not any((tensor == 7).any() for tensor in model.parameters())


def test_a_buffer_with_gaps_is_shared_without_what_lies_between(monkeypatch):
    def broadcast(tensor, source):
        assert tensor.is_contiguous()  # else Gloo writes numel() numbers from its start on
        tensor.fill_(7 + source)

    monkeypatch.setattr(dist, "broadcast", broadcast)
    base = torch.zeros(8)
    model = torch.nn.Linear(2, 2)
    model.register_buffer("even", base[::2])
    model.register_buffer("turned", torch.zeros(2, 3).T)
    share_buffers(SimpleNamespace(model=model, ema=None, ranks=Ranks(world=2)))
    assert base.tolist() == [7, 0] * 4
    assert (model.turned == 7).all()
