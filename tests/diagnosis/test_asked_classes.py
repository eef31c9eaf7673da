"""What a loss asks for is read from its gradient, and chance, causality and leaks are measured."""

from __future__ import annotations

import math
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import skipway as sw
from benchmarks.peers import import_transformers
from skipway.diagnosis.asked_classes import entropy, read_asked_classes
from skipway.diagnosis.outlook import REASONS
from skipway.diagnosis.subject import Subject

diagnose = partial(sw.diagnose, remedies=0)  # remedies are tried in test_offers
V, L = 11, 12
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.multinomial(torch.tensor([4.0] * 3 + [0.5] * 8), 16 * L, True, generator=GENERATOR).view(16, L)


class Decoder(nn.Module):
    """Tokens, one attention and a head; puts out logits, or with labels the pair (logits, loss)."""

    def __init__(self, *, causal: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.table, self.maps, self.head = nn.Embedding(V, 16), nn.Linear(16, 48), nn.Linear(16, V)
        self.gain, self.causal = nn.Parameter(torch.tensor(gain)), causal

    def forward(self, ids: Tensor, labels: Tensor | None = None):
        x = self.table(ids)
        q, k, v = self.maps(x).chunk(3, -1)
        x = x + self.gain * F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        logits = self.head(x)
        if labels is None:
            return logits
        return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_what_is_learned_counts_from_the_best_constant_answer():
    """At a low rate all of the fall of the loss is that of learning how frequent the tokens are."""
    for lr, trains in ((3e-5, False), (3e-2, True)):
        diagnosis = diagnose(Decoder(), IDS, optimizer="adamw", lr=lr, steps=100, allowance=0.2)
        assert diagnosis.trains is trains
        ahead = diagnosis.measurement.ahead
        assert ahead is not None
        counts = torch.bincount(IDS.flatten(), minlength=V).double()
        shares = counts / counts.sum()
        assert ahead.constant == pytest.approx(float(-(shares * shares.log()).nansum()), rel=0.03)
        assert ahead.losses[0] > ahead.constant + 0.3


@pytest.mark.parametrize("kind", ["tokens", "masks", "samples", "smoothed", "weighted", "half"])
def test_what_a_cross_entropy_asks_for_is_read_from_its_gradient(kind):
    shape = {"samples": (64, V), "masks": (8, V, 4, 5)}.get(kind, (8, L, V))
    axis = 1 if kind in ("samples", "masks") else 2
    head = torch.randn(shape, dtype=torch.bfloat16 if kind == "half" else torch.float32, requires_grad=True)
    labels = torch.randint(V, shape[:axis] + shape[axis + 1 :])
    labels.flatten()[::5] = -100
    options = {"smoothed": {"label_smoothing": 0.1}, "weighted": {"weight": torch.rand(V) + 0.5}}.get(kind, {})
    loss = F.cross_entropy(head.movedim(axis, 1).float(), labels, **options)
    read = read_asked_classes(head, torch.autograd.grad(loss, head)[0])
    assert read is not None
    asked, found = read
    assert torch.equal(found, labels)
    assert (asked.classes, asked.places) == (V, int((labels >= 0).sum()))
    assert asked.cross_entropy == pytest.approx(
        F.cross_entropy(head.detach().movedim(axis, 1).float(), labels).item(), rel=1e-5
    )


@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy_with_logits])
def test_other_losses_ask_for_no_class(loss):
    head = torch.randn(16, 5, requires_grad=True)
    targets = torch.rand(16, 5).round()
    assert read_asked_classes(head, torch.autograd.grad(loss(head, targets), head)[0]) is None


def test_the_entropy_of_few_samples_is_not_too_low():
    """Miller 1955: on average log 10 from 100 samples of 10 equal classes, where the plain estimate is 0.045 below."""
    draws = [entropy(torch.randint(10, (100,)), 1000) for _ in range(100)]
    assert sum(draws) / 100 == pytest.approx(math.log(10), abs=0.01)


def test_chance_is_the_entropy_of_what_is_asked_for():
    diagnosis = diagnose(Decoder(), IDS, optimizer="adamw")
    asked = diagnosis.measurement.asked
    assert asked is not None
    tokens = IDS[: diagnosis.subject.count(diagnosis.subject.probed_part), 1:]
    shares = torch.bincount(tokens.flatten()).double() / tokens.numel()
    plain = -(shares * shares.clamp_min(1e-9).log()).sum()
    assert plain <= asked.entropy < plain + 0.1
    assert any(remark.startswith("chance: ") and "log 11 = 2.4" in remark for remark in diagnosis.remarks)
    labels = torch.arange(64).clamp_max(2)  # nearly all are of class 2
    unequal = diagnose(nn.Linear(4, 3), torch.randn(64, 4), targets=labels[torch.randperm(64)])
    assert any("the best constant answer has a loss of" in remark for remark in unequal.remarks)


