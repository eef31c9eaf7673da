"""Wrappers put prefixes before the names of parameters; one was known by a literal, in one of two entrances.

| trial | input | right value |
|---|---|---|
| C2 | `module.`, `_orig_mod.`, `model.`, `backbone.`, any other, several at once, in file and mapping | dropped, said |
| C2 | prefixes in the middle of names, on a part of the names, our own compiled network | dropped and said |
| C2 | DDP + torch.compile, FSDP, activation checkpointing, AveragedModel | dropped and said |
| C2 | Lightning: `state_dict` with `model.`, a loss weight and metrics beside it | named, left out by a choice |
| C2 | MMPretrain: `backbone.` and `head.fc`, a log of foreign types beside them | read by torchvision's names |
| C2 | MoCo and DINO: `module.base_encoder.`, `teacher.backbone.` | dropped and said |
| C2 | two sets of weights under two prefixes | refused, with the option that takes one |
| C2 | a stray name in a file that fits; a whole network for a block | refused as before |
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tests.trials.test_checkpoint_containers import TRAIN, loads, network, other
from torch import nn
from torch.optim.swa_utils import AveragedModel

import skipway as sw
from skipway.cli import main
from skipway.weights import export_names

PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "backbone.", "student.net."]
PREFIXES += ["_fsdp_wrapped_module.", "module.base_encoder.", "teacher.backbone.", "encoder_q."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("where", ["file", "mapping"])
def test_prefixes_are_dropped_and_said(tmp_path, prefix, where):
    state = network().state_dict()
    prefixed = {prefix + key: tensor for key, tensor in state.items()}
    if where == "file":
        torch.save(prefixed, tmp_path / "w.pth")
    (remark,) = loads(tmp_path / "w.pth" if where == "file" else prefixed, state)
    assert f"dropped from {len(state)} of {len(state)} names" in remark
    assert prefix.split(".")[0] in remark


def test_prefixes_in_the_middle_and_on_a_part_of_the_names():
    state = network().state_dict()
    compiled = {key.replace("stages.0.", "stages.0._orig_mod."): tensor for key, tensor in state.items()}
    mixed = {key if key.startswith("head") else f"backbone.{key}": tensor for key, tensor in state.items()}
    theirs = export_names(network(), "torchvision")
    assert "'_orig_mod.'" in loads({f"model.{key}": tensor for key, tensor in compiled.items()}, state)[0]
    assert "'backbone.'" in loads(mixed, state)[0]
    with pytest.warns(UserWarning, match=r"'module\.'"):
        sw.load(network(), {f"module.{key}": tensor for key, tensor in theirs.items()}, names="torchvision")


def wrapped_by(kind: str, model: nn.Module) -> nn.Module:
    if kind == "compile":
        return torch.compile(model)
    if kind == "data parallel and compile":
        return torch.compile(nn.DataParallel(model))
    if kind == "averaged":
        return AveragedModel(model)
    if kind == "checkpointed part":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        model.stages[0] = checkpoint_wrapper(model.stages[0])
        return model
    model.stages[1] = torch.compile(model.stages[1])
    return model


@pytest.mark.parametrize(
    "kind", ["compile", "data parallel and compile", "averaged", "compiled part", "checkpointed part"]
)
def test_networks_in_torchs_wrappers(kind):
    source = network()
    state = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    wrapped = wrapped_by(kind, source).state_dict()
    # torch's own wrapper of activation checkpointing drops its prefix by itself
    assert len(loads(wrapped, state)) == (set(wrapped) != set(state))


def lightning(state):
    """As a LightningModule with `self.model`, a weighted loss and a metric stores it."""
    extra = {"criterion.weight": torch.ones(3), "train_acc.tp": torch.zeros(3, dtype=torch.int64)}
    return {
        "epoch": 3,
        "global_step": 10,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**{f"model.{key}": tensor for key, tensor in state.items()}, **extra},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_score": torch.tensor(0.3)}},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 0.1},
    }


def test_lightning_with_a_loss_and_metrics(tmp_path):
    state = network().state_dict()
    torch.save(lightning(state), tmp_path / "epoch=3.ckpt")
    with pytest.raises(sw.CheckpointError) as caught:
        sw.load(network(), tmp_path / "epoch=3.ckpt", remark=lambda sentence: None)
    text = str(caught.value)
    assert "2 not known to the model:\n  criterion.weight" in text
    assert "All of it fits with adapt=('unexpected',)." in text
    remarks = loads(tmp_path / "epoch=3.ckpt", state, adapt=("unexpected",))
    assert any("'model.' was dropped" in remark for remark in remarks)
    assert any("best_model_score (a tensor)" in remark for remark in remarks)


def test_lightning_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = sw.build("resnet", depth=8, width=4, classes=10, channels=1).state_dict()
    torch.save(lightning(state), "c.ckpt")
    assert main(["train", *TRAIN, "--start", "c.ckpt", "--out", "a"]) == 4
    assert "All of it fits with --weights-adapt classes,size,unexpected." in capsys.readouterr().err
    assert main(["train", *TRAIN, "--start", "c.ckpt", "--weights-adapt", "unexpected", "--out", "b"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "left out: criterion.weight, train_acc.tp" in text


def test_a_choice_drops_no_part_of_the_network():
    """A gain in a block, or a block, is a part of another network."""
    for name in ("stages.0.0.scale.gain", "stages.0.9.branch.conv1.weight", "head.second.weight"):
        with pytest.raises(sw.CheckpointError, match="1 not known to the model"):
            sw.load(network(), {**network().state_dict(), name: torch.ones(1)}, adapt=("unexpected",))
    lacking = network().state_dict()
    del lacking["stem.conv.weight"]
    with pytest.raises(sw.CheckpointError, match="1 not known to the model"):
        sw.load(network(), {**lacking, "loss.weight": torch.ones(1)}, adapt=("unexpected",))


class HistoryBuffer:
    """As mmengine keeps in its checkpoints."""

    def __init__(self):
        self._log_history = [1.0]


def test_mmpretrain(tmp_path):
    source = sw.build("resnet18", classes=7)
    theirs = export_names(source, "torchvision")
    state = {f"head.{key}" if key.startswith("fc.") else f"backbone.{key}": value for key, value in theirs.items()}
    log = {"log_scalars": {"train/loss": HistoryBuffer()}}
    torch.save({"meta": {"epoch": 3, "dataset_meta": {}}, "state_dict": state, "message_hub": log}, tmp_path / "m.pth")
    remarks: list[str] = []
    model = sw.load("resnet18", tmp_path / "m.pth", names="torchvision", adapt="classes", remark=remarks.append)
    assert torch.equal(model.stages[3][1].branch.conv2.weight, source.stages[3][1].branch.conv2.weight)
    assert "HistoryBuffer" in remarks[0]
    assert "the prefixes 'backbone.', 'head.' were dropped" in remarks[1]


def test_a_stray_name_stays_a_stray_name():
    """A name that would fit without its beginning is no prefix where the file fits as it is."""
    state = network().state_dict()
    tensor = state.pop("stem.conv.weight")
    state["elsewhere.stem.conv.weight"] = tensor
    with pytest.raises(sw.CheckpointError, match="elsewhere"):
        sw.load(network(), state)


def test_a_whole_network_is_no_block_with_prefixes():
    with pytest.raises(sw.CheckpointError, match="do not fit this BasicBlock"):
        sw.load(sw.BasicBlock(4, 4), network().state_dict())


def test_two_sets_under_two_prefixes_are_refused():
    state = network().state_dict()
    both = {f"student.{key}": tensor for key, tensor in state.items()}
    both |= {f"teacher.{key}": tensor for key, tensor in other(state).items()}
    with pytest.raises(sw.CheckpointError, match=r"two sets of weights.*Take those of one prefix: entry='student'"):
        sw.load(network(), both)
    for source in (both, {"model": both, "epoch": 3}):
        (remark,) = loads(source, other(state), entry="teacher")
        assert f"the {len(state)} names that begin with 'teacher.' are taken; {len(state)} are left out" in remark
    with pytest.raises(
        sw.CheckpointError, match="holds one state dict, with names that begin with 'student', 'teacher'"
    ):
        sw.load(network(), both, entry="neither")


def test_two_sets_under_two_prefixes_of_a_safetensors_file(tmp_path):
    state = network().state_dict()
    both = {f"{who}.net.{key}": tensor.clone() for who in ("student", "teacher") for key, tensor in state.items()}
    save_file(both, tmp_path / "w.safetensors")
    assert "'net.'" in loads(tmp_path / "w.safetensors", state, entry="student")[1]
    assert len(loads(tmp_path / "w.safetensors", state, entry="student.net")) == 1
