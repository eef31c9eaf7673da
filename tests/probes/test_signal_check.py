"""The check of an untrained network: the size of the signal, stage by stage, in anybody's network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.probes import probe
from skipway.probes.signal_check import check_signal

TINY = {"depth": 8, "width": 4, "channels": 1}
SMALL = {"depth": 8, "channels": 1}


def test_the_signal_check_leaves_no_trace():
    model = sw.build("resnet20", scheme="stochasticdepth(0.5)", **TINY)
    model.stages[0].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.random.get_rng_state()
    check_signal(model, torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random, torch.random.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_silent_branch_leaves_the_stream_alone():
    """Fixup's branches start at 0, so within a stage without projection the stream does not change (Zhang 2019)."""
    first = check_signal(sw.build("resnet20", scheme="fixup", **SMALL), torch.randn(8, 1, 8, 8))[0]
    assert first.ratio == 0.0
    assert first.std_out == pytest.approx(first.std_in, rel=1e-5)
    assert first.warning == ""


def test_a_normalised_branch_has_unit_variance():
    """BatchNorm closes the branch with mean 0 and variance 1 (Ioffe 2015), so the ratio is 1 / std of the stream."""
    first = check_signal(sw.build("resnet20", **SMALL), torch.randn(64, 1, 8, 8))[0]
    assert first.ratio * first.std_in == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("factor", "warning"), [(1e8, "explodes"), (math.nan, "not finite")])
def test_a_signal_that_is_lost_is_said(factor, warning):
    model = sw.build("resnet20", scheme="fixup", **SMALL)
    connection = sw.chain(model)[1]
    with torch.no_grad():
        connection.path[-1].weight.normal_().mul_(factor)
    batch = torch.randn(4, 1, 8, 8)
    warnings = {row.name: row.warning for row in check_signal(model, batch)}
    assert warnings["stages.0"] == ""
    assert warnings["stages.1"] == warning
    broken = [name for name, row in probe(model, batch, measures=["finite"]).connections.items() if not row["finite"]]
    assert broken[:1] == ([connection.name] if math.isnan(factor) else [])


def test_a_network_without_skips_is_checked_at_its_blocks():
    rows = check_signal(sw.build("resnet20", scheme="plain"), torch.randn(8, 3, 8, 8))
    assert [(row.name, row.connections) for row in rows] == [("stages.0", 3), ("stages.1", 3), ("stages.2", 3)]
    assert all(row.std_out > 0 and math.isnan(row.ratio) and row.warning == "" for row in rows)


def test_a_strangers_network_is_checked():
    """Without norms and with orthogonal maps scaled by g, each of 30 additions multiplies the variance by 1 + g²."""
    g, width = 2.0, 64

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(width, width, bias=False)
            nn.init.orthogonal_(self.map.weight, gain=g)

        def forward(self, x):
            return x + self.map(x)

    model = nn.Sequential(nn.Linear(8, width), *(Block() for _ in range(30)))
    (row,) = check_signal(model, torch.randn(256, 8))
    assert row.connections == 30
    assert row.ratio == pytest.approx(g, rel=1e-3)
    assert row.warning == "explodes"
    assert math.log(row.std_out / row.std_in) == pytest.approx(15 * math.log(1 + g**2), rel=0.1)
