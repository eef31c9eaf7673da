"""ResiDual and SiameseNorm, against their authors' code written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.errors import SkipwayError
from skipway.nn import NormedPair, NormedPairExit, StreamEntry

VIT = {"depth": 2, "dim": 8, "heads": 2, "patch": 8, "image": 16, "classes": 3}


def randomise_(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def stem_of(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """The one stream before it is opened."""
    return model.stem(image)[: len(image)]


def finish(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The head behind the exit."""
    for name, module in model.head.named_children():
        x = x if name == "close" else module(x)
    return x


def test_dual_residual_is_the_authors_code():
    """`ResiDualEncoderLayer.forward`: res = res + x; x = layer_norm(x + xr); at the end x + layer_norm(res)."""
    model = randomise_(sw.build("vit-tiny-16", scheme="dualresidual", **VIT))
    image = torch.randn(2, 3, 16, 16)
    x = res = stem_of(model, image)
    connections = [each.residual for each in sw.chain(model)]
    norms = [each.streams.post for each in connections[1:]] + [model.head.close.post]
    for connection, norm in zip(connections, norms, strict=True):
        f = connection.branch(x)
        res = res + f
        x = norm(x + f)
    expected = finish(model, x + model.head.close.pre(res))
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)


def test_dual_residual_holds_the_post_norm_network():
    """Without its second stream it is the family's post-norm network with the same weights."""
    post = randomise_(sw.build("vit-tiny-16", norm="post", **VIT))
    dual = sw.build("vit-tiny-16", norm="post", scheme="dualresidual", **VIT)
    found = dual.load_state_dict(post.state_dict(), strict=False)
    assert all(".post.norm." in name for name in found.unexpected_keys)
    norms = [each.residual.streams.post for each in sw.chain(dual)[1:]] + [dual.head.close.post]
    for norm, connection in zip(norms, sw.chain(post), strict=True):
        norm.load_state_dict(connection.residual.post.norm.state_dict())
    nn.init.zeros_(dual.head.close.pre.weight)
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(dual(image), post(image), rtol=1e-4, atol=1e-5)


def test_siamese_norm_is_the_authors_code():
    """`deit-model-siamesenorm.py`, `Block.forward` and the end of `forward_features`."""
    model = randomise_(sw.build("vit-tiny-16", scheme="siamesenorm", **VIT))
    image = torch.randn(2, 3, 16, 16)
    x = stem_of(model, image)
    y = x.clone()
    for index, block in enumerate(model.blocks):
        c = ((index + 1) * 2) ** 0.5
        for connection in (block.attention, block.mlp):
            x = connection.streams.post(x)
            z = connection.branch(connection.pre(x + connection.streams.pre(y)))
            x, y = x + z / c, y + z
    close = model.head.close
    expected = finish(model, close.post(x) + close.pre(y))
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)


def gradients(scheme: str, depth: int, dim: int = 512) -> torch.Tensor:
    """The gain from each of the branches' outputs, of unit variance, to what the head reads."""
    dressing = sw.schemes.parse_scheme(scheme)
    sites = [sw.Site(dim=dim, index=index, depth=depth, spatial=0, kind="mlp") for index in range(depth)]
    x = torch.randn(64, dim)
    s, branches = StreamEntry(2)(x), [torch.randn(64, dim, requires_grad=True) for _ in sites]
    for site, branch in zip(sites, branches, strict=True):
        streams = dressing.streams(site)
        _, carried, write = streams(s)
        s = streams.join(carried, write, branch)
    signs = torch.randn(64, dim)
    found = torch.autograd.grad((NormedPairExit(dim)(s) * signs).sum(), branches)
    return torch.stack([each.norm() / signs.norm() for each in found]).double()


def test_the_second_stream_of_dual_residual_keeps_the_gradient():
    """2^(-(L - i + 1) / 2) through the normalised stream and 1 / √(1 + L) through the other."""
    depth = 12
    left = torch.arange(depth, 0, -1, dtype=torch.float64)
    expected = 2 ** (-left / 2) + (1 + depth) ** -0.5
    torch.testing.assert_close(gradients("dualresidual", depth), expected, rtol=0.05, atol=0)


