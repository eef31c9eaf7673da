"""Depth itself: 150 branches with every scheme, and ten thousand."""

from __future__ import annotations

import gc

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
    largest = torch.stack(torch._foreach_norm(gradients, ord=float("inf"))).max().item()
    optimizer.step()
    assert torch.isfinite(loss)
    return largest


@pytest.mark.parametrize("scheme", [*all_schemes("conv"), "skipinit(init=0.0, norm='remove')"])
def test_a_quarter_of_resnet1202_takes_a_step(scheme):
    """Finite loss, logits and gradients at 600 branches, which is seen at 150: what grows by a factor a branch and is
    2³² or 2⁻³⁷ there leaves the range of float32, 2¹²⁸ to 2⁻¹⁴⁹, at 600. The plain net, whose gradient must explode by
    (π/(π-1)) a layer (see `Plain`), is only asked for a finite output.
    """
    model = sw.build("resnet-cifar", depth=302, scheme=scheme, classes=2, width=4, stem_width=4)
    images = torch.randn(2, 3, 8, 8)
    if scheme == "plain":
        assert model(images).abs().max() < 2.0**32
    else:
        assert 2.0**-37 < step(model, images) < 2.0**32
        assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_is_left_as_it_was(collects):
    try:
        (gc.enable if collects else gc.disable)()
        sw.build("resnet8", device="meta")
        with pytest.raises(RuntimeError):
            sw.build("resnet8", dtype="no dtype")
        assert gc.isenabled() == collects
    finally:
        gc.enable()


def test_ten_thousand_branches_take_a_step():
    """Fixup has the most to initialise of the schemes without norm; the others take theirs above."""
    model = sw.build("resnet-cifar", depth=20_006, scheme="fixup", classes=2, width=2, stem_width=2)
    assert model.config.branches > 10_000
    assert 0 < step(model, torch.randn(2, 3, 4, 4)) < float("inf")
    assert torch.stack(torch._foreach_norm(list(model.parameters()), ord=float("inf"))).isfinite().all()
