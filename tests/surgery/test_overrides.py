"""Methods that call kernels: what they write into is read by nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.nn import DropPath


def network(slot: str, module: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = sw.build("resnet8", classes=3, width=8).eval()
    for connection in sw.chain(model):
        setattr(connection.residual, slot, module)
    return model, torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("slot", "module"), [("scale", nn.Identity()), ("drop", nn.Identity()), ("drop", DropPath(0.5).eval())]
)
def test_what_a_hook_of_a_slot_keeps_is_what_the_branch_put_out(slot, module):
    model, x = network(slot, module)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    module.register_forward_hook(lambda _, given, output: kept.append((output, output.clone())))
    sw.accelerate(model)
    with torch.no_grad():
        model(x)
    assert kept
    assert all(torch.equal(output, then) for output, then in kept)


def test_what_a_hook_of_all_modules_keeps_is_not_written_into():
    model, x = network("scale", nn.Identity())
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    sw.accelerate(model)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, output: kept.append((output, output.clone())) if type(module) is nn.Identity else None
    )
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    assert kept
    assert all(torch.equal(output, then) for output, then in kept)


@pytest.mark.parametrize("slot", ["scale", "drop"])
def test_a_module_that_needs_its_output_for_the_gradient_has_it(slot):
    model, x = network(slot, nn.Sigmoid())
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    sw.accelerate(model)
    found = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
