"""Names of other libraries: entry points that build, weights that compute the same there and here."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import skipway as sw
from benchmarks import parity
from benchmarks.peers import difference, import_timm, import_torchvision, import_transformers, randomise_
from skipway.install_lines import library_line
from skipway.models import families, find_config
from skipway.models.resnet import CONV_KIT, pooled_projection
from skipway.models.resnet import aliases as resnet
from skipway.models.vit import aliases as vit
from skipway.weights import export_names

SIDE = 32
RESNET_LIKE = ("resnet", "resnext", "wide_resnet", "vit", "convnext", "swin_")
TORCHVISION = [
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d"),
    *("resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2", "vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32"),
    *("vit_h_14", "convnext_tiny", "convnext_small", "convnext_base", "convnext_large", "swin_t", "swin_s", "swin_b"),
    *("swin_v2_t", "swin_v2_s", "swin_v2_b"),
]


def peer(name, bring):
    """The library, or a skip with the reason."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: {library_line(name)}")
    return bring()


@pytest.fixture(scope="module")
def timm():
    return peer("timm", import_timm)


@pytest.fixture(scope="module")
def torchvision():
    return peer("torchvision", import_torchvision)


@pytest.fixture(scope="module")
def transformers():
    return peer("transformers", import_transformers)


def images() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE)


# The tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family in families() if family.aliases], ids=lambda family: family.name)
def test_every_alias_builds(family):
    for alias in family.aliases:
        assert isinstance(sw.build(alias, device="meta"), nn.Module), alias


def test_no_alias_stands_twice():
    entries = [alias for family in families() for alias in family.aliases]
    assert len(entries) == len(set(entries))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_s_names_are_there(name):
    assert any(name in family.aliases for family in families())


def test_torchvision_has_no_others_of_our_families(torchvision):
    theirs = torchvision.models.list_models(module=torchvision.models)
    assert {name for name in theirs if name.startswith(RESNET_LIKE)} == set(TORCHVISION)


@pytest.mark.parametrize(
    ("modules", "elsewhere"),
    [
        (("resnet", "resnetv2"), resnet.ELSEWHERE),
        (("vision_transformer", "deit"), vit.ELSEWHERE),
        (("cait", "swin_transformer", "swin_transformer_v2"), {}),
    ],
    ids=["resnet", "vit", "others"],
)
def test_every_entry_point_of_timm_is_ours_or_said_to_be_none(timm, modules, elsewhere):
    entries = {entry for module in modules for entry in timm.list_models(module=module)}
    ours = {alias for family in families() for alias in family.aliases}
    assert entries - ours == set(elsewhere)
    assert not ours & set(elsewhere)


@pytest.mark.parametrize("name", ["seresnet18", "resnet50s", "resnet26t", "resnetv2_50d"])
def test_parameter_counts_equal_timm_s(timm, name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    ours = sw.build(name, device="meta")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_a_bare_resnet26_is_timm_s_and_the_dial_is_cifar_s():
    assert sw.build("resnet26", device="meta").config.blocks == (2, 2, 2, 2)
    assert sw.build("resnet", depth=26, device="meta").config.blocks == (4, 4, 4)


def test_an_alias_takes_options_and_a_depth():
    config = sw.build("resnet50d.ra2_in1k", depth=101, classes=10, device="meta").config
    assert (config.blocks, config.stem, config.shortcut, config.classes) == ((3, 4, 23, 3), "deep", "pooled", 10)


@pytest.mark.parametrize(("name", "depth"), [("convnextv2_small", 18), ("vit_small_patch16_36x1_224", 6)])
def test_a_depth_goes_before_the_blocks_of_an_alias(name, depth):
    assert sw.build(name, depth=depth, device="meta").config.depth == depth
    assert find_config(name, depth)[1].depth == depth


def test_blocks_of_another_depth_than_the_given_one_are_refused():
    with pytest.raises(sw.SkipwayError, match="depth=6, blocks=12: these blocks make a depth of 12"):
        sw.build("vit", depth=6, blocks=12, device="meta")
    assert sw.build("vit", depth=6, blocks=6, device="meta").config.blocks == 6


# The parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "width", "channels"),
    [("deep", 64, [3, 32, 32, 64]), ("deep", 128, [3, 64, 64, 128]), ("tiered", 64, [3, 24, 32, 64])],
)
def test_a_deep_stem_is_three_small_convolutions(stem, width, channels):
    """He, T. et al. 2019, fig. 2b; timm's "s" and "t"."""
    model = sw.build("resnet50", stem=stem, stem_width=width, device="meta")
    convs = [module for module in model.stem if isinstance(module, nn.Conv2d)]
    assert [conv.in_channels for conv in convs] + [convs[-1].out_channels] == channels
    assert [(conv.kernel_size[0], conv.stride[0]) for conv in convs] == [(3, 2), (3, 1), (3, 1)]
    assert [name for name, _ in model.stem.named_children()][-3:] == ["norm3", "act3", "pool"]


