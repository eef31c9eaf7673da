"""Diagnosis: what is measured agrees with theory, no trace is left, causes are named and mended."""

from __future__ import annotations

import copy
import itertools
import math
import re
import subprocess
import sys
from collections import UserDict
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

import skipway as sw
from skipway.diagnosis import Diagnosis, diagnose
from skipway.diagnosis.loss_rules import LeaveOut
from skipway.diagnosis.measurement import measure
from skipway.diagnosis.offers import changes_frozen
from skipway.diagnosis.passes import curvature, dot, jacobians, noise
from skipway.diagnosis.remedies import (
    AddSkips,
    Case,
    Clip,
    Damp,
    FullPrecision,
    LearningRate,
    NormFirst,
    Remedy,
    Rescheme,
    Revive,
    Shrink,
    Together,
    UnitVariance,
    WarmUp,
)
from skipway.diagnosis.rules import RULES
from skipway.diagnosis.settings import Settings, settings_of
from skipway.diagnosis.subject import Subject
from skipway.diagnosis.trial import Trial
from skipway.nn import LinearMap
from skipway.probes.measures import dead_share, distinctness, swallowed_share, token_distinctness
from skipway.surgery import Operation

WIDTH, DEPTH = 256, 6


class Orthogonal(nn.Module):
    """x + W x with W orthogonal: the variance doubles, and so does the mean squared singular value of the Jacobian."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.orthogonal_(self.map.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.map(x)


@pytest.fixture
def doubling() -> Subject:
    torch.manual_seed(0)
    stem = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.orthogonal_(stem.weight)
    model = nn.Sequential(stem, *(Orthogonal() for _ in range(DEPTH)), nn.Linear(WIDTH, 10))
    return Subject(model, torch.randn(64, WIDTH), torch.randint(10, (64,)))


def test_an_orthogonal_branch_doubles_variance_gradient_and_jacobian(doubling):
    """De & Smith 2020: Var(x_l) = 2^l. Half of the squared gradient comes through each branch, so that the effective
    path is L/2 (Veit et al. 2016), and E σ²(I + W) = 2.
    """
    measured = measure(doubling, iterations=8)
    for number, signal in enumerate(measured.connections, start=1):
        assert signal.variance_after == pytest.approx(2**number, rel=0.15)
        assert signal.ratio == pytest.approx(1, rel=0.05)
        assert abs(signal.cosine) < 0.1
        assert signal.growth == pytest.approx(math.sqrt(2), rel=0.1)
        assert signal.through_branch == pytest.approx(0.5, abs=0.05)
        assert signal.jacobian == pytest.approx(2, rel=0.15)
        assert 1.7 < signal.jacobian_largest <= 2.001  # |1 + e^{iφ}|, at most 2
        assert signal.overflow < 1e-2
    whole = measured.jacobians.whole_largest
    assert whole is not None
    assert measured.jacobians.whole < whole**2  # the mean of the squares is below the largest
    assert measured.effective_path == pytest.approx(DEPTH / 2, rel=0.1)
    assert measured.jacobians.shattering == pytest.approx(1, abs=1e-4)  # linear: the same gradient everywhere


def test_the_sharpness_of_a_quadratic_is_its_largest_eigenvalue():
    torch.manual_seed(0)
    model, loss = quadratic()
    subject = Subject(model, torch.eye(4).repeat(8, 1), torch.zeros(32, 1), loss)
    _, gradient = subject.gradients(subject.part(0, 8))
    assert curvature(subject, gradient, iterations=20).sharpness == pytest.approx(10, rel=1e-2)


def test_gradient_noise_of_equal_chunks_is_none():
    torch.manual_seed(0)
    inputs, targets = torch.randn(8, 5).repeat(4, 1), torch.randint(3, (8,)).repeat(4)
    found, _, _ = noise(Subject(nn.Linear(5, 3), inputs, targets))
    assert found.agreement == pytest.approx(1, abs=1e-5)
    assert found.scale == pytest.approx(0, abs=1e-4)


def test_the_first_step_of_small_size_keeps_its_promise():
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    subject = Subject(model, torch.randn(64, 6), torch.randint(4, (64,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    ahead = Trial(subject, settings_of(optimizer, model)).advance(3).result()
    assert ahead.trust == pytest.approx(1, abs=0.02)
    relative = ahead.updates["weight"]
    _, gradients = subject.gradients(subject.part(0, 8))
    assert relative == pytest.approx(float(1e-2 * gradients[0].norm() / model.weight.detach().norm()), rel=1e-4)


def test_signals():
    assert distinctness(torch.ones(5, 7)).item() == 0
    assert distinctness(torch.eye(5)).item() == pytest.approx(1)
    assert distinctness(torch.ones(4, 8) * 1e30).item() == 0  # squares are infinite
    rows = torch.ones(4, 8)
    rows[0, 0] += 1e-5
    assert 0 < distinctness(rows).item() < 1e-9
    assert token_distinctness(torch.randn(2, 1, 6).expand(2, 5, 6)).item() == pytest.approx(0, abs=1e-6)
    assert dead_share(torch.tensor([[[[1.0]], [[0.0]]]])).item() == 0.5
    assert swallowed_share(torch.ones(10), torch.full((10,), 2.0**-10)).item() == 1


def diagnosed(model: nn.Module, batch: tuple, remedies: int = 0, **options) -> Diagnosis:
    """The diagnosis of a model on (example, targets); remedies are tried in `test_offers`."""
    return diagnose(model, batch[0], targets=batch[1], remedies=remedies, **options)


def rules(diagnosis: Diagnosis) -> set[str]:
    return {finding.rule for finding in diagnosis.findings}


def small(scheme: str = "identity", **options) -> nn.Module:
    return sw.build("resnet", depth=8, scheme=scheme, classes=4, width=4, stem_width=4, channels=1, **options)


def images(count: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(4, (count,), generator=generator)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_touched_and_it_is_cheap(training):
    torch.manual_seed(0)
    model = small().train(not training)
    model.stem.conv.weight.grad = torch.ones_like(model.stem.conv.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random, mode = torch.get_rng_state(), [m.training for m in model.modules()]
    diagnosed(model, images(), training=training)
    assert torch.equal(random, torch.get_rng_state())
    assert mode == [m.training for m in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert bool((model.stem.conv.weight.grad == 1).all())
    assert all(p.grad is None for name, p in model.named_parameters() if name != "stem.conv.weight")
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


BRANCHES = {"identity": 1.0, "skipinit": 0.1, "depthscaled": 3**-0.5} | dict.fromkeys(
    ("zeroinit", "rezero", "fixup", "normfree"), 0.0
)
"""Size of every branch at the start: its last norm gives 1, times the scheme's factor."""


