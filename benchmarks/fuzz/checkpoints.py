"""Checkpoints as anybody may have nested, wrapped, extended, cut off or damaged them.

A case is one network's weights, in one to three sets that differ by a constant, each in an entry under a prefix, among
and beside other values, written in some format and perhaps damaged. Oracles, besides that only a `SkipwayError` may
leave: what was loaded is one set, whole; every tensor of the file is loaded, left out by name, in a set that a remark
names, or an optimizer's; and a network whose loading failed is bit for bit as it was.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import pickle
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import skipway as sw
from skipway.weights import LoadReport, export_names, load_state, read_source
from skipway.weights.prefixes import COUNTERS

__all__ = ["CASES", "outcome"]


class Foreign:
    """An object of somebody's own."""

    def __init__(self) -> None:
        self.tensor = torch.ones(2)


class ForeignDict(dict):  # type: ignore[type-arg]
    """A mapping of somebody's own."""


ENTRIES = ("state_dict", "model", "ema", "model_ema", "teacher", "net", "my own", "généré", "optimizer", "a.b")
PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone.", "student.net.", "x.")
FORMATS = ("torch", "legacy", "safetensors", "numpy", "pickle", "mapping")
EXTRAS: dict[str, Any] = {
    "epoch": 3,
    "note": "best",
    "none": None,
    "loss": torch.tensor(0.5),
    "rng": torch.zeros(5, dtype=torch.uint8),
    "args": argparse.Namespace(lr=0.1),
    "when": datetime.date(2026, 1, 1),
    "path": Path("a/b"),
    "log": collections.defaultdict(list, {"loss": [0.1]}),
    "scalar": np.float64(0.5),
    "trainer": Foreign(),
    "config": ForeignDict(a=1),
    "list": [1, {"a": torch.ones(1)}],
    "n_averaged": torch.tensor(7),
    7: "a number for a name",
}
CHANGES = (
    "miss one",
    "stray key",
    "other shape",
    "other type",
    "half",
    "complex",
    "sparse",
    "meta",
    "part of the names",
)
CHOICES = ("classes", "size", "channels", "depth", "unexpected")


@dataclass(frozen=True)
class Case:
    """One checkpoint and how it is loaded.

    Args:
        sets: for each set of weights its entries from the outside in, and its prefix.
        among: extras between the tensors of the first set.
        beside: extras at the top.
        optimizer: whether an optimizer's state is there.
        changes: what is wrong with the first set.
        names: whose names the file has, and whose are asked for.
        adapt: the differences allowed.
        entry: the entry asked for.
        format: of the file.
        cut: the share of the file that is left; None: all.
        flipped: places, in shares, of bytes that are changed.
    """

    sets: tuple[tuple[tuple[str, ...], str], ...]
    among: tuple[Any, ...]
    beside: tuple[Any, ...]
    optimizer: bool
    changes: tuple[str, ...]
    names: tuple[str, str]
    adapt: tuple[str, ...]
    entry: str | None
    format: str
    cut: float | None
    flipped: tuple[float, ...]


LIBRARIES = st.sampled_from(["skipway", "torchvision", "timm", "huggingface"])


def rarely(strategy: st.SearchStrategy[Any], otherwise: Any) -> st.SearchStrategy[Any]:
    """A value of the strategy in a quarter of the cases."""
    return st.integers(0, 3).flatmap(lambda number: strategy if number == 3 else st.just(otherwise))


def some(values: tuple[Any, ...] | list[Any], most: int = 2) -> st.SearchStrategy[tuple[Any, ...]]:
    """Up to `most` of the values."""
    return st.lists(st.sampled_from(values), max_size=most, unique_by=str).map(tuple)


CASES = st.builds(
    Case,
    sets=st.lists(
        st.tuples(st.lists(st.sampled_from(ENTRIES), max_size=3).map(tuple), st.sampled_from(PREFIXES)),
        min_size=1,
        max_size=3,
    ).map(tuple),
    among=rarely(some(list(EXTRAS)), ()),
    beside=some(list(EXTRAS), 3),
    optimizer=st.booleans(),
    changes=rarely(some(CHANGES), ()),
    names=LIBRARIES.flatmap(lambda own: st.tuples(st.just(own), rarely(LIBRARIES, own))),
    adapt=rarely(some(CHOICES, 3), ()),
    entry=rarely(st.sampled_from((*ENTRIES, "absent")), None),
    format=st.sampled_from(FORMATS),
    cut=rarely(st.floats(0, 1), None),
    flipped=rarely(st.lists(st.floats(0, 0.999), max_size=4).map(tuple), ()),
)


@cache
def network() -> nn.Module:
    """The network that all weights are of."""
    return sw.build("resnet", depth=8, width=4, classes=3)


