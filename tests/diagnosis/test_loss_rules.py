"""What stands between a network and its loss: outputs bounded before a cross-entropy, targets that are broadcast."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import skipway as sw
from skipway.diagnosis.loss_rules import LeaveOut

diagnose = partial(sw.diagnose, remedies=0)  # remedies are tried in test_offers
K = 10
X = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % K


def net(*last: nn.Module, out: int = K) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, out), *last)


class Applied(nn.Module):
    """A network whose forward applies a function to its outputs."""

    def __init__(self, function) -> None:
        super().__init__()
        self.net, self.function = net(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.net(x))


def found(diagnosis: sw.Diagnosis, rule: str) -> sw.Finding | None:
    return next((finding for finding in diagnosis.findings if finding.rule == rule), None)


ONE_HOT, TANH = math.log(math.e + K - 1) - 1, math.log(1 + (K - 1) * math.exp(-2))
"""Cross-entropy of a softmax that is certain, or a sigmoid that is 1 and 0; and of a tanh that is 1 and -1."""


@pytest.mark.parametrize(
    ("model", "least", "module"),
    [
        (net(nn.Softmax(1)), ONE_HOT, "3"),
        (net(nn.Sigmoid()), ONE_HOT, "3"),
        (net(nn.Tanh()), TANH, "3"),
        (net(nn.Sequential(nn.Identity(), nn.Softmax(-1))), ONE_HOT, "3.1"),
        (Applied(lambda out: out.softmax(1)), ONE_HOT, None),
    ],
    ids=["softmax", "sigmoid", "tanh", "nested", "function"],
)
def test_no_weights_get_a_bounded_output_past_its_least_loss(model, least, module):
    diagnosis = diagnose(model, X, targets=Y, optimizer="adamw")
    finding = found(diagnosis, "bounded-output")
    assert finding is not None
    assert finding.evidence["least loss"] == pytest.approx(least, rel=1e-4)
    assert finding.remedies == (() if module is None else (LeaveOut(module),))
    if module is not None:
        mended = diagnosis.fix(LeaveOut(module))
        assert isinstance(mended.model.get_submodule(module), nn.Identity)
        assert found(mended.after, "bounded-output") is None


def test_a_module_that_is_used_inside_of_the_network_too_is_not_taken_out():
    tanh = nn.Tanh()
    model = nn.Sequential(nn.Linear(12, 16), tanh, nn.Linear(16, K), tanh)
    finding = found(diagnose(model, X, targets=Y, optimizer="adamw"), "bounded-output")
    assert finding is not None
    assert finding.evidence["least loss"] == pytest.approx(TANH, rel=1e-4)
    assert (finding.where, finding.remedies) == ((), ())


@pytest.mark.parametrize(
    "model",
    [net(), net(nn.LogSoftmax(1)), net(nn.Flatten()), Applied(lambda out: 30 * torch.tanh(out / 30))],
    ids=["logits", "log-softmax", "flattened", "soft cap"],
)
def test_outputs_that_reach_any_loss_are_left_alone(model):
    assert found(diagnose(model, X, targets=Y, optimizer="adamw"), "bounded-output") is None


def test_a_softmax_over_the_channels_of_maps():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softmax(1))
    labels = torch.arange(8 * 25).view(8, 5, 5) % 4
    diagnosis = diagnose(model, torch.randn(8, 3, 5, 5), targets=labels, optimizer="adamw")
    finding = found(diagnosis, "bounded-output")
    assert finding is not None
    assert finding.evidence["least loss"] == pytest.approx(math.log(math.e + 3) - 1, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, lambda out, targets: ((out - targets) ** 2).mean()])
def test_targets_that_are_compared_with_all_outputs(loss):
    targets = torch.randn(32)
    diagnosis = diagnose(net(out=1), X, targets=targets, loss=loss)
    finding = found(diagnosis, "broadcast-targets")
    assert finding is not None
    assert diagnosis.verdict == "will not train"
    assert found(diagnose(net(out=1), X, targets=targets[:, None], loss=loss), "broadcast-targets") is None


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_sequences_of_length_one_are_compared_with_all():
    """Outputs (N, T, 1) beside targets (N, 1, T): each output meets the targets of all positions of its own sample."""
    x = torch.randn(8, 4, 12)
    diagnosis = diagnose(net(out=1), x, targets=x.sum(-1)[:, None], loss=F.mse_loss)
    assert found(diagnosis, "broadcast-targets") is not None


def test_a_loss_that_brings_targets_into_shape_itself_is_left_alone():
    diagnosis = diagnose(
        net(out=1), X, targets=torch.randn(32), loss=lambda out, targets: F.mse_loss(out.flatten(), targets.flatten())
    )
    assert found(diagnosis, "broadcast-targets") is None


@pytest.mark.parametrize(
    "loss",
    [
        lambda out, targets: F.mse_loss(out.squeeze(1), targets),
        lambda out, targets: F.l1_loss(out[:, 0], targets),
        lambda out, targets: ((out.squeeze(1) - targets) ** 2).mean(),
    ],
    ids=["squeezed", "indexed", "by hand"],
)
def test_a_loss_that_brings_outputs_into_shape_itself_is_left_alone(loss):
    measured = diagnose(net(out=1), X, targets=torch.randn(32), loss=loss)
    assert found(measured, "broadcast-targets") is None


@pytest.mark.parametrize("bias", [math.nan, 1e30])
def test_a_loss_that_is_not_finite_says_nothing_of_the_targets(bias):
    model = net(out=1)
    nn.init.constant_(model[2].bias, bias)
    measured = diagnose(
        model, X, targets=torch.randn(32), loss=lambda out, targets: F.mse_loss(out.flatten(), targets.flatten())
    )
    assert found(measured, "broadcast-targets") is None
