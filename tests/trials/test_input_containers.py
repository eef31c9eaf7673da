"""Kind: a container, a module or its state is known by its class, and what no list knows is a leaf, silently.

| trial | input | right value |
|---|---|---|
| D5 | `BatchEncoding`, `UserDict`, an own `Mapping`, a class with `keys` and `values` | as the dict |
| D5 | a dataclass, frozen, with slots, an object, as the model's one argument | as its tensors |
| D5 | a mapping that `forward` takes as one argument | handed over as one |
| D5 | containers in containers: `UserDict` of a list, a dataclass in a tuple | cut and moved like tensors |
| D5 | texts, numbers, an empty mapping, `None`, an array, a data set, a module, a class | refused, with the way out |
| D5 | re-entrant checkpoints in the model | gradients as without |
| — | a model that keeps activations, a hidden state of the last call, a growing list | works; afterwards as before |
| — | a model that keeps a tree whose nodes hold their parents, an example with one | as without; circles stay circles |
| — | a model that writes into its input | every pass sees the given values, and so does the caller |
| D15 | a model that sets `requires_grad` on what it computed from its input (Wav2Vec2) | works |
| D6 | weight norm old and new, spectral norm, a parametrization of one's own | copied, diagnosed, damped or refused |
| — | encoders that torch runs on a fast path in evaluation | the connections of training |
| — | norms that stay in evaluation, norms without gradients, lazy layers that have run | works |
"""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import skipway as sw
from skipway.diagnosis.lint import lint
from skipway.diagnosis.remedies import Damp
from skipway.probes import probe
from skipway.surgery.fusion import fuse
from skipway.tracing.containers import map_tensors, tensors_in
from skipway.tracing.module_state import copy_module

X, LABELS = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.head(x + self.map(x).relu())


class OwnMapping(Mapping):
    def __init__(self, **entries: Any) -> None:
        self.entries = entries

    def __getitem__(self, name: str) -> Any:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class TensorTable:
    """Like a mapping without being one, and iterates over its rows, as tensordict's class does."""

    def __init__(self, **entries: Tensor) -> None:
        self.entries = entries

    def keys(self):
        return self.entries.keys()

    def values(self):
        return self.entries.values()

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name]

    def __iter__(self):
        return iter(self.entries["x"])


@pytest.mark.parametrize("kind", [UserDict, OrderedDict, OwnMapping, TensorTable])
def test_mappings_of_any_class_are_keyword_arguments(kind):
    model, example = Net(), kind(x=X)
    assert len(sw.chain(model, example)) == 1
    assert sw.diagnose(model, example, targets=LABELS).measurement == sw.diagnose(model, X, targets=LABELS).measurement


def test_batch_encoding():
    transformers = pytest.importorskip("benchmarks.peers").import_transformers()
    example = transformers.BatchEncoding({"x": X})
    assert len(sw.chain(Net(), example)) == len(probe(Net(), example)) == 1


@dataclass
class Batch:
    x: Tensor
    name: str = "a batch"


@dataclass(frozen=True)
class FrozenBatch:
    x: Tensor


@dataclass(slots=True)
class SlottedBatch:
    x: Tensor


class Unpacking(Net):
    """Takes one object and reads its x."""

    def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().forward(batch["x"] if isinstance(batch, dict) else batch.x)


@pytest.mark.parametrize("given", [Batch(X), FrozenBatch(X), SlottedBatch(X), SimpleNamespace(x=X), {"x": X}])
def test_one_object_is_one_argument(given):
    model = Unpacking()
    assert len(sw.chain(model, given)) == 1
    whole = Net.forward(model, X[:8])
    found = sw.diagnose(model, given, targets=LABELS)
    assert found.subject.size == 16
    assert found.measurement.loss == pytest.approx(F.cross_entropy(whole, LABELS[:8]).item(), rel=1e-5)


