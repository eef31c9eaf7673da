"""The ConvNeXt family: published sizes, its norms and its branch, odd images, and parity with its three libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn

import skipway as sw
from benchmarks.peers import difference, import_timm, import_torchvision, import_transformers, randomise_
from skipway.models import ConvNeXt, ConvNeXtConfig
from skipway.models.convnext import CONVNEXT_KIT
from skipway.models.convnext.aliases import ALIASES, ELSEWHERE
from skipway.nn import DepthwiseMlp, Gain, GlobalResponseNorm, LayerNorm2d, Multiply, SqueezeExcitation
from skipway.nn.placement import INSIDE_NORM
from skipway.schemes import all_schemes
from skipway.weights import export_names

TINY = {"depth": 5, "width": 8, "classes": 5}
TWO_STAGES = {"blocks": (1, 1), "width": 4, "classes": 3}
FAMILIES = ("convnext", "convnextv2")
OURS = [variant for family in sw.models.families() if family.name in FAMILIES for variant in family.variants]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Published sizes and the dial --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", OURS, ids=lambda v: v.name)
def test_parameter_counts_equal_the_published_ones(variant):
    assert count(sw.build(variant.name, device="meta")) == variant.parameters


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # Liu et al. 2022, table 1; Woo et al. 2023, table 5 and appendix (they round down)
        *(("convnext-tiny", 29), ("convnext-small", 50), ("convnext-base", 89), ("convnext-large", 198)),
        *(("convnext-xlarge", 350), ("convnextv2-atto", 3.7), ("convnextv2-femto", 5.2), ("convnextv2-pico", 9.1)),
        *(("convnextv2-nano", 15.6), ("convnextv2-tiny", 28.6), ("convnextv2-base", 89), ("convnextv2-large", 198)),
        ("convnextv2-huge", 660),
    ],
)
def test_parameter_counts_round_to_the_papers(name, millions):
    published = {variant.name: variant.parameters for variant in OURS}[name] / 1e6
    assert published == pytest.approx(millions, abs=0.5 if isinstance(millions, int) else 0.05)


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [
        (4, (1, 1, 1, 1)),
        (6, (1, 1, 3, 1)),
        (12, (2, 2, 6, 2)),
        (14, (2, 2, 8, 2)),
        (18, (3, 3, 9, 3)),
        (36, (3, 3, 27, 3)),
        (40, (3, 4, 30, 3)),
        (1000, (3, 3, 991, 3)),
    ],
)
def test_depth_is_one_dial(depth, blocks):
    for name in (*FAMILIES, "convnext-base", "convnextv2-atto"):
        config = sw.build(name, depth=depth, device="meta").config if depth < 1000 else None
        config = config or next(f for f in sw.models.families() if f.name in name).at_depth(depth)
        assert (config.blocks, config.branches, config.depth) == (blocks, depth, depth)


def test_published_networks_are_where_their_own_depth_is():
    for variant in OURS:
        assert variant.at_depth(variant.config.depth) == variant.config
    assert sw.build("convnext-small", depth=18, device="meta").config == sw.models.find_config("convnext-tiny")[1]
    assert sw.build("convnextv2-18", device="meta").config == sw.models.find_config("convnextv2-tiny")[1]


def test_the_published_schemes_are_the_defaults():
    """P6: LayerScale starts at 1e-6 at every size of v1, v2 has none."""
    v1, v2 = (sw.chain(sw.build(name, **TINY)) for name in FAMILIES)
    assert all(isinstance(c.residual.scale, Gain) and c.residual.scale.init == 1e-6 for c in v1)
    assert all(isinstance(c.residual.scale, nn.Identity) for c in v2)
    assert all(isinstance(c.branch.response, nn.Identity) for c in v1)
    assert all(isinstance(c.branch.response, GlobalResponseNorm) for c in v2)


def test_default_initialisation_is_truncated_normal():
    """Liu et al. 2022, sec. 3.1 and the authors' code: N(0, 0.02²) for all maps, biases 0."""
    model = sw.build("convnext-atto")
    maps = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    weights = torch.cat([m.weight.detach().flatten() for m in maps])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    assert not any(m.bias.any() for m in maps)


