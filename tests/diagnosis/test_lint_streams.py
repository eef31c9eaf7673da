"""Lint on several streams and on gates, P26-P30, P32 and P38: in several spellings of code, silent on right ones."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from tests.diagnosis.stream_ports import DIM, PORTS, Network, Plain
from torch import nn

import skipway as sw
from skipway.diagnosis.findings import Finding
from skipway.diagnosis.lint import lint
from skipway.zoo.sources import import_library

TOKENS = torch.zeros(2, 3, DIM)
VIT = {"depth": 2, "dim": 16, "heads": 2, "patch": 8, "image": 16, "classes": 5}
NUMBERS = {"P26", "P27", "P28", "P29", "P30", "P32", "P38"}

FAULTS = {
    "P26": {"apply": False},
    "P27": {"hold": 0.0, "off": -8.0},
    "P28": {"hold": 1.0},
    "P29": {"factor": 1.0},
    "P38": {"std": 0.0},
}
"""Choices of the ports in `stream_ports` that make a fault."""


def streams(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.rule in NUMBERS]


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("number", FAULTS)
def test_faults_are_found_in_every_spelling(port, number):
    (finding,) = streams(lint(Network(PORTS[port], depth=3, **FAULTS[number]), TOKENS))
    assert (finding.rule, finding.level) == (number, "note" if number == "P29" else "serious")
    assert len(finding.where) == 3


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("port", PORTS)
def test_right_ports_are_left_alone(port, n):
    assert streams(lint(Network(PORTS[port], n, depth=3), TOKENS)) == []


def test_p26_of_matrices_without_a_softmax():
    assert streams(lint(Network(Plain), TOKENS)) == []
    (finding,) = streams(lint(Network(Plain, apply=False), TOKENS))
    assert (finding.rule, finding.where) == ("P26", tuple(f"blocks.{number}.mix" for number in range(4)))


def test_p38_zero_biases_and_a_zero_map():
    (finding,) = streams(lint(Network(PORTS["fused"], hold=0.0, std=0.0), TOKENS))
    assert (finding.rule, finding.evidence["streams"]) == ("P38", 4)


@pytest.mark.parametrize("port", [*PORTS, "plain"])
def test_p30_decay_on_static_weights(port):
    model = Network(Plain if port == "plain" else PORTS[port])
    (finding,) = streams(lint(model, TOKENS, torch.optim.AdamW(model.parameters(), weight_decay=0.1)))
    names = {"fused": {"base"}, "apart": {"res", "pre", "post"}, "joined": {"static", "beta"}}
    assert finding.rule == "P30"
    assert {name.rpartition(".")[2] for name in finding.where} == names.get(port, {"mix", "read", "write"})
    static = [value for name, value in model.named_parameters() if name in finding.where]
    others = [value for name, value in model.named_parameters() if name not in finding.where]
    groups = [{"params": static, "weight_decay": 0.0}, {"params": others}]
    assert streams(lint(model, TOKENS, torch.optim.AdamW(groups, weight_decay=0.1))) == []


def test_trained_weights_have_no_start():
    for number in ("P27", "P28", "P29", "P38"):
        assert streams(lint(Network(PORTS["fused"], depth=2, **FAULTS[number]), TOKENS, pretrained=True)) == []


@pytest.mark.parametrize("scheme", ["hyperconnections(2)", "hyperconnections(2, dynamic=False)", "mhc", "gatedstreams"])
def test_ours_start_right(scheme):
    model = sw.build("vit-tiny-16", scheme=scheme, **VIT)
    optimizer = torch.optim.AdamW(sw.param_groups(model, lr=1e-3, weight_decay=0.05))
    assert lint(model, torch.zeros(2, 3, 16, 16), optimizer) == []


def test_faults_of_ours():
    model = sw.build("vit-tiny-16", scheme="mhc(hold=8.0)", **VIT)
    (finding,) = streams(lint(model, torch.zeros(2, 3, 16, 16)))
    assert (finding.rule, len(finding.where)) == ("P27", 4)
    model = sw.build("vit-tiny-16", scheme="hyperconnections(2)", **VIT)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    assert "P30" in {finding.rule for finding in lint(model, torch.zeros(2, 3, 16, 16), optimizer)}


def deepseek() -> nn.Module:
    """DeepSeek-V4 of two layers, as transformers starts it."""
    pytest.importorskip("transformers")
    import_library("transformers")
    package = "transformers.models.deepseek_v4"
    config = import_module(f"{package}.configuration_deepseek_v4").DeepseekV4Config(
        vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        head_dim=16, q_lora_rank=16, num_experts_per_tok=2, n_routed_experts=4, max_position_embeddings=64,
        sliding_window=8, o_groups=2, o_lora_rank=8, index_n_heads=2, index_head_dim=16, index_topk=4,
        num_nextn_predict_layers=0, hc_sinkhorn_iters=5, use_cache=False,
    )  # fmt: skip
    return import_module(f"{package}.modeling_deepseek_v4").DeepseekV4ForCausalLM(config)


def test_transformers_deepseek_v4():
    """Right as it is; wrong with decay on all and maps of 0 besides the biases, and with logits of -8."""
    example = {"input_ids": torch.randint(0, 64, (1, 8))}
    model = deepseek()
    assert lint(model, example) == []
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    with torch.no_grad():
        for value in (parameters[name] for name in parameters if name.endswith("_hc.fn")):
            value.zero_()
    found = streams(lint(model, example, optimizer))
    assert [(finding.rule, len(finding.where)) for finding in found] == [("P38", 4), ("P30", 4)]
    with torch.no_grad():
        for value in (parameters[name] for name in parameters if name.endswith("_hc.base")):
            value[8:] = (8 * torch.eye(4) - 8).flatten()
    assert "P27" in {finding.rule for finding in streams(lint(model, example))}


def test_small_squares_that_mix_no_streams():
    """Talking heads, a bias of attention over as many tokens as it is wide, a projection of few channels."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
            self.talk, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4, 4))
            self.small = nn.Parameter(torch.randn(5, 5))

        def forward(self, x):
            q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            scores = torch.einsum("gh,bhij->bgij", self.talk, q @ k.transpose(-1, -2)) + self.bias
            x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
            return torch.cat((x[..., :5] @ self.small, x[..., 5:]), -1)

    model = nn.Sequential(Heads(), Heads())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    assert streams(lint(model, torch.zeros(2, 4, DIM), optimizer)) == []


