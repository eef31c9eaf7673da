"""Constants on branches ask for rates, decays and ε of the parameters in front of them: CompleteP and depth-μP."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.errors import SkipwayError
from skipway.models.transformer import TOKEN_KIT
from skipway.nn import Mlp
from skipway.nn.placement import PRE_NORM
from skipway.optim.branch_factors import branch_factors, constants_of, watched_factors
from skipway.optim.groups import title_of
from skipway.optim.optimizers import OPTIMIZERS
from skipway.recipe import ResolvedRecipe
from skipway.training.setup import build_optimizer

BRANCHES = 8
RATIOS = {"exponent=1, base=2": (1.0, 0.25), "exponent=0.5, base=2": (0.5, 0.5), "exponent=0.5, base=32": (2.0, 2.0)}
"""m^(a - 1) and m^(-a) for eight branches: Dey et al. 2025, table 1."""


def named(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(each)]: group for group in groups for each in group["params"]}


def encoder(depth: int = BRANCHES // 2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.0)
    return nn.Sequential(
        nn.Linear(3, 8), nn.TransformerEncoder(layer, depth, nn.LayerNorm(8), enable_nested_tensor=False)
    )


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("rule", RATIOS)
def test_table_1_of_completep(foreign, rule):
    """Hidden maps, biases and norms by m^(a - 1), ε by m^(-a); embeddings, final norm and head at the base's."""
    if foreign:
        model, example = encoder(), torch.randn(2, 4, 3)
        sw.rescheme(model, example, f"depthscaled({rule})")
    else:
        model, example = (
            sw.build("vit-tiny-16", depth=BRANCHES // 2, dim=8, heads=2, scheme=f"depthscaled({rule})"),
            None,
        )
    groups = named(model, sw.param_groups(model, example, lr=1.0, weight_decay=0.1, eps=1e-6))
    rate, epsilon = RATIOS[rule]
    for name, group in groups.items():
        hidden = "layers." in name or "blocks." in name
        assert group["lr"] == pytest.approx(rate if hidden else 1.0), name
        assert group.get("eps", 1e-6) == pytest.approx(1e-6 * (epsilon if hidden else 1.0)), name
        matrix = not any(part in name for part in ("bias", "norm", "position", "token"))
        assert group["weight_decay"] == (0.1 if matrix else 0.0), name
    assert {group["name"] for group in groups.values()} >= {
        "weight",
        title_of(sw.nn.Role("weight", rate=rate, epsilon=epsilon)),
    }


def test_without_a_base_groups_are_as_they_were():
    for scheme in ("identity", "depthscaled"):
        groups = sw.param_groups(sw.build("vit-tiny-16", depth=2, dim=8, heads=2, scheme=scheme), lr=1.0)
        assert [group["name"] for group in groups] == ["embedding", "weight", "bias", "norm"]
        assert all("eps" not in group and group["lr"] == 1.0 for group in groups)


@pytest.mark.parametrize("shortcut", ["projection", "pooled", "pad"])
@pytest.mark.parametrize("placement", ["preactivation", "identity"])
def test_what_a_projection_reads_too_keeps_its_rate(placement, shortcut):
    """A norm before branch and projection is not in front of the factor alone; one at the end of a branch is, and so is
    one before a branch whose skip is padded: that is the stream itself.
    """
    model = sw.build(
        "resnet20",
        depth=8,
        width=4,
        stem_width=4,
        shortcut=shortcut,
        scheme=f"{placement} + depthscaled(exponent=0.5, base=1) + layerscale",
    )
    rates = {name: group["lr"] for name, group in named(model, sw.param_groups(model, lr=1.0)).items()}
    hidden = {name for name, rate in rates.items() if rate != 1}
    assert {rates[name] for name in hidden} == {3**-0.5}
    outside = {name for name in rates if ".branch." not in name and ".scale." not in name}
    carried = {name for name in outside if ".pre." in name and (shortcut == "pad" or name.startswith("stages.0."))}
    assert hidden == (set(rates) - outside) | carried
    assert bool(carried) == (placement == "preactivation")


def test_a_scaled_skip_is_no_reader_of_the_norm_before_the_branch():
    """u-μP of `base` asks for the rates of `DepthScaled(exponent=0.5, base=2)`, whose outputs it shares (App. G)."""
    options = {"depth": 2, "dim": 8, "heads": 2, "patch": 8, "image": 16}
    umup, scaled = (
        sw.build("vit-tiny-16", scheme=scheme, **options)
        for scheme in ("umup(base=2)", "depthscaled(exponent=0.5, base=2)")
    )
    rates = [
        {name: group["lr"] for name, group in named(model, sw.param_groups(model, lr=1.0)).items()}
        for model in (umup, scaled)
    ]
    assert rates[0] == pytest.approx(rates[1])
    assert branch_factors(umup) == watched_factors(umup, torch.zeros(1, 3, 16, 16), dict(constants_of(umup)))


def test_both_ways_to_find_them_agree():
    """By the slots of connections and by a watched pass: every way from a parameter to the output passes the factor."""
    model = sw.build(
        "vit-tiny-16", depth=2, dim=8, heads=2, patch=8, image=16, scheme="depthscaled(exponent=0.5, base=1)"
    )
    watched = watched_factors(model, torch.zeros(1, 3, 16, 16), dict(constants_of(model)))
    assert watched == branch_factors(model)
    assert len(watched) == 24


def test_a_network_of_others_without_an_example_is_refused():
    model, example = encoder(), torch.randn(2, 4, 3)
    sw.rescheme(model, example, "depthscaled(exponent=1, base=4)")
    with pytest.raises(SkipwayError, match=r"give an example .* param_groups\(model, example, …\)"):
        sw.param_groups(model, lr=1.0)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.entries)