def test_sites_count_the_branches_since_the_last_map_between_stages():
    chain = sw.chain(sw.build("convnext", device="meta", depth=12, width=8))
    assert [c.site.since for c in chain] == [0, 1, 0, 1, 0, 1, 2, 3, 4, 5, 0, 1]
    assert [c.site.index for c in chain] == list(range(12))
    assert {(c.site.spatial, c.site.kind) for c in chain} == {(2, "conv")}
    assert [c.site.dim for c in chain] == [8, 8, 16, 16, *(32,) * 6, 64, 64]


def test_normfree_divides_by_the_expected_deviation_at_the_maps_between_stages():
    """Var = 1 + α² l when l branches have added: what stands before the map makes it 1 again (Brock et al. 2021)."""
    stages = sw.build("convnext", depth=18, width=8, scheme="normfree").stages
    factors = [stage.downsample.enter.factor for stage in list(stages)[1:]]
    assert factors == pytest.approx([(1 + 0.04 * n) ** -0.5 for n in (3, 3, 9)])
    assert all(isinstance(stage.downsample.enter, Multiply) for stage in list(stages)[1:])


def test_normfree_keeps_the_variance_it_promises():
    """Var = 1 + α² l in a stage and 1 behind the map that follows, but for the taps that zero padding takes: of a 7 × 7
    convolution on n × n pixels ((7n - 12) / 7n)² are left.
    """
    network = sw.build("convnext-tiny", blocks=(2, 2), width=64, scheme="normfree(gain=1.0, alpha=0.5)").eval()
    variances: dict[str, float] = {}
    for name in ("stages.0.blocks.0.branch", "stages.0.blocks.1.branch", "stages.0", "stages.1.downsample"):
        network.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: variances.update({name: y.var().item()})
        )
    with torch.no_grad():
        network(torch.randn(2, 3, 160, 160))
    taps = ((7 * 40 - 12) / (7 * 40)) ** 2
    expected = [taps, taps, 1 + 2 * 0.25 * taps, (1 + 2 * 0.25 * taps) / 1.5]
    assert list(variances.values()) == pytest.approx(expected, rel=0.1)


# Norms and branch --------------------------------------------------------------------------------------------------


def test_layer_norm_over_channels_is_its_equation():
    norm = LayerNorm2d(6, eps=1e-3).double()
    randomise_(norm)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    expected = norm.weight.view(-1, 1, 1) * (x - mean) / (variance + 1e-3).sqrt() + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x.to(memory_format=torch.channels_last)), expected)


def test_layer_norm_over_channels_makes_no_copy_of_channels_last_maps():
    norm = LayerNorm2d(6)
    y = norm(torch.randn(2, 6, 3, 5))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.movedim(1, -1).is_contiguous()


def test_global_response_norm_is_the_papers_equation():
    """Woo et al. 2023, algorithm 1: y = x + g (x n) + b, pixel by pixel and channel by channel."""
    norm = GlobalResponseNorm(4).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    assert torch.equal(norm(x), x)
    randomise_(norm)
    for image in range(2):
        sizes = [sum(v.item() ** 2 for v in x[image, :, :, c].flatten()) ** 0.5 for c in range(4)]
        for c in range(4):
            n = sizes[c] / (sum(sizes) / 4 + 1e-6)
            channel = x[image, :, :, c]
            expected = channel + norm.gain[c] * (channel * n) + norm.bias[c]
            torch.testing.assert_close(norm(x)[image, :, :, c], expected)
    # the scale of what comes in is the scale of what goes out
    with torch.no_grad():
        norm.bias.zero_()
    torch.testing.assert_close(norm(100 * x), 100 * norm(x), rtol=1e-5, atol=1e-5)


