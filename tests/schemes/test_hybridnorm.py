"""HybridNorm against its equations (Zhuo et al. 2025; the authors' `olmo/model.py`), and what its norms undo."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import skipway as sw
from skipway.errors import SkipwayError

SMALL = {"depth": 2, "dim": 16, "heads": 2, "patch": 8, "image": 16, "classes": 4}


def by_hand(network: torch.nn.Module, x: torch.Tensor, star: bool) -> torch.Tensor:
    """x + MHA(norm(q), norm(k), norm(v)); x <- norm(x); x + FFN(x). With `star` the first block is pre-norm besides."""
    for number, block in enumerate(network.blocks):
        attention, mlp, pre = block.attention, block.mlp, star and number == 0
        h = attention.pre(x) if pre else x
        q, k, v = (each.unflatten(-1, (2, 8)).transpose(1, 2) for each in attention.branch.qkv(h).chunk(3, -1))
        q, k, v = (
            F.layer_norm(each, (8,), norm.weight, norm.bias, 1e-6)
            for each, norm in zip(
                (q, k, v), (attention.branch.norm_q, attention.branch.norm_k, attention.branch.norm_v), strict=True
            )
        )
        mixed = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1) @ v
        y = x + attention.branch.proj(mixed.transpose(1, 2).flatten(2))
        z = y if pre else attention.post(y)
        h = mlp.pre(z) if pre else z
        x = z + mlp.branch.fc2(F.gelu(mlp.branch.fc1(h)))
    return x


@pytest.mark.parametrize("first", ["hybrid", "pre"])
def test_the_equations(first):
    network = sw.build("vit-tiny-16", scheme=f"hybridnorm(first={first!r})", **SMALL).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    streams = []
    network.stem.register_forward_hook(lambda module, given, out: streams.append(out))
    list(sw.chain(network))[-1].residual.register_forward_hook(lambda module, given, out: streams.append(out))
    network(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    assert torch.allclose(by_hand(network, streams[0], first == "pre"), streams[1])


@pytest.mark.parametrize("family", ["vit", "cait", "swin"])
def test_the_size_of_queries_keys_and_values_has_no_effect(family):
    """Every attention of every family has the three norms: W_qkv may be 10 times as large, up to ε."""
    options = {
        "vit": ("vit-tiny-16", SMALL),
        "cait": ("cait-xxs24", {"depth": 1, "dim": 16, "heads": 2, "patch": 8, "image": 16, "classes": 4}),
        "swin": ("swin-tiny", {"depth": 8, "dim": 12, "image": 32, "classes": 4}),
    }
    name, small = options[family]
    network = sw.build(name, scheme="hybridnorm", **small).double().eval()
    network.stem.register_forward_hook(lambda module, given, out: 100 * out)  # beside ε
    inputs = [c.residual.branch for c in sw.chain(network) if c.site.kind == "attention"]
    for branch in inputs:
        for part in (getattr(branch, each, None) for each in ("qkv", "q", "k", "v")):
            if part is not None:
                torch.nn.init.normal_(part.weight)
    x = torch.randn(2, 3, small["image"], small["image"], dtype=torch.float64)
    before = network(x)
    with torch.no_grad():
        for branch in inputs:
            for part in (getattr(branch, each, None) for each in ("qkv", "q", "k", "v")):
                if part is not None:
                    part.weight.mul_(10)
    assert torch.allclose(network(x), before, atol=1e-3)


def test_the_stream_is_normed_once_in_a_block():
    network = sw.build("vit-tiny-16", scheme="hybridnorm", **SMALL)
    for block in network.blocks:
        entering = []
        block.mlp.branch.register_forward_pre_hook(lambda module, given, kept=entering: kept.append(given[0]))
        network(torch.randn(2, 3, 16, 16))
        assert torch.allclose(entering[0].var(-1, correction=0), torch.ones(2, 5), atol=1e-2)


def test_what_it_is_not_for():
    with pytest.raises(SkipwayError, match="no queries, keys and values"):
        sw.build("resnet20", scheme="hybridnorm")
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(SkipwayError, match="norms of queries, keys and values"):
        sw.rescheme(layer.eval(), torch.randn(2, 5, 16), "hybridnorm")
