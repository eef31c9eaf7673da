"""Joins that see both skip and branch, against their papers' equations."""

from __future__ import annotations

import pytest
import torch

import skipway as sw
from skipway.nn import Carry, OrthogonalSum, Residual

VIT = {"depth": 2, "dim": 8, "heads": 2, "patch": 8, "image": 16, "classes": 3}


@pytest.mark.parametrize("over", ["feature", "sample"])
@pytest.mark.parametrize(("spatial", "shape"), [(0, (2, 5, 8)), (2, (2, 8, 3, 4))])
def test_orthogonal_sum_is_pythagorean(over, spatial, shape):
    x, f = torch.randn(2, *shape, dtype=torch.float64)
    y = OrthogonalSum(spatial=spatial, over=over)(x, f)
    channel = -1 - spatial
    axes = (channel,) if over == "feature" else (1, 2, 3)[: x.ndim - 1]
    added = y - x
    assert (added * x).sum(axes).abs().max() < 1e-4  # ε |f| / |x|
    torch.testing.assert_close(y.square().sum(axes), (x.square() + added.square()).sum(axes), rtol=1e-5, atol=1e-5)
    if over == "feature":  # written out for one token or pixel
        place = (1, slice(None), 2, 1) if spatial else (1, 2)
        a, b = x[place], f[place]
        torch.testing.assert_close(y[place], a + b - a * (a @ b) / (a @ a + 1e-6))


@pytest.mark.parametrize("name", ["vit-tiny-16", "resnetv2", "convnext"])
def test_the_stream_never_gets_smaller(name):
    options = VIT if name.startswith("vit") else {"width": 8, "classes": 3, "depth": 14}
    model = sw.build(name, scheme="orthogonal", **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    growth = []

    def compare(module: Residual, args: tuple[torch.Tensor], y: torch.Tensor) -> None:
        channel = -1 - module.site.spatial
        growth.append((y.norm(dim=channel) / args[0].norm(dim=channel)).detach())

    for module in model.modules():
        if isinstance(module, Residual) and isinstance(module.shortcut, Carry):
            module.register_forward_hook(compare)
    side = 16 if name.startswith("vit") else 32
    model(torch.randn(2, 3, side, side))
    assert len(growth) > 2
    assert min(float(each.min()) for each in growth) > 1 - 1e-4
    assert max(float(each.max()) for each in growth) > 1.01


def test_two_joins_are_refused():
    with pytest.raises(sw.SkipwayError, match="keep one"):
        sw.schemes.parse_scheme("orthogonal + orthogonal")
    with pytest.raises(sw.SkipwayError, match="no other join"):
        sw.build("vit-tiny-16", scheme="orthogonal + hyperconnections(2)", **VIT)


def test_another_join_is_refused_from_outside():
    model = torch.nn.Sequential(*(torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True) for _ in range(2)))
    with pytest.raises(sw.SkipwayError, match="another join"):
        sw.rescheme(model, torch.randn(3, 2, 8), "orthogonal")