# ---------------------------------------------------------------------------------------------------------------- gates


class Gated(nn.Module):
    """c x + (1 - c) F(x) in the spellings of GTrXL's GRU and of Highway networks; `bias` is on the share of F."""

    def __init__(self, spelling: str, bias: float) -> None:
        super().__init__()
        self.branch, self.gate, self.spelling = nn.Linear(DIM, DIM), nn.Linear(2 * DIM, DIM), spelling
        nn.init.constant_(self.gate.bias, -bias if spelling == "carry" else bias)
        self.gru = nn.GRUCell(DIM, DIM)
        with torch.no_grad():
            self.gru.bias_ih[DIM : 2 * DIM] -= bias

    def forward(self, x):
        f = self.branch(x).relu()
        if self.spelling == "gru":
            return self.gru(f.flatten(0, 1), x.flatten(0, 1)).view_as(x)
        z = torch.sigmoid(self.gate(torch.cat((x, f), dim=-1)))
        return {
            "highway": lambda: x * (1 - z) + f * z,
            "lerp": lambda: torch.lerp(x, f, z),
            "difference": lambda: x + z * (f - x),
            "carry": lambda: f * (1 - z) + z * x,
        }[self.spelling]()


@pytest.mark.parametrize("spelling", ["gru", "highway", "lerp", "difference", "carry"])
def test_p32_gates_are_to_carry_the_stream(spelling):
    (finding,) = streams(lint(nn.Sequential(*(Gated(spelling, 0.0) for _ in range(3))), TOKENS))
    assert (finding.rule, finding.level, finding.evidence["gates"]) == ("P32", "serious", 3)
    assert finding.evidence["carried"] == pytest.approx(0.5, abs=0.05)
    assert streams(lint(nn.Sequential(*(Gated(spelling, -2.0) for _ in range(3))), TOKENS)) == []


def test_p32_leaves_other_gates_alone():
    """Squeeze-and-excitation and GLUs gate branches, recurrent cells gate over time, a value residual mixes values."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.gate = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

        def forward(self, x):
            return x + self.fc2(torch.sigmoid(self.gate(x)) * self.fc1(x)) * torch.sigmoid(self.gate(x).mean(1, True))

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(DIM, DIM)

        def forward(self, x):
            h = c = torch.zeros(len(x), DIM)
            for step in x.unbind(1):
                h, c = self.cell(step, (h, c))
            return h

    class Values(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.mix = nn.ModuleList(Branch() for _ in range(3)), nn.Linear(DIM, 1)

        def forward(self, x):
            first = None
            for layer in self.layers:
                v = layer.fc1(x)
                first = v if first is None else first
                x = x + layer.fc2(torch.lerp(v, first, torch.sigmoid(self.mix(x))).relu())
            return x

    for model in (nn.Sequential(Branch(), Branch()), Cell(), nn.LSTM(DIM, DIM, batch_first=True), Values()):
        assert streams(lint(model, TOKENS)) == [], type(model).__name__
