"""Health of a training run: samples of anybody's network, warnings once, nothing before they are due."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipway as sw
from skipway.monitoring import Health, sample_health


def stranger(depth: int = 4) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


@pytest.mark.parametrize(("make", "shape"), [(lambda: sw.build("resnet20"), (8, 3, 8, 8)), (stranger, (8, 5, 16))])
def test_a_sample_is_what_the_connections_do(make, shape):
    """Per connection: sizes of sum and branch as the chain adds them; the model is left alone."""
    model, x = make().train(), torch.randn(*shape)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = sample_health(model, x, None, lambda output, _: output.square().mean())
    assert list(rows) == [connection.name for connection in sw.chain(model, x)]
    for row in rows.values():
        assert list(row) == ["stream", "largest", "branch", "gradient"]
        assert 0 < row["stream"] <= row["largest"]
        assert min(row["branch"], row["gradient"]) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_network_without_skips_is_sampled_at_its_blocks():
    rows = sample_health(sw.build("resnet20", scheme="plain"), torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=int))
    assert len(rows) == 9
    assert all(set(row) == {"stream", "largest", "gradient"} for row in rows.values())


def test_nothing_is_due_before_its_time():
    assert not any(Health(0.0).due() for _ in range(100))
    health = Health(0.01)
    assert [health.due() for _ in range(20)] == [False] * 19 + [True]
    health.spent = 1e9
    assert not health.due()


def test_few_images_and_one_watch():
    """A sample takes 32 images of the batch, and the chain is watched once for all samples."""
    model, health, seen = stranger(), Health(0.5), []
    model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    for _ in range(3):
        health.sample(model, torch.randn(100, 5, 16), torch.randn(100, 5, 16), F.mse_loss)
    assert seen == [32] * (1 + 3)  # hooks see the watched pass too


def test_warnings_are_given_once_and_name_the_first_connection():
    model, health = stranger(), Health(0.5)
    x = torch.randn(8, 5, 16)
    assert health.sample(model, x, x, F.mse_loss)[1] == []
    with torch.no_grad():
        model.layers[2].linear2.weight.mul_(1e5)
    warnings = health.sample(model, x, x, F.mse_loss)[1]
    assert any(text.startswith("the stream after layers.2:2 has grown from") for text in warnings)
    assert health.sample(model, x, x, F.mse_loss)[1] == []
    with torch.no_grad():
        model.layers[1].linear2.bias.fill_(math.inf)
    warnings = health.sample(model, x, x, F.mse_loss)[1]
    assert "the stream after layers.1:2 is not finite" in warnings
    low = Health(0.5, torch.float16, first={"a": {"stream": 1.0, "largest": 1.0, "branch": 1.0, "gradient": 1.0}})
    (text,) = low.warnings({"a": {"stream": 1.0, "largest": 5000.0, "branch": 1.0, "gradient": 1.0}})
    assert text == "the stream after a reaches 5e+03, near the largest number of torch.float16"
