"""Examples in every form in which people hold them: tensors, tuples, mappings, loaders."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import skipway as sw
from benchmarks.peers import import_transformers
from skipway.errors import SkipwayError
from skipway.tracing import as_batch, as_example, call_model, watch
from skipway.tracing.example import copy_example


class Conditioned(nn.Module):
    """y = x + F(x)·g(c), called with two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(3, 4)

    def forward(self, x, condition):
        return x + self.f(x) * self.g(condition)


X, C = torch.randn(5, 4), torch.randn(5, 3)


@pytest.mark.parametrize(
    "example",
    [(X, C), [X, C], {"x": X, "condition": C}, DataLoader([(X[i], C[i], i) for i in range(5)], batch_size=5)],
    ids=["tuple", "list", "dict", "loader"],
)
def test_every_form_calls_the_model_alike(example):
    model = Conditioned()
    assert torch.equal(call_model(model, example), model(X, C))
    assert len(sw.chain(model, example)) == 1


def test_a_tokenizers_output_is_keyword_arguments():
    pytest.importorskip("transformers")
    transformers = import_transformers()
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(config)
    ids = torch.randint(0, 20, (2, 6))
    encoding = transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert isinstance(as_example(encoding), dict)
    assert len(sw.chain(model, encoding)) == 4


def test_the_last_element_of_a_loaders_batch_is_the_targets():
    loader = DataLoader([(X[i], i) for i in range(5)], batch_size=5)
    example, targets = as_batch(loader)
    assert torch.equal(example, X)
    assert targets.tolist() == list(range(5))
    _, own = as_batch(loader, targets="mine")
    assert own == "mine"
    alone, none = as_batch(DataLoader(list(X), batch_size=5))
    assert torch.equal(alone, X)
    assert none is None


def test_a_tuple_is_arguments_and_never_targets():
    example, targets = as_batch((X, C))
    assert len(example) == 2
    assert targets is None


@pytest.mark.parametrize(("given", "message"), [(3, "example=int"), ("x", "example=str"), (iter(()), "no batch")])
def test_what_is_no_example_is_refused(given, message):
    with pytest.raises(SkipwayError, match=message):
        as_example(given)


def test_a_loader_is_read_once():
    """A second look would see other images."""
    reads = []

    class Loader:
        def __iter__(self):
            reads.append(1)
            return iter([X])

    watch(nn.Linear(4, 4), Loader())
    assert len(reads) == 1


class Cache:
    """What a network writes into, in its own way."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []


class Writing(nn.Module):
    """Writes into everything that it is given; `decides` by values, which the meta device has not."""

    def __init__(self, decides: bool) -> None:
        super().__init__()
        self.decides, self.map = decides, nn.Linear(4, 4)

    def forward(self, x, cache):
        x.sub_(1)
        cache.keys.append(x)
        return self.map(x) if not self.decides or x.sum() < 1e9 else x


@pytest.mark.parametrize("decides", [False, True])
def test_a_watched_network_writes_into_a_copy(decides):
    x, cache = torch.ones(2, 4), Cache()
    program = watch(Writing(decides), (x, cache))
    assert program.on_meta is not decides
    assert torch.equal(x, torch.ones(2, 4))
    assert cache.keys == []


def test_a_copy_shares_what_the_example_shares():
    """`query is key` decides what attention computes."""
    x, cache = torch.ones(2), Cache()
    cache.keys.append(x)
    one, other, copied = copy_example((x, x, cache))
    assert one is other is copied.keys[0]
    one.zero_()
    assert torch.equal(x, torch.ones(2))
    (made,) = copy_example((x.requires_grad_(),), gradients=True)
    assert made.requires_grad
    assert not copy_example(x).requires_grad
    assert copy_example(x, "meta").is_meta


def test_what_is_no_part_of_an_example_is_not_copied(monkeypatch):
    """A module among the arguments is the caller's, and a tensor is copied once."""
    layer, cache, copies, clone = nn.Linear(2, 2), Cache(), [], torch.Tensor.clone
    cache.keys.append(torch.ones(2))
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor, **given: copies.append(1) or clone(tensor, **given))
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", lambda tensor, memo: pytest.fail("copied twice"))
    x, same, cached = copy_example((torch.ones(2), layer, cache))
    assert same is layer
    assert cached is not cache
    assert cached.keys[0] is not cache.keys[0]
    assert torch.equal(cached.keys[0], x)
    assert copies == [1, 1]
