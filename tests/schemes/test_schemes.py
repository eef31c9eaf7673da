"""Contracts that every scheme keeps in every family, and the constants of the papers."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.errors import SkipwayError
from skipway.nn import DynamicTanh, Gain, GlobalResponseNorm, Residual
from skipway.schemes import Stack, all_schemes, card
from skipway.schemes import parse_scheme as read
from skipway.schemes.scheme import members_of

SPECS = [
    *all_schemes(),
    "skipinit(init=0.0, norm='remove')",
    "skipinit(init='depth', norm='remove')",
    "rezero(norm='remove')",
    "fixup(rescale=False)",
    "layerscale(init='depth')",
    "layerscale(init=0.0)",
    "normfree(gain=1.0)",
    "depthscaled(how='init')",
    "dyt(map='erf')",
    "prores(10, 'linear-square')",
    "prores + rezero",
    "hyperconnections(n=2, dynamic=False)",
    "mhc(n=3, form='birkhoff')",
    "fracconnections(2, dynamic=False)",
    "preactivation + layerscale",
    "preactivation + skipinit(norm='remove') + stochasticdepth(0.2)",
]
SMALL = {"classes": 5, "width": 8, "stem_width": 8}
MODELS = {
    "cifar": ("resnet-cifar", {"depth": 14, **SMALL}),
    "cifar projections": ("resnet-cifar", {"depth": 14, "shortcut": "projection", **SMALL}),
    "cifar bottleneck": (
        "resnet-cifar",
        {"depth": 8, "block": "bottleneck", "shortcut": "projection", **SMALL},
    ),
    "preactivation": ("wrn", {"depth": 16, **SMALL}),
    "imagenet, squeeze": ("se-resnet", {"depth": 18, **SMALL, "squeeze": 4}),
    "deep stem, pooled": ("resnet-imagenet", {"depth": 10, **SMALL, "stem": "deep", "shortcut": "pooled"}),
    "resnext": ("resnext", {"depth": 26, **SMALL, "groups": 2, "base_width": 32}),
    "vit": ("vit-tiny-16", {"depth": 2, "dim": 16, "heads": 2, "patch": 8, "image": 32, "classes": 5, "registers": 1}),
    "vit, post-norm": (
        "vit-tiny-16",
        {"depth": 2, "dim": 16, "heads": 2, "patch": 8, "image": 32, "classes": 5, "norm": "post"},
    ),
    "vit, residual post-norm": (
        "vit-tiny-16",
        {
            "depth": 2,
            "dim": 16,
            "heads": 2,
            "patch": 8,
            "image": 32,
            "classes": 5,
            "norm": "respost",
            "pooling": "mean",
        },
    ),
    "cait": ("cait-xxs24", {"depth": 2, "dim": 16, "heads": 2, "patch": 8, "image": 32, "classes": 5}),
    "pooled": ("resnet-pool", {"depth": 11, "classes": 5, "width": 8, "stem_width": 8}),
    "convnext": ("convnext", {"depth": 5, "classes": 5, "width": 8}),
    "convnextv2": ("convnextv2", {"depth": 5, "classes": 5, "width": 8, "squeeze": 4}),
    "swin": ("swin-tiny", {"dim": 8, "heads": 2, "blocks": (2, 2), "window": 2, "image": 32, "classes": 5}),
    "swinv2": ("swinv2-tiny", {"dim": 8, "heads": 2, "blocks": (2, 2), "window": 2, "image": 32, "classes": 5}),
}


def make(model: str, scheme: str, **options) -> nn.Module:
    name, fixed = MODELS[model]
    return sw.build(name, scheme=scheme, **fixed, **options)


CONVOLUTIONAL = {
    *("cifar", "cifar projections", "cifar bottleneck", "preactivation", "imagenet, squeeze", "deep stem, pooled"),
    *("resnext", "pooled", "convnext", "convnextv2"),
}


def fits(model: str, spec: str) -> bool:
    """Whether a scheme is for the branches of a family."""
    if model.startswith("swin") and "value" in spec:
        return False  # windows hold other tokens in every block
    return all("conv" in each.kinds for each in members_of(read(spec))) or model not in CONVOLUTIONAL


PAIRS = [(model, spec) for model in MODELS for spec in SPECS if fits(model, spec)]


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not fits("cifar", spec)])
def test_a_scheme_for_other_branches_is_refused(spec):
    for model in CONVOLUTIONAL:
        with pytest.raises(SkipwayError, match=re.escape(f"scheme='{spec}'")):
            make(model, spec)


def zero_factors(residual: Residual) -> int:
    """Multiplicative factors on the branch's way that are exactly zero: maps, norm gains, learned gains."""
    found = 0
    for module in (*residual.branch.modules(), *residual.scale.modules()):
        if isinstance(module, GlobalResponseNorm):  # it multiplies by 1 + gain ⊙ n
            continue
        factor = getattr(module, "gain", None) if hasattr(module, "gain") else getattr(module, "weight", None)
        if isinstance(factor, torch.Tensor) and factor.numel() and not factor.any():
            found += 1
    return found


