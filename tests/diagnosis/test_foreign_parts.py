"""What users bring to a diagnosis beside the model, and what may fail, be empty or be unusual: loaders, losses,
optimizers, schedules, numbers. It is judged, or refused with its name, and the model is as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import skipway as sw
from skipway.diagnosis.batches import Batches
from skipway.diagnosis.measurement import measure
from skipway.diagnosis.odds import LOW, FirstSteps, Pause, odds
from skipway.diagnosis.outlook import Outlook, cause_of
from skipway.diagnosis.remedies import LearningRate
from skipway.diagnosis.rule_context import Context, calming
from skipway.diagnosis.settings import Settings
from skipway.diagnosis.subject import Subject
from skipway.diagnosis.trial import Trial
from skipway.errors import SkipwayError
from skipway.tracing import preserved_state

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(448, 8, generator=GENERATOR)
LABELS = (X @ torch.randn(8, 4, generator=GENERATOR)).argmax(1)
LOADER = DataLoader(TensorDataset(X, LABELS), batch_size=32)
NAN = math.nan


class Net(nn.Module):
    """Three pre-norm branches."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(norm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(3)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def judge(model: nn.Module | None = None, example: Any = LOADER, **options: Any) -> sw.diagnosis.Diagnosis:
    return sw.diagnose(Net() if model is None else model, example, **{"lr": 0.05, "steps": 400} | options)


def batches_with(place: int, x: Tensor | None = None, labels: Tensor | None = None, problem: Exception | None = None):
    """A function that yields batches, one of which is another one or a failure."""

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        for number, (first, second) in enumerate(LOADER):
            if number == place and problem is not None:
                raise problem
            yield (
                first if number != place or x is None else x,
                second if number != place or labels is None else labels,
            )

    return read


SPOILT = X[:32].clone()
SPOILT[3, 2] = NAN


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            batches_with(5, problem=OSError("cat.jpg is cut")),
            r"example=read\(\): batch 6 cannot be read: OSError: cat.jpg",
        ),
        (batches_with(0, problem=KeyError("label")), r"example=read\(\): batch 1 cannot be read: KeyError"),
        (batches_with(5, x=SPOILT), "a batch has inputs that are not finite"),
        (batches_with(5, labels=LABELS[:32] + 1), "the largest label is 4, and the output has 4 classes"),
        (batches_with(5, labels=torch.full((32,), -100)), "every label is -100"),
    ],
)
def test_a_batch_that_no_training_survives_is_named(example, message):
    model = Net(nn.BatchNorm1d)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SkipwayError, match=message):
        judge(model, example)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_generators_of_a_loader_go_on_within_a_pass_and_are_left_alone():
    """A sampler with replacement draws as it goes; its own generator must not begin anew for each batch."""
    generator, data = torch.Generator().manual_seed(3), TensorDataset(X, LABELS)
    sampler = RandomSampler(data, replacement=True, num_samples=320, generator=generator)
    loader, state = DataLoader(data, batch_size=32, sampler=sampler), generator.get_state()
    expected = [x for x, _ in loader]
    generator.set_state(state)
    for reader in (iter(Batches(loader)), iter(Batches(loader))):
        assert all(torch.equal(next(reader)[0], x) for x in expected)
        assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    "given", [lambda: iter([(X[:64], LABELS[:64])]), lambda: DataLoader([*zip(X[:64], LABELS[:64], strict=True)], 64)]
)
def test_a_loader_of_one_batch_is_one_batch(given):
    diagnosis = judge(example=given())
    assert diagnosis.measurement.ahead is not None
    assert not diagnosis.measurement.ahead.fresh
    assert "parts of one batch" in " ".join(diagnosis.remarks)


def test_batches_of_one_sample_are_left_out_and_counted():
    remarks = " ".join(judge(Net(nn.BatchNorm1d), DataLoader(TensorDataset(X[:97], LABELS[:97]), 32)).remarks)
    assert "1 batch of fewer than 2 samples left out" in remarks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": {}.__getitem__}, r"schedule\(0\) fails: KeyError"),
        (
            {"schedule": ([1.0] * 390).__getitem__},
            r"schedule\(390\) fails: IndexError: .* every planned step, 0 to 399",
        ),
        ({"schedule": lambda step: None}, r"schedule\(0\) fails: TypeError"),
        ({"schedule": lambda step: NAN if step == 7 else 1.0}, r"schedule\(7\)=nan: the rule is a factor"),
        ({"schedule": lambda step: -1.0}, r"schedule\(0\)=-1.0: the rule is a factor"),
        ({"schedule": lambda step: 0.0}, "its factor is 0 at all 400 planned steps"),
        ({"steps": 1.5}, r"steps=1\.5: the rule is a whole number"),
        ({"warmup": 0.1}, r"warmup=0\.1: the rule is a whole number"),
        ({"certainty": "high"}, "certainty='high': the rule"),
        ({"allowance": None}, "allowance=None: the rule"),
        ({"remedies": 2.5}, r"remedies=2\.5: the rule"),
        ({"seed": 2**70}, "seed=.*: the rule is a whole number of at most 64 bits"),
    ],
)
def test_plans_that_are_none_are_refused(options, message):
    with pytest.raises(SkipwayError, match=message):
        judge(**options)