@pytest.mark.parametrize("scheme", [name for name in sw.schemes.all_schemes("conv") if name not in ("layerscale",)])
def test_every_scheme_starts_as_its_theory_says_and_eight_layers_train(scheme):
    torch.manual_seed(0)
    diagnosis = diagnosed(small(scheme), images(), optimizer="adamw")
    assert diagnosis.verdict != "will not train"
    assert "two-zeros" not in rules(diagnosis)
    signals = diagnosis.measurement.connections
    if getattr(sw.schemes.parse_scheme(scheme).open(), "count", 1) > 1:
        assert any("3 connections of several streams" in remark for remark in diagnosis.remarks)
        assert "no-skips" not in rules(diagnosis)
        return
    assert len(signals) == (0 if scheme == "plain" else 3)
    if scheme in BRANCHES:
        assert [signal.branch for signal in signals] == pytest.approx([BRANCHES[scheme]] * 3, abs=1e-2)


STATES = {
    "hyperconnections": "streams: 4 connections",
    "gatedstreams": "streams: 4 connections",
    "dualresidual": "streams: 4 connections",
    "siamesenorm": "streams: 4 connections",
    "fracconnections": "fractions: 4 connections",
    "attentionresiduals": "earlier outputs: 4 connections",
    "attentionresiduals(blocks=None)": "earlier outputs: 4 connections",
} | dict.fromkeys(("denseformer", "mudd", "x0residual", "valueresiduals", "gtrxl", "orthogonal", "perinorm"))
"""Schemes whose state is more than one stream, or which join by more than a sum, and how a remark on them begins."""


@pytest.mark.parametrize("scheme", STATES)
def test_whatever_is_carried_is_not_taken_for_a_fault(scheme):
    torch.manual_seed(0)
    model = sw.build("vit-tiny-16", scheme=scheme, depth=2, classes=4, dim=8, heads=2, patch=4, image=8, channels=1)
    diagnosis = diagnosed(model, images(), optimizer="adamw", lr=1e-3)
    assert len(diagnosis.measurement.connections) == 4
    assert rules(diagnosis).isdisjoint({"no-skips", "two-zeros", "stream-grows", "samples-collapse", "rank-collapse"})
    found = [remark for remark in diagnosis.remarks if re.match("(streams|fractions|earlier outputs):", remark)]
    begin = STATES[scheme]
    assert not found if begin is None else len(found) == 1 and found[0].startswith(begin)


def test_two_zeros_are_seen_where_nothing_is_added():
    model = small("attentionresiduals + rezero")
    for connection in sw.chain(model):
        connection.multiply_(0.0)
    found = [
        finding for finding in diagnosed(model, images(), optimizer="adamw").findings if finding.rule == "two-zeros"
    ]
    assert [len(finding.where) for finding in found] == [3]


def test_a_silent_start_is_not_taken_for_a_dead_one():
    torch.manual_seed(0)
    diagnosis = diagnosed(small("fixup"), images(64), lr=0.1)
    assert diagnosis.measurement.ahead.distinct[0] < 1e-7 < diagnosis.measurement.ahead.distinct[1]
    assert diagnosis.verdict != "will not train"


class ForeignTransformer(nn.Module):
    """A transformer with dropout, a mapping for input and an object for output."""

    class Output(dict):
        pass

    def __init__(self, layers: int = 2, *, norm_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, norm_first=norm_first, batch_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor, unused: Tensor | None = None) -> dict[str, Tensor]:
        return self.Output(logits=self.head(self.body(tokens).mean(1)))


