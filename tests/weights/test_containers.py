"""Checkpoints as people have them: any suffix, prefixes, several sets of weights, objects beside the weights."""

from __future__ import annotations

import argparse
import collections
import datetime
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import skipway as sw
from skipway.weights import export_names, read_weights


def network():
    return sw.build("resnet", depth=8, width=4, classes=3)


def other(state):
    """The same names with other numbers."""
    return {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def loads(source, state, **options):
    """Load and compare; returns the remarks."""
    remarks: list[str] = []
    model = sw.load(network(), source, remark=remarks.append, **options)
    for key, tensor in state.items():
        assert torch.equal(model.state_dict()[key], tensor), key
    return remarks


@pytest.mark.parametrize("suffix", [".pth.tar", ".ckpt", ".pkl", ".th", "", ".PTH", ".safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_content_tells_the_format_of_a_torch_file(tmp_path, suffix, legacy):
    state = network().state_dict()
    path = tmp_path / f"model_best{suffix}"
    torch.save({"state_dict": state, "epoch": 3}, path, _use_new_zipfile_serialization=not legacy)
    assert loads(path, state) == []


@pytest.mark.parametrize("suffix", [".SAFETENSORS", ".bin", ".pth", ""])
def test_the_content_tells_a_safetensors_file(tmp_path, suffix):
    state = network().state_dict()
    save_file(state, tmp_path / f"weights{suffix}")
    assert loads(tmp_path / f"weights{suffix}", state) == []


def test_a_safetensors_header_of_any_length_is_no_pickle(tmp_path):
    """The length is the first bytes of the file, and 128 = 0x80 is how a pickle begins."""
    lengths = set()
    for letters in range(1, 300, 4):
        save_file({"x" * letters: torch.ones(40)}, tmp_path / "weights")
        lengths.add((tmp_path / "weights").read_bytes()[0])
        assert read_weights(tmp_path / "weights")
    assert 0x80 in lengths


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "backbone.", "student.net."]


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
    with pytest.warns(UserWarning, match="'module.'"):
        sw.load(network(), {f"module.{key}": tensor for key, tensor in theirs.items()}, names="torchvision")


def test_our_own_compiled_network_loads():
    state = network().state_dict()
    compiled = torch.compile(network())
    compiled.load_state_dict({f"_orig_mod.{key}": tensor for key, tensor in state.items()})
    assert len(loads(compiled.state_dict(), state)) == 1


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
    both = {f"{who}.{key}": tensor for who in ("student", "teacher") for key, tensor in state.items()}
    with pytest.raises(sw.CheckpointError, match="two sets of weights"):
        sw.load(network(), both)


@pytest.mark.parametrize(
    ("live", "averaged"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema"), ("net", "teacher")],
)
def test_averaged_weights_are_taken_and_said_and_the_others_can_be_chosen(tmp_path, live, averaged):
    state = network().state_dict()
    path = tmp_path / "c.pth"
    torch.save({live: state, averaged: other(state)}, path)
    (remark,) = loads(path, other(state))
    assert f"averaged weights {averaged!r} are taken" in remark
    assert repr(live) in remark
    assert loads(path, state, entry=live) == []
    with pytest.raises(sw.CheckpointError, match=f"holds the state dicts '{live}', '{averaged}'"):
        sw.load(network(), path, entry="nothing")


@pytest.mark.parametrize("entry", ["ema", "model_ema", "params_ema", "teacher", "net", "weights", "my_own_name"])
def test_the_only_state_dict_is_taken_whatever_its_entry_is_called(tmp_path, entry):
    state = network().state_dict()
    torch.save({entry: state, "epoch": 1, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, tmp_path / "c.pth")
    assert loads(tmp_path / "c.pth", state) == []


def test_torchs_averaged_model():
    state = network().state_dict()
    averaged = AveragedModel(network())
    averaged.module.load_state_dict(state)
    assert "module." in loads(averaged.state_dict(), state)[0]


def test_several_state_dicts_of_unknown_names_are_not_guessed(tmp_path):
    torch.save({"generator": network().state_dict(), "discriminator": network().state_dict()}, tmp_path / "gan.pth")
    with pytest.raises(sw.CheckpointError, match="'generator', 'discriminator'; name one of them: entry='generator'"):
        read_weights(tmp_path / "gan.pth")


HARMLESS = {
    "namespace": argparse.Namespace(lr=0.1, layers=[1, 2]),
    "numpy scalar": np.float64(0.5),
    "numpy array": np.arange(3),
    "numpy string": np.str_("x"),
    "date": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
    "path": Path("runs/a"),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "deque": collections.deque([1, 2], maxlen=3),
    "counter": collections.Counter("aab"),
    "ordered": collections.OrderedDict(a=1),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_objects_beside_the_weights(tmp_path, kind):
    state = network().state_dict()
    torch.save({"model": state, "args": HARMLESS[kind]}, tmp_path / "c.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loads(tmp_path / "c.pth", state) == []


class Trainer:
    """An object of somebody's own."""


def test_an_object_that_is_refused_is_named(tmp_path):
    torch.save({"model": network().state_dict(), "trainer": Trainer()}, tmp_path / "c.pth")
    with pytest.raises(sw.CheckpointError, match=r"an object of \S*Trainer.*would run code"):
        sw.load(network(), tmp_path / "c.pth")


def test_a_scripted_module_is_named(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "c.pt")
    with pytest.raises(sw.CheckpointError, match="TorchScript archive"):
        read_weights(tmp_path / "c.pt")


def test_what_a_checkpoint_without_weights_holds_is_said(tmp_path):
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "c.pth")
    with pytest.raises(sw.CheckpointError, match="its entries are epoch, loss"):
        read_weights(tmp_path / "c.pth")


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_another_number_of_channels_is_a_choice(channels):
    """A grey image through the sum is the image copied to three channels through the old map."""
    source = network()
    model = sw.build("resnet", depth=8, width=4, classes=3, channels=channels)
    with pytest.raises(sw.CheckpointError, match=r"adapt=\('channels',\)"):
        sw.load(model, source.state_dict())
    sw.load(model, source.state_dict(), adapt=("channels",))
    grey = torch.randn(2, 1, 8, 8)
    if channels == 1:
        torch.testing.assert_close(model.stem.conv(grey), source.stem.conv(grey.expand(-1, 3, -1, -1)))
    else:
        kept = [channel % 3 for channel in range(channels)]
        assert torch.equal(model.stem.conv.weight, source.stem.conv.weight[:, kept] * (3 / channels))


def test_hints_only_where_they_help():
    with pytest.raises(sw.CheckpointError) as caught:
        sw.load(network(), {f"wrong{number}": torch.zeros(1) for number in range(200)})
    assert "adapt=" not in str(caught.value)


@pytest.mark.parametrize("kind", [torch.int8, torch.complex64])
def test_numbers_of_another_kind_do_not_fit(kind):
    """Quantised weights are no weights."""
    state = network().state_dict()
    state["head.classifier.weight"] = state["head.classifier.weight"].to(kind)
    with pytest.raises(sw.CheckpointError, match=r"(int8|complex64) in the file, float32 in the model"):
        sw.load(network(), state)


def test_a_tensor_that_cannot_be_copied_leaves_the_model_as_it_was():
    model, state = network(), other(network().state_dict())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state["head.classifier.weight"] = state["head.classifier.weight"].to("meta")
    with pytest.raises(sw.CheckpointError, match="head.classifier.weight: a tensor without values"):
        sw.load(model, state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