def check_that_branches_are_silent(network: nn.Module) -> None:
    """Every connection is its shortcut."""
    seen: list[tuple[Residual, torch.Tensor, torch.Tensor]] = []
    hooks = [
        connection.residual.register_forward_hook(lambda residual, args, y: seen.append((residual, args[0], y)))
        for connection in sw.chain(network)
    ]
    network.eval()(torch.randn(2, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    assert len(seen) == network.config.branches
    for residual, x, y in seen:
        assert torch.equal(y, residual.post(residual.shortcut(x, residual.pre(x)))), "a silent branch is heard"
    network.train()


def check_that_all_parameters_learn(network: nn.Module, steps: int) -> None:
    """Within these steps every parameter has a gradient: no scheme holds a part of the network at zero."""
    optimizer = torch.optim.SGD(sw.param_groups(network, lr=0.05), lr=0.05)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    # a ReLU-gated squeeze unit that is dead on this batch is not the scheme's doing; stochastic depth may drop a branch
    # and what is added to all logits of a softmax changes nothing, so its gradient is a rounding error, or none
    still = {
        name: parameter
        for name, parameter in network.named_parameters()
        if ".gate." not in name and not name.endswith("mix_logits.bias")
    }
    for number in range(steps + 1):
        sw.set_step(network, number)
        optimizer.zero_grad()
        out = network(x)
        assert out.shape == (8, 5), "shape of the output"
        assert torch.isfinite(out).all(), "the output is not finite"
        nn.functional.cross_entropy(out, y).backward()
        still = {
            name: parameter for name, parameter in still.items() if parameter.grad is None or not parameter.grad.any()
        }
        if not still:
            return
        optimizer.step()
    assert [*still] == [], "parameters that have no gradient"


@pytest.mark.parametrize(("model", "spec"), PAIRS)
def test_contracts(model, spec):
    """All on one network: it takes about as long to build as to check.

    P13: two zero factors in one branch give exactly zero gradient for ever; a silent scheme has one, others none, and
    starts as its shortcuts. P7: initialised twice equals once, also after some training, and a network born on the meta
    device equals one born on the CPU.

    CaiT's patches reach the classifier through the class blocks alone, so there two chains of silent branches stand one
    behind the other, and it takes a step more.
    """
    torch.manual_seed(3)
    network, silent = make(model, spec), read(spec).silent
    born = {key: value.clone() for key, value in network.state_dict().items()}
    assert {zero_factors(c.residual) for c in sw.chain(network)} == {int(silent)}, "zero factors of a branch"
    if silent:
        check_that_branches_are_silent(network)
    check_that_all_parameters_learn(network, steps=3 if model == "cait" else 2)
    for how, again in (("twice", network), ("on the meta device", make(model, spec, device="meta"))):
        torch.manual_seed(3)
        sw.initialise_(again, device="cpu")
        state = again.state_dict()
        assert state.keys() == born.keys(), how
        assert [key for key, value in born.items() if not torch.equal(state[key], value)] == [], f"initialised {how}"


@pytest.mark.parametrize("spec", SPECS)
def test_spec_string_is_the_objects_own(spec):
    scheme = read(spec)
    assert read(str(scheme)) == scheme
    if not isinstance(scheme, Stack):
        assert read(repr(scheme)) == scheme


def compiled_pairs() -> list[tuple[str, str]]:
    """A small ResNet with every scheme that fits, a ViT with the others and with several streams; fewer streams and
    iterations of mhc, each of which is unrolled into the graph.
    """
    conv = list(all_schemes("conv"))
    others = [name for name in all_schemes() if name not in conv or read(name).open() is not None]
    pairs = [*(("cifar", name) for name in conv), *(("vit", name) for name in others)]
    fewer = {"mhc": "mhc(n=2, iterations=3)", "hyperconnections": "hyperconnections(2)"}
    return [(model, fewer.get(name, name)) for model, name in pairs]


def make_small(model: str, spec: str) -> nn.Module:
    cifar = {"blocks": (1, 1), "width": 4, "stem_width": 4}
    options = cifar if model == "cifar" else {**MODELS["vit"][1], "depth": 1}
    return sw.build(MODELS[model][0], scheme=spec, **options).eval()


@pytest.mark.parametrize(("model", "spec"), compiled_pairs())
def test_compiles_without_graph_break(model, spec):
    torch.compiler.reset()
    network = make_small(model, spec)
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "spec"), compiled_pairs())
def test_exports(model, spec):
    network = make_small(model, spec)
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(network, (x,))
    torch.testing.assert_close(program.module()(x), network(x), rtol=1e-5, atol=1e-6)