def test_mappings_dropout_autocast_and_an_optimizer_of_ones_own():
    torch.manual_seed(0)
    model = ForeignTransformer()
    optimizer = torch.optim.AdamW(
        [{"params": model.body.parameters()}, {"params": model.head.parameters(), "lr": 1e-2}], lr=1e-3
    )
    batch = {"tokens": torch.randn(32, 5, 16)}, torch.randint(4, (32,))
    with torch.autocast("cpu", torch.bfloat16):
        diagnosis = diagnosed(model, batch, optimizer=optimizer)
    assert [c.name for c in diagnosis.chain] == [f"body.layers.{n}:{k}" for n in (0, 1) for k in (1, 2)]
    assert diagnosis.settings.rate == 1e-2
    assert not optimizer.state
    assert [group["lr"] for group in diagnosis.settings.make(model).param_groups] == [1e-3, 1e-2]
    assert set(diagnosis.updates) >= {"weight", "norm", "bias"}


def test_a_mapping_of_any_class_is_keyword_arguments():
    class Encoding(UserDict):
        """As transformers' BatchEncoding."""

    torch.manual_seed(0)
    model, tokens, targets = ForeignTransformer().eval(), torch.randn(32, 5, 16), torch.randint(4, (32,))
    whole = diagnose(model, tokens, targets=targets).measurement
    assert diagnose(model, Encoding(tokens=tokens), targets=targets).measurement.loss == whole.loss
    assert diagnose(model, (tokens, None), targets=targets).measurement.loss == whole.loss


def test_a_loader_is_taken_where_an_example_is():
    inputs, labels = images()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), batch_size=len(labels))
    torch.manual_seed(0)
    model = small()
    one, other = (diagnose(model, loader).measurement, diagnose(model, inputs, targets=labels).measurement)
    assert replace(one, ahead=None, passes=0.0) == replace(other, ahead=None, passes=0.0)


def test_a_loss_of_ones_own_and_no_targets():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    assert diagnose(model, torch.randn(32, 6)).measurement.finite
    inputs = torch.randn(32, 6)
    found = diagnose(model, inputs, loss=lambda output, _: output.square().mean())
    assert found.measurement.loss == pytest.approx(model(inputs[:16]).square().mean().item())  # on the probed half
    with pytest.raises(sw.SkipwayError, match=r"of shape \(16, 6\); the rule is a tensor of one number"):
        diagnose(model, torch.randn(32, 6), loss=lambda output, _: output)


def test_refusals_say_what_to_do():
    with pytest.raises(sw.SkipwayError, match="at least 8"):
        diagnosed(small(), images(4))
    with pytest.raises(sw.SkipwayError, match=r"targets of shape \(3,\): the rule is one for each of the 32 samples"):
        diagnose(small(), images()[0], targets=torch.zeros(3, dtype=torch.long))
    with pytest.raises(sw.SkipwayError, match="largest label is 4, and the output has 4 classes"):
        diagnose(small(), images()[0], targets=torch.full((32,), 4))
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(sw.SkipwayError, match="meta"):
        diagnose(model, torch.randn(8, 4))
    with pytest.raises(sw.SkipwayError, match="requires_grad"):
        diagnose(nn.Linear(4, 4).requires_grad_(False), torch.randn(8, 4))
    with pytest.raises(sw.SkipwayError, match="one of sgd"):
        diagnosed(small(), images(), optimizer="lion")
    for written, meant in (("adamW", "adamw"), ("SGD", "sgd")):
        with pytest.raises(sw.SkipwayError, match=f"optimizer='{written}': did you mean '{meant}'"):
            diagnosed(small(), images(), optimizer=written)
    with pytest.raises(sw.SkipwayError, match=r"example=\(Tensor, Tensor\): .*targets go to targets="):
        diagnose(small(), images())
    with pytest.raises(sw.SkipwayError, match="holds parameters that ResNet does not have"):
        settings_of(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), small())


