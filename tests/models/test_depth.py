"""Depth itself: ResNet-1202 with every scheme, and ten thousand branches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.schemes import all_schemes


def step(model: nn.Module, images: torch.Tensor) -> float:
    """One step of SGD; the largest gradient."""
    optimizer = torch.optim.SGD(sw.param_groups(model, lr=1e-3), lr=1e-3)
    loss = nn.functional.cross_entropy(model(images), torch.arange(len(images)) % 2)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    largest = max(torch._foreach_norm(gradients, ord=float("inf"))).item()
    optimizer.step()
    assert torch.isfinite(loss)
    return largest


@pytest.mark.parametrize("scheme", list(all_schemes("conv")))
def test_resnet1202_takes_a_step(scheme):
    """Finite loss, logits and gradients at 600 branches. The plain net, whose gradient must explode by (π/(π-1)) a
    layer (see `Plain`), is only asked for a finite output.
    """
    model = sw.build("resnet1202", scheme=scheme, classes=2, width=4, stem_width=4)
    images = torch.randn(2, 3, 8, 8)
    if scheme == "plain":
        assert torch.isfinite(model(images)).all()
    else:
        assert 0 < step(model, images) < float("inf")
        assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("scheme", ["skipinit(init=0.0, norm='remove')", "fixup", "rezero"])
def test_ten_thousand_branches_take_a_step(scheme):
    model = sw.build("resnet-cifar", depth=20_006, scheme=scheme, classes=2, width=2, stem_width=2)
    assert model.config.branches > 10_000
    assert 0 < step(model, torch.randn(2, 3, 4, 4)) < float("inf")
    assert all(torch.isfinite(p).all() for p in model.parameters())
