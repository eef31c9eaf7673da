"""Frac-connections against the equations of their paper, written out token by token."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.nn import DynamicFracConnection, FracConnection, Projection, Residual

VIT = {"depth": 2, "dim": 8, "heads": 2, "patch": 8, "image": 16, "classes": 3}
FAMILIES = {
    "resnet-cifar": {"depth": 8, "width": 4, "stem_width": 4},
    "se-resnet": {"depth": 10, "width": 8, "stem_width": 8, "squeeze": 4},
    "vit-tiny-16": VIT,
    "cait-xxs24": {"depth": 1, "dim": 8, "heads": 2, "patch": 8, "image": 16},
    "convnext": {"depth": 4, "width": 8},
    "swin-tiny": {"dim": 8, "heads": 2, "blocks": (2, 2), "window": 2, "image": 16},
}


def randomise_(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def written_out(connection: FracConnection, h: torch.Tensor, branch: nn.Module) -> torch.Tensor:
    """Eq. 6-8 and 11-14 of one token of d numbers, as line 3-5 of algorithm 1."""
    m = connection.fractions
    rows = h.reshape(m, -1)  # eq. 6
    y, a, b = connection.static.split((m, m, 1), dim=1)
    if isinstance(connection, DynamicFracConnection):
        w_y, w_a, w_b = connection.map.weight.T.split((m, m, 1), dim=1)
        normed = connection.norm(rows)  # eq. 11
        y = connection.mix_scale.gain * torch.tanh(normed @ w_y) + y  # eq. 13
        a = connection.mix_scale.gain * torch.tanh(normed @ w_a) + a  # eq. 14
        b = connection.write_scale.gain * torch.tanh(normed @ w_b) + b  # eq. 12
    out = branch((y.T @ rows).reshape(-1)).reshape(m, -1)
    return (b * out + a.T @ rows).reshape(-1)  # eq. 8


@pytest.mark.parametrize("spatial", [0, 2])
@pytest.mark.parametrize("kind", [FracConnection, DynamicFracConnection])
def test_frac_connection_is_the_papers_equations(kind, spatial):
    dim = {"dim": 6} if kind is DynamicFracConnection else {}
    connection = randomise_(kind(3, spatial=spatial, **dim))
    assert connection.static.numel() == 3 * (2 * 3 + 1)  # eq. 16
    map = nn.Linear(6, 6)
    branch = map if spatial == 0 else nn.Conv2d(6, 6, 1)
    if spatial:
        branch.load_state_dict({"weight": map.weight[..., None, None], "bias": map.bias})
    h = torch.randn(2, 4, 6)  # N, tokens, d
    out = Residual(branch, streams=connection)(h if spatial == 0 else h.unflatten(1, (2, 2)).movedim(-1, 1))
    out = out if spatial == 0 else out.movedim(1, -1).flatten(1, 2)
    for sample in range(2):
        for token in range(4):
            expected = written_out(connection, h[sample, token], map)
            torch.testing.assert_close(out[sample, token], expected, rtol=1e-4, atol=1e-5)


def test_where_a_branch_halves_and_widens_the_map_weights_are_averaged():
    connection = randomise_(DynamicFracConnection(2, spatial=2, dim=4))
    branch, short = nn.Conv2d(4, 6, 2, 2), nn.Conv2d(4, 6, 2, 2)
    s = torch.randn(3, 4, 4, 4)
    x, carried, write = connection(s)
    out = Residual(branch, shortcut=Projection(short), streams=connection)(s)
    pooled = write.unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).mean((-3, -1))
    expected = short(carried) + pooled.repeat_interleave(3, dim=1) * branch(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", ["fracconnections", "fracconnections(2, dynamic=False)"])
@pytest.mark.parametrize("name", FAMILIES)
def test_frac_connections_start_as_the_family(name, scheme):
    """Eq. 15, in outputs and in the gradients of what both have."""
    options = {"classes": 3, **FAMILIES[name]}
    plain, network = (sw.build(name, scheme=each, **options) for each in ("identity", scheme))
    assert not network.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    x = torch.randn(2, 3, 32, 32)
    for each in (plain, network):
        nn.functional.cross_entropy(each(x), torch.arange(2)).backward()
    torch.testing.assert_close(network.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)
    theirs = dict(plain.named_parameters())
    for name, parameter in network.named_parameters():
        if name in theirs:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [None, 8])
def test_autocast_leaves_the_skip_as_it_is(dim, dtype):
    """At the start y = x + F(x), with all bits of x, and in the type of x."""
    connection = FracConnection(2, spatial=0) if dim is None else DynamicFracConnection(2, spatial=0, dim=dim)
    s, branch = torch.randn(3, 5, 8).to(dtype), nn.Linear(8, 8)
    nn.init.zeros_(branch.weight)
    nn.init.zeros_(branch.bias)
    with torch.autocast("cpu", torch.bfloat16):
        y = Residual(branch, streams=connection)(s)
    torch.testing.assert_close(y, s, rtol=0, atol=0)


def test_only_the_dynamic_part_is_decayed():
    """Sec. 4.3."""
    model = sw.build("vit-tiny-16", scheme="fracconnections", **VIT)
    groups = sw.param_groups(model, lr=1.0, weight_decay=0.1)
    decayed = {id(p) for group in groups for p in group["params"] if group["weight_decay"]}
    names = [name for name, p in sw.chain(model)[0].residual.streams.named_parameters() if id(p) in decayed]
    assert names == ["map.weight"]


def test_the_mixing_matrix_is_the_product_of_the_matrices():
    """What branch l reads of branch i: Yₗᵀ A…ᵀ diag(Bᵢ), of which the mean over the fractions is estimated."""
    model = sw.build("vit-tiny-16", scheme="fracconnections(2, dynamic=False)", **VIT)
    for connection in sw.chain(model):
        randomise_(connection.residual.streams)
    measured = sw.depth_mixing(model, torch.randn(128, 3, 16, 16)).coefficients
    weights = [each.residual.streams.static.detach().split((2, 2, 1), dim=1) for each in sw.chain(model)]
    expected = torch.zeros(5, 5)
    for column in range(5):
        passed = torch.eye(2) if column == 0 else torch.diag(weights[column - 1][2][:, 0])
        for row in range(column, 5):
            read = weights[row][0].T if row < 4 else torch.eye(2)
            expected[row, column] = torch.diagonal(read @ passed).mean()
            passed = weights[row][1].T @ passed if row < 4 else passed
    torch.testing.assert_close(measured, expected, rtol=0, atol=0.04)
    assert float((expected - torch.ones(5, 5).tril()).abs().max()) > 0.2


@pytest.mark.parametrize("scheme", ["fracconnections", "fracconnections(2, dynamic=False)"])
def test_frac_connections_in_a_network_that_exists(scheme):
    layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True) for _ in range(2)]
    model = nn.Sequential(*layers).eval()
    x = torch.randn(2, 5, 8)
    before, names = model(x), set(model.state_dict())
    operation = sw.rescheme(model, x, scheme)
    assert len(operation.touched) == 4
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    added = [p for name, p in model.named_parameters() if name not in names and "static" in name]
    model(x).square().sum().backward()
    assert len(added) == 4
    assert all(p.grad.any() for p in added)
    operation.undo()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert set(model.state_dict()) == names


def test_fractions_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(sw.SkipwayError, match=r"m=3: the rule is a divisor of the 8 channels"):
        sw.build("vit-tiny-16", scheme="fracconnections(3)", **VIT)
    with pytest.raises(sw.SkipwayError, match="keep one"):
        sw.schemes.parse_scheme("fracconnections + hyperconnections")
    with pytest.raises(sw.SkipwayError, match="7 channels in 2 fractions"):
        FracConnection(2, spatial=0)(torch.zeros(1, 7))
