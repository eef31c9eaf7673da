"""ViT and CaiT: published sizes, arithmetic against obvious references, parity with the other libraries."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import skipway as sw
from benchmarks.peers import difference, import_timm, import_torchvision, import_transformers, randomise_
from skipway.install_lines import library_line
from skipway.models import variants
from skipway.models.transformer import TOKEN_KIT
from skipway.nn import Attention, ClassAttention, Mlp, TalkingHeads
from skipway.nn.placement import PRE_NORM
from skipway.nn.positions import resample
from skipway.schemes import all_schemes, parse_scheme

TINY = {"depth": 2, "dim": 16, "heads": 2, "patch": 8, "image": 32, "classes": 5}
BUILD = {"kit": TOKEN_KIT, "placement": PRE_NORM}


@pytest.mark.parametrize("variant", [v for v in variants() if v.family in ("vit", "cait")], ids=lambda v: v.name)
def test_parameter_counts_equal_the_published_ones(variant):
    model = sw.build(variant.name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == variant.parameters


def test_depth_counts_blocks_and_branches_are_two_a_block():
    model = sw.build("vit-small-16", depth=48, device="meta")
    assert (model.config.depth, len(sw.chain(model)), model.config.dim) == (48, 96, 384)
    assert [c.site.kind for c in sw.chain(model)][:2] == ["attention", "mlp"]


@pytest.mark.parametrize("norm", ["pre", "post", "respost", "sandwich"])
def test_the_norm_stands_where_it_is_said_to(norm):
    """pre: x + F(n(x)); post: n(x + F(x)); respost: x + n(F(x)); sandwich: x + n(F(n(x)))."""
    block = sw.build("vit-tiny-16", norm=norm, **TINY).blocks[0].mlp
    mlp = block.branch
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)

    def inner(h: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(F.linear(h, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2.weight, mlp.fc2.bias)

    expected = {
        "pre": lambda: x + inner(block.pre.norm(x)),
        "post": lambda: block.post.norm(x + inner(x)),
        "respost": lambda: x + mlp.end.norm(inner(x)),
        "sandwich": lambda: x + mlp.end.norm(inner(block.pre.norm(x))),
    }[norm]()
    torch.testing.assert_close(block(x), expected)


def test_attention_against_loops():
    """Every head and every query on its own."""
    attention = Attention(8, 2, **BUILD).double()
    h = torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, v = attention.qkv(h)[0].split(8, dim=-1)
    rows = []
    for token in range(5):
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            weights = torch.softmax(torch.stack([q[token, part] @ k[other, part] / 2 for other in range(5)]), 0)
            heads.append(sum(weights[other] * v[other, part] for other in range(5)))
        rows.append(torch.cat(heads))
    torch.testing.assert_close(attention(h)[0], attention.proj(torch.stack(rows)))


def test_talking_heads_that_do_not_talk_are_attention():
    """W_l = W_w = 1, biases 0: plain attention."""
    talking, plain = TalkingHeads(8, 2, **BUILD), Attention(8, 2, **BUILD)
    plain.load_state_dict(talking.state_dict(), strict=False)
    with torch.no_grad():
        for mix in (talking.mix_logits, talking.mix_weights):
            mix.weight.copy_(torch.eye(2))
    h = torch.randn(2, 5, 8)
    torch.testing.assert_close(talking(h), plain(h))


def test_class_attention_is_the_first_row_of_attention():
    asking, plain = ClassAttention(8, 2, **BUILD), Attention(8, 2, **BUILD)
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([asking.q.weight, asking.k.weight, asking.v.weight]))
        plain.proj.weight.copy_(asking.proj.weight)
    h = torch.randn(2, 5, 8)
    out = asking(h)
    torch.testing.assert_close(out[:, 0], plain(h)[:, 0])
    assert not out[:, 1:].any()


@pytest.mark.parametrize("make", [Attention, TalkingHeads, ClassAttention])
def test_gradcheck_of_attention(make):
    branch = make(4, 2, **BUILD).double()
    assert torch.autograd.gradcheck(branch, torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True))


def test_gradcheck_of_the_mlp():
    branch = Mlp(4, 8, **BUILD).double()
    assert torch.autograd.gradcheck(branch, torch.randn(2, 4, dtype=torch.float64, requires_grad=True))


def test_the_path_of_attention_is_values_then_projection():
    """DeepNorm and Fixup work on values and projection, not on queries and keys."""
    attention = Attention(8, 2, **BUILD)
    values, projection = attention.path()
    before = attention.qkv.weight.clone()
    values.multiply_(0.5)
    assert torch.equal(attention.qkv.weight[:16], before[:16])
    assert torch.equal(attention.qkv.weight[16:], before[16:] / 2)
    assert projection.module is attention.proj


def test_deepnorm_in_a_vit_is_xavier_times_beta():
    """Xavier-normal; β on value, projection and both MLP maps, 1 on queries and keys."""
    model = sw.build("vit-small-16", depth=12, norm="post", scheme="deepnorm", image=32)
    beta = (8 * 12) ** -0.25
    attention, mlp = sw.chain(model)[0].branch, sw.chain(model)[1].branch
    qkv_deviation = (2 / (384 + 3 * 384)) ** 0.5
    assert attention.qkv.weight[: 2 * 384].std().item() == pytest.approx(qkv_deviation, rel=0.02)
    assert attention.qkv.weight[2 * 384 :].std().item() == pytest.approx(beta * qkv_deviation, rel=0.02)
    assert attention.proj.weight.std().item() == pytest.approx(beta * (2 / (2 * 384)) ** 0.5, rel=0.02)
    assert mlp.fc1.weight.std().item() == pytest.approx(beta * (2 / (5 * 384)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_skips_are_removable_separately(kind):
    model = sw.build("vit-tiny-16", scheme=f"plain(kind='{kind}')", **TINY)
    cut = [type(c.residual.shortcut).__name__ == "Cut" for c in sw.chain(model)]
    assert cut == [c.site.kind == kind for c in sw.chain(model)]


def test_positions_are_resampled_and_keep_their_prefix():
    table = torch.randn(1 + 16, 8)
    assert resample(table, (4, 4), (4, 4), 1) is table
    larger = resample(table, (4, 4), (6, 5), 1)
    assert larger.shape == (31, 8)
    assert torch.equal(larger[0], table[0])
    constant = resample(torch.full((16, 8), 3.0), (4, 4), (7, 2))
    torch.testing.assert_close(constant, torch.full((14, 8), 3.0))


@pytest.mark.parametrize("name", ["vit-tiny-16", "cait-xxs24"])
def test_other_image_sizes_and_a_batch_of_one(name):
    model = sw.build(name, **TINY).eval()
    for size in ((32, 32), (64, 40), (8, 8)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)
    with pytest.raises(sw.SkipwayError, match=r"30 × 30 pixels.*near it are 24 or 32"):
        model(torch.randn(1, 3, 30, 30))
    assert model.bfloat16()(torch.randn(2, 3, 32, 32).bfloat16()).dtype == torch.bfloat16


# tests/schemes/test_schemes.py compiles and exports a ViT with the schemes that are for tokens alone or have several
# streams. CaiT's second chain opens and closes streams once more, and its class attention takes gains
COMPILED = [
    *(("vit-tiny-16", scheme) for scheme in all_schemes("conv") if parse_scheme(scheme).open() is None),
    *(("cait-xxs24", scheme) for scheme in ("identity", "fixup", "normfree", "layerscale", "hyperconnections(2)")),
]


@pytest.mark.parametrize(("name", "scheme"), COMPILED)
def test_compiles_and_exports(name, scheme):
    torch.compiler.reset()
    least = {**TINY, "depth": 1, **({"class_blocks": 1} if name.startswith("cait") else {})}
    model = sw.build(name, scheme=scheme, **least).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)
    if scheme in ("identity", "fixup", "normfree"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads divides dim"),
        ({"image": 30}, "near it are 24 and 32"),
        ({"norm": "before"}, "one of 'pre', 'post', 'respost', 'sandwich'"),
        ({"pooling": "max"}, "one of 'token', 'mean', 'normed-mean', 'token.mean'"),
        ({"dim": 0}, "whole number of at least 1"),
        ({"depth": 0}, "every depth from 1 on"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(sw.SkipwayError, match=message):
        sw.build("vit-tiny-16", **{**TINY, **options})


# Parity ------------------------------------------------------------------------------------------------------------


def peer(name, bring):
    """The library, or a skip with the reason."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: {library_line(name)}")
    return bring()