def test_containers_in_containers_keep_their_class_and_are_left_alone():
    given = (UserDict(a=[X, 1]), {"b": Batch(X)}, "text")
    cut = map_tensors(lambda each: each[:2], given)
    assert [tensor.shape[0] for tensor in tensors_in(cut)] == [2, 2]
    assert [tensor.shape[0] for tensor in tensors_in(given)] == [16, 16]
    assert [type(cut[0]), type(cut[1]["b"]), cut[1]["b"].name] == [UserDict, Batch, "a batch"]
    assert map_tensors(lambda each: each, given[2]) is given[2]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("text",), "example=tuple of str: it holds no tensor"),
        ({}, "example=dict: it holds no tensor"),
        (UserDict(x=1), "example=UserDict: it holds no tensor"),
        (None, "example=NoneType: it holds no tensor"),
        ("text", "example=str: it holds no tensor"),
        (X.numpy(), r"example=ndarray: the rule is tensors; give torch\.as_tensor"),
        (torch.utils.data.TensorDataset(X), r"example=TensorDataset: a data set holds single samples.*DataLoader"),
        (nn.Linear(2, 2), "example=Linear: it holds no tensor"),
        (torch.tensor(1.0), "its tensors are single numbers"),
    ],
)
def test_an_example_without_tensors_is_refused(given, words):
    with pytest.raises(sw.SkipwayError, match=words):
        sw.diagnose(Net(), given)


class Checkpointed(Net):
    reentrant = True

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.head.weight.sum() * 0 + x
        y = torch.utils.checkpoint.checkpoint(lambda x: x + self.map(x).relu(), x, use_reentrant=self.reentrant)
        return self.head(y)


def test_reentrant_checkpoints_give_the_gradients_of_the_others():
    model = Checkpointed()
    inside = sw.diagnose(model, X, targets=LABELS)
    model.reentrant = False
    outside = sw.diagnose(model, X, targets=LABELS)
    assert inside.measurement.gradient == outside.measurement.gradient > 0
    assert torch.utils.checkpoint.CheckpointFunction.__mro__[1] is torch.autograd.Function


