"""Activations that are written out, x + f(x) by elements alone, were counted as residual connections.

| trial | input | right value |
|---|---|---|
| D3 | GELU by tanh as in GPT-2, GPT-J and Phi, quick GELU, xIELU, SwiGLU with (up + 1) · glu | no connection |
| D3 | x + σ(x), x + relu(x), x − tanh(x), snake x + sin²(ax)/a, x + x², `lerp`, `addcmul` | no connection |
| D3 | the same inside of a branch, on half of the channels, through views, in place, with a learned factor | none |
| D3 | a modulation x + x · g(c) by another signal | no connection |
| D3 | `GPT2LMHeadModel`, Phi, GPT-J, T5 with gated-gelu, gpt-oss of 4 layers | 8, 4, 4, 20, 8 by their sources |
| – | x + pool(x), x + fft(x), x + W relu(x), x + g · norm(x), attention without weights | connections |

D3 is of the language models' list.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import skipway as sw
from benchmarks.peers import import_transformers
from skipway.tracing import REASONS

C = 8


class Branch(nn.Module):
    """x + down(act(up(x))), which is one connection whatever the activation is."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.up, self.down, self.gain = nn.Linear(C, C), nn.Linear(C, C), nn.Parameter(torch.ones(C))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.activation(self, self.up(x)))


def gelu_tanh(m, x):
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


def xielu(m, x):
    positive = 0.8 * x * x + 0.5 * x
    negative = (torch.expm1(torch.clamp(x, max=-1e-6)) - x) * 0.8 + 0.5 * x
    return torch.where(x > 0, positive, negative)


def gated_linear_unit(m, x):
    up, gate = x.chunk(2, -1)
    gate = gate + gate * torch.sigmoid(1.702 * gate)
    return torch.cat([(up + 1) * gate, up + up.tanh()], -1)


ACTIVATIONS = {
    "gelu by tanh": gelu_tanh,
    "quick gelu and itself": lambda m, x: x + x * torch.sigmoid(1.702 * x),
    "xIELU": xielu,
    "SwiGLU": gated_linear_unit,
    "x + sigmoid": lambda m, x: x + x.sigmoid(),
    "x + relu": lambda m, x: functional.relu(x) + x,
    "in place": lambda m, x: x.tanh().add_(x),
    "x - tanh": lambda m, x: x - x.tanh(),
    "tanh - x": lambda m, x: x.tanh() - x,
    "snake": lambda m, x: x + (m.gain * x).sin().square() / m.gain,
    "learned": lambda m, x: x + m.gain * x.relu(),
    "through views": lambda m, x: x + x.transpose(0, 1).exp().transpose(0, 1),
    "product with itself": lambda m, x: x + x * x,
    "an operator that no table has": lambda m, x: x + torch.special.erfcx(x),
    "lerp": lambda m, x: torch.lerp(x, x.relu(), 0.3),
    "addcmul": lambda m, x: torch.addcmul(x, x, x.sigmoid()),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_no_connection(name):
    chain = sw.chain(nn.Sequential(nn.Linear(C, C), Branch(ACTIVATIONS[name])), torch.randn(4, C))
    assert [(c.name, c.seen.maps) for c in chain] == [("1", ("1.up", "1.down"))]
    assert {refusal.reason for refusal in chain.refused} == {"activation"}
    assert REASONS["activation"] in str(chain.refused[0])


def test_a_modulation_by_another_signal_is_no_connection():
    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(C, C)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x + x * self.embed(c)[:, None]

    chain = sw.chain(Modulated(), (torch.randn(2, 5, C), torch.randn(2, C)))
    assert len(chain) == 0
    assert [refusal.reason for refusal in chain.refused] == ["rotary"]


WORKING = {
    "pool": lambda m, x: x + functional.avg_pool1d(x, 3, 1, 1),
    "fft": lambda m, x: x + torch.fft.fft(x).real,
    "map of an activation": lambda m, x: x + m.up(x.relu()),
    "norm": lambda m, x: x + functional.layer_norm(x, (C,)) * m.gain,
    "attention without weights": lambda m, x: x + (x @ x.mT).softmax(-1) @ x,
    "running sum": lambda m, x: x + x.cumsum(0),
    "squeeze": lambda m, x: x + x * x.mean(1, keepdim=True).sigmoid(),
    "rolled": lambda m, x: x + x.roll(1, 1).relu(),
}


@pytest.mark.parametrize("name", WORKING)
def test_where_positions_or_channels_meet_it_is_a_connection(name):
    class Alone(Branch):
        def forward(self, x: Tensor) -> Tensor:
            return WORKING[name](self, x)

    assert len(sw.chain(Alone(None), torch.randn(4, C))) == 1


SIZES = {"vocab_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 32}
SMALL = {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4}
GROUPED = {"num_key_value_heads": 2}
MODELS = {  # class, configuration, connections
    "GPT2LMHeadModel": (SMALL, 8),
    "PhiModel": ({**SIZES, "intermediate_size": 64}, 4),
    "GPTJModel": ({**SMALL, "rotary_dim": 4}, 4),
    "T5Model": ({"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4}, 20),
    "GptOssModel": (
        {**SIZES, "intermediate_size": 64, "head_dim": 8, "num_local_experts": 4, **GROUPED},
        8,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_language_models_have_the_connections_of_their_sources(name):
    transformers = import_transformers()
    settings, count = MODELS[name]
    kind = getattr(transformers, name)
    own = {"feed_forward_proj": "gated-gelu"} if name == "T5Model" else {}
    with torch.device("meta" if name != "GptOssModel" else "cpu"):
        model = kind(kind.config_class(**settings, **own))
    ids = torch.randint(0, 64, (2, 12))
    chain = sw.chain(model, {"input_ids": ids, **({"decoder_input_ids": ids} if name == "T5Model" else {})})
    assert len(chain) == count
    assert {connection.seen.skip for connection in chain} == {"identity"}
