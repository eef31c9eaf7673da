"""Trial steps are the first steps of the training, can be continued, and leave no trace."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import skipway as sw
from skipway.diagnosis.batches import Batches
from skipway.diagnosis.settings import Settings, settings_of
from skipway.diagnosis.subject import Subject
from skipway.diagnosis.trial import Trial
from skipway.tracing.module_state import copy_module

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(96, 6, generator=GENERATOR)
LABELS = (X[:, 0] > 0.5).long()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def loader(**options) -> DataLoader:
    return DataLoader(TensorDataset(X, LABELS), batch_size=16, **options)


def subject(model: nn.Module, given: object = None) -> Subject:
    batches = None if given is None else Batches(given)  # type: ignore[arg-type]
    inputs, targets = (X, LABELS) if batches is None else batches.first
    return Subject(model, inputs, targets, batches=batches)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_trial_that_is_continued_is_one_that_was_not_stopped(fresh, optimizer):
    settings = Settings(optimizer=optimizer, lr=0.05, warmup=3, schedule="cosine", steps=40)
    given = loader() if fresh else None
    one, other = (Trial(subject(network(), given), settings) for _ in range(2))
    one.advance(20)
    for step in (1, 7, 12, 20):
        other.advance(step)
    assert one.losses == other.losses
    assert len(set(one.losses)) == 20  # dropout and batches differ at each step
    assert one.pauses[-1].moved == other.pauses[-1].moved > 0


def test_trial_steps_are_those_of_a_plain_loop():
    """BatchNorm, momentum, decay, warm-up and schedule as in torch's own loop over the same batches."""
    model = network()
    model[3] = nn.Identity()
    twin = copy_module(model).train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4) * (1 - step / 100))
    losses = []
    for step, (x, y) in enumerate((list(loader()) * 3)[1:13]):  # the first batch is held out
        optimizer.zero_grad()
        loss = F.cross_entropy(twin(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        assert step < 12
    own = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    settings = settings_of(own, model)
    planned = Settings(
        exact=settings.exact, optimizer="sgd", lr=0.1, warmup=4, schedule=lambda step: 1 - step / 100, steps=100
    )
    trial = Trial(subject(model, loader()), planned).advance(12)
    assert trial.losses == pytest.approx(losses, rel=1e-5)
    assert trial.buffers["1.running_mean"].tolist() == pytest.approx(twin[1].running_mean.tolist(), abs=1e-6)


def test_the_marks_of_a_group_go_with_its_parameters():
    """In a copy of a network that lacks some of them, by a remedy, the classifier's place is another one."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    settings = settings_of(torch.optim.SGD(sw.param_groups(model, lr=0.1), lr=0.1), model)
    smaller = nn.Sequential(nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 2))
    (group, _) = settings.make(smaller).param_groups
    classifier, matrix = ([group["params"][place] for place in group[name]] for name in ("classifier", "matrices"))
    assert [id(each) for each in classifier] == [id(smaller[2].weight)]
    assert [id(each) for each in matrix] == [id(smaller[0].weight)]


def test_nothing_of_a_trial_is_left_in_the_model_or_the_loader():
    model = network().eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    own = torch.Generator().manual_seed(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), own.get_state()
    sw.diagnose(model, loader(shuffle=True, generator=own), lr=0.1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], own.get_state())
    assert not any(module.training for module in model.modules())
    assert bool((model[0].weight.grad == 1).all())
    assert model[4].weight.grad is None


class Interrupting(nn.Module):
    """Raises in its seventh pass."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.passes = nn.Linear(6, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self.passes == 7:
            raise KeyboardInterrupt
        return self.map(x)


def test_an_interrupt_puts_the_weights_back():
    model = Interrupting()
    trial = Trial(subject(model), Settings(lr=0.5))
    model.passes = 0
    before = model.map.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        trial.advance(12)
    assert torch.equal(before, model.map.weight)


def count_taken(taken: list[int]):
    for start in range(0, 96, 16):
        taken.append(start)
        yield X[start : start + 16], LABELS[start : start + 16]


def test_what_stands_for_batches():
    taken: list[int] = []
    kinds = {
        "list": [(x, y) for x, y in loader()],
        "lists": list(loader()),
        "function": lambda: iter(loader()),
        "iterator": count_taken(taken),
    }
    losses = {}
    for kind, given in kinds.items():
        diagnosis = sw.diagnose(network(), given, lr=0.01, steps=100, allowance=0.12)
        ahead = diagnosis.measurement.ahead
        assert ahead is not None
        assert ahead.fresh
        losses[kind] = ahead.losses[:12]
        assert any("each on another batch of the loader" in remark for remark in diagnosis.remarks)
    assert len(set(losses.values())) == 1
    assert taken == list(range(0, 96, 16))
    assert any("taken from an iterator" in remark for remark in diagnosis.remarks)


def test_the_best_constant_answer():
    """Entropy of unequal labels, variance of targets, and for a loss of one's own the minimum over one answer."""
    labels = torch.tensor([0] * 72 + [1] * 24)[torch.randperm(96, generator=GENERATOR)]
    share = labels[:84].float().mean().item()  # the last eighth is held out
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    targets = torch.randn(96, 2, generator=GENERATOR) + torch.tensor([3.0, -1.0])
    seen = targets[:84]

    def binary(out: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out[:, 0], y.float())

    def weighted(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, weight=torch.tensor([1.0, 3.0]))

    cases = [
        (Subject(nn.Linear(6, 2), X, labels), entropy),
        (Subject(nn.Linear(6, 2), X, targets), seen.var(0, correction=0).mean().item()),
        (Subject(nn.Linear(6, 2), X, targets, F.l1_loss), (seen - seen.median(0).values).abs().mean().item()),
        (Subject(nn.Linear(6, 1), X, labels, binary), entropy),
        (Subject(nn.Linear(6, 2), X, labels, weighted), None),
    ]
    for given, expected in cases:
        constant = Trial(given, Settings(lr=0.01)).advance(1).constant
        if expected is None:  # weights that make the classes about equal
            weight = torch.tensor([1.0, 3.0])[labels[:84]]
            share = float(weight[labels[:84] == 1].sum() / weight.sum())
            expected = -share * math.log(share) - (1 - share) * math.log(1 - share)
        assert constant == pytest.approx(expected, rel=2e-2)


def test_schedules_and_their_refusals():
    assert [Settings(warmup=2, steps=4, schedule="linear").factor(step) for step in range(4)] == [0.5, 1.0, 1.0, 0.5]
    assert Settings(steps=10, schedule=lambda step: step / 10).factor(3) == pytest.approx(0.3)
    with pytest.raises(sw.SkipwayError, match="schedule"):
        Settings(schedule="cosin")
    with pytest.raises(sw.SkipwayError, match="0.5 < certainty < 1"):
        sw.diagnose(network(), X, targets=LABELS, certainty=1.0)


class Echo(nn.Module):
    """Gives back its input; with `own` the loss beside it, as models of transformers do."""

    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.gain, self.own = nn.Parameter(torch.ones(())), own

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.gain * x
        return (F.cross_entropy(logits, labels), logits) if self.own else logits


def test_information_is_what_outputs_say_about_their_own_samples():
    """Of the squared distance to targets that are met, their variance; of a cross-entropy the same, whoever has it."""
    values = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    trial = Trial(Subject(Echo(), values, values.clone(), F.mse_loss), Settings(lr=1e-9)).advance(1)
    assert trial.losses == [0.0]
    part = values[: trial.part_size].double()
    assert trial.information[0] == pytest.approx(float(part.var(0, correction=0).mean()), rel=1e-6)
    labels = values.argmax(1)
    outside = Trial(Subject(Echo(), values, labels), Settings(lr=1e-9)).advance(1)
    own = Subject(Echo(own=True), {"x": values, "labels": labels}, None)
    own.probed()  # which loss it is, is chosen in a pass with gradients
    inside = Trial(own, Settings(lr=1e-9)).advance(1)
    logits = values[: outside.part_size]
    mean = logits.mean(0, keepdim=True).expand(logits.shape)
    wanted = float(F.cross_entropy(mean, labels[: len(mean)]) - F.cross_entropy(logits, labels[: len(mean)]))
    assert wanted > 0.1
    assert outside.information[0] == pytest.approx(wanted, abs=1e-6)
    assert inside.information[0] == pytest.approx(wanted, abs=1e-6)


def test_information_about_labels_that_are_drawn_at_random_is_about_those_of_the_part():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 4))
    images = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    trial = Trial(Subject(model, images), Settings(lr=0.1)).advance(140)
    assert trial.constant is not None
    for loss, told in zip(trial.losses[-7:], trial.information[-7:], strict=True):
        assert loss < 0.1 * trial.constant
        assert told is not None
        assert told > 0.5 * trial.constant