class Keeping(Net):
    """Keeps what it computes: the last activation, all of them, and a state that the next call goes on from."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.state: Tensor | None = None

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = x + self.map(x).relu()
        if self.state is not None:
            y = y + self.state.mean()
        self.last = self.state = y
        self.kept.append(y)
        return self.head(y)


def test_what_a_model_keeps_is_as_before():
    model = Keeping()
    sw.diagnose(model, X, targets=LABELS)
    assert (model.kept, model.state, hasattr(model, "last")) == ([], None, False)
    model(X).sum().backward()  # the state holds a graph that is freed
    kept = model.kept[0]
    diagnosis = sw.diagnose(model, X, targets=LABELS)
    assert diagnosis.fix(Damp()).after.measurement.finite
    assert len(probe(model, X)) == 1
    assert model.kept == [kept]
    assert model.last is model.state is kept


def test_a_model_that_writes_into_its_input():
    class Writing(Net):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return super().forward(x.mul_(2))

    model, x = Writing(), X.clone()
    diagnosis = sw.diagnose(model, x, targets=LABELS)
    assert torch.equal(x, X)
    whole = Net.forward(model, 2 * X[:8])
    assert diagnosis.measurement.loss == pytest.approx(F.cross_entropy(whole, LABELS[:8]).item(), rel=1e-5)


def test_a_model_that_asks_for_gradients_of_its_input():
    class Flagging(Net):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            x = x[:, None]
            x.requires_grad = True
            return super().forward(x[:, 0])

    model = Flagging()
    assert sw.diagnose(model, X, targets=LABELS).measurement.jacobians.shattering is not None


class Normed(nn.Module):
    def __init__(self, reparametrise) -> None:
        super().__init__()
        self.first, self.second = (reparametrise(nn.Conv1d(4, 4, 3, padding=1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def doubled(module: nn.Module) -> nn.Module:
    """A parametrization that cannot be inverted."""
    nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    return module


NORMALISED = {
    "old weight norm": nn.utils.weight_norm,
    "new weight norm": nn.utils.parametrizations.weight_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "new spectral norm": nn.utils.parametrizations.spectral_norm,
    "own": doubled,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", NORMALISED)
def test_weights_that_are_computed(kind):
    model = nn.Sequential(*(Normed(NORMALISED[kind]) for _ in range(2)), nn.Flatten(), nn.Linear(24, 3))
    x = torch.randn(16, 4, 6)
    model(x)  # the older forms keep a tensor of the graph
    copied = copy_module(model).eval()
    torch.testing.assert_close(copied(x), model.eval()(x))
    model.train()
    diagnosis = sw.diagnose(model, x, targets=LABELS)
    assert (len(diagnosis.chain), diagnosis.measurement.finite) == (2, True)
    assert lint(model, x) is not None
    torch.testing.assert_close(fuse(model)(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    connection = sw.chain(model, x)[0]
    model.eval()
    before = model[0](x) - x
    if kind in ("old weight norm", "new weight norm"):
        connection.multiply_(0.5)
        torch.testing.assert_close(model[0](x) - x, before / 2)
    else:
        with pytest.raises(sw.SkipwayError, match="is computed in every pass"):
            connection.multiply_(0.5)
        torch.testing.assert_close(model[0](x) - x, before)


def circle(tensor: Tensor) -> dict[str, Any]:
    """A node of a tree, whose only child knows it."""
    root: dict[str, Any] = {"children": []}
    root["children"].append({"parent": root, "value": tensor, "again": tensor})
    return root


def test_containers_in_a_circle():
    model = Net()
    model.tree = circle(X.clone().requires_grad_() * 2)  # as an earlier pass leaves it
    assert len(sw.chain(model, X)) == 1
    assert sw.diagnose(model, X, targets=LABELS, allowance=0).measurement.finite
    torch.testing.assert_close(fuse(model)(X), model.eval()(X))
    given = circle(X)
    assert [each is X for each in tensors_in(given)] == [True, True]
    shared = [X]
    assert len(list(tensors_in([shared, shared]))) == 2, "what is held twice is no circle"
    mapped = map_tensors(torch.neg, given)
    (child,) = mapped["children"]
    assert child["parent"] is mapped
    torch.testing.assert_close(child["value"], -X)
    assert given["children"][0]["value"] is X


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_circles_of_every_kind_end(kind):
    """Also where everything knows everything: 12 tables have 10⁹ paths."""
    every = [kind(tensor=torch.full((1,), float(number))) for number in range(12)]
    for each in every:
        each["others"] = [other for other in every if other is not each]
        each["me"] = each
    assert sorted(tensor.item() for tensor in tensors_in(every)) == list(range(12))
    mapped = map_tensors(torch.neg, every)
    assert [each["tensor"].item() for each in mapped] == [-float(number) for number in range(12)]
    assert all(type(each) is kind and each["me"] is each for each in mapped)
    assert mapped[0]["others"][-1] is mapped[-1]


class Layers:
    """A cache that torch's pytree knows, and that makes its list anew whenever it is asked."""

    def __init__(self, layers: list[Tensor]) -> None:
        self.layers = layers


torch.utils._pytree.register_pytree_node(
    Layers, lambda cache: ([list(cache.layers)], None), lambda parts, _: Layers(next(iter(parts)))
)


@pytest.mark.parametrize("kind", [list, tuple])
def test_what_is_made_anew_is_not_taken_for_another(kind):
    """Python gives the place of a list that is no longer kept to the next one."""
    given = kind(Layers([torch.full((1,), float(number))]) for number in range(5))
    assert [each.layers[0].item() for each in map_tensors(torch.clone, given)] == [0, 1, 2, 3, 4]
    assert [each.item() for each in tensors_in(given)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("training", [True, False])
def test_encoders_on_the_fast_path(training):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(40, 3))
    diagnosis = sw.diagnose(model, torch.randn(16, 5, 8), targets=LABELS, training=training)
    assert len(diagnosis.chain) == 4
    assert all(signal.gradient_after > 0 for signal in diagnosis.measurement.connections)


class FrozenNorm(nn.BatchNorm1d):
    def train(self, mode: bool = True):
        return super().train(False)


def test_frozen_norms_and_lazy_layers():
    frozen = nn.BatchNorm1d(8).requires_grad_(False)
    for norm in (FrozenNorm(8), frozen):
        lazy = nn.LazyLinear(3)
        model = nn.Sequential(Net().map, norm, lazy)
        model(X)
        assert sw.diagnose(model, X, targets=LABELS).measurement.finite
