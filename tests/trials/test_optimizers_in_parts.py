"""Kind: an optimizer is taken to hold the whole model, to take any parameter, and to be made by its class alone.

| trial | input | right value |
|---|---|---|
| D5 | Muon on matrices alone | the others stay as they are, and are named |
| D5 | Muon and AdamW, a list for parts of the model | each steps its part |
| D5 | AdamW over the head alone | only the head moves in the trial steps |
| — | a class whose constructor needs arguments of its own | its options are taken over, it is not called |
| — | an optimizer with a schedule, with state from steps | neither steps, nor changes |
| — | a remedy that adds parameters which Muon refuses | they are trained by another optimizer |
| — | two that hold one parameter; one of another model; no optimizers | refused |
| D5 | 4 sequences whose tokens have labels; 4 sequences with one label each | taken; refused |
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.diagnosis.lint import lint
from skipway.diagnosis.remedies import AddSkips
from skipway.diagnosis.settings import settings_of
from skipway.diagnosis.subject import Subject
from skipway.diagnosis.trial import Trial

X, LABELS = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def parts(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    matrices = [each for each in model.parameters() if each.ndim == 2]
    return matrices, [each for each in model.parameters() if each.ndim < 2]


def moved(model: nn.Module, optimizers: object) -> set[str]:
    """The parameters that the trial steps move."""
    ahead = Trial(Subject(model, X, LABELS), settings_of(optimizers, model)).advance(2).result()  # type: ignore[arg-type]
    return {name for name, size in ahead.updates.items() if size}


def test_what_no_optimizer_holds_stays_as_it_is_and_is_named():
    model = network()
    matrices, rest = parts(model)
    optimizer = torch.optim.Muon(matrices, lr=0.02)
    diagnosis = sw.diagnose(model, X, targets=LABELS, optimizer=optimizer)
    assert diagnosis.settings.rate == 0.02
    assert diagnosis.remarks[-1].startswith("optimizer: 3 trainable parameters in none, which stay as they are: 0.bias")
    assert moved(model, optimizer) == {"0.weight", "2.weight", "4.weight"}
    head = torch.optim.AdamW(model[4].parameters())
    assert moved(model, head) == {"4.weight", "4.bias"}
    assert len(rest) == 3


def test_several_optimizers_step_their_parts():
    model = network()
    matrices, rest = parts(model)
    both = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-3)]
    diagnosis = sw.diagnose(model, X, targets=LABELS, optimizer=both)
    assert str(diagnosis.settings) == "muon+adamw at 0.02"
    assert not any(remark.startswith("optimizer") for remark in diagnosis.remarks)
    assert moved(model, both) == {name for name, _ in model.named_parameters()}
    rates = [group["lr"] for group in diagnosis.settings.at(0.2).make(model).param_groups]
    assert rates == pytest.approx([0.2, 1e-2])
    assert not any(finding.rule == "P4" and "in no group" in finding.what for finding in lint(model, X, both))


class Needy(torch.optim.SGD):
    """Its constructor needs an argument that no group holds."""

    def __init__(self, parameters, *, helper: list[int]) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.helper = helper

    def step(self, closure=None):
        self.helper.append(1)
        return super().step(closure)


def test_the_users_optimizer_is_left_alone():
    model = network()
    optimizer = Needy(model.parameters(), helper=[])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model(X).sum().backward()
    optimizer.step()
    schedule.step()
    before = [optimizer.state[each]["momentum_buffer"].clone() for each in model.parameters()]
    weights = [each.detach().clone() for each in model.parameters()]
    assert sw.diagnose(model, X, targets=LABELS, optimizer=optimizer).settings.rate == pytest.approx(0.01)
    assert optimizer.helper == [1]
    after = [optimizer.state[each]["momentum_buffer"] for each in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_parameters_that_a_remedy_adds():
    model = network()
    matrices, _ = parts(model)
    diagnosis = sw.diagnose(model, X, targets=LABELS, optimizer=torch.optim.Muon(matrices, lr=0.02))
    treatment = diagnosis.fix(AddSkips(("0", "2")))
    optimizer = treatment.settings.make(treatment.model)
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    gains = [each for name, each in treatment.model.named_parameters() if name.endswith("gain")]
    assert len(gains) == 2
    assert all(id(gain) in held for gain in gains)
    assert id(treatment.model.get_parameter("4.bias")) not in held


def test_refusals():
    model, other = network(), network()
    twice = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.AdamW(model[4].parameters())]
    for optimizer, words in (
        (twice, r"optimizer=SGD\+AdamW: two of them hold the same parameter"),
        (torch.optim.SGD(other.parameters(), lr=0.1), "it holds parameters that Sequential does not have"),
        ([], "optimizer=list: the rule is one of sgd"),
        ([torch.optim.SGD], "optimizer=list: the rule is one of sgd"),
        (torch.optim.SGD, "optimizer=type: the rule is one of sgd"),
        (None, "optimizer=NoneType: the rule is one of sgd"),
        ("lion", "optimizer='lion': the rule is one of sgd"),
    ):
        with pytest.raises(sw.SkipwayError, match=words):
            sw.diagnose(model, X, targets=LABELS, optimizer=optimizer)  # type: ignore[arg-type]
    with pytest.raises(sw.SkipwayError, match="optimizer=list: the rule is"):
        lint(model, X, [])


class Tokens(nn.Module):
    def __init__(self, classes: int, *, pool: bool) -> None:
        super().__init__()
        self.table, self.map, self.head, self.pool = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, classes), pool

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None):
        x = self.table(ids)
        x = self.head(x + self.map(x))
        x = x.mean(1) if self.pool else x
        return x if labels is None else {"loss": nn.functional.cross_entropy(x.flatten(0, -2), labels.flatten())}


def test_four_sequences_are_enough_where_tokens_have_labels():
    ids = torch.randint(9, (4, 12))
    model = Tokens(9, pool=False)
    for example, targets in ((ids, ids), (ids, None), ({"ids": ids, "labels": ids}, None)):
        diagnosis = sw.diagnose(model, example, targets=targets)
        assert diagnosis.subject.size == 4
        assert diagnosis.measurement.finite
    pooled = Tokens(3, pool=True)
    for example, targets in ((ids, LABELS[:4]), ({"ids": ids, "labels": LABELS[:4]}, None)):
        with pytest.raises(sw.SkipwayError, match="example of 4 samples: the rule is at least 8"):
            sw.diagnose(pooled, example, targets=targets)