def test_global_response_norm_of_nothing_has_a_gradient():
    norm = GlobalResponseNorm(4)
    randomise_(norm)
    x = torch.zeros(1, 2, 2, 4, requires_grad=True)
    norm(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_neither_norm_is_decayed():
    model = sw.build("convnextv2", **TINY)
    decay = {id(p): g["weight_decay"] for g in sw.param_groups(model, lr=1.0, weight_decay=0.1) for p in g["params"]}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            map = isinstance(module, nn.Conv2d | nn.Linear) and name == "weight"
            assert decay[id(parameter)] == (0.1 if map else 0.0)


@pytest.mark.parametrize("response", [None, GlobalResponseNorm])
def test_gradient_of_the_branch(response):
    branch = DepthwiseMlp(3, 5, kit=CONVNEXT_KIT, placement=INSIDE_NORM, kernel_size=3, response=response).double()
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    names, values = zip(*branch.named_parameters(), strict=True)
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)

    def apply(x, *values):
        return torch.func.functional_call(branch, dict(zip(names, values, strict=True)), (x,))

    torch.autograd.gradcheck(apply, (x, *values))


def test_the_branch_is_its_equation():
    """Every pixel by itself behind the depthwise convolution: W₂ r(act(W₁ norm(D h)))."""
    branch = DepthwiseMlp(4, 16, kit=CONVNEXT_KIT, placement=INSIDE_NORM, response=GlobalResponseNorm)
    randomise_(branch)
    h = torch.randn(2, 4, 9, 7)
    mixed = nn.functional.conv2d(h, branch.conv.weight, branch.conv.bias, padding=3, groups=4).permute(0, 2, 3, 1)
    normed = nn.functional.layer_norm(mixed, (4,), branch.inside.norm.weight, branch.inside.norm.bias, eps=1e-6)
    hidden = nn.functional.gelu(normed @ branch.fc1.weight.T + branch.fc1.bias)
    expected = branch.response(hidden) @ branch.fc2.weight.T + branch.fc2.bias
    torch.testing.assert_close(branch(h), expected.permute(0, 3, 1, 2))
    assert [p.module for p in branch.path()] == [branch.conv, branch.fc1, branch.fc2]
    assert branch.closing_norm() is None
    assert DepthwiseMlp(4, 4, kit=CONVNEXT_KIT, placement=INSIDE_NORM.to("end")).closing_norm() is not None


def test_the_gate_closes_the_branch():
    network = sw.build("convnext", squeeze=4, **TINY)
    assert all(isinstance(c.branch.gate, SqueezeExcitation) for c in sw.chain(network))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 5)


# Contracts, beside those of tests/schemes/test_schemes.py ------------------------------------------


