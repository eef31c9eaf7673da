"""Networks that begin far from where trainings begin: losses of 1e16, weights that have been trained, ways around."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import skipway as sw
from skipway.diagnosis.odds import FARTHEST, FirstSteps, Pause, odds
from skipway.diagnosis.rules import maps_in_sequence
from skipway.diagnosis.settings import Settings
from skipway.diagnosis.subject import Subject
from skipway.diagnosis.trial import Trial
from skipway.tracing.watch import watch

LABELS = torch.arange(256) % 4
INPUTS = torch.randn(256, 12, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(4, 12)[LABELS]


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=32, shuffle=True)


def network(factor: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        model[2].weight.mul_(factor)
    return model


@pytest.mark.parametrize("factor", [1.0, 1e3, 1e8, 1e15])
def test_the_best_constant_answer_does_not_depend_on_the_outputs(factor):
    """log 4 of balanced classes, also where the outputs are saturated, and their gradient 0 at every right answer."""
    trial = Trial(Subject(network(factor), INPUTS, LABELS), Settings(lr=1e-9)).advance(1)
    assert trial.constant == pytest.approx(math.log(4), rel=0.03)


def test_the_search_for_a_constant_comes_back_from_outputs_that_have_blown_up():
    """The least mean absolute error of one number is that of the median."""
    targets = torch.randn(96, 2, generator=torch.Generator().manual_seed(1)) + torch.tensor([3.0, -1.0])
    seen = targets[:84]  # the last eighth is held out
    model = nn.Linear(6, 2)
    nn.init.constant_(model.bias, 1e12)
    subject = Subject(model, torch.randn(96, 6), targets, nn.functional.l1_loss)
    constant = Trial(subject, Settings(lr=1e-9)).advance(1).constant
    assert constant == pytest.approx(float((seen - seen.median(0).values).abs().mean()), rel=0.02)


def steps(losses: list[float]) -> FirstSteps:
    pauses = [Pause(0.0, 0.0, 0.5, losses[0]), Pause(0.01, 0.01, 0.5, losses[0]), Pause(0.05, 0.01, 0.5, losses[-1])]
    return FirstSteps(losses, [None] * len(losses), pauses, 2.3, 12.0, 1000.0, 1.0, 1.0, True, True)


def test_losses_beyond_all_that_was_fitted_have_even_odds_at_most():
    falling = [1e16 * 0.9**step for step in range(24)]
    assert odds(steps(falling)) <= 0.5
    assert math.exp(FARTHEST) * 2.3 < falling[-1]


def test_a_trained_network_is_told_so_and_keeps_its_weights():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(100):
        nn.functional.cross_entropy(model(INPUTS), LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()
    diagnosis = sw.diagnose(model, loader(), optimizer="sgd", lr=30.0, steps=300)
    assert "trained-already" in {finding.rule for finding in diagnosis.findings}
    assert not any("draw" in str(offer.remedy) for offer in diagnosis.tried)
    assert "trained-already" not in {finding.rule for finding in sw.diagnose(network(), loader(), lr=0.01).findings}


class UNet(nn.Module):
    """Maps around which concatenations lead, or none do."""

    def __init__(self, around: bool) -> None:
        super().__init__()
        self.around = around
        self.down = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1) for _ in range(8))
        self.up = nn.ModuleList(nn.Conv1d(4 + 4 * around, 4, 3, padding=1) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for each in self.down:
            x = each(x).relu()
            kept.append(x)
        for each, other in zip(self.up, reversed(kept), strict=True):
            x = each(torch.cat([x, other], 1) if self.around else x).relu()
        return x


def test_ways_around_maps_are_not_maps_in_sequence():
    x = torch.randn(2, 4, 8)
    assert maps_in_sequence(watch(UNet(around=False), x)) == 16
    assert maps_in_sequence(watch(UNet(around=True), x)) == 2  # down[0], and up[7] beside it


class Late(nn.Module):
    """A second input that joins behind a trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, late: Tensor) -> Tensor:
        return self.head(torch.cat([self.trunk(x), late], 1))


def test_the_longest_of_the_shortest_ways_from_several_inputs_counts():
    assert maps_in_sequence(watch(Late(), (torch.randn(3, 4), torch.randn(3, 4)))) == 13


def test_targets_may_follow_the_example():
    assert sw.diagnose(network(), INPUTS, LABELS, lr=0.1).measurement.ahead is not None


def test_few_samples_with_random_labels_prove_nothing():
    """Six samples are learnt by heart by a network that cannot learn anything else."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10))
    few = sw.diagnose(model, torch.randn(8, 3, 4, 4), lr=0.1)
    assert few.odds < 0.99
