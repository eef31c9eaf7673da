"""A convolution that skips pixels first is the one that it replaces."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from skipway.kernels.torch_faults import subsample_first
from skipway.nn import maps


@pytest.fixture
def avx2(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.mark.usefixtures("avx2")
@pytest.mark.parametrize("stride", [2, (1, 3)])
@pytest.mark.parametrize("kind", [nn.Conv2d, maps.Conv2d, maps.ScaledStandardConv2d])
def test_outputs_and_gradients_stay_the_same(kind, stride):
    """In the layout in which torch's own gradient is right everywhere."""
    layer = kind(4, 6, 1, stride=stride)
    model = nn.Sequential(layer, nn.ReLU()).double()
    changed = copy.deepcopy(model)
    assert subsample_first(changed) == ["0"]
    copied = copy.deepcopy(changed)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    for each in (model, changed, copied):
        each(x).square().sum().backward()
        torch.testing.assert_close(each(x), model(x))
        torch.testing.assert_close(each[0].weight.grad, layer.weight.grad)
    assert subsample_first(changed) == [], "changed once"


@pytest.mark.usefixtures("avx2")
def test_other_convolutions_are_left_alone():
    layers = [nn.Conv2d(8, 4, 1, stride=2), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, stride=2, padding=1)]
    layers += [nn.Conv2d(4, 4, 1, stride=2, padding=1), nn.Conv2d(4, 4, 1, stride=2, groups=2)]
    assert subsample_first(nn.Sequential(*layers)) == []


def test_nothing_is_changed_where_torch_is_right(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert subsample_first(nn.Conv2d(4, 4, 1, stride=2)) == []