# tests/schemes/test_schemes.py compiles and exports every scheme; here those that change what a block of ConvNeXt holds
@pytest.mark.parametrize(
    ("spec", "response"),
    [
        *((spec, True) for spec in ("identity", "fixup", "normfree", "preactivation", "hyperconnections(2)", "prores")),
        ("layerscale", False),
    ],
)
def test_compiles_and_exports(spec, response):
    torch.compiler.reset()
    config = ConvNeXtConfig(**TWO_STAGES, response=response, squeeze=2, scheme=sw.schemes.parse_scheme(spec))
    network = sw.initialise_(ConvNeXt(config)).eval()
    randomise_(network)
    x = torch.randn(2, 3, 8, 11)
    expected = network(x)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    program = torch.export.export(network, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", list(all_schemes("conv")))
def test_memory_formats_agree_and_a_batch_of_one(spec):
    network = randomise_(sw.build("convnextv2", scheme=spec, squeeze=2, **TINY).eval())
    x = torch.randn(2, 3, 40, 33)
    out = network(x)
    torch.testing.assert_close(network(x[:1]), out[:1], rtol=1e-4, atol=1e-5)
    last = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_and_images_of_one_channel(name):
    network = randomise_(sw.build(name, channels=1, **TINY).eval())
    x = torch.randn(4, 1, 32, 32)
    expected = network(x)
    out = network.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    # bfloat16 has 8 bits; five branches and a head in a row
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (63, 32)])
def test_what_patches_and_halvings_leave_over_is_not_seen(size):
    """Sides floor, as in the three libraries: 33 × 47 pixels are those of 32 × 32 of them."""
    network = randomise_(sw.build("convnext", **TINY).eval())
    x = torch.randn(1, 3, *size)
    shapes: list[tuple[int, int]] = []
    for stage in network.stages:
        stage.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[-2:])))
    network(x)
    assert shapes == [(size[0] // side, size[1] // side) for side in (4, 8, 16, 32)]


def test_small_images_have_small_patches():
    config = ConvNeXtConfig(blocks=(1, 1), width=8, patch=1, kernel=3, classes=10)
    assert sw.initialise_(ConvNeXt(config))(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    assert config.least == 2


# Weights -----------------------------------------------------------------------------------------------------------


def installed(library: Callable[[], ModuleType]) -> ModuleType:
    """A library to compare with; where it is absent the test is skipped."""
    try:
        return library()
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: docs/install.md")


def timm_pair(entry: str, **options) -> tuple[nn.Module, nn.Module]:
    """A network of timm and ours of the same name, cut down."""
    theirs = installed(import_timm).create_model(
        entry, dims=[8, 16, 32, 64], depths=[1, 2, 1, 1], num_classes=7, norm_eps=options.get("epsilon")
    )
    return sw.build(entry, width=8, blocks=(1, 2, 1, 1), classes=7, **options), theirs


@pytest.mark.parametrize("size", [(32, 32), (65, 79)])
@pytest.mark.parametrize("entry", ["convnext_tiny", "convnext_nano", "convnextv2_tiny", "convnextv2_nano"])
def test_parity_with_timm(entry, size):
    ours, theirs = timm_pair(entry)
    assert difference(ours, randomise_(theirs), "timm", torch.randn(2, 3, *size)) < 1e-5


def test_parity_with_timm_at_another_epsilon():
    ours, theirs = timm_pair("convnext_xxlarge", epsilon=1e-5)
    assert difference(ours, randomise_(theirs), "timm", torch.randn(2, 3, 32, 32)) < 1e-5


@pytest.mark.parametrize("entry", ["convnext_tiny", "convnextv2_atto"])
def test_parity_with_timm_at_full_size(entry):
    theirs = randomise_(installed(import_timm).create_model(entry))
    assert difference(sw.build(entry), theirs, "timm", torch.randn(1, 3, 64, 64)) < 1e-5


@pytest.mark.parametrize("size", [(32, 32), (65, 79)])
def test_parity_with_torchvision(size):
    models = installed(import_torchvision).models.convnext
    settings = [models.CNBlockConfig(w, o, n) for w, o, n in ((8, 16, 1), (16, 32, 2), (32, 64, 1), (64, None, 1))]
    theirs = models.ConvNeXt(settings, num_classes=7)
    ours = sw.build("convnext-tiny", width=8, blocks=(1, 2, 1, 1), classes=7)
    assert difference(ours, randomise_(theirs), "torchvision", torch.randn(2, 3, *size)) < 1e-5


@pytest.mark.parametrize("size", [(32, 32), (65, 79)])
@pytest.mark.parametrize("name", FAMILIES)
def test_parity_with_huggingface(name, size):
    ours, theirs = huggingface_pair(name)
    assert difference(ours, randomise_(theirs), "huggingface", torch.randn(2, 3, *size)) < 1e-5


def huggingface_pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A network of Hugging Face and ours of the same sizes; the ε of their last norm is the authors', as ours."""
    transformers = installed(import_transformers)
    config, model = {
        "convnext": (transformers.ConvNextConfig, transformers.ConvNextForImageClassification),
        "convnextv2": (transformers.ConvNextV2Config, transformers.ConvNextV2ForImageClassification),
    }[name]
    sizes = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 2, 1, 1], "num_labels": 7, "layer_norm_eps": 1e-6}
    return sw.build(f"{name}-tiny", width=8, blocks=(1, 2, 1, 1), classes=7), model(config(**sizes))


@pytest.mark.parametrize("name", FAMILIES)
def test_names_read_both_ways(name):
    """What we export the other library loads, strictly, each of Hugging Face's two classes under its own prefix."""
    ours, theirs = huggingface_pair(name)
    exported = export_names(ours, "huggingface")
    shaped = {key: exported[key].reshape(value.shape) for key, value in theirs.state_dict().items()}
    assert exported.keys() == shaped.keys()
    theirs.load_state_dict(shaped)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(theirs.eval()(x).logits, ours.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", ["timm", "torchvision", "huggingface"])
@pytest.mark.parametrize("name", FAMILIES)
def test_our_own_names_survive_the_round(name, names):
    if (name, names) == ("convnextv2", "torchvision"):
        with pytest.raises(sw.CheckpointError, match="no name for 'stages.0.blocks.0.branch.response"):
            export_names(sw.build(name, **TINY), names)
        return
    ours = randomise_(sw.build(name, **TINY))
    twin = sw.load(sw.build(name, **TINY), export_names(ours, names), names=names)
    for key, value in ours.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value)


def test_every_entry_point_of_timm_is_ours_or_said_to_be_none(monkeypatch):
    timm = installed(import_timm)
    # numbers alone are compared, and on the meta device torch takes a millisecond to draw each weight
    monkeypatch.setattr("timm.models.convnext.trunc_normal_", lambda weight, **options: weight)
    for kind in (nn.Conv2d, nn.Linear):
        monkeypatch.setattr(kind, "reset_parameters", lambda self: None)
    entries = set(timm.list_models(module="convnext"))
    assert entries == {*ALIASES, *ELSEWHERE}
    for entry in ALIASES:
        with torch.device("meta"):
            theirs = timm.create_model(entry)
        assert count(sw.build(entry, device="meta")) == count(theirs), entry


# Bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width=0: the rule is a whole number"),
        ({"classes": 1.5}, "classes=1.5"),
        ({"blocks": (3, 0, 3)}, "at least one block"),
        ({"blocks": ()}, "at least one block"),
        ({"kernel": 4}, "kernel=4: the rule is an odd number.* near it are 3 and 5"),
        ({"patch": 3}, "patch=3: the rule is 1 or an even number; near it are 2 and 4"),
        ({"squeeze": 0}, "squeeze=0"),
        ({"epsilon": 0.0}, "epsilon=0.0: the rule is a number above 0"),
        ({"ratios": 4}, "unknown option 'ratios'; did you mean 'ratio'"),
        ({"depth": 3}, "depth=3: .* at least four blocks.* every depth from 4 on"),
    ],
)
def test_bad_input_names_value_rule_and_way_out(options, message):
    with pytest.raises(sw.SkipwayError, match=message):
        sw.build("convnext-tiny", device="meta", **options)


def test_images_that_are_too_small_are_told_the_least():
    network = sw.build("convnext", **TINY)
    with pytest.raises(sw.SkipwayError, match="24 × 40 pixels: .* at least 32 × 32.* near it is 32 × 40"):
        network(torch.randn(1, 3, 24, 40))
    with pytest.raises(sw.SkipwayError, match="unknown model 'convnext-tyni'; did you mean 'convnext-tiny'"):
        sw.build("convnext-tyni")


def test_the_config_is_frozen_and_its_numbers_are_derived():
    config = ConvNeXtConfig(blocks=[1, 2])
    assert config.blocks == (1, 2)
    assert replace(config, width=10).dims == (10, 20)
    with pytest.raises(AttributeError):
        config.width = 3