@pytest.fixture(scope="module")
def timm():
    return peer("timm", import_timm)


@pytest.mark.parametrize(
    "entry", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_xsmall_patch16_clip_224", "cait_xxs24_224"]
)
def test_parity_with_timm(timm, entry):
    theirs = timm.create_model(entry, img_size=32, num_classes=7)
    depth = len(theirs.blocks)
    ours = sw.build(entry, depth=depth, image=32, classes=7)
    assert difference(ours, randomise_(theirs), "timm", torch.randn(2, 3, 32, 32)) < 1e-5


def test_parity_with_torchvision():
    theirs = peer("torchvision", import_torchvision).models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=64, num_classes=5
    )
    assert (
        difference(sw.build("vit-tiny-16", **TINY), randomise_(theirs), "torchvision", torch.randn(2, 3, 32, 32)) < 1e-5
    )


SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    ("config", "kind", "options", "own"),
    [
        ("ViTConfig", "ViTForImageClassification", {"intermediate_size": 64}, {"epsilon": 1e-12}),
        ("Dinov2Config", "Dinov2ForImageClassification", {}, {"pooling": "token+mean", "scheme": "layerscale"}),
        (
            "Dinov2WithRegistersConfig",
            "Dinov2WithRegistersForImageClassification",
            {"num_register_tokens": 3},
            {"pooling": "token+mean", "scheme": "layerscale", "registers": 3},
        ),
    ],
)
def test_parity_with_hugging_face_in_memory_and_on_disk(tmp_path, config, kind, options, own):
    """Names in memory and names in the file differ; both load."""
    transformers = peer("transformers", import_transformers)
    theirs = getattr(transformers, kind)(getattr(transformers, config)(**SHAPE, **options, num_labels=5))
    randomise_(theirs)
    images = torch.randn(2, 3, 32, 32)
    ours = sw.build("vit-tiny-16", **TINY, **own)
    assert difference(ours, theirs, "huggingface", images) < 1e-5
    theirs.save_pretrained(tmp_path)
    from_disk = sw.load(sw.build("vit-tiny-16", **TINY, **own), tmp_path / "model.safetensors", names="huggingface")
    with torch.no_grad():
        torch.testing.assert_close(from_disk.eval()(images), ours(images), rtol=0, atol=0)


def test_a_file_of_another_architecture_is_recognised():
    state = sw.weights.export_names(sw.build("vit-tiny-16", device="meta"), "timm")
    with pytest.raises(sw.CheckpointError, match="Its keys look like a ViT of timm"):
        sw.load(sw.build("resnet20"), state, names="torchvision")


def test_modules_are_the_field_s_own():
    assert isinstance(sw.build("vit-tiny-16", **TINY).blocks[0].mlp.pre.norm, nn.LayerNorm)