def numbered(number: int, library: str) -> dict[str, Tensor]:
    """The weights of a set: those of the network and its number."""
    state = export_names(network(), library)
    return {key: tensor + number if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def changed(state: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    """Weights with something wrong."""
    first = next(iter(state))
    tensor = state[first]
    match change:
        case "miss one":
            return {key: value for key, value in state.items() if key != first}
        case "stray key":
            return {**state, "criterion.weight": torch.ones(3)}
        case "other shape":
            return {**state, first: tensor[:1]}
        case "other type":
            return {**state, first: torch.ones(tensor.shape, dtype=torch.int8)}
        case "half":
            return {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        case "complex":
            return {**state, first: torch.ones(tensor.shape, dtype=torch.complex64)}
        case "sparse" if not tensor.is_meta:
            return {**state, first: tensor.to_sparse()}
        case "meta":
            return {**state, first: tensor.to("meta")}
    return {(f"extra.{key}" if number % 3 == 0 else key): value for number, (key, value) in enumerate(state.items())}


def content_of(case: Case) -> dict[Any, Any]:
    """The content of the checkpoint. A later set under the same entries adds to or replaces the earlier one."""
    content: dict[Any, Any] = {}
    for number, (path, prefix) in enumerate(case.sets):
        state = numbered(number, case.names[0])
        for change in case.changes if number == 0 else ():
            state = changed(state, change)
        inner = content
        for name in path:
            inner = inner.setdefault(name, {}) if isinstance(inner.get(name, {}), dict) else inner
        inner.update({prefix + key: tensor for key, tensor in state.items()})
        inner.update({name: EXTRAS[name] for name in case.among if number == 0})
    for name in case.beside:
        content.setdefault(name, EXTRAS[name])
    if case.optimizer:
        content.setdefault("solver", {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []})
    return content


def write(case: Case, content: dict[Any, Any], path: Path) -> Any:
    """Write the checkpoint as the case says, damage it, and return what is to be loaded."""
    flat = all(
        isinstance(key, str) and isinstance(value, Tensor) and not value.is_sparse and not value.is_meta
        for key, value in content.items()
    )
    match case.format:
        case "mapping":
            return content
        case "pickle":
            path.write_bytes(pickle.dumps(content, protocol=4))
        case "safetensors" if flat:
            save_file({key: value.clone() for key, value in content.items()}, path)
        case "numpy" if flat:
            with path.open("wb") as file:
                np.savez(file, **{key: value.numpy() for key, value in content.items()})
        case _:
            torch.save(content, path, _use_new_zipfile_serialization=case.format != "legacy")
    data = bytearray(path.read_bytes())
    for place in case.flipped:
        data[int(place * len(data))] ^= 0xFF
    path.write_bytes(data[: int(len(data) * case.cut)] if case.cut is not None else data)
    return path


def count_tensors(value: Any) -> int:
    """The tensors of a checkpoint that are not an optimizer's, in mappings of any depth."""
    if isinstance(value, Tensor):
        return 1
    if not isinstance(value, dict) or "param_groups" in value:
        return 0
    return sum(count_tensors(each) for name, each in value.items() if "optim" not in str(name))


def count_counters(value: Any) -> int:
    """The counters of wrappers in a checkpoint."""
    if not isinstance(value, dict):
        return 0
    return sum(name in COUNTERS or count_counters(each) for name, each in value.items())


def entry_of(content: Any, path: str) -> dict[Any, Any]:
    """The entry of a checkpoint that a path of names with dots leads to."""
    while path:
        name = max((each for each in map(str, content) if f"{path}.".startswith(f"{each}.")), key=len)
        content, path = content[name], path[len(name) + 1 :]
    return content


def check_account(content: dict[Any, Any], report: LoadReport, remarks: list[str]) -> None:
    """Assert that the tensors of the file add up."""
    loaded = sum(len(theirs) for theirs in report.renamed.values()) + len(report.matched)
    text = "\n".join(remarks)
    beside = sum(int(number) for number in re.findall(r"(\d+) values? beside the weights left out", text))
    listed = re.search(r"beside the weights left out: (.*)", text)
    # of these, what is no tensor does not count here; a list that is cut names the first ones only
    others = 0 if listed is None else len(re.findall(r"\((?!a tensor)[^)]*\)", listed[1]))
    named = re.search(r"also there: (.*) \(choose", text)
    aside = sum(
        sum(isinstance(each, Tensor) for each in entry_of(content, path).values())
        for path in (re.findall(r"'([^']*)'", named[1]) if named is not None else ())
    )
    counters = count_counters(content)
    found = loaded + len(report.left_out) + beside - others + aside
    # a wrapper's counter is no weight, and is dropped where it stands among the weights that are taken
    assert found <= count_tensors(content) <= found + counters, (count_tensors(content), found, remarks)


def check_one_set(model: nn.Module, report: LoadReport) -> None:
    """Assert that all tensors that were loaded come from one set."""
    own = network().state_dict()
    sets = {
        round(float((tensor - own[key]).mean()))
        for key, tensor in model.state_dict().items()
        if key in report.tensors and key not in report.resampled and tensor.is_floating_point()
    }
    assert len(sets) == 1, sets


def outcome(case: Case, folder: Path) -> str:
    """Load the checkpoint of a case; "loaded", "loaded with remarks", or how it was refused."""
    content = content_of(case)
    model = sw.build("resnet", depth=8, width=4, classes=3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    remarks: list[str] = []
    source = write(case, content, folder / "checkpoint")
    try:
        state = read_source(source, case.entry, remarks.append)
        report = load_state(model, state, names=case.names[1], adapt=case.adapt, remark=remarks.append)
    except sw.SkipwayError as error:
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        text = str(error)
        assert all(letter.isprintable() or letter == "\n" for letter in text)
        kinds = ("do not fit", "damaged", "several state dicts", "holds no state dict", "holds the state dicts")
        return f"refused: {next((kind for kind in kinds if kind in text), 'named')}"
    if case.cut is None and not case.flipped:
        if case.entry is None:
            check_account(content, report, remarks)
        check_one_set(model, report)
    return "loaded with remarks" if remarks else "loaded"
