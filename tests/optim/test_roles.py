"""The role of a parameter follows from what it does, whatever its module is called and whatever its shape."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import skipway as sw
from benchmarks.peers import import_timm, import_transformers
from benchmarks.surgery.foreign_networks import configured
from skipway.optim.roles import parameter_roles


def roles(model, example=None):
    return {name: role.name for name, role in parameter_roles(model, example).items()}


class Own(nn.Module):
    """Everything by hand: an embedding, positions, a token, a norm, a map (3-D, by expert), a gain, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 4))
        self.positions = nn.Parameter(torch.randn(5, 4))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.experts = nn.Parameter(torch.randn(2, 4, 4))
        self.down = nn.Parameter(torch.randn(4, 2))
        self.up = nn.Parameter(torch.randn(2, 4))
        self.gamma = nn.Parameter(torch.randn(1, 1, 4))
        self.alpha = nn.Parameter(torch.randn(()))
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, ids):
        x = nn.functional.embedding(ids, self.table) + self.positions
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1)
        x = x + self.alpha * (x @ self.experts[0] @ self.experts[1].T + self.shift)
        return x * self.gamma + x @ (self.down @ self.up)


def test_a_network_written_by_hand():
    assert roles(Own(), torch.randint(7, (2, 5))) == {
        **dict.fromkeys(("table", "positions", "token"), "embedding"),
        **dict.fromkeys(("experts", "down", "up"), "weight"),
        **dict.fromkeys(("gamma", "alpha"), "gain"),
        "shift": "bias",
    }


def test_a_tied_embedding_is_one_whatever_registers_it_first():
    head, table = nn.Linear(4, 7, bias=False), nn.Embedding(7, 4)
    table.weight = head.weight
    groups = sw.param_groups(nn.ModuleList((head, table)), lr=0.1, weight_decay=0.1)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("embedding", 0.0)]


def test_without_an_example_what_is_not_known_is_named_and_not_decayed():
    model = Own()
    with pytest.warns(UserWarning, match=r"the role of table, positions, token and 6 more is not known"):
        groups = sw.param_groups(model, lr=0.1, weight_decay=0.1)
    assert {group["name"]: group["weight_decay"] for group in groups} == {"unknown": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = sw.param_groups(model, torch.randint(7, (2, 5)), lr=0.1, weight_decay=0.1)
    assert {group["name"]: group["weight_decay"] for group in groups}["weight"] == 0.1


@pytest.mark.parametrize(
    ("wrap", "gains"),
    [(parametrizations.weight_norm, 1), (parametrizations.spectral_norm, 0), (nn.utils.weight_norm, 1)],
)
def test_parametrized_maps(wrap, gains):
    """Weight normalisation W = g v/|v|: v is the weight, g a gain."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's old weight_norm is deprecated
        model = nn.Sequential(wrap(nn.Linear(4, 6)), nn.ReLU(), wrap(nn.Conv1d(6, 3, 1)))
    found = roles(model[0])
    assert sorted(found.values()) == sorted(["bias", "weight", *["gain"] * gains])


def test_the_maps_of_gpt2_are_decayed():
    """transformers' Conv1D is a linear map whose weight is transposed."""
    transformers = import_transformers()
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=50))
    groups = sw.param_groups(model, lr=1e-3, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = [p for g in groups if g["weight_decay"] for p in g["params"] if ".h." in names[id(p)]]
    assert sum(parameter.numel() for parameter in decayed) == 98_304
    bare = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"] if p.ndim > 1}
    assert bare == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_the_experts_of_a_mixture_are_decayed():
    model = configured("Mixtral")
    groups = sw.param_groups(model, {"input_ids": torch.randint(64, (1, 8))}, lr=1e-3, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    bare = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"] if p.ndim > 1}
    assert bare == {"model.embed_tokens.weight"}


def test_tokens_and_positions_of_timm_are_embeddings_unasked():
    model = import_timm().create_model("vit_tiny_patch16_224", depth=1, init_values=1e-5)
    found = roles(model)
    assert {name for name, role in found.items() if role == "embedding"} == {"cls_token", "pos_embed"}
    assert {name for name, role in found.items() if role == "gain"} == {"blocks.0.ls1.gamma", "blocks.0.ls2.gamma"}
    assert "unknown" not in found.values()


@pytest.mark.parametrize("name", ["resnet20", "vit-tiny-16", "convnext-atto", "swin-tiny", "cait-xxs24", "swinv2-tiny"])
def test_our_own_networks_hold_nothing_unknown(name):
    assert "unknown" not in roles(sw.build(name, device="meta")).values()
