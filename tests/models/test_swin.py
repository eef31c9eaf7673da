"""The Swin family: windows against loops over tokens, published sizes, parity with torchvision, timm, Hugging Face."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import skipway as sw
from benchmarks.peers import difference, import_timm, import_torchvision, import_transformers, randomise_
from skipway.models import SwinConfig, variants
from skipway.models.swin.aliases import ALIASES
from skipway.models.swin.network import NeighbourConcat
from skipway.nn import CosineWindowAttention, Window, WindowAttention
from skipway.nn.kit import Kit
from skipway.nn.placement import PRE_NORM
from skipway.nn.window import ContinuousPosition, PositionTable, QueryValueBias, SharpQuery
from skipway.schemes import all_schemes
from skipway.weights import export_names, match

LINEAR = Kit(conv=nn.Conv2d, linear=nn.Linear, norm=None, act=nn.GELU)
SMALL = {"dim": 8, "heads": 2, "blocks": (2, 2, 2), "window": 4, "image": 64, "classes": 5}
ATTENTIONS = {"v1": WindowAttention, "v2": CosineWindowAttention}
VERSIONS = {"v1": "swin-tiny", "v2": "swinv2-tiny"}
PUBLISHED = [variant for variant in variants() if variant.family.startswith("swin")]


def small(version: str, **options) -> nn.Module:
    return sw.build(VERSIONS[version], **{**SMALL, **options}).eval()


def branch(version: str, side: int, shift: int) -> WindowAttention:
    """An attention branch of 8 channels and 2 heads in float64, nothing in it at zero."""
    made = ATTENTIONS[version](8, 2, Window(side, shift), kit=LINEAR, placement=PRE_NORM).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


@pytest.mark.parametrize("patch", [1, 2, 3, 5])
def test_patches_do_not_overlap_and_see_every_pixel(patch):
    """A patch is one linear map of its own pixels, whether its side is even or odd."""
    stem = small("v1", patch=patch, image=4 * patch, blocks=(2,)).stem
    nn.init.normal_(stem.patch.bias)
    x = torch.randn(2, 3, 4 * patch, 3 * patch)
    squares = x.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(3)
    expected = squares @ stem.patch.weight.flatten(1).T + stem.patch.bias
    torch.testing.assert_close(stem.patch(x).permute(0, 2, 3, 1), expected, rtol=1e-4, atol=1e-5)


# The slow reference: no rolling, no partition, only which tokens meet -------------------------------------------------


def band(position: int, length: int, side: int, shift: int) -> int:
    """The number of a token's window along one axis: boundaries at shift, shift + side, …; one window if it fits."""
    return 0 if length <= side else (position - shift) // side


def meets(a: tuple[int, int], b: tuple[int, int], size: tuple[int, int], side: int, shift: int) -> bool:
    """Whether two tokens stand in the same window (Liu et al. 2021, fig. 2: those at the border are smaller)."""
    padded = [length + -length % side for length in size]
    return all(band(p, n, side, shift) == band(q, n, side, shift) for p, q, n in zip(a, b, padded, strict=True))


def position_table(attention: WindowAttention, dy: int, dx: int) -> torch.Tensor:
    side = attention.window.side
    return attention.position.table[(dy + side - 1) * (2 * side - 1) + dx + side - 1]


def position_function(attention: WindowAttention, dy: int, dx: int) -> torch.Tensor:
    """B(Δ) = 16 σ(W₂ relu(W₁ Δ̂ + b)) with Δ̂ = sign(Δ) log₂(1 + 8|Δ|/(w-1)) / 3, one offset at a time."""
    p = attention.position
    spaced = [math.copysign(math.log2(1 + 8 * abs(d) / (p.learned_at - 1)) / 3, d) for d in (dy, dx)]
    hidden = torch.relu(p.inner @ torch.tensor(spaced, dtype=torch.float64) + p.inner_bias)
    return 16 * torch.sigmoid(p.outer @ hidden)