def test_training_compiles_without_graph_break_with_random_drops():
    """P9: the mask comes from torch's generator, so a compiled step draws anew."""
    torch.compiler.reset()
    network = sw.build("resnet-cifar", depth=8, width=4, stem_width=4, scheme="identity + stochasticdepth(0.9)")
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 8, 8)
    assert not torch.equal(compiled(x), compiled(x))


# Constants of the papers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bottleneck", [False, True])
def test_fixup_factor_counts_the_branches_of_the_network(bottleneck):
    """P1: L^(-1/(2m-2)) with L all branches: 0.192 for ResNet-56 (m = 2, L = 27), 0.5 for ResNet-50 (m = 3, L = 16)."""
    options = {"width": 8, "stem_width": 8, "classes": 2}
    name, factor = ("resnet50", 0.5) if bottleneck else ("resnet56", 27**-0.5)
    torch.manual_seed(1)
    plain_he = sw.build(name, scheme="fixup(rescale=False)", **options)
    torch.manual_seed(1)
    network = sw.build(name, scheme="fixup", **options)
    for ours, he in zip(sw.chain(network), sw.chain(plain_he), strict=True):
        *others, last = ours.path
        assert not last.weight.any()
        for map, reference in zip(others, he.path, strict=False):
            torch.testing.assert_close(map.weight, reference.weight * factor)
    assert not network.head.classifier.weight.any()


def test_fixup_zeroes_a_last_map_whose_weight_is_an_inner_map_elsewhere():
    """Rule 1 before rule 2: F(x) = 0 at the start, of whatever else the weight is."""
    first, second = (sw.BasicBlock(8, 8, scheme="fixup") for _ in range(2))
    second.branch.conv2.weight = first.branch.conv1.weight
    model, x = nn.Sequential(first, second), torch.rand(2, 8, 4, 4)
    sw.initialise_(model)
    torch.testing.assert_close(model(x), x)
    assert second.branch.conv1.weight.any()


