"""What a file of weights is was decided by its suffix, and what it holds by closed lists of names and types.

| trial | input | right value |
|---|---|---|
| C1 | a file of torch.save, zipped or older, under any suffix | read: the content decides |
| C1 | a safetensors file under any suffix, with a header of any length | read |
| C3 | Namespace, NumPy scalars, dates, paths, collections beside the weights | read |
| C3 | objects of foreign types, subclasses of dict and list beside the weights | the weights read, the types named |
| C3 | a network pickled as a whole, of torchvision or of somebody's own module | its weights read, no code run |
| C3 | a pickle that calls a function | never called |
| C4 | live and averaged weights, in entries of any name and depth | averaged ones taken and said, the other by choice |
| C4 | one set of weights in an entry of any name, in a tuple, of NumPy arrays | taken |
| C4 | several sets of unknown names | refused, listed, with the choice |
| C4 | numbers, texts and tensors beside the weights | left out and named |
| – | .npz of NumPy with names of the model | read |
| – | Git LFS pointer, HTML, JSON, archives, GGUF, Keras, ONNX, Flax, TensorFlow, a program of torch.export | named |
| – | any of these in place of a run, for predict, evaluate and export | named |
| – | an empty file, one that is cut off, a folder in place of a file | named |
| – | folders: a run's, with one file or several, of FSDP, DeepSpeed, TensorFlow, Flax, Orbax, PEFT | read or named |
"""

from __future__ import annotations

import argparse
import collections
import datetime
import pickle
import sys
import tarfile
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.weights.test_names import peer
from torch import nn
from torch.optim.swa_utils import AveragedModel

import skipway as sw
from benchmarks.peers import import_torchvision
from skipway.cli import main
from skipway.weights import read_weights


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


def test_arrays_of_numpy(tmp_path):
    state = network().state_dict()
    np.savez(tmp_path / "w.npz", **{key: tensor.numpy() for key, tensor in state.items()})
    assert loads(tmp_path / "w.npz", state) == []
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    with pytest.raises(sw.CheckpointError, match="damaged or no numpy file"):
        read_weights(tmp_path / "objects.npz")
    swapped = {key: tensor.numpy() for key, tensor in state.items()}
    swapped = {key: value.astype(value.dtype.newbyteorder()) for key, value in swapped.items()}
    assert loads({"model": swapped}, state) == []


@pytest.mark.parametrize(
    ("live", "averaged"),
    [
        *(("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema"), ("net", "teacher")),
        *(("model", "ema_model"), ("model", "swa"), ("generator", "generator_ema"), ("model", "model_averaged")),
    ],
)
def test_averaged_weights_are_taken_and_said_and_the_others_can_be_chosen(tmp_path, live, averaged):
    state = network().state_dict()
    path = tmp_path / "c.pth"
    torch.save({live: state, averaged: other(state)}, path)
    (remark,) = loads(path, other(state))
    assert f"averaged weights {averaged!r} are taken" in remark
    assert f"choose by entry='{live}'" in remark
    assert loads(path, state, entry=live) == []
    with pytest.raises(sw.CheckpointError, match=f"holds the state dicts '{live}', '{averaged}'"):
        sw.load(network(), path, entry="nothing")


