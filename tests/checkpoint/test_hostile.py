"""Files that want to run code, lie, or lead astray: refused with our own error, and a marker file never comes to be."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import skipway as sw
from skipway.checkpoint import files as storage
from skipway.checkpoint.manifest import MANIFEST, Entry, Manifest, hash_line
from skipway.checkpoint.state import load_model_state
from skipway.checkpoint.store import Checkpoints, Snapshot
from skipway.errors import CheckpointError, SkipwayError
from skipway.training.run_folder import RunFolder
from skipway.weights import files

STEP = 7


class Payload:
    """Whoever unpickles this runs a command."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def touch_by(kind: str, marker: Path) -> Payload:
    command = f"touch {marker}"
    if kind == "os.system":
        return Payload(os.system, command)
    if kind == "eval":
        return Payload(eval, f"open({str(marker)!r}, 'w')")
    if kind == "exec":
        return Payload(exec, f"open({str(marker)!r}, 'w')")
    if kind == "open":
        return Payload(open, str(marker), "w")
    if kind == "getattr":
        return Payload(getattr, Payload(__import__, "os"), "system")
    if kind == "Path.touch":
        return Payload(Path.touch, marker)
    raise AssertionError(kind)


PAYLOADS = ("os.system", "eval", "exec", "open", "getattr", "Path.touch")


def as_torch(content: object, path: Path) -> None:
    torch.save(content, path)


def as_old_torch(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def as_torch_with_other_pickle(content: object, path: Path) -> None:
    """A good file of torch whose index is replaced."""
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickle.dumps(content, protocol=2) if name.endswith("data.pkl") else source.read(name))


WRITERS = (as_torch, as_old_torch, as_pickle, as_torch_with_other_pickle)


def refused(read: Callable[[], object], marker: Path) -> str:
    """The message with which it is refused, which a terminal can show."""
    with pytest.raises(SkipwayError) as caught:
        read()
    assert not marker.exists()
    text = str(caught.value)
    assert "\x1b" not in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    return text


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", PAYLOADS)
def test_code_in_weights_is_never_run(tmp_path, marker, kind, writer):
    payload = touch_by(kind, marker)
    for number, content in enumerate([payload, {"w": torch.zeros(2), "x": payload}, {"state_dict": {"w": payload}}]):
        for suffix in (".pt", ".pth", ".bin"):
            path = tmp_path / f"{number}{suffix}"
            writer(content, path)
            if number == 1:  # weights beside the code may be read, without it
                assert_left_out(path, marker)
            else:
                refused(lambda path=path: files.read_weights(path), marker)
    # the payload does what it says where it is let
    if kind in ("os.system", "Path.touch"):
        pickle.loads(pickle.dumps(payload))
        assert marker.exists()


def assert_left_out(path: Path, marker: Path) -> None:
    """Either the file is refused, or its tensor is read, what stands beside it is named, and nothing ran."""
    remarks: list[str] = []
    try:
        state = files.read_weights(path, remark=remarks.append)
    except SkipwayError:
        state = None
    assert not marker.exists()
    if state is not None:
        assert list(state) == ["w"]
        assert "x (" in remarks[0]
        assert "not read, since that could run code" in remarks[1]


def forge(folder: Path, contents: dict[str, bytes], step: int = STEP) -> Checkpoints:
    """A checkpoint folder with a manifest that fits: what somebody who knows the format can make."""
    place = folder / f"step-{step:08d}"
    place.mkdir(parents=True)
    contents = {"state.json": json.dumps({"step": step, "state": {}}).encode(), **contents}
    for name, content in contents.items():
        (place / name).write_bytes(content)
    entries = {name: Entry(len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()}
    (place / MANIFEST).write_bytes(Manifest(step, entries).encoded())
    return Checkpoints(folder)


def test_a_forged_folder_is_read_as_data(tmp_path):
    content = safetensors.torch.save({"w": torch.ones(2)})
    assert forge(tmp_path, {"model.safetensors": content}).newest()[0].tensors["model"]["w"].tolist() == [1, 1]


@pytest.mark.parametrize("name", [".metadata", "model.pt", "optimizer.bin", "state.pkl", "__0_0.distcp", "rng.npy"])
@pytest.mark.parametrize("kind", PAYLOADS)
def test_code_in_a_checkpoint_is_never_run(tmp_path, marker, kind, name):
    code = pickle.dumps(touch_by(kind, marker))
    text = refused(forge(tmp_path / "named", {name: code}).newest, marker)
    assert name in text
    checkpoints = forge(tmp_path / "added", {})
    (tmp_path / "added" / f"step-{STEP:08d}" / name).write_bytes(code)
    assert name in refused(checkpoints.newest, marker)
    # nor as what its name says it is not
    refused(forge(tmp_path / "tensors", {"model.safetensors": code}).newest, marker)
    refused(forge(tmp_path / "state", {"state.json": code}).newest, marker)


def test_a_folder_of_torchs_own_checkpoints_is_no_weights(tmp_path, marker):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(touch_by("os.system", marker)))
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    refused(lambda: files.read_weights(tmp_path), marker)