def test_fixup_has_no_norm_and_a_scalar_before_every_map_and_activation():
    network = sw.build("resnet20", scheme="fixup")
    assert not [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    names = [name for name, p in sw.chain(network)[1].residual.named_parameters() if p.ndim == 0]
    assert names == [
        "pre.enter.bias",
        "branch.norm1.bias",
        "branch.before2.bias",
        "scale.multiplier.gain",
        "scale.bias.bias",
    ]
    assert hasattr(network.head, "before")


@pytest.mark.parametrize(("blocks", "value"), [(12, 0.1), (18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6), (36, 1e-6)])
def test_layerscale_follows_the_depth_of_the_network(blocks, value):
    """P2: one value in the whole net, by its depth in transformer blocks of two branches each."""
    values = {
        sw.LayerScale.by_depth().scale(sw.Site(dim=4, index=i, depth=2 * blocks)).init for i in (0, 2 * blocks - 1)
    }
    assert values == {value}


def test_deepnorm_constants():
    """α = (2N)^(1/4), β = (8N)^(-1/4) of an encoder alone with N layers."""
    scheme = sw.DeepNorm()
    for layers, alpha, beta in (
        (12, 2.2134, 0.3195),
        (24, 2.6321, 0.2686),
        (100, 3.7606, 0.1880),
        (1000, 6.6874, 0.1057),
    ):
        assert scheme.carry(sw.Site(dim=1, depth=2 * layers), None).factor == pytest.approx(alpha, abs=5e-5)
        assert scheme.shrink(2 * layers) == pytest.approx(beta, abs=5e-5)


def test_normfree_betas_of_resnet50():
    """1/β from the variance accumulated before the reset at each transition."""
    network = sw.build("resnet50", scheme="normfree", width=8, stem_width=8)
    betas = [c.residual.pre.enter.factor for c in sw.chain(network)]
    expected = [
        1.0,
        0.9806,
        0.9623,
        0.9449,
        0.9806,
        0.9623,
        0.9449,
        0.9285,
        0.9806,
        0.9623,
        0.9449,
        0.9285,
        0.9129,
        0.8980,
    ]
    assert betas[:14] == pytest.approx(expected, abs=5e-5)
    assert all(conv.bias is not None for conv in network.modules() if isinstance(conv, nn.Conv2d))


def test_depthscaled_and_skipinit_by_depth():
    network = sw.build("resnet110", scheme="skipinit(init='depth')")
    assert {c.residual.scale.init for c in sw.chain(network)} == {54**-0.5}
    network = sw.build("resnet110", scheme="depthscaled")
    assert {c.residual.scale.factor for c in sw.chain(network)} == {54**-0.5}


def test_stochastic_depth_is_linear_with_depth_and_safe_at_one_branch():
    """P9: p_l = l/L p_L, l from 1; a single branch has p_L and nothing divides by zero."""
    scheme = sw.StochasticDepth(0.5)
    assert [scheme.drop(sw.Site(dim=1, index=i, depth=4)).probability for i in range(4)] == [
        0.125,
        0.25,
        0.375,
        0.5,
    ]
    assert scheme.drop(sw.Site(dim=1)).probability == 0.5


def test_stochastic_depth_keeps_the_expectation_and_is_off_in_eval():
    drop = sw.StochasticDepth(0.3).drop(sw.Site(dim=1))
    x = torch.ones(20_000, 1)
    assert drop(x).mean().item() == pytest.approx(1.0, abs=4 * (0.3 / 0.7 / 20_000) ** 0.5)
    assert torch.equal(drop.eval()(x), x)


def test_zero_is_a_value():
    """An initial value of 0 does not switch the scheme off."""
    network = sw.build("resnet20", scheme="layerscale(init=0)")
    assert all(isinstance(c.residual.scale, Gain) for c in sw.chain(network))


def test_residual_of_rezero_has_its_activation_inside():
    block = sw.build("resnet20", scheme="rezero").stages[0][0]
    assert isinstance(block.post, nn.Identity)
    assert isinstance(block.branch.act2, nn.ReLU)


# Composition and bad input -----------------------------------------------------------------------------------------


def test_two_silent_schemes_do_not_stack():
    with pytest.raises(SkipwayError, match="two zero factors"):
        read("zeroinit + rezero")
    assert read("zeroinit + layerscale").silent


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("layerscal", "did you mean 'layerscale'"),
        ("layerscale(inti=1)", "unexpected keyword argument 'inti'; the arguments are: init, rate"),
        ("stochasticdepth(rate=0.1)", "the arguments are: probability"),
        ("mudd(1)", "the arguments are: none"),
        ("layerscale(init=", "is not of the form"),
        ("layerscale(init=__import__('os'))", "is not of the form"),
        ("layerscale(init='deep')", "finite number or 'depth'"),
        ("skipinit(norm='drop')", "one of 'keep', 'remove'"),
        ("stochasticdepth(1.0)", "0 <= p < 1"),
        ("", "unknown scheme"),
    ],
)
def test_bad_specs_say_what_to_do(spec, message):
    with pytest.raises(SkipwayError, match=message):
        read(spec)


def test_a_new_scheme_is_one_class_that_nobody_else_knows():
    from dataclasses import dataclass

    from skipway.schemes.scheme import REGISTRY, Scheme

    @dataclass(frozen=True)
    class Halved(Scheme):
        """y = x + ½ F(x)."""

        equation = "y = x + ½ F(x)"
        when = "in this test"
        source = "-"

        def scale(self, site):
            return sw.nn.Multiply(0.5)

    try:
        network = sw.build("resnet20", scheme="halved + stochasticdepth(0.1)")
        assert network.stages[2][2].scale.factor == 0.5
        assert card("halved").startswith("# Halved")
    finally:
        del REGISTRY.entries["halved"], REGISTRY._names["halved"]


@pytest.mark.parametrize("name", list(all_schemes()))
def test_every_scheme_tells_its_equation_depth_rates_theory_and_source(name):
    kind = all_schemes()[name]
    for word in ("Depth:", "Decay and learning rate:", "Theory at the start:", "Source:", ">>> "):
        assert word in kind.__doc__.replace("Theory at the start (", "Theory at the start: ("), (name, word)
    assert all(isinstance(getattr(kind, field), str) for field in ("equation", "norm_note", "when", "source"))


# Schemes of 2025 and 2026 ------------------------------------------------------------------------------------------


def test_perinorm_of_a_transformer_is_the_sandwich():
    """Kim et al. 2025, eq. 4, has the norms where CogView's sandwich has them."""
    options = MODELS["vit"][1]
    torch.manual_seed(0)
    ours = sw.build("vit-tiny-16", scheme="perinorm", **options)
    torch.manual_seed(0)
    sandwich = sw.build("vit-tiny-16", norm="sandwich", **options)
    assert list(ours.state_dict()) == list(sandwich.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), sandwich(x), rtol=0, atol=0)


