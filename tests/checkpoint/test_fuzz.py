"""Random bytes and random values into every reader of a run folder: a result or our own error, never another one."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from skipway.checkpoint import files as storage
from skipway.checkpoint.lock import describe_holder, read_holder
from skipway.checkpoint.manifest import MANIFEST, Entry, Manifest, hash_line
from skipway.checkpoint.state import load_model_state, load_optimizer_state
from skipway.checkpoint.store import Checkpoints, Snapshot, encode_state
from skipway.errors import CheckpointError, SkipwayError
from skipway.training.run_folder import RunFolder
from skipway.weights import files

MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
HERE = Path("here")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=8), part, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(
    ["version", "step", "files", "state", "sha256", "size", "state.json", "__metadata__", "w", "dtype"]
)


def only_ours(read: Callable[[], Any]) -> Any:
    """What is read, or None where it is refused in our words, which a terminal can show."""
    text = ""
    try:
        return read()
    except SkipwayError as error:
        text = str(error)
    assert all(letter.isprintable() for letter in text), repr(text)
    return None


def write(place: Path, content: bytes) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return place


@MANY
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_manifest_of_anything(body):
    for content in (body, body + b"\n", body + b"\n" + hash_line(body + b"\n")):
        assert only_ours(lambda content=content: Manifest.parse(content, HERE)) is None


@MANY
@given(st.dictionaries(NAMES, JSON, max_size=5), JSON)
def test_manifest_of_known_words_and_any_values(values, files_value):
    for extra in ({}, {"version": 2}, {"version": 2, "step": 3}, {"version": 2, "step": 3, "files": files_value}):
        above = json.dumps({**values, **extra}).removesuffix("}").encode() + b",\n"
        found = only_ours(lambda above=above: Manifest.parse(above + hash_line(above), HERE))
        assert found is None or isinstance(found, Manifest)


@MANY
@given(
    st.integers(0, 10**15),
    st.dictionaries(
        st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,20}", fullmatch=True),
        st.builds(Entry, st.integers(0, 2**60), st.from_regex(r"[0-9a-f]{64}", fullmatch=True)),
        max_size=4,
    ),
)
def test_every_manifest_comes_back(step, entries):
    manifest = Manifest(step, entries)
    assert Manifest.parse(manifest.encoded(), HERE) == manifest


@MANY
@given(st.dictionaries(st.text(max_size=10), JSON, max_size=4))
def test_every_state_comes_back(state):
    assert repr(storage.decode_json(encode_state(1, state), HERE)["state"]) == repr(state)


@MANY
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_state_and_config_of_anything(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "anything"
    place = folder / "step-00000001"
    write(place / "state.json", content)
    entries = {"state.json": Entry(len(content), hashlib.sha256(content).hexdigest())}
    write(place / MANIFEST, Manifest(1, entries).encoded())
    only_ours(Checkpoints(folder).newest)
    run = RunFolder(folder / "run")
    for path in (run.config, run.metrics, run.steps, run.lock_file, run.holder):
        write(path, content)
    config = only_ours(run.read_config)
    assert config is None or isinstance(config, dict)
    assert all(isinstance(row, dict) for row in run.read_metrics() + run.read_steps())
    run.keep_metrics(3)
    run.keep_steps(3)
    assert all(row["step"] <= 3 for row in run.read_steps())
    assert describe_holder(read_holder(run.holder)).isprintable()
    with run.lock():
        pass


@MANY
@given(st.dictionaries(st.text(max_size=6) | NAMES, JSON, max_size=4), st.binary(max_size=40))
def test_tensors_of_any_header(tmp_path_factory, header, data):
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + data
    path = write(tmp_path_factory.getbasetemp() / "header" / "w.safetensors", content)
    for read in (files.read_weights, storage.read_tensors):
        found = only_ours(lambda read=read: read(path))
        assert found is None or not data


@MANY
@given(st.dictionaries(st.text(max_size=12), st.lists(st.integers(0, 3), max_size=3), max_size=4))
def test_tensors_of_any_names_and_shapes_into_a_model(tmp_path_factory, shapes):
    checkpoints = Checkpoints(tmp_path_factory.getbasetemp() / "names")
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    only_ours(lambda: checkpoints.save(Snapshot(1, {"model": tensors, "optimizer": tensors}, {})))
    found = only_ours(checkpoints.newest)
    if found is not None:
        model = nn.Linear(2, 1)
        only_ours(lambda: load_model_state(model, found[0].tensors["model"]))
        optimizer = torch.optim.SGD(model.parameters())
        only_ours(lambda: load_optimizer_state(model, optimizer, found[0].tensors["optimizer"]))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".json", MANIFEST])
def test_six_thousand_inputs(tmp_path, suffix):
    """1,500 for each reader: good files with bytes changed, cut, doubled and put in, and noise."""
    chance = random.Random(suffix)
    path = tmp_path / f"x{suffix}"
    if suffix == ".pt":
        torch.save({"w": torch.ones(3), "deep": [1, {"a": (2.0, "text")}]}, path)
        good, read = path.read_bytes(), lambda: files.read_weights(path, remark=lambda sentence: None)
    elif suffix == ".safetensors":
        good, read = (
            safetensors.torch.save({"w": torch.ones(3), "v": torch.zeros(2, 2)}),
            lambda: files.read_weights(path),
        )
    elif suffix == ".json":
        good, read = storage.encode_json({"a": [1, 2.5, "x", None, {"b": {}}]}), lambda: storage.read_json(path)
    else:
        good = Manifest(3, {"state.json": Entry(2, "0" * 64)}).encoded()
        read = lambda: Manifest.parse(path.read_bytes(), path)  # noqa: E731
    for _ in range(1500):
        content = bytearray(good if chance.random() < 0.9 else chance.randbytes(chance.randrange(200)))
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(content) + 1)
            kind = chance.randrange(4)
            if kind == 0 and place < len(content):
                content[place] = chance.randrange(256)
            elif kind == 1:
                del content[place:]
            elif kind == 2:
                content[place:place] = content[: chance.randrange(40)]
            else:
                content[place:place] = chance.randbytes(chance.randrange(1, 5))
        path.write_bytes(content)
        found = only_ours(read)
        assert suffix != MANIFEST or found is None or bytes(content) == good


def test_rules_of_the_tests_themselves():
    with pytest.raises(ZeroDivisionError):
        only_ours(lambda: 1 / 0)
    assert only_ours(lambda: (_ for _ in ()).throw(CheckpointError("x"))) is None
