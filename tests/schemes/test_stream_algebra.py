"""The arithmetic of several streams against plain expressions, with first and second derivatives, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.nn import stream_algebra
from skipway.nn.stream_algebra import add_written, gated_mean, mix_streams, normed_product, sinkhorn
from skipway.schemes import parse_scheme as read


def assert_derivatives(function, *tensors: torch.Tensor) -> None:
    tensors = tuple(each.double().requires_grad_() for each in tensors)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("piece", [1, 2**17])
@pytest.mark.parametrize("per_token", [False, True])
def test_mixing_is_the_weighted_sum(monkeypatch, piece, per_token):
    """Σⱼ w[j, k] sⱼ, also where samples are taken in several pieces."""
    monkeypatch.setattr(stream_algebra, "PIECE", piece)
    s, weights = torch.randn(3, 2, 2, 4), torch.randn(*((2, 2) if per_token else ()), 3, 4)
    expected = sum(s[j, ..., None] * weights[..., None, j, :] for j in range(3)).movedim(-1, 0)
    first, others = mix_streams(s, weights)
    torch.testing.assert_close(torch.cat((first[None], others)), expected)
    assert_derivatives(mix_streams, s, weights)


@pytest.mark.parametrize("shape", [(3, 2, 2, 1), (3, 1, 1, 1)])
def test_writing_adds_the_branch_to_every_stream(shape):
    carried, write, f = torch.randn(3 * 2, 2, 4), torch.randn(shape), torch.randn(2, 2, 4)
    expected = carried.unflatten(0, (3, 2)) + write * f
    torch.testing.assert_close(add_written(carried, write, f, -1).unflatten(0, (3, 2)), expected)
    assert_derivatives(lambda *tensors: add_written(*tensors, -1), carried, write, f)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_map_of_a_norm_is_computed_without_the_norm(groups):
    s, weight = 3 * torch.randn(groups, 5, 6) + 1, torch.randn(groups, 3, 6)
    rows = s.transpose(0, 1).flatten(1)
    expected = nn.functional.rms_norm(rows, rows.shape[1:], eps=1e-3) @ weight.transpose(0, 1).flatten(1).T
    torch.testing.assert_close(normed_product(s, weight, 1e-3, centred=False), expected, rtol=1e-4, atol=1e-5)
    assert_derivatives(lambda s, weight: normed_product(s, weight, 1e-3, centred=False), s, weight)
    if groups == 1:
        weight = weight - weight.mean(-1, keepdim=True)
        expected = nn.functional.layer_norm(s[0], (6,), eps=1e-3) @ weight[0].T
        torch.testing.assert_close(normed_product(s, weight, 1e-3, centred=True), expected, rtol=1e-4, atol=1e-5)

        def centred(s, weight):
            return normed_product(s, weight - weight.mean(-1, keepdim=True), 1e-3, centred=True)

        assert_derivatives(centred, s, weight)


def test_a_gated_read_is_the_mean_of_gated_norms():
    s, hidden, up, gain = torch.randn(2, 3, 4), torch.randn(3, 2), torch.randn(2, 4, 2), torch.randn(2, 4)
    gates = torch.sigmoid(torch.einsum("rk,nck->nrc", hidden, up))
    expected = (gates * gain.unsqueeze(1) * nn.functional.rms_norm(s, (4,), eps=1e-3)).mean(0)
    torch.testing.assert_close(gated_mean(s, hidden, up, gain, 1e-3), expected)
    assert_derivatives(lambda *tensors: gated_mean(*tensors, 1e-3), s, hidden, up, gain)


def test_sinkhorn_divides_by_sums_in_turn():
    """Eq. 9, written out: columns after rows."""
    logits = torch.randn(2, 3, 3)
    matrix = torch.softmax(logits, -1) + 1e-3
    for axis in (-2, -1, -2, -1, -2):
        matrix = matrix / (matrix.sum(axis, keepdim=True) + 1e-3)
    torch.testing.assert_close(sinkhorn(logits, 3, 1e-3), matrix)
    assert_derivatives(lambda logits: sinkhorn(logits, 3, 1e-3), logits)


@pytest.mark.parametrize(
    "scheme",
    ["hyperconnections(4, dynamic=False)", "hyperconnections(4)", "mhc", "mhc(form='birkhoff')", "gatedstreams"],
)
def test_a_connection_keeps_its_streams_and_little_more(scheme):
    """Bytes for the backward pass of one connection, n = 4: the streams, the branch's output, a few numbers a token."""
    streams = read(scheme).streams(sw.Site(dim=256, index=1, depth=4, spatial=0, kind="mlp")).bfloat16()
    s = torch.randn(4 * 2, 256, 256, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x, carried, write = streams(s)
        streams.join(carried, write, x)
    own = {parameter.untyped_storage().data_ptr() for parameter in streams.parameters()}
    bytes_kept = sum(number for storage, number in kept.items() if storage not in own)
    maps = 4 * sum(parameter.numel() for parameter in streams.parameters())
    assert bytes_kept < s.nbytes + x.nbytes + 3 * maps + 512 * 4 * 300  # 300 numbers a token: logits, gates, weights