class Random(nn.Module):
    """Adds another time in every other pass, which it counts where nothing is put back."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.passes = nn.Linear(6, 6), itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        calls = next(self.passes)
        for _ in range(calls % 3):
            x = x.reshape(-1, 2, 3).flatten(1) + 1.0 * x.new_zeros(6)
        return (x[:, None] + self.map(x)[:, None]).flatten(1) if calls % 2 else x + self.map(x)


def test_a_model_that_runs_otherwise_each_time_is_refused():
    with pytest.raises(sw.SkipwayError, match="something else each time"):
        diagnose(Random(), torch.randn(16, 6))


def learnable(count: int = 64) -> tuple[Tensor, Tensor]:
    """Images whose class is the quarter that is bright."""
    inputs, labels = images(count)
    for label, (row, column) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
        inputs[labels == label, :, row : row + 4, column : column + 4] += 2
    return inputs, labels


def test_plain_depth_is_blamed_and_mended():
    torch.manual_seed(0)
    model = sw.build("resnet", depth=20, scheme="plain", classes=4, width=4, stem_width=4, channels=1)
    diagnosis = diagnosed(model, learnable(), lr=0.1, allowance=0)
    found = next(finding for finding in diagnosis.findings if finding.rule == "no-skips")
    assert found.remedies[0] == Rescheme("identity")
    treatment = diagnosis.fix(Rescheme("identity"))
    assert len(treatment.after.chain) == 9
    assert "no-skips" not in rules(treatment.after)
    assert re.search(rf"^verdict +{diagnosis.verdict} +{treatment.after.verdict}$", str(treatment), re.MULTILINE)


def test_a_plain_torch_network_is_given_skips():
    torch.manual_seed(0)
    layers = [m for _ in range(20) for m in (nn.Linear(16, 16), nn.ReLU())]
    model = nn.Sequential(nn.Linear(8, 16), *layers, nn.Linear(16, 4))
    diagnosis = diagnosed(model, (torch.randn(64, 8), torch.randint(4, (64,))), lr=0.1)
    assert "no-skips" in rules(diagnosis)
    remedy = next(r for f in diagnosis.findings for r in f.remedies if isinstance(r, AddSkips))
    treatment = diagnosis.fix(remedy)
    assert len(treatment.after.chain) == len(remedy.modules) >= 20
    assert len(sw.chain(model, torch.randn(8, 8))) == 0  # the original is as it was
    assert treatment.after.measurement.distinct > diagnosis.measurement.distinct


class Branch(nn.Module):
    """x + W₂ relu(W₁ x), He-initialised and nothing to hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        for module in (self.first, self.second):
            nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


def test_a_stream_that_doubles_is_blamed_and_damped():
    torch.manual_seed(0)
    model = nn.Sequential(*(Branch() for _ in range(24)), nn.Linear(32, 4))
    diagnosis = diagnosed(model, (torch.randn(64, 32), torch.randint(4, (64,))), lr=0.1)
    growth = next(f for f in diagnosis.findings if f.rule == "stream-grows")
    assert growth.evidence["growth"] > 2**24
    treatment = diagnosis.fix(Damp())
    after = treatment.after.measurement.connections
    # a branch adds E[W₂ relu(W₁x)]² = 2 |x|² at He's gain of 2 after no rectifier; 1/√L of it, over L: e² at most
    assert after[-1].variance_after / after[0].variance_before < math.e**2 * 2
    assert "stream-grows" not in rules(treatment.after)


def test_two_zeros_are_blamed_and_one_is_not():
    torch.manual_seed(0)
    model = small("zeroinit")
    assert "two-zeros" not in rules(diagnosed(model, images()))
    for connection in sw.chain(model):
        nn.init.zeros_(connection.path[-1].module.weight)
    diagnosis = diagnosed(model, images())
    found = next(f for f in diagnosis.findings if f.rule == "two-zeros")
    assert found.where == tuple(connection.name for connection in sw.chain(model))
    assert "two-zeros" not in rules(diagnosis.fix(found.remedies[0]).after)


def test_post_norm_has_a_switch_in_torchs_own_layers():
    torch.manual_seed(0)
    model = ForeignTransformer(6, norm_first=False)
    batch = {"tokens": torch.randn(32, 5, 16)}, torch.randint(4, (32,))
    diagnosis = diagnosed(model, batch, optimizer="adamw")
    found = next(f for f in diagnosis.findings if f.rule == "post-norm")
    assert found.remedies[0] == NormFirst()
    after = diagnosis.fix(NormFirst()).after
    assert {c.seen.norms for c in after.chain} == {("pre",)}


@pytest.mark.parametrize(("scheme", "found"), [("keel", False), ("keel(alpha=1.0)", True), ("deepnorm", True)])
def test_post_norm_with_a_strong_skip_is_not_blamed(scheme, found):
    """Keel's skip, α = L, passes e^(-v / 2L) of the gradient."""
    model = sw.build("vit-tiny-16", depth=6, dim=16, heads=2, patch=8, image=16, classes=4, scheme=scheme)
    diagnosis = sw.diagnose(model, torch.randn(16, 3, 16, 16), optimizer="adamw", remedies=0)
    assert ("post-norm" in {finding.rule for finding in diagnosis.findings}) == found


def test_a_rate_that_is_far_too_high_is_lowered():
    torch.manual_seed(0)
    model = small()
    diagnosis = diagnosed(model, images(64), lr=1e4)
    assert diagnosis.verdict != "trains"
    assert any(isinstance(r, LearningRate) for f in diagnosis.findings for r in f.remedies)


def test_not_finite_is_fatal_and_located():
    model = nn.Sequential(*(Branch() for _ in range(3)), nn.Linear(32, 4))
    with torch.no_grad():
        model[1].second.weight.fill_(math.nan)
    diagnosis = diagnosed(model, (torch.randn(16, 32), torch.randint(4, (16,))))
    assert diagnosis.verdict == "will not train"
    assert diagnosis.findings[0].rule == "not-finite"
    assert diagnosis.findings[0].where == ("1",)