@pytest.mark.parametrize("entry", ["ema", "model_ema", "params_ema", "teacher", "net", "weights", "my_own_name"])
def test_the_only_state_dict_is_taken_whatever_its_entry_is_called(tmp_path, entry):
    state = network().state_dict()
    torch.save({entry: state, "epoch": 1, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, tmp_path / "c.pth")
    assert loads(tmp_path / "c.pth", state) == []


OPTIMIZERS = {
    "fastai": lambda state: {"model": state, "opt": {"state": [{"grad_avg": torch.ones(2)}], "hypers": [{"lr": 0.1}]}},
    "numbered": lambda state: {"model": state, "opt": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "groups": lambda state: {"model": state, "solver": {"state": {"a": {"m": torch.ones(2)}}, "param_groups": []}},
    "tuple": lambda state: (state, {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}),
    "list": lambda state: [state, 3],
    "arrays": lambda state: {"model": {key: tensor.numpy() for key, tensor in state.items()}},
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_states_of_optimizers_are_no_state_dicts(tmp_path, kind):
    state = network().state_dict()
    torch.save(OPTIMIZERS[kind](state), tmp_path / "c.pth")
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


def test_what_stands_beside_the_weights_is_named(tmp_path):
    state = network().state_dict()
    extra = {"epoch": 3, "note": "best", "_extra_state": None}
    (remark,) = loads({**state, **extra}, state)
    assert "2 values beside the weights left out: epoch (int), note (str)" in remark
    (remark,) = loads({"run": {"model": state, "loss": torch.tensor(0.3)}, "rng": torch.ones(8)}, state)
    assert "2 values beside the weights left out: run.loss (a tensor), rng (a tensor)" in remark


HARMLESS = {
    "namespace": argparse.Namespace(lr=0.1, layers=[1, 2]),
    "simple namespace": types.SimpleNamespace(lr=0.1),
    "numpy scalar": np.float64(0.5),
    "numpy string": np.str_("x"),
    "date": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "path": Path("runs/a"),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "deque": collections.deque([1, 2], maxlen=3),
    "counter": collections.Counter("aab"),
    "ordered": collections.OrderedDict(a=1),
    "list of arrays": [np.arange(3)],
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

    def __init__(self):
        self.history = [1, 2]


class Config(dict):
    """A dict of somebody's own."""


class Log(list):
    """A list of somebody's own."""


class Slots:
    __slots__ = ("a",)

    def __init__(self):
        self.a = 1


FOREIGN = {
    "object": Trainer(),
    "class": Trainer,
    "function": loads,
    "dict": Config(a=1, b=Config(c=2)),
    "list": Log([1, 2, 3]),
    "slots": Slots(),
    "nested": {"callbacks": [Trainer(), {"log": Log([1])}]},
    "enum": pickle.HIGHEST_PROTOCOL and __import__("enum").Enum("Stage", "TRAIN TEST", module=__name__).TRAIN,
    "partial": __import__("functools").partial(loads, state=None),
    "dtype": torch.float16,
}
Stage = type(FOREIGN["enum"])


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("legacy", [False, True])
def test_objects_of_foreign_types_are_left_out_and_named(tmp_path, kind, legacy):
    state = network().state_dict()
    torch.save({"extra": FOREIGN[kind], "model": state}, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    remarks = loads(tmp_path / "c.pth", state)
    if kind != "dtype":
        assert "objects of foreign types were not read, since that could run code: " in remarks[-1]
        assert __name__ in remarks[-1] or "functools" in remarks[-1]


class Net(nn.Module):
    """A network of somebody's own, with a buffer that is not stored and a part that occurs twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.again = self.conv
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.act = torch.nn.functional.relu


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_network_pickled_as_a_whole(tmp_path, wrapped):
    net = Net()
    torch.save(net, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(sw.CheckpointError, match="holds more than tensors and would run code"):
        read_weights(tmp_path / "old.pth")
    torch.save({"epoch": 3, "model": net} if wrapped else net, tmp_path / "net.pth")
    with pytest.warns(UserWarning, match="objects of foreign types"):
        found = read_weights(tmp_path / "net.pth")
    state = net.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_network_of_torchvision_pickled_as_a_whole(tmp_path):
    models = peer("torchvision", import_torchvision).models
    theirs = models.resnet18(num_classes=5).eval()
    torch.save(theirs, tmp_path / "r18.pth")
    model = sw.build("resnet18", classes=5)
    sw.load(model, tmp_path / "r18.pth", names="torchvision", remark=lambda sentence: None)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model.eval()(images), theirs(images), rtol=1e-4, atol=1e-4)


class Payload:
    """What a hostile pickle does."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["whole", "beside", "among"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("call", ["open", "eval", "system", "exec"])
def test_no_function_of_a_pickle_is_called(tmp_path, place, legacy, call):
    import os

    mark = tmp_path / "mark"
    payload = {
        "open": Payload(open, str(mark), "w"),
        "eval": Payload(eval, f"open({str(mark)!r}, 'w')"),
        "exec": Payload(exec, f"open({str(mark)!r}, 'w')"),
        "system": Payload(os.system, f"touch {mark}"),
    }[call]
    state = network().state_dict()
    content = {"whole": payload, "beside": {"model": state, "x": payload}, "among": {**state, "x": payload}}[place]
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    remarks: list[str] = []
    if place == "whole" or call == "system":
        with pytest.raises(sw.CheckpointError, match=r"(w|c)ould run code"):
            sw.load(network(), tmp_path / "c.pth")
    else:
        sw.load(network(), tmp_path / "c.pth", remark=remarks.append)
        assert call in remarks[-1]
    assert not mark.exists()


def test_what_a_checkpoint_without_weights_holds_is_said(tmp_path):
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "c.pth")
    with pytest.raises(sw.CheckpointError, match="its entries are epoch, loss"):
        read_weights(tmp_path / "c.pth")
    torch.save({"epoch": 3, "trainer": Trainer()}, tmp_path / "c.pth")
    with pytest.raises(sw.CheckpointError, match=r"trainer \(an object of \S*Trainer, which is not read"):
        read_weights(tmp_path / "c.pth")


@pytest.mark.parametrize("content", [[torch.ones(3)], torch.ones(3)], ids=["list", "tensor"])
def test_tensors_without_names(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(
        sw.CheckpointError, match=r"holds no state dict \(names to tensors\): it holds a (list|Tensor)$"
    ):
        read_weights(tmp_path / "c.pth")


def zipped(path, **files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)


def write_tar(path):
    (path.parent / "model.pth").write_bytes(b"x")
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "model.pth", "model.pth")


def write_program(path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)


NAMED = {
    "lfs.pth": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "Git LFS"),
    "page.pth": (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>not found</html>"), "a page of HTML"),
    "config.pth": (lambda path: path.write_bytes(b'{"architectures": ["ViT"]}'), "a JSON file"),
    "a.gz": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + b"0" * 99), "a gzip archive"),
    "a.zst": (lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd" + b"0" * 99), "a Zstandard archive"),
    "a.zip": (lambda path: zipped(path, model__pth=b"x"), "a zip archive that holds model.pth; unpack it first"),
    "a.tar": (write_tar, "a tar archive that holds model.pth; unpack it first"),
    "m.gguf": (lambda path: path.write_bytes(b"GGUF\x03\0\0\0"), "a GGUF file"),
    "m.h5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"0" * 99), "an HDF5 file of Keras"),
    "m.keras": (lambda path: zipped(path, config__json=b"{}", model__weights__h5=b"x"), "a model of Keras"),
    "m.npy": (lambda path: np.save(path, np.ones(3)), "a single NumPy array"),
    "m.onnx": (lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch"), "an ONNX file"),
    "flax_model.msgpack": (lambda path: path.write_bytes(b"\x81\xa6params\x80"), "a file of Flax"),
    "m.tflite": (lambda path: path.write_bytes(b"\x1c\0\0\0TFL3" + b"0" * 99), "LiteRT"),
    "graph.pb": (lambda path: path.write_bytes(b"\n\x10\n\x05input"), "a graph of TensorFlow"),
    "m.pkl": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "a plain pickle that torch.save did not write"),
    "m.pt2": (write_program, "a program of torch.export"),
    "m.pt": (lambda path: torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path), "a TorchScript"),
    "empty.pth": (lambda path: path.write_bytes(b""), "an empty file"),
    "empty.safetensors": (lambda path: path.write_bytes(b""), "an empty file"),
    "text.txt": (lambda path: path.write_bytes(b"hello"), "no file of weights"),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_files_of_other_kinds_are_named(tmp_path, name):
    write, kind = NAMED[name]
    write(tmp_path / name)
    with pytest.raises(sw.CheckpointError, match=kind):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "legacy", "numpy"])
def test_files_that_are_cut_off_are_damaged(tmp_path, kind):
    state, path = network().state_dict(), tmp_path / "whole"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "numpy":
        with path.open("wb") as file:
            np.savez(file, **{key: tensor.numpy() for key, tensor in state.items()})
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch")
    content = path.read_bytes()
    for share in (0.001, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(sw.CheckpointError, match=r"damaged"):
            read_weights(path)


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    save_file(network().state_dict(), tmp_path / "w")

    def refuse(path, *args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(sw.CheckpointError, match="cannot be read: Permission denied"):
        read_weights(tmp_path / "w")


FOLDERS = {
    ".metadata": "torch.distributed.checkpoint",
    "zero_to_fp32.py": "DeepSpeed",
    "saved_model.pb": "a SavedModel of TensorFlow",
    "model.ckpt-100.index": "a checkpoint of TensorFlow",
    "tf_model.h5": "TensorFlow alone",
    "flax_model.msgpack": "Flax",
    "_CHECKPOINT_METADATA": "Orbax",
    "adapter_config.json": "PEFT",
    "readme.txt": "a folder without weights",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_other_kinds_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(sw.CheckpointError, match=FOLDERS[name]):
        read_weights(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_a_checkpoint_of_fsdp_by_its_way_out(tmp_path):
    """The command that the message gives makes a file that is read."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    state = network().state_dict()
    checkpoint.save({"model": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(sw.CheckpointError, match="format_utils dcp_to_torch"):
        read_weights(tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "weights.pth")
    assert loads(tmp_path / "weights.pth", state) == []


def test_folders_with_one_file_and_with_several(tmp_path):
    state = network().state_dict()
    torch.save(state, tmp_path / "epoch3.ckpt")
    (tmp_path / "config.yaml").write_text("lr: 0.1")
    (remark,) = loads(tmp_path, state)
    assert "the weights of epoch3.ckpt are taken" in remark
    save_file(state, tmp_path / "epoch4.safetensors")
    with pytest.raises(sw.CheckpointError, match="2 files of weights, epoch3.ckpt, epoch4.safetensors; name one"):
        read_weights(tmp_path)
    save_file(other(state), tmp_path / "last.safetensors")
    assert loads(tmp_path, other(state)) == []
    save_file(state, tmp_path / "best.safetensors")
    assert "best.safetensors" in loads(tmp_path, state)[0]


TRAIN = ["--model", "resnet", "--depth", "8", "--width", "4", "--epochs", "1", "--batch-size", "512", "--device", "cpu"]
TRAIN += ["--precision", "float32"]


def test_the_command_line_chooses_among_several_sets_in_its_own_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = sw.build("resnet", depth=8, width=4, classes=10, channels=1).state_dict()
    torch.save({"model": state, "ema": other(state), "trainer": Trainer(), "loss": torch.ones(1)}, "c.pth")
    assert main(["train", *TRAIN, "--start", "c.pth", "--out", "a"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "the averaged weights 'ema' are taken; also there: 'model' (choose by --weights-entry model)" in text
    assert "left out: loss (a tensor)" in text
    assert f"not read, since that could run code: {__name__}.Trainer" in text
    assert f"{len(state) - 2} of {len(state)} tensors from" in text  # all but the classifier, whose classes are unknown
    assert main(["train", *TRAIN, "--start", "c.pth", "--weights-entry", "swa", "--out", "b"]) == 4
    assert "--weights-entry swa: " in capsys.readouterr().err


def test_rescheme_reads_the_same_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = sw.build("resnet20").state_dict()
    torch.save({"model": {f"module.{key}": tensor for key, tensor in state.items()}, "ema": other(state)}, "c.pth")
    options = ["rescheme", "resnet20", "--scheme", "skipinit", "--weights", "c.pth"]
    assert main([*options, "-o", "a"]) == 0
    assert "(choose by --weights-entry model)" in capsys.readouterr().err
    assert main([*options, "--weights-entry", "model", "-o", "b"]) == 0
    assert "the prefix 'module.' was dropped" in capsys.readouterr().err
    found = read_weights(tmp_path / "b" / "model.safetensors")
    assert torch.equal(found["stem.conv.weight"], state["stem.conv.weight"])


def test_pickled_types_are_not_imported(tmp_path):
    """A module that only the file names stays unknown to Python."""
    module = types.ModuleType("only_in_the_file")
    exec("class Thing:\n    pass", module.__dict__)
    sys.modules[module.__name__] = module
    try:
        torch.save({"model": network().state_dict(), "thing": module.Thing()}, tmp_path / "c.pth")
    finally:
        del sys.modules[module.__name__]
    remarks: list[str] = []
    read_weights(tmp_path / "c.pth", remark=remarks.append)
    assert "only_in_the_file.Thing" in remarks[0]
    assert module.__name__ not in sys.modules


FOREIGN_RUNS = {
    "torch": (lambda path: torch.save(network().state_dict(), path), "is a file of torch.save"),
    "lfs": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "Git LFS"),
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "bare": (lambda path: save_file(network().state_dict(), path), "does not describe its network"),
}


@pytest.mark.parametrize("kind", FOREIGN_RUNS)
def test_files_that_are_no_run_are_named(tmp_path, kind):
    write, message = FOREIGN_RUNS[kind]
    write(tmp_path / "w.safetensors")
    with pytest.raises(sw.CheckpointError, match=message):
        sw.from_pretrained(tmp_path / "w.safetensors")
