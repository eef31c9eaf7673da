"""Multiply-adds equal the published ones: torchvision's documentation, column GFLOPS, three decimals there."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import skipway as sw

GIGA_MULTIPLY_ADDS = {
    "resnet18": 1.814,
    "resnet34": 3.664,
    "resnet50": 4.089,
    "resnet101": 7.801,
    "resnet152": 11.514,
    "resnext50-32x4d": 4.230,
    "resnext101-32x8d": 16.414,
    "resnext101-64x4d": 15.460,
    "wide-resnet50-2": 11.398,
    "wide-resnet101-2": 22.753,
    "vit-base-16": 17.564,
    "vit-base-32": 4.409,
    "vit-large-16": 61.555,
    "vit-large-32": 15.378,
    "convnext-tiny": 4.456,
    "convnext-small": 8.684,
    "convnext-base": 15.355,
    "convnext-large": 34.361,
    "swin-tiny": 4.491,
    "swin-small": 8.741,
    "swin-base": 15.431,
    "swinv2-tiny": 5.940,
    "swinv2-small": 11.546,
    "swinv2-base": 20.325,
}


@pytest.mark.parametrize("name", GIGA_MULTIPLY_ADDS)
def test_flops_equal_the_published_ones(name):
    """One image of 224² (Swin V2: 256²), within 0.2 %; nothing is computed, the network stands on the meta device."""
    model = sw.build(name, device="meta").eval()
    size = 256 if name.startswith("swinv2") else 224
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(GIGA_MULTIPLY_ADDS[name], rel=2e-3)
