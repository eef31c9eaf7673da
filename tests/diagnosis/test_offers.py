"""Remedies are offered only where they were tried and the odds rose, and rates in the direction that helps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import skipway as sw
from skipway.diagnosis.outlook import foresee
from skipway.diagnosis.remedies import Clip, LearningRate, Together, WarmUp

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(256, 16, generator=GENERATOR)
LABELS = 2 * (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
LOADER = DataLoader(TensorDataset(X, LABELS), batch_size=32)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))


@pytest.mark.parametrize(("rate", "cause"), [(1e-6, "rate-too-low"), (1e3, "rate-too-high")])
def test_a_rate_is_moved_in_the_direction_that_helps(rate, cause):
    diagnosis = sw.diagnose(network(), LOADER, lr=rate, allowance=0.05)
    assert not diagnosis.trains
    rates = [offer.remedy.value for offer in diagnosis.offers if isinstance(offer.remedy, LearningRate)]
    assert rates
    assert all((value > rate) == (cause == "rate-too-low") for value in rates)
    assert cause in {finding.rule for finding in diagnosis.findings}
    treatment = diagnosis.fix()
    assert treatment.after.odds > diagnosis.odds + 0.2
    assert treatment.applied[0] == diagnosis.remedies[0]


class Branch(nn.Module):
    """x + W₂ relu(W₁ x), He-initialised and nothing to hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        for module in (self.first, self.second):
            nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


def test_a_remedy_of_the_model_is_offered_with_the_rate_that_it_needs():
    torch.manual_seed(0)
    model = nn.Sequential(*(Branch() for _ in range(24)), nn.Linear(16, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    diagnosis = sw.diagnose(model, LOADER, lr=0.1, remedies=8)
    assert diagnosis.verdict == "will not train"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert 0 < len(diagnosis.offers) <= len(diagnosis.tried) <= 8
    assert all(offer.verdict == "trains" or offer.odds > diagnosis.odds + 0.2 for offer in diagnosis.offers)
    assert diagnosis.remedies == tuple(offer.remedy for offer in diagnosis.offers)
    assert diagnosis.why_no_offer == ""
    told, lines = str(diagnosis).splitlines(), diagnosis.table().splitlines()
    offered = [line.removeprefix("  offer → ") for line in told if "offer →" in line]
    assert len(offered) == len(diagnosis.offers)
    assert all(" → " in line and line.split(", ")[-1].startswith(("trains", "undecided")) for line in offered)
    assert ["(applied by fix)" in line for line in offered] == [len(offered) > 1, *[False] * (len(offered) - 1)]
    assert f"→ {offered[0]}"[:60] in "\n".join(lines), "the command line has the same words"
    vain = [each for each in diagnosis.tried if each not in diagnosis.offers]
    remark = next((line for line in diagnosis.remarks if line.startswith("remedies: tried without")), "")
    assert all(str(each) in remark for each in vain)


def test_what_trains_is_offered_nothing_and_what_was_tried_in_vain_is_said():
    assert sw.diagnose(network(), LOADER, optimizer="adamw", lr=0.01, allowance=0.1).offers == ()
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    broken = sw.diagnose(model, LOADER, remedies=2)
    assert broken.verdict == "will not train"
    assert broken.odds == 0
    none = sw.diagnose(model, LOADER, remedies=0)
    assert none.tried == ()
    with pytest.raises(sw.SkipwayError, match="will not train' and no remedy was tried"):
        none.fix()


def test_remedies_together_are_words_and_settings():
    both = Together((WarmUp(10), Clip(0.5)))
    treatment = sw.diagnose(network(), LOADER, lr=0.1, remedies=0).fix(both)
    assert treatment.settings.warmup == 10
    assert str(treatment.settings.clip) == "ClipNorm(most=0.5)"
    assert str(both) == "warm the learning rate up over 10 steps; and clip the norm of all gradients together to 0.5"


def test_an_undecided_verdict_says_what_would_decide_it():
    diagnosis = sw.diagnose(network(), LOADER, lr=1e-3, steps=400, allowance=0.03)
    if diagnosis.verdict == "undecided":
        look = diagnosis.next_look
        assert look is not None
        assert look.allowance >= (len(diagnosis.measurement.ahead.losses) + look.steps) / 400
        assert str(look).startswith(f"{look.steps} more trial steps would probably decide it: allowance=")


def test_a_certainty_that_was_not_calibrated_is_said():
    diagnosis = sw.diagnose(network(), LOADER, lr=1e-3, steps=400, certainty=0.999, remedies=0)
    assert (diagnosis.verdict, diagnosis.next_look) == ("undecided", None)
    assert diagnosis.grounds[1] == "certainty=0.999: none above 0.95 was calibrated"
    blown_up = sw.diagnose(network(), LOADER, lr=1e30, steps=400, certainty=0.999, remedies=0)
    assert blown_up.verdict == "will not train"


def test_nothing_is_tried_where_no_remedy_could_raise_the_odds_clearly(monkeypatch):
    def undecided(trial, **limits):
        return replace(foresee(trial, **limits), verdict="undecided", odds=0.9)

    monkeypatch.setattr("skipway.diagnosis.diagnosis.foresee", undecided)
    diagnosis = sw.diagnose(network(), LOADER, lr=0.1)
    assert diagnosis.tried == ()
    with pytest.raises(sw.SkipwayError, match="at odds of 90 % no remedy is tried"):
        diagnosis.fix()