def test_a_deep_stem_has_no_gate_and_its_biases_under_fixup():
    model = sw.build("se-resnet50", stem="deep", scheme="fixup", device="meta")
    names = [name for name, _ in model.stem.named_children()]
    assert names[:-2] == ["conv1", "norm1", "act1", "before2", "conv2", "norm2", "act2", "before3", "conv3", "norm3"]


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 4), (7, 9)])
def test_a_pooled_projection_projects_means(size):
    """The mean over the pixels that are there, in loops; He, T. et al. 2019, fig. 2c."""
    project = pooled_projection(3, 8, stride=2).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    rows = [
        torch.stack([x[:, :, i : i + 2, j : j + 2].mean((2, 3)) for j in range(0, size[1], 2)], dim=-1)
        for i in range(0, size[0], 2)
    ]
    expected = project.norm(torch.einsum("oc,nchw->nohw", project.conv.weight[:, :, 0, 0], torch.stack(rows, dim=2)))
    torch.testing.assert_close(project(x), expected)


def test_what_needs_no_pooling_has_none():
    assert [name for name, _ in pooled_projection(64, 256).named_children()] == ["conv", "norm"]


def test_a_gate_has_hidden_units_enough():
    assert sw.nn.SqueezeExcitation(64, reduction=16).squeeze.out_channels == 4
    assert sw.nn.SqueezeExcitation(64, reduction=16, least=8).squeeze.out_channels == 8


# Parity -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry", ["resnet18", "resnet18d", "resnet26d", "resnet14t", "seresnet18", "resnetv2_18", "resnetv2_50d"]
)
def test_resnets_of_timm(timm, entry):
    theirs = randomise_(timm.create_model(entry, num_classes=5))
    assert difference(sw.build(entry, classes=5), theirs, "timm", images()) < 1e-5


def test_grouped_and_gated_bottlenecks_of_timm(timm):
    theirs = randomise_(timm.create_model("seresnext26d_32x4d", num_classes=5))
    assert difference(sw.build("seresnext26d_32x4d", classes=5), theirs, "timm", images()) < 1e-5


@pytest.mark.parametrize("entry", ["resnet18", "resnext50_32x4d"])
def test_resnets_of_torchvision(torchvision, entry):
    theirs = randomise_(torchvision.models.get_model(entry, num_classes=5))
    assert difference(sw.build(entry, classes=5), theirs, "torchvision", images()) < 1e-5


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_resnets_of_hugging_face_in_memory_and_on_disk(transformers, tmp_path, block):
    expansion = 4 if block == "bottleneck" else 1
    sizes = {"embedding_size": 8, "hidden_sizes": [8 * expansion, 16 * expansion], "depths": [2, 1], "num_labels": 5}
    theirs = randomise_(transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, layer_type=block)))
    options = {"width": 8, "stem_width": 8, "blocks": (2, 1), "block": block, "classes": 5}
    ours, x = sw.build("resnet50", **options), images()
    assert difference(ours, theirs, "huggingface", x) < 1e-5
    theirs.save_pretrained(tmp_path)
    stored = sw.load(sw.build("resnet50", **options), tmp_path / "model.safetensors", names="huggingface")
    torch.testing.assert_close(stored.eval()(x), ours(x), rtol=0, atol=0)
    assert export_names(ours, "huggingface").keys() == theirs.state_dict().keys()