def test_mixnorm_counts_blocks_from_the_front():
    """⌈0.25 N⌉ of N blocks are post-norm: 3 of 12, 2 of 5; in a ResNet a block is one branch."""
    for blocks, early in ((12, 3), (5, 2)):
        options = {**MODELS["vit"][1], "depth": blocks}
        network = sw.build("vit-tiny-16", scheme="mixnorm", **options)
        posts = [isinstance(c.residual.post, nn.Identity) for c in sw.chain(network)]
        assert posts == [False] * 2 * early + [True] * 2 * (blocks - early)
    network = sw.build("resnet20", scheme="mixnorm")
    posts = [isinstance(c.residual.post, nn.Identity) for c in sw.chain(network)]
    assert posts == [False] * 3 + [True] * 6


def test_layernormscaling_is_the_root_of_the_blocks_number():
    network = make("vit", "layernormscaling")
    assert [c.residual.pre.enter.factor for c in sw.chain(network)] == [1.0, 1.0, 2**-0.5, 2**-0.5]


def test_layernormscaling_leaves_maps_between_stages_alone():
    """What enters a branch is scaled, and a patch merging is none: the next stage begins with the plain network's."""
    plain, scaled = (make("swin", scheme) for scheme in ("identity", "layernormscaling"))
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 4, 8)
    torch.testing.assert_close(scaled.stages[0].merge(x), plain.stages[0].merge(x), rtol=0, atol=0)


def test_a_map_between_stages_is_entered_where_the_scheme_counts_on_it():
    """After four branches of a stage 1 / √(1 + 4 α²) in front of the map, α = 0.2; Fixup's bias stands there, too."""
    assert make("swin", "normfree").stages[0].merge.enter.factor == pytest.approx((1 + 4 * 0.2**2) ** -0.5)
    assert make("swin", "fixup").stages[0].merge.enter.bias.shape == ()
    both = make("convnext", "stochasticdepth + fixup").stages[1].downsample
    assert both.enter.bias.shape == ()


def test_layerscale_counts_caits_depth_as_its_paper_does():
    """Touvron et al. 2021, sec. 2: 0.1 to depth 18, 1e-5 to 24, 1e-6 beyond; class-attention blocks are not depth."""
    for blocks, init in ((18, 0.1), (24, 1e-5), (25, 1e-6)):
        network = sw.build("cait-s24", depth=blocks, dim=8, heads=2, image=32, scheme="layerscale(init='depth')")
        assert {connection.residual.scale.init for connection in sw.chain(network)} == {init}


@pytest.mark.parametrize("name", ["vit", "convnext", "swin"])
@pytest.mark.parametrize("map", ["tanh", "erf"])
def test_dyt_replaces_every_norm_by_the_equation(name, map):
    """y = γ ⊙ f(α x + s) + β on the channel axis of the norm that it replaces, with each parameter in its place."""
    network = make(name, f"dyt(map={map!r})")
    bounded = [module for module in network.modules() if isinstance(module, DynamicTanh)]
    assert bounded
    assert not [module for module in network.modules() if isinstance(module, nn.LayerNorm | nn.BatchNorm2d)]
    for module in bounded:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
        channels = len(module.weight)
        x = torch.randn(2, channels, 3, 4) if len(module.shape) == 3 else torch.randn(2, 5, channels)
        last = x.movedim(1, -1) if len(module.shape) == 3 else x
        inner = module.alpha * last + (module.shift if map == "erf" else 0.0)
        expected = getattr(torch, map)(inner) * module.weight + module.bias
        y = module(x)
        torch.testing.assert_close(y.movedim(1, -1) if len(module.shape) == 3 else y, expected)


@pytest.mark.parametrize("map", ["tanh", "erf"])
def test_dyt_takes_the_axis_of_an_rmsnorm(map):
    """The last one, of tokens: the same network as in place of LayerNorm, for any number of tokens."""
    options = {"depth": 2, "dim": 8, "heads": 2, "vocab": 9, "context": 16, "scheme": f"dyt(map={map!r})"}
    rms, layer = (sw.build("gpt", rms=each, **options) for each in (True, False))
    rms.load_state_dict(layer.state_dict())
    for tokens in (1, 3, 8):
        ids = torch.randint(9, (2, tokens))
        torch.testing.assert_close(rms(ids), layer(ids), rtol=0, atol=0)