def test_every_optimizer_steps_as_without_the_factor(optimizer, exponent):
    """The gradient behind a factor c is c times as large; ε (or SGD's rate) makes the step what it is without c, times
    the rate m^(a - 1), decay included. ε and decay are large here, so that they count."""
    if optimizer in ("lion", "lamb", "muon"):
        pytest.importorskip("pytorch_optimizer")
    spec = OPTIMIZERS[optimizer](**({"eps": 1e-2} if optimizer == "adamw" else {}))
    x, direction, steps = torch.randn(4, 8), torch.randn(4, 8), []
    for scheme, rate in ((sw.DepthScaled(exponent=exponent, base=4), 1.0), (sw.Identity(), 4 ** (exponent - 1))):
        torch.manual_seed(1)
        site = sw.Site(dim=8, index=0, depth=16, spatial=0, kind="mlp")
        slots = scheme.slots(
            site,
            branch=lambda kit, placement: Mlp(8, 8, kit=kit, placement=placement),
            shortcut=None,
            kit=TOKEN_KIT,
            placement=PRE_NORM,
        )
        model = sw.Residual(**slots)
        groups = sw.param_groups(model, lr=1e-2 * rate, weight_decay=0.3, eps=spec.eps, adaptive=spec.adaptive)
        before, step = [each.detach().clone() for each in model.parameters()], spec.build(groups)
        for _ in range(3):
            step.zero_grad()
            # linear in what is scaled: at equal parameters the gradient is c times the plain one
            (model.scale(model.branch(model.pre(x))) * direction).sum().backward()
            step.step()
        steps.append([after.detach() - each for after, each in zip(model.parameters(), before, strict=True)])
    ours, plain = steps
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(ours, plain, strict=True))


def step_size(branches: int, scheme: str, optimizer: type[torch.optim.Optimizer], seed: int) -> float:
    """How much the last stream of a pre-norm network changes by one step on the parameters of its branches."""
    torch.manual_seed(seed)
    model = sw.build("vit-tiny-16", depth=branches // 2, dim=32, heads=2, patch=8, image=16, classes=10, scheme=scheme)
    start, inside, streams = torch.randn(16, 5, 32), set(), []
    model.stem.register_forward_hook(lambda *_: start)
    for connection in (connections := sw.chain(model)):
        parts = (connection.residual.pre, connection.residual.branch)
        inside |= {id(each) for part in parts for each in part.parameters()}
        for module in connection.residual.branch.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in inside)
    connections[-1].residual.register_forward_hook(lambda module, given, out: streams.append(out.detach()))
    x, labels, adaptive = torch.zeros(16, 3, 16, 16), torch.randint(10, (16,)), optimizer is torch.optim.Adam
    groups = sw.param_groups(model, lr=1e-4 if adaptive else 1e-2, eps=1e-12, adaptive=adaptive)
    nn.functional.cross_entropy(model(x), labels).backward()
    optimizer(groups).step()
    model(x)
    return float((streams[1] - streams[0]).norm())


@pytest.mark.parametrize(
    ("scheme", "optimizer", "exponent"),
    [
        ("depthscaled(exponent=1, base=1)", torch.optim.Adam, 0.0),
        ("depthscaled(exponent=0.5, base=1)", torch.optim.Adam, 0.0),
        ("depthscaled(exponent=0.5)", torch.optim.Adam, 0.5),
        ("depthscaled(exponent=1.5)", torch.optim.Adam, -0.5),
        ("depthscaled(exponent=1, base=1)", torch.optim.SGD, 0.0),
        ("depthscaled(exponent=1)", torch.optim.SGD, -1.0),
    ],
)
def test_a_step_changes_the_function_by_a_power_of_the_depth(scheme, optimizer, exponent):
    """L branches, each multiplied by L^(-p), whose parameters step by L^q: L^(1 - p + q), flat with q = p - 1. For SGD
    the gradient brings another L^(-p). Terms of order 1/L against L at 4 branches leave ln(e^(1/4)) / ln 8 = 0.12."""
    depths = [4, 8, 16, 32]
    logs = torch.tensor([[math.log(step_size(depth, scheme, optimizer, seed)) for depth in depths] for seed in (0, 1)])
    places = torch.tensor(depths).log()
    centred = places - places.mean()
    slope = float((logs.mean(0) * centred).sum() / centred.square().sum())
    print(f"{scheme}, {optimizer.__name__}: slope {slope:.2f}, theory {exponent}")  # shown by pytest -s
    assert slope == pytest.approx(exponent, abs=0.2)