def logits(attention: WindowAttention, q: torch.Tensor, k: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    """One logit per head for a pair of tokens whose q and k are (heads, d)."""
    if isinstance(attention, CosineWindowAttention):
        scale = attention.norm_q.log_scale.flatten().clamp(max=math.log(100)).exp()
        return scale * torch.cosine_similarity(q, k, dim=-1) + position_function(attention, dy, dx)
    return (q * k).sum(-1) / q.shape[-1] ** 0.5 + position_table(attention, dy, dx)


def slow(attention: WindowAttention, h: torch.Tensor) -> torch.Tensor:
    """The whole branch, token by token."""
    window, (_, height, width, dim) = attention.window, h.shape
    places = [(y, x) for y in range(height + -height % window.side) for x in range(width + -width % window.side)]
    out = torch.zeros_like(h)
    for image in range(len(h)):
        rows = [h[image, y, x] if y < height and x < width else h.new_zeros(dim) for y, x in places]
        qkv = [attention.bias(attention.qkv(row)).view(3, attention.heads, -1) for row in rows]
        for (y, x), (q, _, _) in zip(places, qkv, strict=True):
            if y >= height or x >= width:
                continue
            seen = [
                (logits(attention, q, k, y - b, x - a), v)
                for (b, a), (_, k, v) in zip(places, qkv, strict=True)
                if meets((y, x), (b, a), (height, width), window.side, window.shift)
            ]
            weights = torch.stack([logit for logit, _ in seen]).softmax(0)
            value = sum(weight[:, None] * v for weight, (_, v) in zip(weights, seen, strict=True))
            out[image, y, x] = attention.proj(value.flatten())
    return out


@pytest.mark.parametrize("version", ATTENTIONS)
@pytest.mark.parametrize(
    ("size", "side", "shift"),
    [
        ((4, 4), 2, 0),
        ((4, 4), 2, 1),
        ((6, 3), 3, 1),  # one axis is a single window: no shift along it
        ((3, 3), 3, 1),
        ((5, 7), 3, 1),  # padded
        ((5, 4), 4, 2),
        ((2, 1), 3, 1),  # smaller than the window
    ],
)
@torch.no_grad()
def test_branch_equals_loops_over_tokens(version, size, side, shift):
    attention = branch(version, side, shift)
    h = torch.randn(2, *size, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(h), slow(attention, h), rtol=1e-6, atol=1e-6)


@given(st.integers(1, 11), st.integers(1, 11), st.integers(1, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_who_meets_whom(height, width, side, data):
    """Every pair of a window either met before the shift, or is told apart; and all tokens come back to their place."""
    window = Window(side, shift=data.draw(st.integers(0, side - 1)))
    columns, rows = width + -width % side, height + -height % side
    numbered = torch.arange(rows * columns, dtype=torch.float64).view(1, rows, columns, 1)
    tokens = window.split(numbered)[0, :, :, 0].long()
    apart = window.apart(height, width, torch.device("cpu"))
    for number, members in enumerate(tokens.tolist()):
        for i, a in enumerate(members):
            for j, b in enumerate(members):
                together = apart is None or not apart[number, i, j]
                size = (height, width)
                assert together == meets(divmod(a, columns), divmod(b, columns), size, side, window.shift)
    x = torch.randn(2, height, width, 3)
    torch.testing.assert_close(window.join(window.split(x), height, width), x, rtol=0, atol=0)


@pytest.mark.parametrize("side", [1, 2, 3, 7])
def test_position_bias_by_relative_offset(side):
    """Swin's index: row (dy + w - 1)(2w - 1) + dx + w - 1 of the table, dy and dx of the query from the key."""
    position = PositionTable(heads=2, side=side)
    position.reset_parameters()
    found = position()
    for i in range(side**2):
        for j in range(side**2):
            dy, dx = i // side - j // side, i % side - j % side
            row = (dy + side - 1) * (2 * side - 1) + dx + side - 1
            assert torch.equal(found[:, i, j], position.table[row])


def test_continuous_positions_of_other_windows():
    """Equal offsets have equal coordinates in every window, and log-spacing keeps larger ones near: from windows of 8
    to 16 the range grows by a third, where linear offsets grow by 1.14 (Liu et al. 2022, sec. 3.3).
    """
    wide = ContinuousPosition(2, 16, learned_at=8).offsets()
    narrow = ContinuousPosition(2, 8).offsets()
    assert (wide.max() / narrow.max()).item() == pytest.approx(math.log2(1 + 8 * 15 / 7) / math.log2(9))
    assert (wide.max() / narrow.max()).item() == pytest.approx(1.33, abs=0.02)
    wide, narrow = wide.view(31, 31, 2), narrow.view(15, 15, 2)
    torch.testing.assert_close(wide[8:23, 8:23], narrow, rtol=0, atol=0)  # equal offsets, equal coordinates
    assert narrow[0, 14].tolist() == pytest.approx([-math.log2(9) / 3, math.log2(9) / 3])
    assert not ContinuousPosition(2, 1).offsets().any()


def test_logit_scale_is_clamped_at_one_hundred():
    """Liu et al. 2022: τ is not below 0.01."""
    sharp = SharpQuery(heads=1)
    q = torch.randn(1, 1, 3, 4)
    with torch.no_grad():
        sharp.log_scale.fill_(9.0)
    torch.testing.assert_close(sharp(q).norm(dim=-1), torch.full((1, 1, 3), 100.0 * 4**0.5))
    sharp.reset_parameters()
    torch.testing.assert_close(sharp(q).norm(dim=-1), torch.full((1, 1, 3), 10.0 * 4**0.5))


def test_keys_have_no_bias():
    bias = QueryValueBias(2)
    with torch.no_grad():
        bias.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert bias(torch.zeros(6)).tolist() == [1, 2, 0, 0, 3, 4]
    attention = branch("v2", 2, 0)
    assert attention.qkv.bias is None


@pytest.mark.parametrize("version", ATTENTIONS)
@pytest.mark.parametrize("shift", [0, 1])
def test_gradients_of_the_branch(version, shift):
    attention = ATTENTIONS[version](4, 2, Window(2, shift), kit=LINEAR, placement=PRE_NORM).double()
    if version == "v2":
        attention.position = ContinuousPosition(2, 2, hidden=3).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    names = [name for name, _ in attention.named_parameters()]
    start = [parameter.detach().clone().requires_grad_() for parameter in attention.parameters()]

    def run(h, *values):
        return torch.func.functional_call(attention, dict(zip(names, values, strict=True)), (h,))

    h = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (h, *start))


def test_neighbours_are_column_by_column():
    """↖ ↙ ↗ ↘, the order of the authors' code; an odd map is padded below and on the right."""
    x = torch.arange(9.0).view(1, 3, 3, 1)
    found = NeighbourConcat()(x)[0]
    for row in range(2):
        for column in range(2):
            places = [(2 * row + a, 2 * column + b) for b in range(2) for a in range(2)]
            expected = [x[0, r, c, 0].item() if r < 3 and c < 3 else 0.0 for r, c in places]
            assert found[row, column].tolist() == expected


# The network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", PUBLISHED, ids=lambda v: v.name)
def test_parameter_counts_equal_the_published_ones(variant):
    model = sw.build(variant.name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == variant.parameters


def test_depth_counts_blocks_and_the_chain_branches():
    assert sw.build("swin", depth=12, device="meta").config == sw.build("swin-tiny", device="meta").config
    assert sw.build("swinv2-base", depth=12, device="meta").config.blocks == (2, 2, 6, 2)
    model = sw.build("swinv2", depth=100, device="meta")
    assert model.config.blocks == (2, 2, 94, 2)
    assert model.config.norm == "respost"
    assert len(sw.chain(model)) == model.config.branches == 200
    assert sw.build("swin-30", device="meta").config.depth == 30


def test_sites_restart_behind_each_merging():
    sites = [c.residual.site for c in sw.chain(small("v1", blocks=(2, 4)))]
    assert [site.index for site in sites] == list(range(12))
    assert [site.since for site in sites] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
    assert [site.dim for site in sites] == [8] * 4 + [16] * 8
    assert {site.depth for site in sites} == {12}
    assert [site.kind for site in sites] == ["attention", "mlp"] * 6
    assert {site.spatial for site in sites} == {0}


def test_every_second_block_is_shifted_by_half_a_window():
    model = small("v1", window=5, image=64)
    windows = [c.branch.window for c in sw.chain(model) if c.site.kind == "attention"]
    # maps of 16, 8 and 4 tokens: the last holds no window of 5
    assert windows == [Window(5), Window(5, 2), Window(5), Window(5, 2), Window(4), Window(4, 2)]


def test_v2_starts_with_silent_branches_and_v1_does_not():
    """P8: the authors and timm zero the norms behind V2's branches; torchvision and Hugging Face leave them at one."""
    for version, silent in (("v1", False), ("v2", True)):
        for connection in sw.chain(small(version)):
            if silent:
                assert not connection.branch.closing_norm().weight.any()
                assert not connection.branch.closing_norm().bias.any()
            else:
                assert (connection.residual.pre.norm.weight == 1).all()
                assert connection.path[-1].weight.any()
    assert all((c.branch.closing_norm().weight == 1).all() for c in sw.chain(small("v2", scheme="identity")))
    assert all(isinstance(v.config.scheme, sw.ZeroInit) == (v.family == "swinv2") for v in PUBLISHED)


@pytest.mark.parametrize("version", VERSIONS)
def test_norms_stand_as_published(version):
    model = small(version)
    assert [n for n, _ in model.stages[0].merge.named_children()] == {
        "v1": ["neighbours", "norm", "reduction"],
        "v2": ["neighbours", "reduction", "norm"],
    }[version]
    assert [n for n, _ in model.head.named_children()] == ["norm", "flatten", "pool", "classifier"]
    post = small(version, norm="post")
    assert not hasattr(post.head, "norm")
    assert hasattr(post.stages[0][0].attention.post, "norm")


def test_normfree_enters_a_merging_with_unit_variance():
    """β² = 1 + α² l of the l branches before the merging, as at a projection; the branches behind start anew."""
    model = small("v1", scheme="normfree(alpha=0.5)")
    assert model.stages[0].merge.enter.factor == pytest.approx((1 + 0.25 * 4) ** -0.5)
    assert model.stages[1][0].attention.pre.enter.factor == 1.0


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [(4, 4), (36, 52), (64, 64)])
def test_any_multiple_of_the_patch_and_a_batch_of_one(version, size):
    model = randomise_(small(version))
    x = torch.randn(3, 3, *size)
    out = model(x)
    assert out.shape == (3, 5)
    torch.testing.assert_close(model(x[:1]), out[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_bfloat16_and_autocast(version):
    x = torch.randn(2, 3, 36, 64)
    model = small(version, dtype=torch.bfloat16)
    assert model(x.bfloat16()).dtype == torch.bfloat16
    full = randomise_(small(version))
    with torch.autocast("cpu", torch.bfloat16):
        out = full(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), full(x), rtol=0.1, atol=0.05)


@pytest.mark.parametrize(("version", "blocks", "size"), [("v1", (2,), (36, 52)), ("v2", (1, 1), (32, 32))])
def test_compiles_without_graph_break_and_exports(version, blocks, size):
    """Windows and padding are those of both versions; shifts are tried in the first, merging in the second one."""
    torch.compiler.reset()
    model = randomise_(small(version, blocks=blocks))
    x = torch.randn(2, 3, *size)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(program(x[:1].repeat(3, 1, 1, 1))[1:2], model(x)[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_but_parameters_is_kept(version):
    """No masks, no index tables: a copy, a network born on the meta device and one filled by assignment all work."""
    model = randomise_(small(version))
    assert not list(model.buffers())
    x = torch.randn(2, 3, 36, 64)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    empty = small(version, device="meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(x), model(x))


@pytest.mark.parametrize("version", VERSIONS)
def test_positions_and_scales_are_not_decayed(version):
    """The authors' no_weight_decay: the table, or the function and the logit scale."""
    model = small(version)
    groups = sw.param_groups(model, lr=1.0, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        map = name.endswith("weight") and "norm." not in name
        assert (decay[id(parameter)] > 0) == map, name


WINDOWED = [name for name in all_schemes() if name != "valueresiduals"]
"""Values of the first attention belong to other tokens in windows that are shifted."""


@pytest.mark.parametrize("scheme", [*WINDOWED, "plain(kind='attention')"])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_scheme_dresses_it(version, scheme):
    model = small(version, scheme=scheme, norm={"v1": "pre", "v2": "respost"}[version])
    assert torch.isfinite(model(torch.randn(2, 3, 32, 48))).all()
    paths = [[map.module for map in connection.path] for connection in sw.chain(model)]
    assert all(len(path) == 2 for path in paths)
    rows = [connection.path[0].rows for connection in sw.chain(model)][::2]
    assert all(rows[number] == slice(2 * dim, 3 * dim) for number, dim in enumerate((8, 8, 16, 16, 32, 32)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("swin", {"depth": 13}, r"depth=13: .* near it are 12 and 14"),
        ("swin", {"depth": 4}, r"near it are 8 and 10"),
        ("swinv2-tiny", {"depth": 25}, r"near it are 24 and 26"),
        ("swin-tinny", {}, "did you mean 'swin-tiny'"),
        ("swin-tiny", {"image": 226}, r"image=226, patch=4: .* near it are 224 and 228"),
        ("swin-tiny", {"heads": 5}, "heads divides dim"),
        ("swin-tiny", {"window": 0}, r"window=0: the rule is a whole number"),
        ("swin-tiny", {"window": (7, 7)}, "one for each of the 4"),
        ("swin-tiny", {"blocks": ()}, "at least one block"),
        ("swin-tiny", {"blocks": (2, 0)}, "at least one block in every one"),
        ("swin-tiny", {"attention": "cos"}, "one of 'dot', 'cosine'"),
        ("swin-tiny", {"norm": "before"}, "one of 'pre'"),
        ("swin-tiny", {"learned_window": 7}, "a table of positions has one window"),
        ("swinv2-tiny", {"learned_window": (8, 8)}, "one for each of the 4"),
    ],
)
def test_bad_input_names_value_rule_and_way_out(name, options, message):
    with pytest.raises(sw.SkipwayError, match=message):
        sw.build(name, **options)


def test_numbers_of_stages_are_read_once():
    window = map(int, "4442")
    config = sw.build("swin-tiny", blocks=map(int, "2222"), window=window, image=32, device="meta").config
    assert (config.blocks, config.window, config.windows) == ((2, 2, 2, 2), (4, 4, 4, 2), (4, 4, 2, 1))
    with pytest.raises(sw.SkipwayError, match=r"window=<map.*: the rule is a whole number of at least 1 for all"):
        replace(config, window=map(int, "44"))


def test_integers_of_numpy_are_integers():
    ours = sw.build("swin-tiny", dim=np.int64(12), window=np.int64(4), image=32, blocks=np.array([2, 2, 2, 2]))
    assert ours.config.windows == (4, 4, 2, 1)
    assert ours.config.blocks == (2, 2, 2, 2)
    assert sw.build("convnext-tiny", blocks=np.array([1, 1, 1, 1]), width=8).config.branches == 4


def test_an_image_that_the_patch_does_not_divide_says_what_is_near():
    with pytest.raises(sw.SkipwayError, match=r"33 × 64 pixels: .* of its patch, 4; near it are 32 or 36 for 33$"):
        small("v1")(torch.zeros(1, 3, 33, 64))
    with pytest.raises(sw.SkipwayError, match="0 <= shift < side"):
        Window(4, shift=4)
    with pytest.raises(sw.SkipwayError, match="at least one token"):
        Window(0)


# Other libraries -----------------------------------------------------------------------------------------------------

needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed: docs/install.md")
needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


@pytest.fixture(scope="module", autouse=True)
def quiet_imports():
    """The other libraries warn about each other at import; that is not ours to fail on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if find_spec("timm") is not None:
            import_timm()
        if find_spec("transformers") is not None:
            import_transformers().SwinForImageClassification  # noqa: B018 - the lazy import is what warns


def of_torchvision(version: str) -> nn.Module:
    """torchvision's network of the size of SMALL."""
    swin = import_torchvision().models.swin_transformer
    options = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "num_classes": 5}
    if version == "v2":
        options |= {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return randomise_(swin.SwinTransformer(window_size=[4, 4], **options))


def of_timm(version: str, image: int, window: int | tuple[int, ...], **options) -> nn.Module:
    import_timm()
    from timm.models import swin_transformer, swin_transformer_v2

    kind = {"v1": swin_transformer.SwinTransformer, "v2": swin_transformer_v2.SwinTransformerV2}[version]
    options |= {"embed_dim": 8, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "num_classes": 5}
    return randomise_(kind(img_size=image, window_size=window, **options))


def of_huggingface(version: str, image: int, window: int) -> nn.Module:
    name, library = {"v1": "Swin", "v2": "Swinv2"}[version], import_transformers()
    config, kind = getattr(library, f"{name}Config"), getattr(library, f"{name}ForImageClassification")
    sizes = {"patch_size": 4, "embed_dim": 8, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "num_labels": 5}
    return randomise_(kind(config(image_size=image, window_size=window, **sizes)))


@needs_torchvision
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [(64, 64), (32, 32), (36, 52), (4, 20)])
def test_logits_equal_torchvisions_at_any_size(version, size):
    assert difference(small(version), of_torchvision(version), "torchvision", torch.randn(2, 3, *size)) < 1e-5


@needs_timm
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("image", "window"), [(64, 4), (64, 8), (32, (2, 4, 2)), (48, 3)])
def test_logits_equal_timms(version, image, window):
    """At sizes whose maps the windows divide; elsewhere timm pads behind the shift, torchvision and HF before it."""
    learned = {"v1": {}, "v2": {"learned_window": (3, 3, 2)}}[version]
    theirs = of_timm(version, image, window, **({"pretrained_window_sizes": (3, 3, 2)} if learned else {}))
    ours = small(version, image=image, window=window, **learned)
    assert difference(ours, theirs, "timm", torch.randn(2, 3, image, image)) < 1e-5


@needs_transformers
@pytest.mark.parametrize(
    ("version", "image", "window"), [("v1", 64, 4), ("v1", 36, 3), ("v1", 40, 3), ("v2", 64, 4), ("v2", 64, 8)]
)
def test_logits_equal_hugging_faces(version, image, window):
    """Its V2 counts the maps by rounding down, so that its last windows are smaller on odd maps; ours round up."""
    theirs = of_huggingface(version, image, window)
    ours = small(version, image=image, window=window)
    assert difference(ours, theirs, "huggingface", torch.randn(2, 3, image, image)) < 1e-5


@needs_transformers
@pytest.mark.parametrize("version", VERSIONS)
def test_hugging_faces_names_in_files_load_too(version, tmp_path):
    """Transformers 5 has other names in memory than in the files that it writes."""
    theirs = of_huggingface(version, 64, 4)
    theirs.save_pretrained(tmp_path)
    in_memory, from_file = small(version), small(version)
    sw.load(in_memory, theirs.state_dict(), names="huggingface")
    sw.load(from_file, tmp_path / "model.safetensors", names="huggingface")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(in_memory(x), from_file(x))


@needs_timm
@needs_torchvision
@pytest.mark.parametrize(
    ("name", "library", "size"),
    [
        ("swin_t", "torchvision", 224),
        ("swin_v2_t", "torchvision", 256),
        ("swin_tiny_patch4_window7_224", "timm", 224),
        ("swinv2_tiny_window16_256", "timm", 256),
    ],
)
def test_published_networks_equal_theirs(name, library, size):
    theirs = getattr(import_torchvision().models, name)() if library == "torchvision" else None
    theirs = import_timm().create_model(name) if theirs is None else theirs
    entry, options = ALIASES[name]
    ours = sw.build(entry, **options)
    assert difference(ours, randomise_(theirs), library, torch.randn(1, 3, size, size)) < 1e-5


@needs_timm
def test_aliases_cover_timm():
    names = [name for name in import_timm().list_models("swin*") if "_cr_" not in name]
    assert set(names) <= set(ALIASES)
    assert all(sw.build(name, device="meta").config for name in ALIASES)


@needs_timm
@pytest.mark.parametrize(
    "name", ["swin_base_patch4_window12_384", "swin_s3_tiny_224", "swinv2_base_window12to24_192to384"]
)
def test_aliases_have_timms_shapes(name):
    with torch.device("meta"):
        theirs = import_timm().create_model(name)
    ours = sw.build(name, device="meta")
    assert match(ours, theirs.state_dict(), names="timm").fits
    attentions = [layer.blocks[0].attn for layer in theirs.layers]
    assert [(side, side) for side in ours.config.windows] == [each.window_size for each in attentions]
    if ours.config.learned_window is not None:
        learned = [(side, side) for side in ours.config.learned_windows]
        assert learned == [each.pretrained_window_size for each in attentions]


@needs_torchvision
def test_torchvisions_v2_has_a_bias_that_never_acts():
    """Why its count is larger: the bias of the keys, zeroed in every forward; ours to theirs writes zeros there."""
    counts = {"swin_v2_t": "swinv2-tiny", "swin_v2_s": "swinv2-small", "swin_v2_b": "swinv2-base"}
    for theirs, ours in counts.items():
        with torch.device("meta"):
            model = getattr(import_torchvision().models, theirs)()
        own = sw.build(ours, device="meta")
        keys = sum(c.site.dim for c in sw.chain(own) if c.site.kind == "attention")
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in own.parameters()) + keys


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("library", ["torchvision", "timm", "huggingface"])
def test_names_go_both_ways(version, library):
    model = randomise_(small(version))
    state = export_names(model, library)
    back = sw.load(small(version), state, names=library)
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    root = {"v1": "swin.", "v2": "swinv2."}[version]
    if library == "huggingface":
        assert all(key.startswith((root, "classifier.")) for key in state)


def coordinates(side: int, learned: int) -> torch.Tensor:
    """V2's offsets as files hold them (Liu et al. 2022, eq. 4, over log₂ 8): (1, 2 side - 1, 2 side - 1, 2)."""
    line = torch.arange(1.0 - side, side) * 8 / (learned - 1)
    line = line.sign() * torch.log2(1 + line.abs()) / 3
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)[None]


@pytest.mark.parametrize("learned", [2, 3, 24])
def test_tables_in_a_file_show_the_windows_that_v2_learned_at(learned):
    table = coordinates(4, learned).bfloat16()
    state = export_names(small("v2"), "timm")
    state |= {f"layers.{i}.blocks.{j}.attn.relative_coords_table": table for i in range(3) for j in range(2)}
    said = rf"learned_window=\(4, 4, 4\) in the model, learned_window=\({learned}, {learned}, {learned}\) in the file"
    with pytest.raises(sw.CheckpointError, match=said):
        sw.load(small("v2"), state, names="timm")
    assert sw.load(small("v2", learned_window=learned), state, names="timm")


@pytest.mark.parametrize(
    ("names", "key"),
    [
        ("timm", "layers.{}.blocks.{}.attn.relative_coords_table"),
        ("huggingface", "swinv2.encoder.layers.{}.blocks.{}.attention.self.relative_coords_table"),
    ],
)
def test_each_stage_has_a_table_of_its_own(names, key):
    model = small("v2", image=16, learned_window=2)
    state = export_names(model, names)
    windows = model.config.windows
    stages = reversed(list(enumerate(windows)))
    state |= {key.format(i, j): coordinates(window, 2) for i, window in stages for j in range(2)}
    assert len(set(windows)) > 1
    assert sw.load(model, state, names=names)


@needs_torchvision
def test_torchvision_s_tables_show_its_windows():
    state = of_torchvision("v2").state_dict()
    with pytest.raises(sw.CheckpointError, match=r"window=\(8, 8, 4\) in the model, window=\(4, 4, 4\) in the file"):
        sw.load(small("v2", window=8), state, names="torchvision")
    assert sw.load(small("v2", window=8, learned_window=4), state, names="torchvision")


def test_config_tells_its_maps_and_windows():
    config = SwinConfig(dim=96, heads=3, window=7, image=300)
    assert config.maps == (75, 38, 19, 10)
    assert config.windows == (7, 7, 7, 7)
    assert config.widths == (96, 192, 384, 768)
    assert config.learned_windows == (7, 7, 7, 7)
