"""Lint on networks that read earlier outputs, P31 and P35, in several spellings, and P37 on warm-ups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.diagnosis.findings import Finding
from skipway.diagnosis.lint import lint

DIM, BLOCKS = 16, 4
TOKENS = torch.zeros(2, 3, DIM)
VIT = {"depth": 2, "dim": 16, "heads": 2, "patch": 8, "image": 16, "classes": 5}


def by(number: str, findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.rule == number]


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x):
        return self.fc2(self.fc1(self.norm(x)).relu())


class AttentionOverDepth(nn.Module):
    """h = Σ aᵢ vᵢ, a = softmax(wᵀ norm(vᵢ)), with queries drawn with a deviation of `std`."""

    def __init__(self, spelling: str, std: float) -> None:
        super().__init__()
        self.spelling, self.stem = spelling, nn.Linear(DIM, DIM)
        self.branches, self.norms = (
            nn.ModuleList(kind() for _ in range(BLOCKS)) for kind in (Branch, lambda: nn.RMSNorm(DIM))
        )
        self.queries = nn.ParameterList(nn.Parameter(torch.randn(DIM) * std) for _ in range(BLOCKS))
        self.maps = nn.ModuleList(nn.Linear(DIM, 1, bias=False) for _ in range(BLOCKS))
        for each in self.maps:
            nn.init.normal_(each.weight, std=std)

    def forward(self, x):
        sources = [self.stem(x)]
        for branch, norm, query, map in zip(self.branches, self.norms, self.queries, self.maps, strict=True):
            v = torch.stack(sources)
            if self.spelling == "einsum":
                a = torch.einsum("d,kbtd->kbt", query, norm(v)).softmax(0)
                h = torch.einsum("kbt,kbtd->btd", a, v)
            elif self.spelling == "linear":
                a = map(norm(v.movedim(0, 2))).squeeze(-1).softmax(-1)
                h = (a.unsqueeze(-2) @ v.movedim(0, 2)).squeeze(-2)
            elif self.spelling == "sum":
                h = ((norm(v) * query).sum(-1, keepdim=True).softmax(0) * v).sum(0)
            else:
                a = torch.stack([(norm(each) * query).sum(-1) for each in sources], dim=-1).softmax(-1)
                h = sum(a[..., number, None] * each for number, each in enumerate(sources))
            sources.append(branch(h))
        return sources[-1]


@pytest.mark.parametrize("spelling", ["einsum", "linear", "sum", "loop"])
def test_p31_queries_start_at_zero(spelling):
    """Liger-Kernel's module draws them with a deviation of 0.02."""
    model = AttentionOverDepth(spelling, 0.02)
    (finding,) = by("P31", lint(model, TOKENS))
    assert (finding.level, len(finding.where)) == ("serious", BLOCKS)
    assert {name.partition(".")[0] for name in finding.where} == {"maps" if spelling == "linear" else "queries"}
    assert by("P31", lint(model, TOKENS, pretrained=True)) == []
    assert by("P31", lint(AttentionOverDepth(spelling, 0.0), TOKENS)) == []


def test_p31_leaves_pooling_and_attention_alone():
    class Pooling(nn.Module):
        """A learned query over tokens, and one over all hidden states at the end."""

        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(Branch() for _ in range(BLOCKS))
            self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
            self.tokens, self.states = nn.Parameter(torch.randn(DIM)), nn.Parameter(torch.randn(DIM))

        def forward(self, x):
            states = [x]
            for branch in self.branches:
                x = x + branch(x) + self.attention(x, x, x)[0]
                states.append(x)
            v = torch.stack(states)
            h = torch.einsum("kbt,kbtd->btd", (v @ self.states).softmax(0), v)
            return ((h @ self.tokens).softmax(-1).unsqueeze(-1) * h).sum(1)

    assert by("P31", lint(Pooling(), TOKENS)) == []


class DenseFormer(nn.Module):
    """x = Σ aⱼ Xⱼ after each block, the weights in linear maps, as the authors', or in parameters."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling, self.branches = spelling, nn.ModuleList(Branch() for _ in range(BLOCKS))
        lengths = range(2, BLOCKS + 2)
        self.maps = nn.ModuleList(nn.Linear(length, 1, bias=False) for length in lengths)
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(length)) for length in lengths)
        del self._modules["weights" if spelling == "linear" else "maps"]
        for each in self.averages():
            nn.init.zeros_(each)
            each.data.view(-1)[-1] = 1.0

    def averages(self) -> list[nn.Parameter]:
        return [each.weight for each in self.maps] if self.spelling == "linear" else list(self.weights)

    def forward(self, x):
        outputs = [x]
        for number, branch in enumerate(self.branches):
            outputs.append(x + branch(x))
            if self.spelling == "linear":
                x = self.maps[number](torch.stack(outputs, dim=-1)).squeeze(-1)
            elif self.spelling == "tensordot":
                x = torch.tensordot(self.weights[number], torch.stack(outputs), dims=1)
            else:
                x = sum(self.weights[number][index] * each for index, each in enumerate(outputs))
        return x


@pytest.mark.parametrize("spelling", ["linear", "tensordot", "loop"])
def test_p35_averages_start_at_the_newest_output_and_are_not_decayed(spelling):
    model = DenseFormer(spelling)
    averages = model.averages()
    others = [value for value in model.parameters() if all(value is not each for each in averages)]
    right = torch.optim.AdamW([{"params": averages, "weight_decay": 0.0}, {"params": others}], weight_decay=0.1)
    assert by("P35", lint(model, TOKENS, right)) == []
    (finding,) = by("P35", lint(model, TOKENS, torch.optim.AdamW(model.parameters(), weight_decay=0.1)))
    assert (finding.level, finding.evidence["weight decay"], len(finding.where)) == ("serious", 0.1, BLOCKS)
    for each in averages:  # what a global initialisation of GPT-2's does
        nn.init.normal_(each, std=0.02)
    (finding,) = by("P35", lint(model, TOKENS, right))
    assert abs(finding.evidence["weight of the newest"]) < 0.1
    assert by("P35", lint(model, TOKENS, right, pretrained=True)) == []


def test_p37_one_warmup_for_all_under_post_norm():
    for scheme, count in (("deepnorm + prores(10, schedule='equal')", 1), ("keel + prores(10, schedule='equal')", 1),
                          ("deepnorm + prores(10)", 0), ("prores(10, schedule='equal')", 0)):  # fmt: skip
        model = sw.build("vit-tiny-16", scheme=scheme, **VIT)
        for example in (None, torch.zeros(2, 3, 16, 16)):
            assert len(by("P37", lint(model, example))) == count, scheme


def test_p37_says_nothing_of_norms_that_were_not_seen():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model, example = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 3, 8)
    sw.rescheme(model, example, "prores(10, schedule='equal')", start="scheme")
    assert by("P37", lint(model, None)) == []
