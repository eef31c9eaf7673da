"""Rules on outputs, logits, precision, rate and depth fire on the fault, and not on the mended network."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import skipway as sw
from benchmarks.peers import import_transformers
from skipway.diagnosis import Diagnosis, Finding, Settings
from skipway.diagnosis.activations import ActivationObserver
from skipway.diagnosis.measurement import measure
from skipway.diagnosis.outlook import REASONS, Outlook
from skipway.diagnosis.output_rules import growth_by_depth
from skipway.diagnosis.remedies import Damp, FullPrecision, LearningRate, Shrink, WarmUp
from skipway.diagnosis.rule_context import Context, Rule
from skipway.diagnosis.rules import post_norm
from skipway.diagnosis.subject import Subject

V, L, D = 11, 12, 16
IDS = torch.randint(V, (16, L), generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(
        self, *, causal: bool = True, written_out: bool = False, factor: float = 1.0, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.maps, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.causal, self.written_out, self.scale = causal, written_out, factor * D**-0.5
        nn.init.normal_(self.maps.weight, std=gain * D**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.maps(x).chunk(3, -1)
        if not self.written_out:
            return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale))
        mask = torch.full((x.shape[1],) * 2, torch.finfo(x.dtype).min).triu(1)
        return self.out((q @ k.mT * self.scale + mask).softmax(-1) @ v)


class Gated(nn.Module):
    def __init__(self, size: float = 1.0) -> None:
        super().__init__()
        self.up, self.down, self.size = nn.Linear(D, 2 * D), nn.Linear(D, D), size

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down((self.size * a) * (self.size * b) / self.size**2)


class Block(nn.Module):
    """x + f(norm(x)), or norm(x + f(x))."""

    def __init__(self, branch: nn.Module, *, post: bool = False) -> None:
        super().__init__()
        self.norm, self.branch, self.post = nn.LayerNorm(D), branch, post

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.branch(x)) if self.post else x + self.branch(self.norm(x))


class Decoder(nn.Module):
    """A decoder with a tied head, or one of its own."""

    def __init__(self, *branches: nn.Module, std: float = 0.02, tied: bool = True, post: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)
        nn.init.normal_(self.table.weight, std=std)
        self.blocks = nn.Sequential(*(Block(branch, post=post) for branch in branches))
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.table(ids))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


def diagnosed(model: nn.Module, **options) -> Diagnosis:
    options |= {"targets": IDS[:, 1:].contiguous(), "optimizer": "adamw", "remedies": 0}
    return sw.diagnose(model, IDS[:, :-1].contiguous(), **options)


def found(diagnosis: Diagnosis, rule: str):
    return next((finding for finding in diagnosis.findings if finding.rule == rule), None)


def test_a_missing_causal_mask():
    diagnosis = diagnosed(Decoder(Attention(causal=False)))
    assert not diagnosis.trains
    finding = found(diagnosis, "missing-causal-mask")
    assert finding is not None
    assert finding.level == "serious"
    assert diagnosed(Decoder(Attention())).findings == ()
    copying = sw.diagnose(Decoder(Attention()), IDS, targets=IDS, optimizer="adamw")
    assert [finding.rule for finding in copying.findings] == ["copied-target"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_start_far_from_an_even_answer(tied):
    """Drawn with deviation 1 a table of width D puts out logits of √D = 4, of which log V + 8 is the loss."""
    model = Decoder(mlp(), std=1.0, tied=tied)
    if not tied:
        nn.init.normal_(model.head.weight)
    diagnosis = diagnosed(model)
    finding = found(diagnosis, "loud-start")
    assert finding is not None
    assert f"an even answer has log {V} = {math.log(V):.3g}" in finding.what
    assert finding.where == (("table.weight",) if tied else ())
    remedy = finding.remedies[0]
    assert isinstance(remedy, Shrink)
    treatment = diagnosis.fix(remedy)
    assert found(treatment.after, "loud-start") is None
    assert treatment.after.measurement.loss < math.log(V) + 0.5
    assert found(diagnosed(Decoder(mlp(), tied=tied)), "loud-start") is None


@pytest.mark.parametrize("written_out", [False, True])
def test_attention_logits_without_their_factor(written_out):
    """Queries and keys of deviation g over D channels have products of deviation g² √D; 1/√D makes it g²."""
    sharp = diagnosed(Decoder(Attention(written_out=written_out, gain=2.0, factor=D**0.5)))
    finding = found(sharp, "sharp-attention")
    assert finding is not None
    assert finding.where == ("blocks.0.branch",)
    assert finding.evidence["before"] == pytest.approx(4 * D**0.5, rel=0.5)
    mended = diagnosed(Decoder(Attention(written_out=written_out, gain=1.0)))
    assert found(mended, "sharp-attention") is None
    assert mended.measurement.ahead is not None
    assert 0.1 < mended.measurement.ahead.activations[0].spread < 2


def test_logits_that_the_first_steps_blow_up():
    diagnosis = diagnosed(Decoder(mlp(), tied=False), lr=3.0)
    finding = found(diagnosis, "growing-logits")
    assert finding is not None
    assert "z-loss" in finding.why
    assert found(diagnosis.fix(LearningRate(1e-3)).after, "growing-logits") is None


def test_a_rate_that_is_too_high_for_a_depth():
    """The first step moves logits more, the deeper the network is, and a warm-up or a lower rate mends it."""
    changes = []
    for depth in (2, 24):
        torch.manual_seed(0)
        diagnosis = diagnosed(Decoder(*(mlp() for _ in range(depth)), tied=False), lr=0.03)
        assert diagnosis.measurement.ahead is not None
        changes.append(diagnosis.measurement.ahead.first_change)
    assert changes[1] > 1.1 * changes[0]
    finding = found(diagnosis, "rate-times-depth")
    assert finding is not None
    rate, warmup = finding.remedies
    assert isinstance(rate, LearningRate)
    assert isinstance(warmup, WarmUp)
    assert found(diagnosis.fix(rate).after, "rate-times-depth") is None
    assert found(diagnosed(diagnosis.subject.model, lr=0.03, warmup=100), "rate-times-depth") is None


def judged(rule: Rule, model: nn.Module, **options) -> list[Finding]:
    """What one rule finds, without trial steps."""
    subject = Subject(model, IDS[:, :-1], IDS[:, 1:])
    outlook = Outlook("trains", 1.0)
    return list(rule(Context(measure(subject), Settings(**options), subject, outlook)))


def test_post_norm_without_warmup():
    model = Decoder(*(mlp() for _ in range(24)), post=True)
    assert len(judged(post_norm, model)) == 1
    assert not judged(post_norm, model, warmup=100)


def test_a_stream_that_grows_with_depth():
    """Branches of one unit each: the variance grows to L; last maps divided by √L leave it near 2."""
    model = Decoder(*(mlp() for _ in range(48)), tied=False)
    for block in model.blocks:
        for layer in (block.branch[0], block.branch[2]):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    (finding,) = judged(growth_by_depth, model)
    assert 24 < finding.evidence["growth"] < 96
    assert finding.remedies == (Damp(),)
    for connection in sw.chain(model, IDS):
        connection.multiply_(48**-0.5)
    assert not judged(growth_by_depth, model)


def test_gates_beyond_float16():
    """A product of two signals of size s is s², inside of a branch whose output is as small as ever."""
    finding = found(diagnosed(Decoder(Gated(2000.0), std=1.0)), "overflow")
    assert finding is not None
    assert finding.evidence["largest value over float16's"] > 1
    assert finding.where == ("blocks.0.branch",)
    assert found(diagnosed(Decoder(Gated(), std=1.0)), "overflow") is None


def test_weights_in_float16():
    diagnosis = diagnosed(Decoder(mlp()).half())
    finding = found(diagnosis, "float16-weights")
    assert finding is not None
    assert finding.remedies == (FullPrecision(),)
    treatment = diagnosis.fix(FullPrecision())
    assert treatment.after.verdict == "trains"
    assert found(treatment.after, "float16-weights") is None
    assert found(diagnosed(Decoder(mlp()).bfloat16()), "float16-weights") is None


def test_the_observer_leaves_outputs_and_hooks_alone():
    model = Decoder(Attention(), Attention(written_out=True), mlp())
    plain = model(IDS)
    with torch.no_grad(), ActivationObserver(model) as observer:
        output = model(IDS)
    assert torch.equal(plain, output)
    seen = observer.read()
    assert seen.largest >= output.abs().max()
    assert seen.spread_in in ("blocks.0.branch", "blocks.1.branch")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


SIZE = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PUBLISHED = {
    "LlamaForCausalLM": ("LlamaConfig", SIZE),
    "Qwen3ForCausalLM": ("Qwen3Config", {**SIZE, "num_key_value_heads": 1, "head_dim": 8}),
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "BertForMaskedLM": ("BertConfig", SIZE),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        | {"decoder_start_token_id": 0},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_starts_raise_no_alarm(name):
    hub = import_transformers()
    kind, sizes = PUBLISHED[name]
    model = getattr(hub, name)(getattr(hub, kind)(**sizes))
    batch = {"input_ids": IDS, "labels": IDS}
    if name.startswith("Bert"):
        hidden = torch.rand(IDS.shape) < 0.3
        batch = {"input_ids": IDS.masked_fill(hidden, 0), "labels": torch.where(hidden, IDS, -100)}
    elif name.startswith("T5"):
        batch = {"input_ids": IDS.flip(0), "labels": IDS}
    diagnosis = sw.diagnose(model, batch, optimizer="adamw", lr=1e-3, remedies=0)
    assert {finding.rule for finding in diagnosis.findings} <= set(REASONS)  # of theory's none