BATCHES = {
    "labels": (lambda: (IDS, IDS), None),
    "targets": (lambda: IDS[:, :-1].contiguous(), IDS[:, 1:].contiguous()),
}


@pytest.mark.parametrize("gain", [1.0, 0.0, 1e-6])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_missing_causal_mask_is_seen_through_silent_branches(batch, gain):
    make, targets = BATCHES[batch]
    for causal in (True, False):
        model = Decoder(causal=causal, gain=gain)
        before = [each.clone() for each in model.parameters()]
        asked = diagnose(model, make(), targets=targets, optimizer="adamw").measurement.asked
        assert asked is not None
        assert asked.ahead == (None if causal else 1)
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_target_at_its_own_position_needs_copying_alone():
    asked = diagnose(Decoder(), IDS, targets=IDS, optimizer="adamw").measurement.asked
    assert asked is not None
    assert asked.ahead == 0


def test_tokens_alone_are_refused_where_later_ones_are_seen():
    with pytest.raises(sw.SkipwayError, match="its outputs depend on later tokens, .*give targets="):
        diagnose(Decoder(causal=False), IDS)


def test_padding_is_not_asked_for():
    class Padded(Decoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor):
            return super().forward(input_ids)

    mask = torch.ones_like(IDS)
    mask[:, :4] = 0
    diagnosis = diagnose(Padded(), {"input_ids": IDS, "attention_mask": mask}, optimizer="adamw")
    asked = diagnosis.measurement.asked
    assert asked is not None
    assert asked.places == (L - 5) * 8  # from the second token on that is not padding
    assert "without padding" in diagnosis.remarks[0]


class Routed(Decoder):
    def forward(self, ids: Tensor, labels: Tensor | None = None):
        return {"logits": super().forward(ids), "balance": self.maps.weight.square().mean()}


@pytest.mark.parametrize("targets", [None, IDS])
def test_the_loss_of_a_router_is_not_taken_for_the_models(targets):
    model = Routed()
    diagnosis = diagnose(model, IDS, targets=targets, optimizer="adamw")
    assert "cross-entropy" in diagnosis.remarks[0]
    assert "(output balance), not computed from it, left out, as of a router: give loss=" in diagnosis.remarks[0]


class Dropping(nn.Module):
    """LayerDrop by a random number of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(6)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or random.random() > 0.4:
                x = x + layer(x).relu() / 4
        return self.head(x)


def test_layers_left_out_at_random_are_the_same_in_every_pass_and_said():
    model, x, labels = Dropping(), torch.randn(32, 8), torch.randint(3, (32,))
    state = random.getstate()
    first, second = (diagnose(model, x, targets=labels) for _ in range(2))
    assert random.getstate() == state
    assert first.measurement == second.measurement
    assert any(remark.startswith("left out at random: layers.") for remark in first.remarks)
    assert not any("left out" in each for each in diagnose(model, x, targets=labels, training=False).remarks)
    subject = Subject(model, x, labels)
    assert torch.equal(subject.gradients(subject.part(0, 8))[0], subject.gradients(subject.part(0, 8))[0])


def test_masked_language_models_and_encoder_decoders_have_no_answer_in_sight():
    hub = import_transformers()
    size = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    bert = hub.BertForMaskedLM(hub.BertConfig(**size, num_attention_heads=2))
    hidden = torch.rand(IDS.shape) < 0.3
    batch = hub.BatchEncoding({"input_ids": IDS.masked_fill(hidden, V - 1), "labels": torch.where(hidden, IDS, -100)})
    for given, ahead in ((batch, None), ({"input_ids": IDS, "labels": IDS}, 0)):
        asked = diagnose(bert, given, optimizer="adamw").measurement.asked
        assert asked is not None
        assert asked.ahead == ahead
    with pytest.raises(sw.SkipwayError, match="BertForMaskedLM cannot be asked for each next token"):
        diagnose(bert, IDS)
    t5 = hub.T5ForConditionalGeneration(
        hub.T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    asked = diagnose(t5, {"input_ids": IDS.flip(0), "labels": IDS}, optimizer="adamw").measurement.asked
    assert asked is not None
    assert asked.ahead is None


class Experts(Decoder):
    """Tokens go to the expert that a router prefers, and none to the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(3))

    def forward(self, ids: Tensor, labels: Tensor | None = None):
        x = self.table(ids)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = ids % 2 == number
            y[chosen] = expert(x[chosen])
        return self.head(x + y)


def test_an_expert_without_tokens_is_not_dead():
    diagnosis = diagnose(Experts(), IDS, optimizer="adamw")
    assert len(diagnosis.chain) == 1
    assert diagnosis.measurement.connections[0].dead < 0.5
    assert {finding.rule for finding in diagnosis.findings} <= set(REASONS)  # of theory's none