class NeedsClosure(torch.optim.SGD):
    """Evaluates the loss again, as sharpness-aware minimisation does."""

    def step(self, closure=None):
        closure()
        return super().step()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (NeedsClosure, {}, "optimizer=NeedsClosure: its step fails: TypeError"),
        (torch.optim.SGD, {"maximize": True}, "maximize=True raises the loss"),
    ],
)
def test_optimizers_that_a_diagnosis_cannot_step_are_refused(kind, options, message):
    model = Net()
    with pytest.raises(SkipwayError, match=message):
        judge(model, optimizer=kind(model.parameters(), lr=0.1, **options), lr=None)


@pytest.mark.parametrize("sort", ["sgd", "sparse adam", "adamw"])
def test_sparse_gradients_are_judged_where_the_optimizer_takes_them(sort):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16, sparse=True), nn.Flatten(), nn.Linear(80, 4))
    ids = torch.randint(50, (256, 5), generator=torch.Generator().manual_seed(0))
    table, head = model[0].parameters(), model[2].parameters()
    optimizer = {"sparse adam": [torch.optim.SparseAdam([*table], 0.01), torch.optim.Adam(head, 0.01)]}.get(sort, sort)
    question = {"optimizer": optimizer, "lr": None, "example": DataLoader([*zip(ids, ids[:, 0] % 4, strict=True)], 32)}
    if sort == "adamw":
        with pytest.raises(SkipwayError, match="optimizer=AdamW: its step fails: .*sparse gradients"):
            judge(model, **question)
    else:
        assert judge(model, **question).measurement.gradient > 0