def test_the_range_test_prefers_a_rate_that_trains():
    torch.manual_seed(0)
    chances = diagnosed(small(), images(64), lr=0.1).range_test([1e-2, 1e5])
    assert chances[1e-2] > 0.5 > chances[1e5]


def quadratic() -> tuple[nn.Linear, Callable[..., Tensor]]:
    """w ↦ Σ λ w² / 2 with eigenvalues λ up to 10."""
    model = nn.Linear(4, 1, bias=False)
    eigenvalues = torch.tensor([1.0, 2.0, 3.0, 10.0])
    return model, lambda *_: (eigenvalues * model.weight[0] ** 2).sum() / 2


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 2 * 1.9 / 10), ("adam", 2 / 10)])
def test_the_largest_rate_is_the_edge_of_stability_of_a_quadratic(optimizer, rate):
    """2/λ, with momentum β 2(1 + β)/λ: just below it gradient descent converges, just above it diverges."""
    torch.manual_seed(0)
    model, loss = quadratic()
    largest = diagnose(model, torch.eye(4).repeat(8, 1), loss=loss, optimizer=optimizer).largest_rate
    assert largest == pytest.approx(rate, rel=0.05)
    if optimizer == "sgd":
        for factor, converges in ((0.97, True), (1.03, False)):
            nn.init.ones_(model.weight)
            steps = torch.optim.SGD(model.parameters(), lr=factor * rate, momentum=0.9)
            for _ in range(500):
                steps.zero_grad()
                loss().backward()
                steps.step()
            assert (float(loss().detach()) < 1e-3) is converges


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 1),
        ({"momentum": 0.5}, 1.5),
        ({"momentum": 0.9, "nesterov": True}, 1.9 / 2.8),
        ({"momentum": 0.5, "dampening": 0.5}, 1.5 / 0.5),
    ],
    ids=["plain", "momentum", "nesterov", "dampened"],
)
def test_the_largest_rate_of_a_given_optimizer_is_that_of_its_momentum(options, factor):
    torch.manual_seed(0)
    model, loss = quadratic()
    given = torch.optim.SGD(model.parameters(), lr=0.01, **options)
    largest = diagnose(model, torch.eye(4).repeat(8, 1), loss=loss, optimizer=given, remedies=0).largest_rate
    assert largest == pytest.approx(2 * factor / 10, rel=0.05)
    for share, converges in ((0.97, True), (1.03, False)):
        nn.init.ones_(model.weight)
        steps = torch.optim.SGD(model.parameters(), lr=share * 2 * factor / 10, **options)
        for _ in range(500):
            steps.zero_grad()
            loss().backward()
            steps.step()
        assert (float(loss().detach()) < 1e-3) is converges


def test_what_16_bits_cannot_hold_is_not_measured_in_them():
    """Products of small gradients are below the least float16, and a small step of a weight is rounded away."""
    small = [torch.full((10,), 1e-4, dtype=torch.float16)]
    assert dot(small, small) == pytest.approx(1e-7, rel=0.02)
    model, loss = quadratic()
    found = diagnose(model.bfloat16(), torch.eye(4).repeat(8, 1).bfloat16(), loss=loss, remedies=0)
    assert math.isnan(found.largest_rate)
    assert not {"sharpness λ", "rate limit 2/λ"} & set(dict(found.key_numbers))
    assert [remark for remark in found.remarks if remark.startswith("sharpness: not measured of weights of 16 bits")]


def test_every_rule_has_its_words():
    assert all(rule.__doc__ for rule in RULES)


def test_jacobians_need_no_real_inputs():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.branch = nn.Embedding(9, 8), nn.Linear(8, 8)

        def forward(self, words: Tensor) -> Tensor:
            x = self.table(words).mean(1)
            return x + self.branch(x).relu()

    found = jacobians(Subject(Words(), torch.randint(9, (16, 4)), torch.randint(8, (16,))))
    assert found.whole is None
    assert found.shattering is None
    assert len(found.mean_square) == 1


DEEP = """
import threading
import torch
from torch import nn
from skipway.diagnosis.passes import jacobians
from skipway.diagnosis.subject import Subject
from skipway.studies.chains import block_chain

subject = Subject(nn.Sequential(*block_chain("skipinit", 400, width=4)), torch.randn(8, 4), torch.zeros(8, dtype=int))
subject.chain

def measure():
    subject.probed()
    jacobians(subject)
    print("done")

threading.stack_size(152 * 1024)
thread = threading.Thread(target=measure)
thread.start()
thread.join()
"""


