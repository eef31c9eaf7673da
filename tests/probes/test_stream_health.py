"""The health of several streams: gains of matrices known by hand, in networks of ours and of others."""

from __future__ import annotations

import pytest
import torch
from tests.diagnosis.stream_ports import DIM, PORTS, Network, Plain

import skipway as sw
from skipway.nn.manifold import sinkhorn
from skipway.probes.stream_health import similarity

VIT = {"depth": 2, "dim": 16, "heads": 2, "patch": 8, "image": 16, "classes": 5}
UNEVEN = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
"""A: stream 0 gets both, stream 1 gets itself. Rows sum to 2 and 1 (forward), columns to 1 and 2 (backward)."""


def test_forward_gains_are_sums_of_rows_and_backward_gains_of_columns():
    """llm-internal-medicine #39 had them swapped: with s' = A s a stream gets a row, and a gradient a column."""
    health = sw.StreamHealth(("a", "b"), torch.stack((UNEVEN, torch.tensor([[3.0, 0.0], [0.0, 1.0]]))), torch.ones(2))
    assert torch.equal(health.composite[1], torch.tensor([[3.0, 3.0], [0.0, 1.0]]))
    assert health.forward_gain.tolist() == [[2.0, 1.0], [6.0, 1.0]]
    assert health.backward_gain.tolist() == [[2.0, 1.0], [4.0, 3.0]]
    assert torch.allclose(health.difference, torch.ones(2))
    assert bool(health.response.isnan().all())
    assert "response" not in str(health), "a column without a number is left out"
    assert "nan" not in str(health)


@pytest.mark.parametrize("others", [False, True], ids=["ours", "others"])
def test_matrices_of_a_network(others):
    """Ours keep A_r of s' = A_rᵀ s in columns 1 to n; the port keeps A of s' = A s."""
    if others:
        model, x = Network(Plain, 2), torch.randn(2, 3, DIM)
        for block in model.blocks:
            block.mix.data.copy_(UNEVEN)
    else:
        model, x = (
            sw.build("vit-tiny-16", scheme="hyperconnections(2, dynamic=False)", **VIT),
            torch.randn(2, 3, 16, 16),
        )
        for connection in sw.chain(model):
            connection.residual.streams.static.data[:, 1:3] = UNEVEN.T
    before = {name: value.clone() for name, value in model.state_dict().items()}
    health = sw.stream_health(model, x)
    assert len(health.names) == 4 - others  # the first state of a network of others was left by no connection
    assert torch.allclose(health.mixing, UNEVEN.double().expand_as(health.mixing), atol=1e-6)
    assert health.forward_gain[-1].tolist() == pytest.approx([len(health.names) + 1, 1])
    assert health.backward_gain[-1].tolist() == pytest.approx([len(health.names) + 1, 1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "forward" in str(health)


def test_difference_and_response_of_mhc_follow_from_its_start():
    """λ = (e^hold - 1) / (e^hold + n - 1) a connection, and p (1 - p) of the softmax."""
    x = torch.randn(2, 3, 16, 16)
    for hold, n in ((4.0, 4), (2.0, 2)):
        health = sw.stream_health(sw.build("vit-tiny-16", scheme=f"mhc(n={n}, hold={hold})", **VIT), x)
        e = torch.tensor(hold).exp()
        kept = float((e - 1) / (e + n - 1))
        assert health.difference.tolist() == pytest.approx([kept**k for k in (1, 2, 3, 4)], rel=0.02)
        p = torch.cat((e.view(1), torch.ones(n - 1))) / (e + n - 1)
        assert health.response[0].item() == pytest.approx(float((p * (1 - p)).mean()) * n**2 / (n - 1), rel=0.02)
        assert health.forward_gain.sub(1).abs().max() < 0.02


def test_streams_of_a_port_with_equal_logits_are_one():
    health = sw.stream_health(Network(PORTS["fused"], hold=0.0, std=0.0), torch.randn(2, 3, DIM))
    assert health.similarity.tolist() == pytest.approx([1.0] * 3)
    assert health.response.tolist() == pytest.approx([1.0] * 3, rel=1e-3)
    assert float(health.difference.max()) < 1e-3


def test_columns_drift_over_correlated_layers_at_20_iterations():
    """Rows (what a stream gets) are exact; what truncation leaves in the columns compounds where layers are alike."""
    logits = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 6

    def drift(iterations: int) -> float:
        layers = sinkhorn(logits, iterations).T.expand(64, 4, 4)
        health = sw.StreamHealth(("",) * 64, layers, torch.ones(64))
        assert (health.forward_gain - 1).abs().max() < 1e-9
        return float(health.backward_gain[-1].log().abs().max())

    assert drift(20) > 0.05
    assert drift(20) > 4 * drift(100)


def test_one_stream_is_refused():
    with pytest.raises(sw.SkipwayError, match="several streams"):
        sw.stream_health(sw.build("vit-tiny-16", **VIT), torch.randn(2, 3, 16, 16))


def test_a_stream_of_zeros_is_like_no_other():
    assert similarity(torch.stack((torch.ones(3), torch.ones(3), torch.zeros(3)))) == pytest.approx(1 / 3)