@pytest.mark.parametrize(("pooled", "gated"), [(False, False), (False, True), (True, True)])
def test_blocks_of_timm(timm, pooled, gated):
    project = pooled_projection if pooled else sw.projection
    gate = partial(sw.nn.SqueezeExcitation, least=8) if gated else None
    block = sw.Bottleneck(16, 8, 2, project(16, 32, 2), kit=replace(CONV_KIT, gate=gate))
    made = timm.models.resnet
    theirs = made.Bottleneck(
        16,
        8,
        2,
        (made.downsample_avg if pooled else made.downsample_conv)(16, 32, 1, stride=2),
        attn_layer="se" if gated else None,
    )
    x = torch.randn(2, 16, 8, 8)
    assert difference(block, randomise_(theirs), "timm", x) < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "resnet18d", "seresnet18", "resnetv2_18d", "resnet26t"])
def test_what_we_export_timm_loads(timm, name):
    ours = randomise_(sw.build(name, width=8, stem_width=8, classes=3))
    exported = export_names(ours, "timm")
    theirs = timm.create_model(name)
    assert exported.keys() == theirs.state_dict().keys()
    twin = sw.load(sw.build(name, width=8, stem_width=8, classes=3), exported, names="timm")
    for key, value in ours.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value)


TOKENS = {"depth": 2, "num_heads": 2, "embed_dim": 16, "patch_size": 8, "img_size": SIDE, "num_classes": 5}
OUR_TOKENS = {"depth": 2, "heads": 2, "dim": 16, "patch": 8, "image": SIDE, "classes": 5}


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({"fc_norm": False, "act_layer": "gelu_tanh"}, {"pooling": "normed-mean", "act": "tanhgelu"}),
        ({"reg_tokens": 3, "no_embed_class": True}, {"pooling": "mean", "registers": 3}),
    ],
)
def test_means_over_patches_of_timm(timm, options, own):
    """timm's `norm` stands before the mean and its `fc_norm` behind: where ours stands the other way nothing loads."""
    theirs = randomise_(timm.models.VisionTransformer(**TOKENS, class_token=False, global_pool="avg", **options))
    assert difference(sw.build("vit-tiny-16", **OUR_TOKENS, **own), theirs, "timm", images()) < 1e-5
    other = {"mean": "normed-mean", "normed-mean": "mean"}[own["pooling"]]
    with pytest.raises(sw.CheckpointError, match="norm"):
        sw.load(sw.build("vit-tiny-16", **{**OUR_TOKENS, **own, "pooling": other}), theirs.state_dict(), names="timm")


# The wide table's own arithmetic ------------------------------------------------------------------------------------


def entry(**changes) -> parity.Entry:
    options = {"width": 4, "stem_width": 4, "classes": 3}
    made = {
        "library": "torchvision",
        "family": "resnet",
        "name": "resnet18",
        "ours": "resnet18",
        "make": lambda: Renamed(sw.build("resnet18", **options)),
        "build": lambda **more: sw.build("resnet18", **options, **more),
    }
    return parity.Entry(**{**made, **changes})


class Renamed(nn.Module):
    """One of ours under torchvision's names."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def state_dict(self):
        return export_names(self.inner, "torchvision")

    def forward(self, x):
        return self.inner(x)


def test_the_wide_table_tells_right_from_wrong():
    assert parity.check(entry(), 350e6).verdict == "ok"
    wrong = entry(build=lambda **more: sw.build("resnet18", width=4, stem_width=4, classes=3, scheme="plain", **more))
    assert parity.check(wrong, 350e6).verdict == "FAIL"
    narrow = entry(build=lambda **more: sw.build("resnet18", width=8, stem_width=4, classes=3, **more))
    assert "in the file" in parity.check(narrow, 350e6).reason
    unknown = entry(build=lambda **more: sw.build("resnet18", widht=4, **more))
    assert "did you mean 'width'" in parity.check(unknown, 350e6).reason


def test_the_wide_table_compares_shapes_of_what_is_too_large():
    assert parity.check(entry(), 10).verdict == "shapes"
    narrow = entry(build=lambda **more: sw.build("resnet18", width=8, stem_width=4, classes=3, **more))
    assert parity.check(narrow, 10).verdict == "FAIL"


def test_the_wide_table_sums_up():
    outcomes = [parity.check(entry(), 350e6), parity.check(entry(), 10)]
    assert [line.split()[:5] for line in parity.summary(outcomes).splitlines()[1:]] == [
        ["torchvision", "resnet", "1", "1", "0"],
        ["torchvision", "all", "1", "1", "0"],
    ]