def test_graphs_of_deep_networks_are_taken_apart_piece_by_piece():
    """With a small stack 400 branches are as 20,000: a graph with hooks that was dropped as a whole overflowed it."""
    done = subprocess.run([sys.executable, "-c", DEEP], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


class Shared(nn.Module):
    """One block four times."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.block(x)
        return x


def case_of(model: nn.Module, x: Tensor) -> Case:
    return Case(model, Settings(optimizer="sgd"), x, sw.chain(model, x))


def test_a_shared_block_is_damped_once():
    model, x = Shared(Branch()), torch.randn(2, 32)
    before = model.block.second.weight.detach().clone()
    Damp().apply(case_of(model, x))
    torch.testing.assert_close(model.block.second.weight, before / 2)


def test_blocks_that_share_a_parameter_are_damped_once():
    model, x = nn.Sequential(Branch(), Branch()), torch.randn(2, 32)
    model[1].second.weight = model[0].second.weight
    before, bias = model[0].second.weight.detach().clone(), model[1].second.bias.detach().clone()
    Damp(0.5).apply(case_of(model, x))
    torch.testing.assert_close(model[0].second.weight, before / 2)
    torch.testing.assert_close(model[1].second.bias, bias / 2)


def test_nothing_is_damped_where_one_branch_cannot_be():
    model, x = nn.Sequential(Branch(), Branch()), torch.randn(2, 32)
    nn.utils.spectral_norm(model[1].second)
    before = model[0].second.weight.detach().clone()
    with pytest.raises(sw.SkipwayError, match="take the parametrization away"):
        Damp(0.5).apply(case_of(model, x))
    assert torch.equal(model[0].second.weight, before)


class Ending(nn.Module):
    """x + F(x) with a last map that is given."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), last

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.relu(self.first(x)))


class FrozenNorm(nn.Module):
    """y = γ x̂ + β with γ, β and the statistics in buffers, as in torchvision's FrozenBatchNorm2d."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def test_norms_whose_weights_are_buffers_are_damped_once_and_put_back():
    """No remedy that is tried may change them: they are frozen."""
    model, x = nn.Sequential(Ending(FrozenNorm(32)), Ending(FrozenNorm(32))), torch.randn(2, 32)
    model[1].last.register_buffer("weight", model[0].last.weight)
    inputs, before = torch.randn(2, 32), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    branch = model[0].last(inputs)
    assert not changes_frozen(model, copy.deepcopy(model))
    twin = copy.deepcopy(model)
    operation = Damp(0.5).apply(case_of(model, x)).operation
    torch.testing.assert_close(model[0].last(inputs), branch / 2)
    torch.testing.assert_close(model[1].last.weight, before["1.last.weight"] / 2)
    assert changes_frozen(twin, model)
    model[0].last.running_mean.fill_(7.0)  # which no remedy writes into
    assert operation is not None
    operation.undo()
    torch.testing.assert_close(model.state_dict(), before | {"0.last.running_mean": torch.full((32,), 7.0)})


def test_frozen_maps_whose_weights_are_buffers_are_multiplied_and_get_unit_variance():
    linear, x = nn.Linear(32, 32, bias=False), 9 * torch.randn(64, 32)
    weight = linear.weight.detach().clone()
    del linear.weight
    linear.register_buffer("weight", weight.clone())
    LinearMap(linear).multiply_(0.5)
    torch.testing.assert_close(linear.weight, weight / 2)
    operation = UnitVariance(("0",)).apply(case_of(nn.Sequential(linear), x)).operation
    assert float(linear(x).std()) == pytest.approx(1, abs=0.01)
    assert operation is not None
    operation.undo()
    torch.testing.assert_close(linear.weight, weight / 2)


def test_rows_that_weight_norm_computes_as_zero_are_damped_with_the_others():
    linear, x = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)), torch.randn(2, 32)
    linear.parametrizations.weight.original0.data[:16] = 0
    before = linear.weight.detach().clone()
    Damp(0.5).apply(case_of(Ending(linear), x))
    torch.testing.assert_close(linear.weight, before / 2)


def test_a_network_with_spectral_norm_in_training_is_as_before_where_it_cannot_be_damped():
    model, x = Ending(nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32))), torch.randn(2, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(sw.SkipwayError, match="take the parametrization away"):
        Damp(0.5).apply(case_of(model, x))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("moved", [False, True])
def test_buffers_that_orthogonal_maps_exchange_are_put_back_by_undo(moved):
    """`Module.half` and `float` exchange buffers, too."""
    linear, x = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), torch.randn(8, 4)
    model = nn.Sequential(linear, nn.Linear(4, 4))
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    operation = UnitVariance(("0", "1")).apply(case_of(model, x)).operation
    assert operation is not None
    if moved:
        model.half().float()
    operation.undo(force=moved)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class InBuffer(nn.Module):
    """A parametrization whose inverse writes a buffer: W = s W'."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        self.scale.copy_(weight.norm())
        return weight / self.scale


def test_a_parametrization_that_keeps_the_scale_in_a_buffer_gets_unit_variance():
    model, x = nn.Sequential(nn.Linear(4, 4)), 9 * torch.randn(64, 4)
    nn.utils.parametrize.register_parametrization(model[0], "weight", InBuffer())
    UnitVariance(("0",)).apply(case_of(model, x))
    assert float(model(x).detach().std()) == pytest.approx(1, abs=0.05)