@pytest.mark.parametrize("name", ["../out.bin", "/etc/passwd", "a/../../out.bin", "..", ""])
def test_an_index_of_shards_cannot_lead_out_of_its_folder(tmp_path, marker, name):
    (tmp_path / "in").mkdir()
    as_torch({"w": touch_by("os.system", marker)}, tmp_path / "out.bin")
    (tmp_path / "in" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    refused(lambda: files.read_weights(tmp_path / "in"), marker)


IMPORTS = {"_target_": "os.system", "class_path": "subprocess.Popen", "!!python/object/apply:os.system": ["x"]}


def test_paths_of_code_in_json_stay_text(tmp_path, marker):
    state = {**IMPORTS, "command": f"touch {marker}"}
    checkpoints = forge(tmp_path / "c", {"state.json": json.dumps({"step": STEP, "state": state}).encode()})
    assert checkpoints.newest()[0].state == state
    folder = RunFolder(tmp_path / "run")
    folder.begin(state, None)
    assert folder.read_config() == state
    assert not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "__import__('os')", "resnet18\x1b[31m", "<script>alert(1)</script>"])
def test_names_of_models_are_looked_up_and_nothing_else(marker, name):
    with pytest.raises(SkipwayError):
        sw.build(name)
    with pytest.raises(SkipwayError):
        sw.build("resnet18", scheme=name)
    assert not marker.exists()


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def about(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EIGHT = bytes(8)
LIES = {
    "empty": b"",
    "seven bytes": bytes(7),
    "length of 2^63": raw(b"{}", length=2**63),
    "length of 2^64 - 1": raw(b"{}", length=2**64 - 1),
    "length over the limit": raw(b"{}", length=100_000_001),
    "length over the file": raw(b"{}", length=3),
    "no length": raw(b"", length=0),
    "not JSON": raw(b"{'a': 1}"),
    "not text": raw(b'{"\xff\xfe": 1}'),
    "list": raw([1, 2]),
    "deep": raw(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "deep list": raw(b"[" * 500_000),
    "overlap": raw({"a": about(), "b": about(offsets=(4, 12))}, bytes(12)),
    "same place": raw({"a": about(), "b": about()}, EIGHT),
    "gap": raw({"a": about(), "b": about(offsets=(12, 20))}, bytes(20)),
    "beyond the end": raw({"a": about(offsets=(0, 16), shape=(4,))}, EIGHT),
    "something behind": raw({"a": about()}, bytes(9)),
    "backwards": raw({"a": about(offsets=(8, 0))}, EIGHT),
    "negative": raw({"a": about(offsets=(-8, 0))}, EIGHT),
    "negative shape": raw({"a": about(shape=(-2,))}, EIGHT),
    "wrong shape": raw({"a": about(shape=(3,))}, EIGHT),
    "overflowing shape": raw({"a": about(shape=(2**62, 4))}, EIGHT),
    "overflow to nothing": raw({"a": about(shape=(2**32, 2**32), offsets=(0, 0))}),
    "shape of text": raw({"a": about(shape="2")}, EIGHT),
    "unknown type": raw({"a": about("PICKLE")}, EIGHT),
    "type of code": raw({"a": about("__import__('os').system")}, EIGHT),
    "float offsets": raw({"a": about(offsets=(0.0, 8.0))}, EIGHT),
    "key twice": raw(b'{"a":%b,"a":%b}' % ((json.dumps(about()).encode(),) * 2), EIGHT),
    "metadata of numbers": raw({"__metadata__": {"a": 1}}),
    "lacking offsets": raw({"a": {"dtype": "F32", "shape": [2]}}, EIGHT),
    "pickle": pickle.dumps({"a": 1}),
    "zip": b"PK\x03\x04" + bytes(60),
    "html": b"<!DOCTYPE html><html><script>alert(1)</script>",
}


@pytest.mark.parametrize("lie", LIES)
def test_tensors_files_that_lie_are_refused(tmp_path, marker, lie):
    readers: list[Callable[[], object]] = []
    path = tmp_path / "w.safetensors"
    path.write_bytes(LIES[lie])
    readers += [lambda: files.read_weights(path), lambda: storage.read_tensors(path)]
    readers.append(forge(tmp_path / "whole", {"model.safetensors": LIES[lie]}).newest)
    readers.append(forge(tmp_path / "shard", {"shard-00001-model-00001-of-00001.safetensors": LIES[lie]}).newest)
    for read in readers:
        refused(read, marker)


def shard(places: object, *shapes: tuple[int, ...]) -> bytes:
    tensors = {f"model/{k}": torch.ones(shape) for k, shape in enumerate(shapes)}
    text = places if isinstance(places, str) else json.dumps(places)
    return safetensors.torch.save(tensors, metadata={"DCP_SHARDING_INFO": text})


@pytest.mark.parametrize(
    "places",
    [
        *("[" * 100_000, "not json", [], {"model/0": []}, {"model/0": {"saved_offsets": [0]}}),
        *({"model/0": {"saved_offsets": [10**12, 0]}}, {"model/0": {"saved_offsets": [-1, 0]}}),
        *({"model/0": {"saved_offsets": "ab"}}, {"model/0": {"saved_offsets": [1, 0]}}),
    ],
    ids=str,
)
def test_pieces_that_lie_about_their_places_are_refused(tmp_path, marker, places):
    content = shard(places, (2, 2))
    refused(forge(tmp_path, {"shard-00001-model-00001-of-00001.safetensors": content}).newest, marker)


def with_hash(body: bytes) -> bytes:
    return body + hash_line(body)


MANIFESTS = {
    "empty": b"",
    "list": with_hash(b"[1,\n"),
    "number": with_hash(b"1\n"),
    "deep": with_hash(b'{"a":' + b"[" * 100_000 + b"\n"),
    "another version": with_hash(b'{"version": 99, "step": 7, "files": {},\n'),
    "no files": with_hash(b'{"version": 2, "step": 7,\n'),
    "step of text": with_hash(b'{"version": 2, "step": "7", "files": {},\n'),
    "another step": with_hash(b'{"version": 2, "step": 8, "files": {},\n'),
    "upwards": with_hash(b'{"version": 2, "step": 7, "files": {"../../x": {"size": 0, "sha256": ""}},\n'),
    "absolute": with_hash(b'{"version": 2, "step": 7, "files": {"/etc/passwd": {"size": 0, "sha256": ""}},\n'),
    "colours": with_hash(b'{"version": 2, "step": 7, "files": {"\\u001b[31mx<b>": {"size": 0, "sha256": ""}},\n'),
    "itself": with_hash(b'{"version": 2, "step": 7, "files": {"MANIFEST.json": {"size": 0, "sha256": ""}},\n'),
    "no hash": with_hash(b'{"version": 2, "step": 7, "files": {"state.json": {"size": 0, "sha256": "x"}},\n'),
    "negative size": with_hash(b'{"version": 2, "step": 7, "files": {"state.json": {"size": -1, "sha256": "x"}},\n'),
    "digits": with_hash(b'{"version": 2, "step": ' + b"7" * 5000 + b', "files": {},\n'),
    "key twice": with_hash(b'{"version": 2, "step": 7, "step": 7, "files": {},\n'),
    "not text": with_hash(b'{"version": 2, "step": 7, "\xff": {},\n'),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_that_lie_are_refused(tmp_path, marker, kind):
    checkpoints = forge(tmp_path, {})
    (tmp_path / f"step-{STEP:08d}" / MANIFEST).write_bytes(MANIFESTS[kind])
    assert MANIFEST in refused(checkpoints.newest, marker)


STATES = {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "digits": b'{"step": 7, "state": {"a": ' + b"1" * 10_000 + b"}}",
    "key twice": b'{"step": 7, "state": {"a": 1, "a": 2}}',
    "not text": b'{"step": 7, "state": {"\xff": 1}}',
    "another step": b'{"step": 8, "state": {}}',
    "no state": b'{"step": 7}',
    "state of text": b'{"step": 7, "state": "x"}',
    "colours": b'{"step": 7, "state": \x1b[31m}',
    "bytes order mark": b'\xef\xbb\xbf{"step": 7, "state": {}}',
}


@pytest.mark.parametrize("kind", STATES)
def test_states_that_lie_are_refused(tmp_path, marker, kind):
    assert "state.json" in refused(forge(tmp_path / "c", {"state.json": STATES[kind]}).newest, marker)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.config.write_bytes(STATES[kind])
    if kind not in ("another step", "no state", "state of text"):  # those are good configs
        refused(folder.read_config, marker)


def test_large_files_are_not_read(tmp_path, marker, monkeypatch):
    monkeypatch.setattr(storage, "MAX_JSON_BYTES", 1 << 20)
    state = json.dumps({"step": STEP, "state": {"a": "x" * (1 << 20)}}).encode()
    assert "larger than" in refused(forge(tmp_path / "state", {"state.json": state}).newest, marker)
    checkpoints = forge(tmp_path / "manifest", {})
    os.truncate(tmp_path / "manifest" / f"step-{STEP:08d}" / MANIFEST, 1 << 40)  # takes no room on the disk
    assert "larger than" in refused(checkpoints.newest, marker)
    checkpoints = forge(tmp_path / "size", {})
    os.truncate(tmp_path / "size" / f"step-{STEP:08d}" / "state.json", 1 << 40)
    assert "1,099,511,627,776 bytes where" in refused(checkpoints.newest, marker)


def test_links_lead_nowhere(tmp_path, marker):
    outside = tmp_path / "outside"
    Checkpoints(outside).save(Snapshot(STEP, {}, {}))
    Checkpoints(outside).save(Snapshot(STEP + 1, {}, {}))
    (outside / ".tmp-mine").mkdir()
    everything = sorted(outside.rglob("*"))
    # the whole folder
    (tmp_path / "link").symlink_to(outside)
    checkpoints = Checkpoints(tmp_path / "link", keep=1)
    for act in (checkpoints.newest, checkpoints.sweep, lambda: checkpoints.save(Snapshot(9, {}, {}))):
        assert "links are not followed" in refused(act, marker)
    # one checkpoint, and what looks like a leftover
    inside = Checkpoints(tmp_path / "inside", keep=1)
    inside.folder.mkdir()
    (inside.folder / f"step-{STEP:08d}").symlink_to(outside / f"step-{STEP:08d}")
    (inside.folder / ".tmp-x").symlink_to(outside)
    assert "links are not followed" in refused(inside.newest, marker)
    inside.sweep()
    inside.save(Snapshot(9, {}, {}))
    assert [entry.name for entry in inside.folder.iterdir()] == ["step-00000009"]
    # one file
    place = inside.folder / "step-00000009"
    (place / "state.json").rename(tmp_path / "state.json")
    (place / "state.json").symlink_to(tmp_path / "state.json")
    assert "state.json" in refused(inside.newest, marker)
    assert sorted(outside.rglob("*")) == everything


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", [MANIFEST, "state.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, marker, name):
    checkpoints = forge(tmp_path, {})
    (tmp_path / f"step-{STEP:08d}" / name).unlink()
    os.mkfifo(tmp_path / f"step-{STEP:08d}" / name)
    assert name in refused(checkpoints.newest, marker)


@pytest.mark.parametrize(
    "name", ["\x1b[31mred", "<img src=x onerror=alert(1)>", "a\r\nb", "‮gnp.exe", "\x00", "../../etc"]
)
def test_names_of_tensors_cannot_write_on_the_terminal(tmp_path, marker, name):
    content = safetensors.torch.save({name: torch.zeros(1)})
    found = forge(tmp_path, {"model.safetensors": content}).newest()[0]
    refused(lambda: load_model_state(nn.Linear(1, 1), found.tensors["model"]), marker)
    refused(
        lambda: load_model_state(nn.Linear(1, 1), {**dict(nn.Linear(1, 1).named_parameters()), name: torch.zeros(1)}),
        marker,
    )


def test_names_of_folders_cannot_write_on_the_terminal(tmp_path, marker):
    folder = tmp_path / "run\x1b[31m"
    for act in (
        Checkpoints(folder).newest,
        RunFolder(folder).read_config,
        lambda: storage.read_tensors(folder / "x.safetensors"),
    ):
        refused(act, marker)
    (folder / f"step-{STEP:08d}").mkdir(parents=True)
    refused(Checkpoints(folder).newest, marker)
    assert isinstance(CheckpointError("x"), SkipwayError)