def test_a_base_is_for_branches_that_stay_multiplied():
    with pytest.raises(SkipwayError, match='how="forward"'):
        sw.DepthScaled(how="init", base=4)
    with pytest.raises(SkipwayError, match="base"):
        sw.DepthScaled(base=0)


@pytest.mark.parametrize(
    ("optimizer", "eps", "rate"), [("adamw(eps=1e-6)", 1e-6 / 3**0.5, 3**-0.5), ("sgd", None, 1.0)]
)
def test_a_recipe_trains_by_them(optimizer, eps, rate):
    """`skipway train`'s own optimizer: three branches, m = 3; SGD's rate is m^(2a - 1) = 1 at a = 1/2."""
    recipe = ResolvedRecipe(model="resnet20", optimizer=optimizer, lr=0.1, weight_decay=0.3)
    model = sw.build("resnet20", depth=8, width=4, scheme="depthscaled(exponent=0.5, base=1)")
    groups = named(model, build_optimizer(recipe, model, torch.zeros(1, 3, 32, 32)).param_groups)
    inside, stem = groups["stages.0.0.branch.conv1.weight"], groups["stem.conv.weight"]
    assert inside["lr"] == pytest.approx(stem["lr"] * rate)
    assert inside.get("eps") == (None if eps is None else pytest.approx(eps))
    assert inside["weight_decay"] == pytest.approx(0.3 * (1 if eps else 3**-0.5))


@pytest.mark.parametrize("scheme", ["identity", "depthscaled(exponent=0.5, base=1)"])
def test_muon_leaves_the_classifier_to_adamw(scheme):
    """The classifier's matrix, which is not the last of the groups where branches have groups of their own."""
    pytest.importorskip("pytorch_optimizer")
    model = sw.build("vit-tiny-16", depth=2, dim=8, heads=2, scheme=scheme)
    spec = OPTIMIZERS["muon"]()
    optimizer = spec.build(sw.param_groups(model, lr=1e-2, eps=spec.eps, adaptive=spec.adaptive))
    matrices = {name for name, group in named(model, optimizer.param_groups).items() if group["use_muon"]}
    maps = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert matrices == maps - {"head.classifier.weight"}


def test_folding_keeps_constants_that_ask_for_rates():
    """A constant that is gone asks for nothing: the network would be trained otherwise."""
    model, example = encoder().eval(), torch.randn(2, 4, 3)
    sw.rescheme(model, example, "depthscaled(exponent=1, base=2)", start="scheme")
    before = named(model, sw.param_groups(model, example, lr=1.0, eps=1e-6))
    operation = sw.fold_gains(model, example)
    after = named(model, sw.param_groups(model, example, lr=1.0, eps=1e-6))
    assert {name: (group["lr"], group.get("eps")) for name, group in after.items()} == {
        name: (group["lr"], group.get("eps")) for name, group in before.items()
    }
    assert any("rates" in reason for reason in operation.refused.values())


@pytest.mark.parametrize("native", [True, False])
def test_muon_iterates_in_a_precision_that_the_processor_has(monkeypatch, native):
    """One step moves the weight by the fifth iterate of s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5 of each singular value
    (Jordan 2024), which float32 has to 1e-4 and bfloat16 has not."""
    pytest.importorskip("pytorch_optimizer")
    monkeypatch.setattr("skipway.optim.muon.cpu_has_bfloat16", lambda: native)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(4, 2, bias=False))
    spec = OPTIMIZERS["muon"](momentum=0.0)
    optimizer = spec.build(sw.param_groups(model, lr=1.0, weight_decay=0.0, adaptive=True))
    before = model[0].weight.detach().double()
    model(torch.randn(5, 6)).square().sum().backward()
    left, values, right = torch.linalg.svd(model[0].weight.grad.double(), full_matrices=False)
    values /= values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    optimizer.step()
    moved = before - model[0].weight.detach().double()
    expected = left @ values.diag() @ right
    error = moved / moved.norm() - expected / expected.norm()
    assert (error.norm() < 1e-4) != native