def test_convolutions_with_parametrizations_are_revived():
    class Gated(nn.Module):
        """Two zeros on a branch: the gain, and g of weight norm."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.gain = nn.Conv2d(4, 4, 1), nn.Parameter(torch.zeros(()))
            self.last = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1, bias=False))
            nn.init.zeros_(self.last.parametrizations.weight.original0)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gain * self.last(torch.relu(self.first(x)))

    diagnosis = sw.diagnose(nn.Sequential(Gated(), Gated()), torch.randn(8, 4, 2, 2), remedies=0, allowance=0)
    (remedy,) = next(finding.remedies for finding in diagnosis.findings if finding.rule == "two-zeros")
    assert remedy == Revive(("0.last", "1.last"))
    assert diagnosis.fix(remedy).model[1].last.weight.any()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("kind", ["channels last", "bfloat16", "weight norm", "weight norm by a hook"])
def test_maps_of_any_memory_type_and_parametrization_get_unit_variance(kind):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), 9 * torch.randn(4, 3, 8, 8)
    if kind == "channels last":
        model.to(memory_format=torch.channels_last)
    elif kind == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    elif kind == "weight norm":
        nn.utils.parametrizations.weight_norm(model[0])
    else:
        nn.utils.weight_norm(model[0])
    UnitVariance(("0", "1")).apply(case_of(model, x))
    with torch.no_grad():
        assert float(model[0](x).float().std()) == pytest.approx(1, abs=0.05)
    rows = model[1].weight.detach().float().flatten(1)
    products = rows @ rows.T
    torch.testing.assert_close(products, products[0, 0] * torch.eye(4), atol=1e-2 * float(products[0, 0]), rtol=0)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_zero_that_weight_norm_computes_is_revived(norm, dtype):
    model, x = nn.Sequential(Branch(), Branch()).to(dtype), torch.randn(2, 32, dtype=dtype)
    linear = norm(model[0].second)
    with torch.no_grad():
        linear.weight_g.zero_() if norm is nn.utils.weight_norm else linear.parametrizations.weight.original0.zero_()
    model(x)
    assert not linear.weight.any()
    Revive(("0.second",)).apply(case_of(model, x))
    model(x)  # which computes the weight
    assert linear.weight.any()


def test_a_pruned_zero_is_not_revived_without_a_word():
    model, x = nn.Sequential(Branch(), Branch()), torch.randn(2, 32)
    nn.init.zeros_(model[0].second.weight)
    nn.utils.prune.identity(model[0].second, "weight")
    with pytest.raises(sw.SkipwayError, match=r"the weight of 0\.second is computed .*torch\.nn\.utils\.prune\.remove"):
        Revive(("0.second",)).apply(case_of(model, x))


def test_remedies_in_place_can_be_undone_and_what_was_before_them():
    model, x = nn.Sequential(Branch(), Branch()), torch.randn(16, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    operation = sw.rescheme(model, x, "layerscale")
    dressed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    treatment = sw.diagnose(model, x, remedies=0, allowance=0).fix(Damp(), LearningRate(0.01), inplace=True)
    assert treatment.model is model
    with pytest.raises(sw.SkipwayError, match="a later operation builds on it"):
        operation.undo()
    (damped,) = treatment.operations
    damped.undo()
    torch.testing.assert_close(model.state_dict(), dressed)
    operation.undo()
    torch.testing.assert_close(model.state_dict(), before)


class Unapplied(Exception):
    """What a remedy or a diagnosis ends with."""


class Failing:
    """A remedy that fails."""

    def apply(self, case: Case) -> Case:
        raise Unapplied


@pytest.mark.parametrize("failing", ["remedy", "diagnosis", "together"])
def test_a_network_is_as_before_where_a_remedy_in_place_or_the_diagnosis_after_it_fails(monkeypatch, failing):
    model, x = nn.Sequential(Branch(), Branch()), torch.randn(16, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    operation = sw.rescheme(model, x, "layerscale")
    dressed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    diagnosis = sw.diagnose(model, x, remedies=0, allowance=0)
    remedies: tuple[Remedy, ...] = (Damp(), Failing())
    if failing == "diagnosis":
        remedies = (Damp(), AddSkips(("0.first",)))
        monkeypatch.setattr("skipway.diagnosis.diagnosis.examine", lambda *_, **__: Failing().apply(case_of(model, x)))
    case = case_of(model, x)
    with pytest.raises(Unapplied):
        Together(remedies).apply(case) if failing == "together" else diagnosis.fix(*remedies, inplace=True)
    torch.testing.assert_close(model.state_dict(), dressed, rtol=0, atol=0)
    operation.undo()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "remedy",
    [Shrink("0.linear1.weight", 0.1), FullPrecision(), NormFirst(), LeaveOut("1"), AddSkips(("2",)), Damp()],
    ids=str,
)
def test_what_any_remedy_did_in_place_is_one_operation_that_can_be_undone(remedy):
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0, batch_first=True)
    model, x = nn.Sequential(layer, nn.Softmax(-1), nn.Linear(8, 8)).bfloat16().eval(), torch.randn(2, 3, 8).bfloat16()
    model.register_buffer("factor", torch.ones(2).bfloat16())
    before, states = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    case = Together((remedy, Shrink("0.linear2.weight", 0.5))).apply(case_of(model, x))
    assert case.operation is not None
    assert not torch.equal(case.model(x.to(model[0].linear1.weight.dtype)), before)
    case.operation.undo()
    torch.testing.assert_close(model.state_dict(), states, rtol=0, atol=0)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def applied_in_place(
    model: nn.Module, x: Tensor, *remedies: Remedy, together: bool
) -> tuple[nn.Module, tuple[Operation | None, ...]]:
    """The network after remedies, and the operations on it."""
    if together:
        case = Together(remedies).apply(case_of(model, x))
        return case.model, (case.operation,)
    treatment = sw.diagnose(model, x, remedies=0, allowance=0).fix(*remedies, inplace=True)
    return treatment.model, treatment.operations


@pytest.mark.parametrize("together", [False, True])
def test_what_is_done_to_a_network_that_was_built_anew_is_an_operation_on_that_network(together):
    """The network that was given has no part in the new one and is as before; undo looks at the one that it changes."""
    model, x = sw.build("resnet-cifar", depth=8, width=4, stem_width=4), torch.randn(16, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    remedies = (Damp(0.5), Rescheme("skipinit"), Damp(0.5))
    network, (damped,) = applied_in_place(model, x, *remedies, together=together)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    gain = network.stages[0][0].branch.norm2.weight
    torch.testing.assert_close(gain.detach(), torch.full((4,), 0.5))
    assert damped is not None
    assert damped.model is network
    later = Damp(0.5).apply(case_of(network, x)).operation
    assert later is not None
    with pytest.raises(sw.SkipwayError, match="a later operation builds on it"):
        damped.undo()
    later.undo()
    with torch.no_grad():
        gain.mul_(3)  # as training does
    with pytest.raises(sw.SkipwayError, match="changed since"):
        damped.undo()
    damped.undo(force=True)
    torch.testing.assert_close(gain.detach(), torch.ones(4))


class Wrapped:
    """A remedy that puts the model into another one."""

    def apply(self, case: Case) -> Case:
        return replace(case, model=nn.Sequential(case.model, nn.Identity()))


@pytest.mark.parametrize("together", [False, True])
def test_what_was_done_to_a_network_stays_where_that_is_a_part_of_the_next_one(together):
    model, x = nn.Sequential(Branch(), Branch()), torch.randn(16, 32)
    before = model[0].second.weight.detach().clone()
    network, _ = applied_in_place(model, x, Damp(0.5), Wrapped(), Damp(0.5), together=together)
    assert network[0] is model
    torch.testing.assert_close(model[0].second.weight, before / 4)


def test_remedies_within_others_are_one_row():
    assert Together((Damp(), Together((WarmUp(10), Clip())))) == Together((Damp(), WarmUp(10), Clip()))


class Standardised(nn.Conv2d):
    """Ŵ = g (W − μ) / σ with one g per output, of shape (out, 1, 1, 1), as in timm's ScaledStdConv2d."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(4, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, self.gain * (self.weight - mean) / deviation, self.bias, padding=1)


