"""u-μP's residual scheme: closed forms of Blake et al. 2024, appendix G, and the backward factor of their code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.errors import SkipwayError
from skipway.nn import Carry


def sites(depth: int) -> list[sw.Site]:
    kinds = ("attention", "mlp")
    return [sw.Site(dim=8, index=each, depth=depth, spatial=0, kind=kinds[each % 2]) for each in range(depth)]


@pytest.mark.parametrize(("alpha", "ratio", "depth"), [(1.0, 1.0, 4), (0.5, 1.0, 6), (1.0, 2.0, 12), (2.0, 0.3, 48)])
def test_every_branch_of_a_kind_has_the_same_share(alpha, ratio, depth):
    """Stem and branches of variance 1 that are independent: the shares in the output's variance."""
    scheme = sw.UMuP(alpha=alpha, ratio=ratio)
    shares = torch.zeros(depth + 1, dtype=torch.float64)
    shares[0] = 1
    for number, site in enumerate(sites(depth)):
        shares *= scheme.carry(site, None).factor ** 2
        shares[number + 1] = scheme.scale(site).factor ** 2
        assert float(shares.sum()) == pytest.approx(1)  # a stream of constant variance
    stem, attention, mlp = shares[0], shares[1::2], shares[2::2]
    assert float(stem) == pytest.approx(1 / (1 + 2 * alpha**2))
    assert float((attention.sum() + mlp.sum()) / 2 / stem) == pytest.approx(alpha**2)
    assert float(attention.sum() / mlp.sum()) == pytest.approx(ratio**2)
    assert float(attention.max() - attention.min()) == pytest.approx(0, abs=1e-12)
    assert float(mlp.max() - mlp.min()) == pytest.approx(0, abs=1e-12)


def test_a_step_is_that_with_the_backward_factor_of_the_authors():
    """Their branch is entered through scale_bwd(x, τ / √(1 + τ²)) and left through scale_fwd: the gradients of x are
    the usual ones, those of the branch's parameters lack the factor. SGD with our groups moves them as theirs."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, forward, backward):
            ctx.backward_factor = backward
            return x * forward

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.backward_factor, None, None

    scheme = sw.UMuP()
    torch.manual_seed(1)
    branches = [nn.Linear(8, 8).double() for _ in range(4)]
    copies = [nn.Linear(8, 8).double() for _ in range(4)]
    for branch, copy in zip(branches, copies, strict=True):
        copy.load_state_dict(branch.state_dict())
    ours = nn.Sequential(
        *(
            sw.Residual(branch, scale=scheme.scale(site), shortcut=scheme.carry(site, None), site=site)
            for branch, site in zip(branches, sites(4), strict=True)
        )
    )
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(3, 8, dtype=torch.float64)
    (ours(x) * direction).sum().backward()
    (expected,), x.grad = (x.grad.clone(),), None
    torch.optim.SGD(sw.param_groups(ours, lr=0.1, weight_decay=0.0, adaptive=False)).step()

    stream = x
    for copy, site in zip(copies, sites(4), strict=True):
        tau = scheme.tau(site)
        skip, size = (1 + tau**2) ** -0.5, tau * (1 + tau**2) ** -0.5
        stream = stream * skip + Scale.apply(copy(Scale.apply(stream, 1.0, size)), size, 1.0)
    (stream * direction).sum().backward()
    torch.optim.SGD([each for copy in copies for each in copy.parameters()], lr=0.1).step()
    assert torch.allclose(x.grad, expected)
    for branch, copy in zip(branches, copies, strict=True):
        assert torch.allclose(branch.weight, copy.weight)


def test_rates_follow_the_square_root_of_the_depth():
    model = sw.build("vit-tiny-16", depth=4, dim=8, heads=2, scheme="umup(base=2)")
    rates = {group["lr"] for group in sw.param_groups(model, lr=1.0)}
    assert rates == {1.0, 0.5}
    assert isinstance(sw.chain(model)[0].residual.shortcut.inner, Carry)


def test_norms_do_not_see_the_size_of_the_stream():
    shape = {"depth": 3, "dim": 16, "heads": 2, "patch": 8, "image": 16, "classes": 4}
    umup, depthscaled = (
        sw.build("vit-tiny-16", scheme=scheme, **shape) for scheme in ("umup", "depthscaled(exponent=0.5, base=2)")
    )
    for network in (umup, depthscaled):
        network.stem.register_forward_hook(lambda module, given, out: 50 * out)  # beside ε = 1e-6
    depthscaled.load_state_dict(umup.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(umup(x), depthscaled(x), rtol=1e-3, atol=1e-5)


def tau_of(layers: str, place: int, ratio: float) -> float:
    """Appendix G: τ² = α_kind² / (L/2 + n_a α_a² + n_m α_m²), with the kinds before it counted."""
    mlp = 2 / (1 + ratio**2)
    size = {"a": ratio**2 * mlp, "m": mlp}
    return (size[layers[place]] / (len(layers) / 2 + sum(size[each] for each in layers[:place]))) ** 0.5


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        options = {"dropout": 0.0, "batch_first": True}
        self.layers = nn.ModuleList([nn.TransformerDecoderLayer(8, 2, 16, **options) for _ in range(3)])

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, memory)
        return x


def test_branches_in_networks_of_others_are_counted_by_kind():
    """A decoder with cross-attention has two attentions to an MLP; norm(s x + t F) = norm(x + t/s F), t/s = τ."""
    torch.manual_seed(0)
    model, given = Decoder().eval(), (torch.randn(2, 4, 8), torch.randn(2, 5, 8))
    sw.rescheme(model, given, "umup(ratio=2.0)", start="scheme")
    scales = [module.residual_scale for module in model.modules() if hasattr(module, "residual_scale")]
    found = [scale[0].factor * scale[1].factor for scale in scales]
    assert found == pytest.approx([tau_of("aam" * 3, place, 2.0) for place in range(9)])


def test_kinds_that_are_not_known_are_not_guessed():
    scheme, wrong = sw.UMuP(ratio=2.0), sw.Site(dim=8, index=1, depth=4, spatial=0, kind="attention")
    with pytest.raises(SkipwayError, match=r"ratio=2.0: branch 1 is of kind 'attention' where every other"):
        scheme.scale(wrong)
    assert sw.UMuP().tau(wrong) == pytest.approx((1 / 3) ** 0.5)
    known = replace(wrong, kinds=("attention", "attention", "mlp", "mlp"))
    assert scheme.tau(known) == pytest.approx(tau_of("aamm", 1, 2.0))
    alone = sw.Site(dim=8, index=1, depth=2, spatial=0, kind="mlp", kinds=("mlp", "mlp"))
    with pytest.raises(SkipwayError, match="the branches of this network are MLPs, which is not attention and MLPs"):
        scheme.tau(alone)


def test_convolutions_are_of_one_kind():
    assert sw.build("resnet20", depth=8, width=4, scheme="umup")
    with pytest.raises(SkipwayError, match="ratio=2.0: the branches of this network are convolutions"):
        sw.build("resnet20", depth=8, width=4, scheme="umup(ratio=2.0)")