def test_targets_of_several_heads_are_cut_with_their_samples_for_a_given_loss():
    class Twins(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            output = super().forward(x)
            return output, output[:, 0]

    def loss(output, targets):
        return F.cross_entropy(output[0], targets[0]) + F.mse_loss(output[1], targets[1])

    pairs = [(x, (y, x[:, 0])) for x, y in LOADER]
    assert judge(Twins(), pairs, loss=loss).odds > 0.5
    assert judge(Twins(), X[:64], targets=(LABELS[:64], X[:64, 0]), loss=loss).odds > 0.5


@dataclass
class Output:
    logits: Tensor
    penalty: Tensor


class Penalised(Net):
    """Beside its logits it returns a number that is computed from them."""

    def forward(self, x: Tensor) -> Output:
        output = super().forward(x)
        return Output(output, output.square().mean())


def test_a_number_beside_the_output_is_no_loss_where_the_model_was_given_no_targets():
    remark = judge(Penalised()).remarks[0]
    assert "cross-entropy of output logits" in remark
    assert "(output penalty), given no targets, left out: give loss=" in remark


def test_a_batch_that_is_a_mapping_has_no_targets_for_a_given_loss():
    class Whole(Net):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward(batch["x"])

    rows = [{"x": x, "y": y} for x, y in zip(X, LABELS, strict=True)]
    with pytest.raises(SkipwayError, match=r"a mapping goes to the model as it is.*yield pairs \(batch, targets\)"):
        judge(Whole(), DataLoader(rows, 32), loss=F.cross_entropy)


@pytest.mark.parametrize(
    "question",
    [
        {"example": [(X[:32], LABELS[:32] * 0)] * 14},
        {"example": X[:64], "targets": LABELS[:64] * 0 + 2},
        {"loss": lambda output, targets: output.square().mean()},
    ],
)
def test_one_answer_that_is_right_for_all_samples_is_no_training(question):
    diagnosis = judge(**question)
    assert not diagnosis.trains
    assert "constant-targets" in {finding.rule for finding in diagnosis.findings}
    assert "one answer is right for all samples" in " ".join(diagnosis.grounds)


def test_parts_without_a_gradient_and_parts_at_rest_are_named():
    class Detached(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[0](self.stem(x)).detach())

    assert "the loss does not depend on 20 trainable parameters" in " ".join(judge(Detached()).remarks)
    model = Net(nn.BatchNorm1d)
    model.blocks[0].eval()
    moments = model.blocks[0][0].running_mean.clone()
    assert "mode: blocks.0.0 in evaluation mode, as given" in " ".join(judge(model).remarks)
    assert not model.blocks[0][0].training
    assert torch.equal(model.blocks[0][0].running_mean, moments)


def test_power_iterations_of_spectral_norm_are_taken_back():
    model = Net()
    torch.nn.utils.parametrizations.spectral_norm(model.head)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    judge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_frozen_is_neither_drawn_again_nor_damped():
    model = Net().requires_grad_(False)
    model.head.requires_grad_(True)
    diagnosis = judge(model, lr=1e-9, remedies=9)
    kinds = [str(each.remedy) for each in diagnosis.tried]
    assert kinds
    assert not any("last weights of every branch" in each for each in kinds)
    assert all("blocks" not in each for each in kinds)


def test_complex_parameters_and_inference_mode_are_refused():
    class Waves(Net):
        def __init__(self) -> None:
            super().__init__()
            self.waves = nn.Parameter(torch.ones(16, dtype=torch.complex64))

    with pytest.raises(SkipwayError, match="waves of complex numbers; the rule is real"):
        judge(Waves())
    with torch.inference_mode(), pytest.raises(SkipwayError, match="inference_mode"):
        judge(Net())


@pytest.mark.parametrize("rate", [1e-30, 1e30])
def test_a_rate_that_is_far_off_is_replaced_by_the_usual_one(rate):
    diagnosis = judge(lr=rate)
    assert diagnosis.verdict == "will not train"
    assert diagnosis.remedies[0] == LearningRate(0.1)


def test_short_plans_and_long_warmups_are_remarked_upon():
    short, warm = judge(steps=5), judge(steps=100, warmup=1000)
    assert "5 planned, and the shortest look ahead takes 12" in " ".join(short.remarks)
    assert "no look" not in " ".join(short.grounds)
    assert "end at 10 % of the rate" in " ".join(warm.remarks)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_the_best_constant_answer_does_not_depend_on_the_scale_of_a_loss(scale):
    """Theory: the entropy of the labels, times the scale."""
    model = Net()
    subject = Subject(model, X[:128], LABELS[:128], lambda output, y: scale * F.cross_entropy(output, y))
    trial = Trial(subject, Settings(lr=1e-4 / scale)).advance(3)
    shares = torch.bincount(LABELS[:112]) / 112
    assert trial.constant is not None
    assert trial.constant / scale == pytest.approx(-float((shares * shares.log()).sum()), rel=0.02)


def first_steps(losses: list[float], constant: float | None, moved: float = 0.01) -> FirstSteps:
    pauses = [Pause(0.0, 0.0, 1.0, losses[0]), Pause(moved / 12, moved / 12, 1.0, losses[1])]
    pauses += [Pause(moved, moved / 12, 1.0, losses[-1])] * 2
    return FirstSteps(losses, [None] * len(losses), pauses, constant, 24.0, 1000.0, 1.0, 1.0, True, False)


def test_a_loss_below_zero_is_measured_from_the_best_constant_answer():
    """A loss that stays at the answer of no input is no gain, whatever number is added to it."""
    noise = torch.randn(24, generator=torch.Generator().manual_seed(0)) * 0.01
    flat = [1.39 + float(each) for each in noise]
    below = [each - 5 for each in flat]
    assert abs(first_steps(flat, 1.386).relative(1.386) - 1) < 1e-9
    assert abs(first_steps(below, -3.614).relative(-3.614) - 1) < 1e-9
    assert odds(first_steps(below, -3.614)) < 0.9
    assert "negative loss" in " ".join(judge(loss=lambda output, y: F.cross_entropy(output, y) - 5).remarks)


def test_weights_that_cannot_move_learn_nothing():
    losses = [1.4 - 0.01 * step for step in range(24)]
    assert odds(first_steps(losses, 1.386, moved=0.0)) == LOW


def test_a_loss_below_zero_that_falls_is_no_loss_that_grows():
    trial = Trial(Subject(Net(), X[:128], LABELS[:128], lambda o, y: F.cross_entropy(o, y) - 5), Settings(lr=0.05))
    assert cause_of(trial.advance(12).result(), None) != "rate-too-high"


class OwnLoss(Net):
    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        output = super().forward(x)
        return {"cost": F.cross_entropy(output, labels), "logits": output}


def test_a_trial_alone_takes_the_loss_of_the_model():
    """Its first pass is one without gradients, by which a loss of the model's own is not known."""
    trial = Trial(Subject(OwnLoss(), {"x": X[:64], "labels": LABELS[:64]}), Settings(lr=0.05)).advance(2)
    assert trial.subject.objective is not None
    assert trial.subject.objective.own


class Plain(nn.Module):
    """x + W₂ φ(W₁ x), without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        lambda linear: nn.utils.prune.random_unstructured(linear, "weight", 0.5),
    ],
    ids=["weight norm", "spectral norm", "parametrization", "pruning"],
)
def test_weights_that_are_computed_in_every_pass_are_trained_by_what_they_are_computed_from(compute):
    torch.manual_seed(0)
    model = nn.Sequential(Plain(), Plain(), nn.Linear(8, 4))
    compute(model[0].second)
    subject = Subject(model, X[:32], LABELS[:32])
    context = Context(measure(subject), Settings(optimizer="sgd"), subject, Outlook("undecided", 0.5))
    for trained in (True, False):
        model[0].second.requires_grad_(trained)
        with preserved_state(model):
            assert context.frozen is not trained
            assert bool(calming(context)) is trained
            assert ("0.second" in context.maps) is trained
