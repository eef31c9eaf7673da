"""A network whose residual warm-up stands at step 0 is not called dead, and a clock that nobody moves is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import skipway as sw
from skipway.diagnosis.residual_warmup import judged_warmup
from skipway.monitoring import Health
from skipway.nn import warmup_state

IMAGES, LABELS = torch.randn(16, 3, 8, 8), torch.arange(16) % 3


def small(scheme: str) -> nn.Module:
    return sw.build("resnet-cifar", depth=8, width=4, stem_width=4, classes=3, scheme=scheme)


def diagnosed(model: nn.Module, steps: int = 1000, **options) -> sw.Diagnosis:
    return sw.diagnose(model, IMAGES, targets=LABELS, optimizer="adamw", steps=steps, remedies=0, **options)


@pytest.mark.parametrize("scheme", ["prores", "prores(0.5)", "prores(2000, 'stagewise-0')", "prores + rezero"])
def test_branches_at_step_0_are_not_called_dead(scheme):
    """They are judged at the end of the planned training, or of the warm-up where a factor is 0 until then."""
    model = small(scheme)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    diagnosis = diagnosed(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    rules = {finding.rule: finding for finding in diagnosis.findings}
    assert "two-zeros" not in rules
    told = rules["residual-warmup"]
    assert told.level == "note"
    assert told.what.startswith("the residual warm-up stands at step 0")
    assert "set_step(model, step, total)" in told.why
    assert ("two zeros at step 0" in told.why) == ("rezero" in scheme)
    branches = [signal.branch for signal in diagnosis.measurement.connections]
    assert len(branches) == 3
    assert all(size > 0 for size in branches) != ("rezero" in scheme)


def test_the_network_is_judged_with_the_factors_of_the_plan():
    """A branch has the size that it has after the planned steps: a share of that at the end of the warm-up."""
    sizes = {}
    for steps in (1000, 100_000):
        torch.manual_seed(0)
        model = small("prores")
        diagnosis = diagnosed(model, steps, allowance=0)
        sizes[steps] = [signal.branch for signal in diagnosis.measurement.connections]
        (told,) = (finding for finding in diagnosis.findings if finding.rule == "residual-warmup")
        assert ("a share of the training, prores(0.25)" in told.what) == (steps == 1000)
    # BatchNorm closes the branches, so that their size does not depend on the stream
    expected = [1, 1 / 2, 1 / 3]
    assert [a / b for a, b in zip(sizes[1000], sizes[100_000], strict=True)] == pytest.approx(expected, rel=1e-3)


def test_a_real_pair_of_zeros_is_still_found():
    model = small("prores + rezero")
    for connection in sw.chain(model):
        nn.init.zeros_(connection.residual.branch.conv2.weight)
        nn.init.zeros_(connection.residual.branch.norm2.weight)
    assert "two-zeros" in {finding.rule for finding in diagnosed(model).findings}


def test_a_warm_up_that_is_over_is_not_mentioned():
    model = small("prores(3)")
    sw.set_step(model, 9)
    assert judged_warmup(model, 100) is None
    assert judged_warmup(small("identity"), 100) is None
    assert "residual-warmup" not in {finding.rule for finding in diagnosed(model).findings}


def sample(health: Health, model: nn.Module) -> list[str]:
    return health.sample(model, IMAGES, LABELS, F.cross_entropy)[1]


def test_the_monitor_tells_once_of_a_clock_that_stands_still():
    model, health = small("prores(10)"), Health(0.01)
    assert sample(health, model) == [], "before the training"
    (warning,) = sample(health, model)
    assert warning.startswith("the residual warm-up stands still at step 0 of 30")
    assert sample(health, model) == []
    model, health = small("prores(10)"), Health(0.01)
    for step in (1, 2, 30, 31):
        sw.set_step(model, step)
        assert sample(health, model) == []
    model, health = small("prores(10)"), Health(0.01)
    assert not health.due()  # a step was taken
    assert len(sample(health, model)) == 1


def test_checkpoints_of_a_loop_tell_of_a_clock_that_stands_at_0(tmp_path):
    model = small("prores(10)")
    checkpoints = sw.LoopCheckpoints(tmp_path, model=model)
    checkpoints.save(0)
    with pytest.warns(UserWarning, match=r"model: the residual warm-up stands at step 0 of 30, .* after 5 steps"):
        checkpoints.save(5)
    sw.set_step(model, 6)
    checkpoints.save(6)
    other = small("prores(10)")
    assert sw.LoopCheckpoints(tmp_path, model=other).resume() == 6
    assert warmup_state(other) == warmup_state(model)
