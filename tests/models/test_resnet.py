"""The ResNet family: published sizes, the depth dial, frozen names, clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import skipway as sw
from skipway.models import find_config, variants
from skipway.schemes import all_schemes

RESNETS = [variant for variant in variants() if isinstance(variant.config, sw.ResNetConfig)]
GOLDEN = Path(__file__).parent / "golden" / "state_dict_names.json"


@pytest.mark.parametrize("variant", RESNETS, ids=lambda v: v.name)
def test_parameter_counts_equal_the_published_ones(variant):
    model = sw.build(variant.name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == variant.parameters


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # He 2015, table 6; He 2016, table 4; timm's results table; Hu 2018; Zagoruyko & Komodakis 2016, table 5
        *(("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.7)),
        *(("resnet1202", 19.4), ("resnetv2-164", 1.7), ("resnetv2-50", 25.55), ("resnetv2-101", 44.54)),
        *(("resnetv2-152", 60.19), ("se-resnet50", 28.1), ("wrn-28-10", 36.5)),
    ],
)
def test_parameter_counts_round_to_the_papers(name, millions):
    count = sum(p.numel() for p in sw.build(name, device="meta").parameters()) / 1e6
    digits = len(str(millions).partition(".")[2])
    assert count == pytest.approx(millions, abs=0.5 * 10**-digits * 1.001)


@pytest.mark.parametrize("variant", RESNETS, ids=lambda v: v.name)
def test_depth_is_the_number_in_the_name(variant):
    number = int("".join(c if c.isdigit() else " " for c in variant.name.replace("v2", "")).split()[0])
    # a WRN counts the two projections of its widened stages too
    assert variant.config.depth + (2 if variant.family == "wrn" else 0) == number


@pytest.mark.parametrize(
    ("name", "depth", "blocks"),
    [
        ("resnet", 50, (3, 4, 6, 3)),
        ("resnet", 110, (18, 18, 18)),
        ("resnet", 1001, (111, 111, 111)),
        ("resnet-cifar", 8, (1, 1, 1)),
        ("resnet-patch", 14, (2, 2, 2)),
        ("resnet-pool", 17, (2, 2, 2)),
        ("resnet-imagenet", 302, (3, 4, 90, 3)),
        ("wrn", 1000, (166, 166, 166)),
        ("resnext", 50, (3, 4, 6, 3)),
        ("resnet44", 56, (9, 9, 9)),
    ],
)
def test_depth_is_one_dial(name, depth, blocks):
    assert sw.build(name, depth=depth, device="meta").config.blocks == blocks


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("ResNet-50", "resnet50"),
        ("wide_resnet50_2", "wide-resnet50-2"),
        ("resnext50_32x4d", "resnext50-32x4d"),
        ("seresnet50", "se-resnet50"),
        ("resnetv2_50", "resnetv2-50"),
        ("WRN_28_10", "wrn-28-10"),
    ],
)
def test_spelling_is_forgiven(name, like):
    assert sw.build(name, device="meta").config == sw.build(like, device="meta").config


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet51", {}, r"near it are 50 and 53"),
        ("resnet", {"depth": 51}, r"depth=51: .* near it are 50 and 53"),
        ("resnet-cifar", {"depth": 110 + 1}, r"6·n \+ 2, n ≥ 1 weight layers; near it are 110 and 116"),
        ("wrn-17-2", {}, r"near it are 16 and 22"),
        ("resnet", {"depth": 2}, r"near it are"),
        ("resnet", {}, "is a family and needs a depth"),
        ("resnot50", {}, "unknown model 'resnot50'; did you mean 'resnet50'"),
        ("resnet20", {"clases": 10}, "unknown option 'clases'; did you mean 'classes'"),
        ("resnet20", {"scheme": "fixpu"}, "did you mean 'fixup'"),
        ("resnet20", {"width": 0}, "width=0: the rule is a whole number"),
        ("resnet20", {"classes": 1.5}, "classes=1.5"),
        ("resnet20", {"blocks": (3, 0, 3)}, "at least one block"),
        ("resnet20", {"block": "basik"}, "one of 'basic', 'bottleneck'"),
        ("resnet50", {"width": 8, "base_width": 4}, "inner width of 0"),
        ("resnet20", {"groups": 2}, "use Bottleneck"),
        ("resnet", {"depth": "20"}, "depth='20': the rule is a whole number"),
        ("resnet50", {"squeeze": "4"}, "squeeze='4': the rule is a whole number or None"),
        (20, {}, "name=20: the rule is a text"),
        ("resnet20", {"blocks": np.array(3)}, "the rule is a number for each stage"),
        ("resnet20", {"blocks": "33"}, "blocks='33': the rule is a number for each stage"),
        ("resnet20", {"blocks": {}}, "blocks={}: the rule is a number for each stage"),
        ("vit-tiny-16", {"ratio": "4"}, "ratio='4': the rule is a number"),
        ("convnext", {"depth": 18, "dims": (8,)}, "unknown option 'dims'; .*squeeze, width$"),
        ("resnet20", {"scheme": "nosuch"}, r"unknown scheme 'nosuch'.* more \(skipway schemes lists them\)"),
    ],
)
def test_bad_input_names_value_rule_and_way_out(name, options, message):
    with pytest.raises(sw.SkipwayError, match=message):
        sw.build(name, **options)


def test_state_dict_names_are_frozen():
    """Weights saved today load tomorrow: a change here is a change of format and needs a key map for the old names."""
    plain = {
        **{f"resnet-{name}": {} for name in ("imagenet10", "imagenet14", "cifar8")},
        **{name: {} for name in ("resnetv2-14", "wrn-10-1", "se-resnet10")},
        **{name: {"depth": 1} for name in ("vit-tiny-16", "cait-xxs24")},
        **{name: {"depth": 4} for name in ("convnext", "convnextv2")},
        **{name: {"blocks": (1, 1)} for name in ("swin-tiny", "swinv2-tiny")},
    }
    specs = [
        *((name, None, options) for name, options in plain.items()),
        *(("resnet-cifar8", scheme, {}) for scheme in all_schemes("conv")),
        *(("vit-tiny-16", scheme, {"depth": 1}) for scheme in all_schemes() if scheme not in all_schemes("conv")),
        *(("vit-tiny-16", scheme, {"depth": 1}) for scheme in all_schemes() if scheme not in all_schemes("conv")),
    ]
    names = {
        f"{model} {scheme}": sorted(sw.build(model, scheme=scheme, device="meta", **options).state_dict())
        for model, scheme, options in specs
    }
    assert names == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (64, 32)])
def test_any_image_size_and_a_batch_of_one(size):
    model = sw.build("resnet18", width=4, stem_width=4, classes=3).eval()
    x = torch.randn(1, 3, *size)
    out = model(x)
    assert out.shape == (1, 3)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), out, rtol=1e-4, atol=1e-5)


def test_images_of_one_channel_and_bfloat16():
    model = sw.build("resnet20", channels=1, classes=3, dtype=torch.bfloat16).eval()
    assert model(torch.randn(2, 1, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_stem_ends_where_the_placement_says():
    original, preactivated = sw.build("resnet50", device="meta"), sw.build("resnetv2-50", device="meta")
    assert [n for n, _ in original.stem.named_children()] == ["conv", "norm", "act", "pool"]
    assert [n for n, _ in preactivated.stem.named_children()] == ["conv", "pool"]
    assert [n for n, _ in preactivated.head.named_children()] == [
        "norm",
        "act",
        "pool",
        "flatten",
        "classifier",
    ]


def test_projections_of_preactivation_see_the_activated_input():
    """He 2016: the first unit of a stage projects act(norm(x)), not x."""
    block = sw.build("wrn-16-2").stages[1][0].eval()
    x = torch.randn(1, 32, 8, 8)
    expected = block.shortcut.map(block.pre(x)) + block.branch(block.pre(x))
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


def test_default_initialisation_is_he_fan_out():
    model = sw.build("resnet18")
    conv = model.stages[3][1].branch.conv2
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_building_costs_order_depth():
    """The same number of modules, parameters and chain entries per branch at any depth."""
    small, large = sw.build("resnet-cifar26", device="meta"), sw.build("resnet-cifar50", device="meta")
    larger = sw.build("resnet-cifar74", device="meta")
    counts = [len(list(m.modules())) for m in (small, large, larger)]
    assert counts[1] - counts[0] == counts[2] - counts[1]
    assert [len(sw.chain(m)) for m in (small, large, larger)] == [12, 24, 36]


@pytest.mark.parametrize("name", ["resnet-patch8", "resnet-cifar-8"])
def test_a_depth_replaces_that_of_the_name(name):
    family = name.rstrip("8").rstrip("-")
    assert find_config(name, 20) == find_config(family, 20) != find_config(name)
    with pytest.raises(sw.SkipwayError, match="near it are 20 and 26"):
        find_config(name, 21)


def test_pooled_transitions_are_those_of_resnet9():
    """Page 2018: max(conv(x)) over 2 × 2 pixels, norm, ReLU, then identity shortcuts; odd sides round up."""
    network = sw.build("resnet-pool11", width=4, stem_width=3, classes=2).eval()
    h = nn.Sequential(*list(network.stem.children())[:-1])(torch.randn(2, 3, 14, 14))
    downsamples = [network.stem.downsample, *(stage.downsample for stage in network.stages[1:])]
    for downsample, stage, side in zip(downsamples, network.stages, (7, 4, 2), strict=True):
        expected = nn.functional.max_pool2d(downsample.conv(h), 2, ceil_mode=True)
        h = downsample(h)
        torch.testing.assert_close(h, downsample.post.norm(expected).relu())
        assert h.shape == (2, downsample.conv.out_channels, side, side)
        h = stage.blocks(h)
    assert all(isinstance(connection.residual.shortcut, sw.nn.Carry) for connection in sw.chain(network))
    assert [each.reduction for each in network.stage_maps()] == [2, 4, 8]
    # stem, three transitions, three blocks of two, classifier
    maps = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert network.config.depth == len(maps) == 11