def test_the_normalised_stream_of_siamese_norm_forgets_slowly():
    """(1 / c) Π (1 + 1 / c²)^(-1/2) through the normalised stream, c² = 2b, and 1 / √(1 + L) through the other."""
    depth = 12
    squares = torch.tensor([2.0 * (index // 2 + 1) for index in range(depth)], dtype=torch.float64)
    kept = (1 + 1 / squares) ** -0.5
    products = kept.flip(0).cumprod(0).flip(0)
    expected = products / squares.sqrt() + (1 + depth) ** -0.5
    torch.testing.assert_close(gradients("siamesenorm", depth), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("scheme", ["dualresidual", "siamesenorm"])
def test_the_streams_have_the_variance_of_post_norm_and_of_pre_norm(scheme):
    dim, depth = 256, 8
    dressing = sw.schemes.parse_scheme(scheme)
    s = StreamEntry(2)(torch.randn(64, dim))
    for index in range(depth):
        streams = dressing.streams(sw.Site(dim=dim, index=index, depth=depth, spatial=0, kind="mlp"))
        _, carried, write = streams(s)
        s = streams.join(carried, write, torch.randn(64, dim)).detach()
        assert float(s[:64].var()) == pytest.approx(1 + streams.factor**2, rel=0.1)
        assert float(s[64:].var()) == pytest.approx(2 + index, rel=0.1)


@pytest.mark.parametrize("scheme", ["dualresidual", "siamesenorm"])
def test_two_normalised_streams_are_refused_where_they_have_no_meaning(scheme):
    with pytest.raises(sw.SkipwayError, match="no convolutional form"):
        sw.build("resnet20", scheme=scheme)
    with pytest.raises(sw.SkipwayError, match="keep one"):
        sw.schemes.parse_scheme(f"{scheme} + mhc")
    layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True) for _ in range(2)]
    with pytest.raises(sw.SkipwayError, match="norms between the connections"):
        sw.rescheme(nn.Sequential(*layers), torch.randn(2, 5, 8), scheme)


def test_a_pair_is_two_streams():
    with pytest.raises(sw.SkipwayError, match="a multiple of 2"):
        NormedPair(4, fused=True)(torch.zeros(3, 4))


@pytest.mark.parametrize("scheme", ["dualresidual", "siamesenorm"])
def test_the_norms_are_the_familys(scheme):
    """RMSNorm stays RMSNorm, with the family's ε and biases; a scheme beside it that replaces norms replaces these."""
    options = {"depth": 2, "dim": 8, "heads": 2, "vocab": 9, "context": 8, "epsilon": 1e-3}
    for choices, kind in (({"rms": True}, nn.RMSNorm), ({"bias": "none"}, nn.LayerNorm)):
        model = sw.build("gpt", scheme=scheme, **options, **choices)
        norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)]
        assert len(norms) >= 5
        assert all(type(norm) is kind and norm.eps == 1e-3 for norm in norms)
        assert all(getattr(norm, "bias", None) is None for norm in norms)
    model = sw.build("vit-tiny-16", epsilon=1e-3, scheme=scheme, **VIT)
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-3}
    bounded = sw.build("vit-tiny-16", scheme=f"{scheme} + dyt", **VIT)
    assert not any(isinstance(module, nn.LayerNorm) for module in bounded.modules())


def test_dual_residual_holds_the_post_norm_network_with_rmsnorm():
    """As above, in a decoder whose norms have no mean."""
    options = {"depth": 2, "dim": 8, "heads": 2, "vocab": 9, "context": 8, "norm": "post", "rms": True}
    post, dual = (sw.build("gpt", scheme=scheme, **options) for scheme in ("identity", "dualresidual"))
    randomise_(post)
    dual.load_state_dict(post.state_dict(), strict=False)
    norms = [each.residual.streams.post for each in sw.chain(dual)[1:]] + [dual.head.close.post]
    for norm, connection in zip(norms, sw.chain(post), strict=True):
        norm.load_state_dict(connection.residual.post.norm.state_dict())
    nn.init.zeros_(dual.head.close.pre.weight)
    ids = torch.randint(9, (2, 5))
    torch.testing.assert_close(dual(ids), post(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["siamesenorm", "dualresidual"])
@pytest.mark.parametrize("other", ["fixup", "normfree", "skipinit(norm='remove')", "rezero(norm='remove')"])
def test_a_scheme_that_removes_the_norms_is_refused(scheme, other):
    """Without norms the two streams of a pair are one."""
    with pytest.raises(SkipwayError, match=f"{scheme}.*the rule is one that keeps the norm"):
        sw.build("vit-tiny-16", scheme=f"{scheme} + {other}", **VIT)


@pytest.mark.parametrize("scheme", ["siamesenorm", "dualresidual"])
@pytest.mark.parametrize("other", ["skipinit(norm='keep')", "dyt"])
def test_a_scheme_that_keeps_or_replaces_the_norms_is_taken(scheme, other):
    """DyT stands for every norm of a network, those of the pair included."""
    model = sw.build("vit-tiny-16", scheme=f"{scheme} + {other}", **VIT)
    kind = sw.nn.DynamicTanh if other == "dyt" else nn.LayerNorm
    assert isinstance(sw.chain(model)[1].residual.streams.post, kind)
    assert isinstance(model.head.close.pre, kind)