def test_unit_variance_scales_the_gains_of_weights_that_others_standardise():
    model, x = nn.Sequential(Standardised(), Standardised()), 9 * torch.randn(8, 4, 8, 8)
    UnitVariance(("0", "1")).apply(case_of(model, x))
    first = model[0](x).detach()
    assert [float(first.std()), float(model[1](first).detach().std())] == pytest.approx([1, 1], rel=2e-2)


def test_branches_that_end_in_a_standardised_weight_are_damped():
    model, x = sw.build("resnet8", scheme="normfree", width=4, stem_width=4), torch.randn(4, 3, 8, 8)
    branch = model.eval().stages[0][0].branch
    inputs = torch.randn(2, branch.conv1.in_channels, 8, 8)
    before = branch(inputs).detach()
    Damp(0.5).apply(case_of(model, x))
    torch.testing.assert_close(branch(inputs), before / 2)


def test_unit_variance_scales_the_gains_of_standardised_weights():
    """The output of a standardised weight does not depend on the weight's scale, but on its gain."""
    model, x = sw.build("resnet8", scheme="normfree", width=4, stem_width=4), torch.randn(4, 3, 8, 8)
    maps = ("stages.0.0.branch.conv1", "stages.0.0.branch.conv2")
    deviations: list[float] = []
    UnitVariance(maps).apply(case_of(model, 3 * x))
    for name in maps:
        model.get_submodule(name).register_forward_hook(lambda _, __, out: deviations.append(float(out.detach().std())))
    model.train()(3 * x)
    assert deviations == pytest.approx([1, 1], rel=1e-2)


class Silenced(nn.Module):
    """A parametrization whose result is 0, whatever is written."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


@pytest.mark.parametrize("remedy", [UnitVariance(("0", "1")), Revive(("0", "1"))])
def test_weights_that_cannot_be_written_are_said(remedy):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(8, 4)
    for linear in model:
        if isinstance(remedy, Revive):
            nn.utils.parametrize.register_parametrization(linear, "weight", Silenced())
        else:
            nn.utils.parametrizations.spectral_norm(linear)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(sw.SkipwayError, match="the weight of 0 is computed in every pass from other parameters"):
        remedy.apply(case_of(model, x))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name])
