"""Positions counted from the tokens, `cumsum(ids != pad)`, were taken for a signal, and their sum for a connection.

| trial | input | right value |
|---|---|---|
| D16 | RoBERTa, CamemBERT, XLM-R, MPNet, ESM, M2M100 of 4 layers | 2 per encoder layer, 3 per decoder layer |
| D16 | embeddings of running counts of tokens, of the mask, of lengths; sinusoids looked up by counts | constant |
| – | positions by `arange`, a parameter, a buffer | constant as before |
| – | a parameter that is looked up by `arange` or by counts | an embedding: no weight decay |
| – | rotary embeddings by positions that are given | rotary, as without |
| – | token types that are given, one-hot tokens, whole numbers as numbers | signals; connections are found |
| – | padding set to zero after every layer (`x * mask`) | the connections stay |
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import skipway as sw
from benchmarks.peers import import_transformers

V, C, T = 50, 8, 6
SIZES = {"vocab_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
MARIAN = {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
MARIAN |= {f"{side}_{part}": 4 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
MODELS = {
    "RobertaModel": (SIZES, 8),
    "MPNetModel": (SIZES, 8),
    "EsmModel": ({**SIZES, "pad_token_id": 1, "mask_token_id": 2}, 8),
    "CamembertModel": (SIZES, 8),
    "XLMRobertaModel": (SIZES, 8),
    "M2M100Model": (MARIAN, 20),
}


@pytest.mark.parametrize("name", MODELS)
def test_positions_from_tokens_are_constant(name):
    transformers = import_transformers()
    settings, count = MODELS[name]
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings))  # of real weights, since masks are read
    ids = torch.randint(3, 50, (2, 12))
    decoder = {"decoder_input_ids": ids} if name == "M2M100Model" else {}
    chain = sw.chain(model, {"input_ids": ids, **decoder})
    assert len(chain) == count
    assert {connection.seen.kind for connection in chain} == {"attention", "mlp"}
    reasons = [refusal.reason for refusal in chain.refused if refusal.reason != "rotary"]
    assert set(reasons) <= {"constant"}


def test_rotary_embeddings_are_rotary_whether_positions_are_given_or_not():
    transformers = import_transformers()
    model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES))
    ids = torch.randint(3, 50, (2, 12))
    for positions in ({}, {"position_ids": torch.arange(12)[None].expand(2, -1)}):
        chain = sw.chain(model, {"input_ids": ids, **positions})
        assert (len(chain), {refusal.reason for refusal in chain.refused}) == (8, {"rotary"})


class Encoder(nn.Module):
    """Embeds tokens and passes them through two feed-forward connections."""

    def __init__(self, positions=None, inputs=None, keep=None) -> None:
        super().__init__()
        self.tokens, self.table = nn.Embedding(V, C), nn.Embedding(V, C)
        self.parameter = nn.Parameter(torch.zeros(1, T, C))
        self.register_buffer("sinusoids", torch.randn(V, C))
        self.up, self.down = nn.Linear(C, C), nn.Linear(C, C)
        self.positions, self.inputs, self.keep = positions, inputs, keep

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.tokens(ids) if self.inputs is None else self.inputs(self, ids)
        if self.positions is not None:
            x = x + self.positions(self, ids, mask)
        for _ in range(2):
            x = x + self.down(self.up(x).relu())
            if self.keep is not None:
                x = x * self.keep(ids, mask)
        return x


def counted(m, ids, mask):
    real = ids.ne(1).int()
    return (real.cumsum(1).type_as(real) * real).long() + 1


POSITIONS = {
    "running count of tokens": lambda m, ids, mask: m.table(counted(m, ids, mask)),
    "running count, sinusoids": lambda m, ids, mask: m.sinusoids.index_select(0, counted(m, ids, mask).view(-1)).view(
        *ids.shape, C
    ),
    "running count of the mask": lambda m, ids, mask: m.table((mask.cumsum(1) * mask - 1).clamp(min=0)),
    "of the mask itself": lambda m, ids, mask: m.table((mask == 0).long()),
    "lengths": lambda m, ids, mask: m.table((ids != 1).sum(1, keepdim=True).expand(-1, T).clamp(max=V - 1)),
    "arange": lambda m, ids, mask: m.table(torch.arange(T, device=ids.device)),
    "a parameter": lambda m, ids, mask: m.parameter,
    "a buffer": lambda m, ids, mask: m.sinusoids[:T],
}


@pytest.mark.parametrize("name", POSITIONS)
def test_a_sum_with_positions_is_refused_as_constant(name):
    ids = torch.randint(2, V, (3, T))
    chain = sw.chain(Encoder(POSITIONS[name]), (ids, torch.ones_like(ids)))
    assert [refusal.reason for refusal in chain.refused] == ["constant"]
    assert len(chain) == 2


INPUTS = {
    "one-hot tokens": lambda m, ids: (ids[..., None] == torch.arange(V, device=ids.device)).float() @ m.tokens.weight,
    "one_hot": lambda m, ids: functional.one_hot(ids, V).float() @ m.tokens.weight,
    "whole numbers as numbers": lambda m, ids: (ids.float() / V)[..., None] * m.parameter,
}


@pytest.mark.parametrize("name", INPUTS)
def test_other_whole_numbers_are_signals(name):
    ids = torch.randint(2, V, (3, T))
    assert len(sw.chain(Encoder(inputs=INPUTS[name]), (ids,))) == 2


def test_given_token_types_are_a_signal_of_their_own():
    chain = sw.chain(
        Encoder(lambda m, ids, types: m.table(types)), (torch.randint(2, V, (3, T)), torch.ones(3, T).long())
    )
    assert len(chain) == 2
    assert [refusal.reason for refusal in chain.refused] == ["unrelated"]


@pytest.mark.parametrize(
    "keep", [lambda ids, mask: (ids != 1)[..., None], lambda ids, mask: (ids != 1).float().unsqueeze(-1)]
)
def test_padding_set_to_zero_keeps_the_connections(keep):
    chain = sw.chain(Encoder(keep=keep), (torch.randint(2, V, (3, T)),))
    assert [(c.seen.skip, c.seen.maps) for c in chain] == [("identity", ("up", "down"))] * 2


@pytest.mark.parametrize(
    "positions", [lambda ids: torch.arange(T, device=ids.device), lambda ids: counted(None, ids, None)]
)
def test_a_table_of_positions_is_an_embedding(positions):
    class Table(Encoder):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids) + functional.embedding(positions(ids), self.free)
            return x + self.down(self.up(x).relu())

    model = Table()
    model.free = nn.Parameter(torch.randn(V, C))
    del model.parameter
    groups = sw.param_groups(model, lr=1e-3, weight_decay=0.1, example=torch.randint(2, V, (3, T)))
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert (decay[id(model.free)], decay[id(model.up.weight)]) == (0, 0.1)
