"""Functions that are computed otherwise for OpenVINO's conversion: the same numbers, and the operators that it has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import skipway as sw
from skipway.inference.backends import Choice, build_openvino, convert_openvino
from skipway.inference.plain_operators import PlainOperators
from skipway.inference.quantization import convert_any_batch


def qkv(heads: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, size, 5, 8, generator=generator, dtype=torch.float64) for size in (4, heads, heads))


MASKS = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "masks": {"attn_mask": MASKS},
    "one mask": {"attn_mask": MASKS[0, 0], "dropout_p": 0.0},
    "hidden": {"attn_mask": MASKS[0, 0] > -1},
    "a hidden row": {"attn_mask": MASKS.masked_fill(torch.arange(5)[:, None] == 2, -math.inf)},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_is_that_of_torch(name):
    (q, k, v), options = qkv(), OPTIONS[name]
    with PlainOperators():
        plain = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(plain, F.scaled_dot_product_attention(q, k, v, **options))


class Padded(nn.Module):
    """Attention in which no token sees one that is 0."""

    def __init__(self, added: bool) -> None:
        super().__init__()
        self.added, self.vectors = added, nn.Embedding(6, 8)

    def forward(self, ids):
        x, hidden = self.vectors(ids)[:, None], ids.eq(0)[:, None, None, :]
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -math.inf) if self.added else ~hidden
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


@pytest.mark.parametrize("added", [True, False])
def test_a_sample_that_is_padded_throughout_is_0_in_openvino_too(added):
    pytest.importorskip("openvino")
    net, ids = Padded(added), torch.tensor([[1, 2, 3], [4, 5, 0]])
    fast, other = build_openvino(net, ids, Choice("openvino")), torch.tensor([[1, 0, 3], [0, 0, 0]])
    assert (net(other)[1] == 0).all()
    for given in (ids, other):
        torch.testing.assert_close(fast(given), net(given).detach(), atol=1e-5, rtol=1e-4)


def test_attention_of_shared_keys_is_left_to_torch():
    q, k, v = qkv(heads=2)
    with PlainOperators():
        plain = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.equal(plain, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_norms_over_moved_channels_are_those_of_torch():
    norm = nn.LayerNorm(6)
    nn.init.normal_(norm.weight)
    maps = torch.randn(2, 6, 3, 5)
    for x in (maps.permute(0, 2, 3, 1), maps.permute(0, 2, 3, 1).contiguous(), torch.randn(2, 3, 6)):
        with PlainOperators():
            plain = norm(x)
        assert plain.shape == x.shape
        torch.testing.assert_close(plain, norm(x))
    over = nn.LayerNorm([5, 6])  # of several axes
    with PlainOperators():
        torch.testing.assert_close(over(maps.permute(0, 2, 3, 1)), F.layer_norm(maps.permute(0, 2, 3, 1), [5, 6]))


def layers(model: nn.Module, x: torch.Tensor, convert: Callable[..., Any] = convert_openvino) -> list[str]:
    """Kinds of the layers that OpenVINO runs, as `convert` reads the network."""
    openvino = pytest.importorskip("openvino")
    converted = convert(model, x)
    converted.reshape(list(x.shape))
    compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [str(each.get_rt_info()["layerType"].astype(str)) for each in compiled.get_runtime_model().get_ops()]


def test_openvino_runs_norms_and_attention_without_layers_that_copy():
    """One norm layer for each norm of a map; of an attention no transposition but that of q, k and v together."""
    torch.manual_seed(0)
    convnext = sw.build("convnext_atto", blocks=(1, 1, 1, 1), classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    norms = sum(isinstance(each, nn.LayerNorm) for each in convnext.modules())
    for convert in (convert_openvino, convert_any_batch):  # what integers are made of
        found = layers(convnext, x, convert)
        assert found.count("MVN") >= norms - 2  # the head has no map
        assert found.count("RMS") <= 2
    vit = sw.build("vit", depth=2, dim=32, heads=2, patch=8, image=32, classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    assert layers(vit, x).count("Transpose") == 2
    fast = build_openvino(vit, x, Choice("openvino"))
    torch.testing.assert_close(fast(x), vit(x).detach(), atol=1e-5, rtol=1e-4)
