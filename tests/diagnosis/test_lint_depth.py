"""Lint on factors that follow from depth, P25, P34 and P36: found in any spelling, and silent on the right ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.diagnosis.findings import Finding
from skipway.diagnosis.lint import lint

DIM, LAYERS = 16, 4
TOKENS = torch.zeros(2, 3, DIM)
VIT = {"dim": 16, "heads": 2, "patch": 8, "image": 16, "classes": 5}


def by(number: str, findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.rule == number]


class PostNorm(nn.Module):
    """y = norm(α x + F(x)), by an operator of choice."""

    def __init__(self, alpha: float, gain: float, spelling: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM), nn.LayerNorm(DIM)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_normal_(layer.weight, gain=gain)
        self.alpha, self.spelling = alpha, spelling

    def forward(self, x):
        f = self.fc2(self.fc1(x).relu())
        if self.spelling == "alpha":
            return self.norm(torch.add(f, x, alpha=self.alpha))
        return self.norm(x * self.alpha + f if self.spelling == "right" else f + self.alpha * x)


def post_norm(alpha: float, gain: float = 1.0, spelling: str = "left", branches: int = 2 * LAYERS) -> nn.Sequential:
    return nn.Sequential(*(PostNorm(alpha, gain, spelling) for _ in range(branches)))


@pytest.mark.parametrize("spelling", ["left", "right", "alpha"])
def test_p25_the_literal_of_32_layers(spelling):
    """pixeli99/MixLN has 2.8284271247461903 = (2 · 32)^(1/4) at any depth."""
    (finding,) = by("P25", lint(post_norm(2.8284271247461903, spelling=spelling), TOKENS))
    assert (finding.level, finding.evidence["branches it belongs to"]) == ("serious", 64)
    assert len(finding.where) == 8


@pytest.mark.parametrize("spelling", ["left", "right", "alpha"])
def test_p25_the_exponent_with_a_plus(spelling):
    """`xavier_normal_(gain=(num_layers * 8) ** 0.25)`."""
    (finding,) = by("P25", lint(post_norm((2 * LAYERS) ** 0.25, (8 * LAYERS) ** 0.25, spelling), TOKENS))
    assert math.isclose(finding.evidence["right"], (8 * LAYERS) ** -0.25)
    assert by("P25", lint(post_norm((2 * LAYERS) ** 0.25, (8 * LAYERS) ** 0.25), TOKENS, pretrained=True)) == []


def test_p25_right_ones_are_left_alone():
    for branches in (4, 8):
        assert by("P25", lint(post_norm(branches**0.25, (4 * branches) ** -0.25, branches=branches), TOKENS)) == []
    assert by("P25", lint(post_norm(1.7), TOKENS)) == []  # nobody's fourth root
    assert by("P25", lint(post_norm(1.0, 32**0.25), TOKENS)) == []  # plain post-norm of some gain
    for scheme in ("deepnorm", "keel", "keel(alpha=2.0)"):
        model = sw.build("vit-tiny-16", depth=2, scheme=scheme, **VIT)
        for example in (None, torch.zeros(2, 3, 16, 16)):
            assert by("P25", lint(model, example)) == [], scheme


class Scaled(nn.Module):
    """x + F(norm(x) / √b), the division written in several ways."""

    def __init__(self, block: int, spelling: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM), nn.LayerNorm(DIM)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.block, self.spelling = block, spelling
        self.register_buffer("factor", torch.tensor(block**-0.5), persistent=False)

    def forward(self, x):
        h = self.norm(x)
        h = {"divide": h / math.sqrt(self.block), "buffer": h * self.factor, "multiply": self.block**-0.5 * h}[
            self.spelling
        ]
        return x + self.fc2(self.fc1(h).relu())


def scaled(spelling: str, per: int = 1, std: float | None = None) -> nn.Sequential:
    model = nn.Sequential(*(Scaled(number // per + 1, spelling) for number in range(8)))
    for layer in model if std is not None else ():
        nn.init.normal_(layer.fc2.weight, std=std)
    return model


@pytest.mark.parametrize("per", [1, 2])
@pytest.mark.parametrize("spelling", ["divide", "buffer", "multiply"])
def test_p34_layernorm_scaling_with_gpt2s_or_a_zero_start(spelling, per):
    for std in (0.02 / 8**0.5, 0.0):
        (finding,) = by("P34", lint(scaled(spelling, per, std), TOKENS))
        assert finding.level == "note"
        assert finding.where == tuple(f"{number}.fc2" for number in range(8))
    assert by("P34", lint(scaled(spelling, per), TOKENS)) == []
    assert by("P34", lint(scaled(spelling, per, 0.0), TOKENS, pretrained=True)) == []


def test_p34_of_ours():
    for more, count in (("", 0), (" + zeroinit", 1), (" + depthscaled(how='init')", 1), (" + layerscale", 0)):
        model = sw.build("vit-tiny-16", depth=4, scheme=f"layernormscaling{more}", **VIT)
        for example in (None, torch.zeros(2, 3, 16, 16)):
            assert len(by("P34", lint(model, example))) == count, more


def test_p34_a_depth_scaled_start_alone_is_gpt2s():
    model = scaled("divide", std=0.02 / 8**0.5)
    for layer in model:
        layer.block = 1
    assert by("P34", lint(model, TOKENS)) == []


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x):
        return self.fc2(self.fc1(self.norm(x)).relu())


class Scalars(nn.Module):
    """Learned numbers on the stream, as nanochat (a vector of them, and x₀) and modded-nanogpt (one each) have them."""

    def __init__(self, spelling: str, blocks: int = 6) -> None:
        super().__init__()
        self.stem, self.blocks, self.spelling = (
            nn.Linear(DIM, DIM),
            nn.ModuleList(Block() for _ in range(blocks)),
            spelling,
        )
        self.keep, self.early = nn.Parameter(torch.ones(blocks)), nn.Parameter(torch.zeros(blocks))
        self.each = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(blocks))

    def forward(self, x):
        x0 = x = self.stem(x)
        for number, block in enumerate(self.blocks):
            if self.spelling == "nanochat":
                x = self.keep[number] * x + self.early[number] * x0
                x = x + block(x)
            elif self.spelling == "modded":
                x = self.each[number] * x + block(x)
            elif self.spelling == "branch":  # multiplies branches alone
                x = x + self.each[number] * block(x)
            else:  # adds an early tensor alone
                x = x + self.early[number] * x0
                x = x + block(x)
        return x


def adam(model: nn.Module, lr: float, slow: float | None = None) -> torch.optim.Optimizer:
    scalars = [value for name, value in model.named_parameters() if "keep" in name or "each" in name]
    others = [value for value in model.parameters() if all(value is not each for each in scalars)]
    return torch.optim.Adam([{"params": others}, {"params": scalars, "lr": slow or lr}], lr=lr)


@pytest.mark.parametrize("spelling", ["nanochat", "modded"])
def test_p36_stream_scalars_compound(spelling):
    model = Scalars(spelling)
    (finding,) = by("P36", lint(model, TOKENS, adam(model, 0.5)))
    assert finding.level == "serious"
    assert set(finding.where) <= {"keep", *(f"each.{number}" for number in range(6))}
    assert by("P36", lint(model, TOKENS, adam(model, 0.5, slow=0.005))) == []
    assert by("P36", lint(model, TOKENS, adam(model, 1e-3))) == []
    assert by("P36", lint(model, TOKENS, torch.optim.SGD(model.parameters(), lr=0.5))) == []  # moves by the gradient


@pytest.mark.parametrize("spelling", ["branch", "early"])
def test_p36_additive_ones_may_be_fast(spelling):
    model = Scalars(spelling)
    assert by("P36", lint(model, TOKENS, adam(model, 0.5))) == []
