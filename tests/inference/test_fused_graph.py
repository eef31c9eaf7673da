"""The fused graph of a network: the same outputs, and what has become part of a product."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import skipway as sw
from skipway import kernels
from skipway.inference import optimize
from skipway.inference.fused_attention import bias_of
from skipway.inference.fused_graph import fuse_graph
from skipway.inference.fused_operators import FusedAttention, FusedNorm, FusedPool, FusedProduct
from skipway.kernels import epilogue
from skipway.kernels.epilogue import patches_in_place

VIEWS = {"reshape", "permute", "transpose", "getitem", "unbind", "select", "slice", "expand", "unsqueeze"}


def left(graph):
    """Names of the operators that are no modules and compute something."""
    names = [
        getattr(each.target, "__name__", str(each.target)) for each in graph.graph.nodes if each.op == "call_function"
    ]
    return [name.partition(".")[0] for name in names if name.partition(".")[0] not in VIEWS]


def epilogues(graph):
    return [str(each.epilogue.joined or (each.epilogue.activation and each.epilogue.activation.name))
            for each in graph.modules() if isinstance(each, FusedProduct)]  # fmt: skip


@torch.no_grad()
def fused(model, *shape, dtype=torch.float32, tolerance=1e-5):
    """The graph of a model, which agrees with it on two inputs."""
    torch.manual_seed(1)
    x = torch.randn(*shape, dtype=dtype)
    expected = copy.deepcopy(model).eval()
    graph = fuse_graph(copy.deepcopy(model).eval(), x)
    for each in (x, torch.randn_like(x)):
        y = expected(each)
        assert (graph(each) - y).abs().max() <= tolerance * y.abs().max()
    return graph


class Wrapped(nn.Module):
    """A function of modules."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def trained(norm):
    """A norm with statistics and an affine that are not those it begins with."""
    for each in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(each)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet8", {}),
        ("vit-tiny-16", {"depth": 2, "image": 32}),
        ("convnext-atto", {"depth": 4}),
        ("swin-tiny", {"depth": 8, "dim": 24}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_families_agree(name, options, dtype):
    torch.manual_seed(0)
    model = sw.build(name, classes=5, **options).eval()
    size = 32 if "image" in options or name == "resnet8" else 224
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        graph = fuse_graph(copy.deepcopy(model).to(dtype), x.to(dtype))
        off = (graph(x.to(dtype)).float() - expected).abs().max() / expected.abs().max()
    assert off <= {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert not {"batch_norm", "relu", "gelu", "layer_norm", "linear", "conv2d", "scaled_dot_product_attention"} & set(
        left(graph)
    )


def test_norms_and_activations_of_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), trained(nn.BatchNorm2d(8)), nn.SiLU(), nn.Conv2d(8, 4, 1, groups=4)
    )
    graph = fused(model, 2, 3, 9, 9)
    assert left(graph) == []
    assert epilogues(graph) == ["swish", "None"]


def test_a_norm_without_affine_and_one_of_features():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False), nn.Hardtanh(-2, 1), nn.Linear(5, 2))
    nn.init.normal_(model[1].running_mean)
    assert left(fused(model, 4, 6)) == []


def test_norms_over_another_axis_than_the_outputs_stay():
    model = nn.Sequential(nn.Linear(6, 6), trained(nn.BatchNorm1d(6)))
    assert "_native_batch_norm_legit_no_training" in left(fused(model, 4, 6, 6))


def test_the_end_of_a_bottleneck():
    parts = {"conv": nn.Conv2d(4, 4, 3, padding=1, bias=False), "norm": trained(nn.BatchNorm2d(4))}
    model = Wrapped(lambda self, x: F.relu(x + self.norm(self.conv(x))), **parts)
    graph = fused(model, 2, 4, 6, 6)
    assert left(graph) == []
    assert [each.epilogue.activation.name for each in graph.children()] == ["relu"]


def test_another_activation_than_relu_after_a_sum_leaves_the_sum_in_the_convolution():
    model = Wrapped(lambda self, x: F.leaky_relu(x + self.conv(x), 0.1), conv=nn.Conv2d(4, 4, 3, padding=1))
    with kernels.only("onednn"):
        graph = fused(model, 2, 4, 6, 6)
    assert epilogues(graph) == ["add"]
    assert left(graph) == ["leaky_relu"]


def test_of_two_products_the_later_one_adds():
    model = Wrapped(
        lambda self, x: self.first(x) + self.second(self.first(x)), first=nn.Linear(4, 4), second=nn.Linear(4, 4)
    )
    graph = fused(model, 3, 4)
    assert left(graph) == []
    assert sorted(epilogues(graph)) == ["None", "None", "add"]


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: self.map(x) * self.map(x),
        lambda self, x: (y := self.map(x)) * y,
        lambda self, x: F.gelu(y := self.map(x)) + y,
        lambda self, x: torch.add(x, self.map(x), alpha=2),
        lambda self, x: self.map(x) + torch.ones(1, 3, 1),
        lambda self, x: self.map(x) + x[:1],
        lambda self, x: self.map(x) * 2 + 1,
        lambda self, x: self.map(self.map(x).relu_()).mul_(x),
        lambda self, x: self.map(x) - x,
        lambda self, x: torch.stack([self.map(x), x]).sum(0),
    ],
)
def test_what_is_used_twice_or_broadcast(function):
    fused(Wrapped(function, map=nn.Linear(4, 4)), 2, 3, 4)


@pytest.mark.parametrize(
    ("function", "overwritten"),
    [
        (lambda self, x: F.relu(self.first(x) + self.second(x)), 1),
        (lambda self, x: x + self.first(x), 0),
        (lambda self, x: (y := self.first(x)) * (y + self.second(y)), 0),
        (lambda self, x: (y := self.first(x))[:1].sum() * (y + self.second(x)), 1),
        (lambda self, x: ((y := self.first(x))[:1], F.relu(y + self.second(x)))[::-1], 0),
        (lambda self, x: self.table + self.first(x), 0),
        (lambda self, x: (y := self.first(x)).mT + self.second(y.mT), 0),
        (lambda self, x: F.relu(self.second(x) + F.relu(self.first(x))).mT, 1),
        (lambda self, x: F.relu(self.second(y := self.first(x)) + y), 0),
        (lambda self, x: (y := self.first(x)).type_as(x) * (y + self.second(x)), 0),
        (lambda self, x: torch.einsum("nchw->nhwc", y := self.first(x)).relu().sum() + F.relu(y + self.second(x)), 1),
        (lambda self, x: (v := torch.einsum("nchw->nhwc", y := self.first(x)), y + self.second(x), v.relu())[1:], 0),
        (lambda self, x: (v := torch.broadcast_tensors(y := self.first(x))[0], y + self.second(x), v.relu())[1:], 0),
        (lambda self, x: (v := (y := self.first(x)).unsafe_split(2, 1)[1], y + self.second(x), v.relu())[1:], 0),
    ],
)
def test_a_convolution_writes_over_what_it_adds_where_nobody_reads_it_afterwards(function, overwritten):
    parts = {"first": nn.Conv2d(4, 4, 3, padding=1), "second": nn.Conv2d(4, 4, 3, padding=1)}
    model = Wrapped(function, **parts, table=nn.Parameter(torch.randn(2, 4, 6, 6)))
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad(), kernels.only("onednn"):
        graph = fuse_graph(copy.deepcopy(model), x)
        products = [each for each in graph.modules() if isinstance(each, FusedProduct)]
        assert sum(each.chosen.compute is patches_in_place for each in products) == overwritten
        for _ in range(2):
            given = x.clone()
            for ours, theirs in zip(graph(given), model(x), strict=True):
                assert torch.allclose(ours, theirs, atol=1e-5)
            assert torch.equal(given, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [(3, 2, 1), (2, None, 0), (3, 1, 0), ((3, 2), 1, 0), (3, 2, 1, 1, False, True), (3, 1, 1, 2)]
)
def test_max_pooling(options, dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(*options))
    graph = fused(
        model.to(dtype), 2, 3, 9, 8, dtype=dtype, tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    )
    square = options in [(3, 2, 1), (2, None, 0), (3, 1, 0)]
    assert any(isinstance(each, FusedPool) for each in graph.modules()) == square


def test_layer_scale_is_folded():
    gamma = nn.Parameter(torch.randn(4))
    model = Wrapped(lambda self, x: x + self.gamma * self.map(x), map=nn.Linear(4, 4), gamma=gamma)
    graph = fused(model, 2, 3, 4)
    assert left(graph) == []
    assert epilogues(graph) == ["add"]


def test_a_map_that_is_shared_keeps_the_scale_of_each_place():
    parts = {"map": nn.Linear(4, 4), "gamma": nn.Parameter(torch.randn(4))}
    assert left(fused(Wrapped(lambda self, x: self.map(self.gamma * self.map(x)), **parts), 2, 4)) == []


def test_a_residual_whose_axes_are_moved():
    parts = {"map": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}
    model = Wrapped(lambda self, x: x + self.map(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2), **parts)
    graph = fused(model, 2, 4, 5, 6)
    assert left(graph) == []
    assert epilogues(graph) == ["add"]
    assert any(isinstance(each, FusedNorm) for each in graph.modules())


def test_a_gate():
    model = Wrapped(lambda self, x: F.silu(self.gate(x)) * self.up(x), gate=nn.Linear(4, 8), up=nn.Linear(4, 8))
    graph = fused(model, 3, 4)
    assert left(graph) == []
    assert sorted(epilogues(graph)) == ["mul", "swish"]


def test_idle_operators_and_constants():
    parts = {"map": nn.Linear(4, 4), "drop": nn.Dropout(0.5), "table": nn.Parameter(torch.randn(5, 4))}
    model = Wrapped(
        lambda self, x: self.drop(self.map(x)).clone() + self.table[torch.arange(3)].cumsum(0) * torch.ones(3, 1),
        **parts,
    )
    assert left(fused(model, 3, 4)) == ["add"] or left(fused(model, 3, 4)) == []


def test_a_mask_that_is_made_in_the_shape_of_an_input_is_a_constant():
    def masked(self, x):
        mask = x.new_zeros(3, 4)
        mask[:2, 1:] = torch.inf
        return torch.cat([x.masked_fill(mask.isinf(), 0), torch.full_like(x, 2), x.new_ones(1, 4).bool()], 0)

    assert left(fused(Wrapped(masked), 3, 4)) == ["masked_fill", "cat"]


def test_random_numbers_are_drawn_in_every_call():
    graph = fuse_graph(Wrapped(lambda self, x: x + torch.rand(3)), torch.zeros(3))
    with torch.no_grad():
        assert not torch.equal(graph(torch.zeros(3)), graph(torch.zeros(3)))


@pytest.mark.parametrize(
    "function", [lambda self, x: self.table * 2, lambda self, x: x.clone(), lambda self, x: self.table]
)
def test_what_is_returned_may_be_written_into(function):
    model = Wrapped(function, table=nn.Parameter(torch.ones(3)))
    x = torch.ones(3)
    with torch.no_grad():
        graph = fuse_graph(model, x)
        graph(x).zero_()
        assert graph(x).count_nonzero() == 3


@pytest.mark.parametrize("kind", ["none", "numbers", "truth", "windows", "head"])
def test_attention(kind):
    torch.manual_seed(0)
    mask = {
        "none": None,
        "numbers": torch.randn(1, 1, 6, 6),
        "truth": torch.rand(1, 2, 6, 6) > 0.3,
        "windows": torch.randn(2, 2, 6, 6).repeat(2, 1, 1, 1),
        "head": torch.randn(6, 6),
    }[kind]

    def attend(self, x):
        q, k, v = self.map(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    graph = fused(Wrapped(attend, map=nn.Linear(8, 24)), 4, 6, 8)
    (attention,) = [each for each in graph.modules() if isinstance(each, FusedAttention)]
    assert attention.bias is None or len(attention.bias) == (2 if kind == "windows" else 1)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}])
@pytest.mark.parametrize("rows", [6, 4])
def test_options_of_attention(options, rows):
    def attend(self, x):
        q, k, v = self.map(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q[:, :, :rows], k, v, **options)

    graph = fused(Wrapped(attend, map=nn.Linear(8, 24)), 4, 6, 8)
    # a mask that begins with the first key, of more keys than rows, is left to torch
    ours = any(isinstance(each, FusedAttention) for each in graph.modules())
    assert ours == (rows == 6 or "is_causal" not in options)


BIAS, PER_HEAD, WINDOWS = torch.randn(2, 6, 6), torch.rand(2, 1, 1) + 0.5, torch.randn(2, 1, 6, 6)
CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)
HIDDEN_ROW = torch.zeros(6, 6).masked_fill(torch.arange(6)[:, None] == 2, -torch.inf)


def windowed(logits):
    return (logits.unflatten(0, (-1, 2)) + WINDOWS).flatten(0, 1)


@pytest.mark.parametrize(
    ("logits", "weights", "ours"),
    [
        (lambda q, k: q @ k.mT, lambda p: p, True),
        (lambda q, k: (q * 0.5) @ k.mT, lambda p: p, True),
        (lambda q, k: (q / 3) @ (k * 2).mT, lambda p: p, True),
        (lambda q, k: q @ k.mT / 2 + BIAS, lambda p: p.contiguous(), True),
        (lambda q, k: 0.3 * (BIAS + q @ k.mT), lambda p: F.dropout(p, 0.5, False), True),
        (lambda q, k: F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * PER_HEAD + BIAS, lambda p: p, True),
        (lambda q, k: windowed(q @ k.mT + BIAS), lambda p: p, True),
        (lambda q, k: (q @ k.mT * 0.5).masked_fill(CAUSAL, -torch.inf), lambda p: p, True),
        (lambda q, k: (q @ k.mT).masked_fill(CAUSAL, -1e9) * 2, lambda p: p, True),
        (lambda q, k: (q @ k.mT).masked_fill(CAUSAL, -2.0), lambda p: p, False),
        (lambda q, k: (q @ k.mT).masked_fill(CAUSAL, -1e6) * 1e-6, lambda p: p, False),
        (lambda q, k: (q @ k.mT).masked_fill(HIDDEN_ROW.isinf(), -1e9), lambda p: p, False),
        (lambda q, k: q @ k.mT + HIDDEN_ROW.clamp_min(-1e9), lambda p: p, False),
        (lambda q, k: (y := q @ k.mT) + y, lambda p: p, False),
        (lambda q, k: (y := q @ k.mT) * y, lambda p: p, False),
        (lambda q, k: 2 / (3 + q @ k.mT), lambda p: p, False),
        (lambda q, k: q @ k.mT + q.mean((-1, -2), keepdim=True) * BIAS, lambda p: p, False),
        (lambda q, k: q @ k.mT * BIAS, lambda p: p, False),
        (lambda q, k: q @ k.mT, lambda p: p.mT, False),
        (lambda q, k: q @ k.mT, lambda p: p * 2, False),
        (lambda q, k: (q @ k.mT).relu(), lambda p: p, False),
    ],
)
def test_attention_that_is_written_out(logits, weights, ours):
    def attend(self, x):
        q, k, v = self.map(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return (weights(logits(q, k).softmax(-1)) @ v).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    graph = fused(Wrapped(attend, map=nn.Linear(8, 24)), 4, 6, 8)
    found = [each for each in graph.modules() if isinstance(each, FusedAttention)]
    assert bool(found) == ours
    assert not ours or "softmax" not in left(graph)


def test_weights_of_attention_that_are_returned_are_computed():
    def attend(self, x):
        q, k, v = self.map(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT).softmax(-1)
        return torch.cat([weights, weights @ v], -1)

    assert "softmax" in left(fused(Wrapped(attend, map=nn.Linear(8, 24)), 4, 6, 8))


def test_softmax_over_another_axis_is_left_to_torch():
    def attend(self, x):
        q, k, v = self.map(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return (q @ k.mT).softmax(-2) @ v

    assert "softmax" in left(fused(Wrapped(attend, map=nn.Linear(8, 24)), 4, 6, 8))


def test_softmax_in_float32_of_16_bits():
    def attend(self, x):
        q, k, v = self.map(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT).float() * 0.5 + BIAS).softmax(-1, dtype=torch.float32).to(v.dtype) @ v

    model = Wrapped(attend, map=nn.Linear(8, 24)).bfloat16()
    assert "softmax" not in left(fused(model, 4, 6, 8, dtype=torch.bfloat16, tolerance=0.03))


def test_periods_of_a_bias():
    windows = torch.randn(3, 1, 2, 2)
    assert torch.equal(bias_of(windows.repeat(2, 1, 1, 1), (2, 2), torch.float32), windows)
    mixed = torch.cat([windows, windows.flip(0)])
    assert torch.equal(bias_of(mixed, (2, 2), torch.float32), mixed)


def test_double_precision_is_left_to_torch():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), trained(nn.BatchNorm2d(4)), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    ).double()
    assert fused(model, 2, 3, 4, 4, dtype=torch.float64, tolerance=1e-12) is not None


def test_kernels_that_are_switched_off():
    with kernels.off():
        graph = fused(nn.Sequential(nn.Linear(4, 4), nn.GELU()), 2, 4)
    (product,) = graph.children()
    assert product.chosen is product.kernel.implementation("reference")
    assert product.weight is not None


def test_weights_are_held_once():
    with kernels.only("onednn"):
        graph = fused(nn.Sequential(nn.Linear(64, 64), nn.GELU()), 64, 64)
    assert sum(each.numel() for each in graph.parameters()) == 64  # the bias: the weight is packed


def test_what_became_part_of_a_weight_is_released():
    parts = {"map": nn.Linear(8, 8), "table": nn.Parameter(torch.randn(64, 8)), "scale": nn.Parameter(torch.randn(8))}
    model = Wrapped(lambda self, x: self.scale.exp() * self.map(x) + self.table.cumsum(0)[:4], **parts)
    model.unused = nn.Parameter(torch.zeros(3))
    graph = fuse_graph(model, torch.randn(4, 8))
    held = {name: tuple(each.shape) for name, each in (*graph.named_parameters(), *graph.named_buffers())}
    named = {each.target for each in graph.graph.nodes if each.op == "get_attr"}
    assert {name for name in held if not name.startswith("fused_")} == named
    assert len(named) == 1  # the summand


def test_packed_weights_go_with_the_graph(monkeypatch):
    packed = []
    pack = epilogue.pack_weight
    monkeypatch.setattr(epilogue, "pack_weight", lambda *given: packed.append(pack(*given)) or packed[-1])
    model = nn.Sequential(nn.Linear(64, 64), nn.Flatten(0), nn.Unflatten(0, (1, 8, 8, 64)), nn.Conv2d(8, 8, 1)).eval()
    with torch.no_grad():
        graph = fuse_graph(model, torch.randn(64, 64))
    assert len(packed) == 2
    kept = [weakref.ref(each) for each in packed]
    del graph
    packed.clear()
    gc.collect()
    assert [each() for each in kept] == [None, None]


def test_an_image_without_a_batch_is_left_to_torch():
    table = torch.arange(1.0, 7).view(6, 1)
    fused(Wrapped(lambda self, x: self.map(x) * table, map=nn.Conv2d(6, 6, 3, padding=1)), 6, 6, 6)


def test_a_factor_with_more_axes_than_the_product_is_left_to_torch():
    graph = fused(Wrapped(lambda self, x: self.map(x) * torch.arange(4.0).view(1, 1, 4), map=nn.Linear(4, 4)), 3, 4)
    assert graph(torch.randn(3, 4)).shape == (1, 3, 4)


def test_a_mask_is_not_copied_for_every_head():
    mask = torch.ones(6, 6, dtype=torch.bool).tril()

    def attend(self, x):
        q, k, v = self.map(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2).flatten(2)

    model = Wrapped(attend, map=nn.Linear(8, 24))
    model.register_buffer("mask", mask)
    (attention,) = [each for each in fused(model, 4, 6, 8).modules() if isinstance(each, FusedAttention)]
    assert attention.bias.numel() == mask.numel()


def test_paths_that_depend_on_values_are_refused_with_the_reason():
    model = Wrapped(lambda self, x: self.map(x) if x.sum() > 0 else x, map=nn.Linear(4, 4))
    with pytest.raises(sw.SkipwayError, match="reads values of its input"):
        optimize(model, torch.ones(2, 4), backends=["fused"], cache=False)


def test_autocast_of_the_caller_changes_nothing():
    torch.manual_seed(0)
    model = sw.build("vit-tiny-16", depth=1, image=32, classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    fast = optimize(model, x, backends=["fused"], precisions="bfloat16", cache=False)
    expected = fast(x)
    with torch.autocast("cpu"):
        assert torch.allclose(fast(x), expected)


def test_optimize_gives_batches_of_any_size_and_saves(tmp_path):
    torch.manual_seed(0)
    model = sw.build("resnet8", classes=5).eval()
    x = torch.randn(4, 3, 32, 32)
    fast = optimize(model, x, backends=["fused"], cache=False)
    fast.save(tmp_path / "fast.pt")
    again = sw.load_optimized(tmp_path / "fast.pt")
    more = torch.randn(7, 3, 32, 32)
    with torch.no_grad():
        for each in (fast, again):
            assert each.backend == "fused"
            assert torch.allclose(each(x), model(x), atol=1e-4)
            assert torch.allclose(each(more), model(more), atol=1e-4)


def test_inputs_with_gaps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 8)).eval()
    fast = optimize(model, torch.randn(8, 16, 64), backends=["fused"], cache=False)
    wide = torch.randn(8, 16, 128)
    for x in (wide[..., ::2], wide[:, :, 64:], torch.randn(16, 8, 64).transpose(0, 1)):
        with torch.no_grad():
            assert torch.allclose(fast(x), model(x), atol=1e-5)


@pytest.mark.parametrize("backend", ["fused", "eager"])
def test_volumes(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(2, 4, 3), trained(nn.BatchNorm3d(4)), nn.ReLU(), nn.MaxPool3d(2)).eval()
    x = torch.randn(2, 2, 6, 6, 6)
    with torch.no_grad():
        assert torch.allclose(optimize(model, x, backends=backend, cache=False)(x), model(x), atol=1e-5)


class Heads(nn.Module):
    """Several inputs by name, in containers, and a flag; several outputs in containers."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 3), nn.LayerNorm(8)

    def forward(self, model, extra=None, *, scale=1.0, doubled=False):
        y = F.gelu(self.first(self.norm(model)))
        if extra is not None:
            y = y + extra["mask"] * scale + extra["others"][0]
        return {"classes": self.second(y), "parts": [y.mean(1), y * 2 if doubled else y], "kind": "heads"}


def named_inputs(images):
    return {"scale": torch.tensor(0.5), "model": torch.randn(images, 5, 8), "doubled": True}


def in_containers(images):
    extra = {"mask": torch.randn(images, 1, 8), "others": (torch.randn(images, 5, 8),)}
    return {**named_inputs(images), "extra": extra}


@pytest.mark.parametrize(("example", "sizes"), [(named_inputs, [4, 4, 6]), (in_containers, [4, 4])])
def test_several_inputs_and_outputs_in_containers(example, sizes):
    torch.manual_seed(0)
    model = Heads().eval()
    fast = optimize(model, example(4), backends=["fused"], cache=False)
    with torch.no_grad():
        for images in sizes:
            given = example(images)
            ours, theirs = fast(**given), model(**given)
            assert list(ours) == list(theirs)
            assert torch.allclose(ours["classes"], theirs["classes"], atol=1e-5)
            for one, other in zip(ours["parts"], theirs["parts"], strict=True):
                assert torch.allclose(one, other, atol=1e-5)
        given["doubled"] = False
        with pytest.warns(UserWarning, match="other shapes, types or names") as said:  # the flag is part of the graph
            assert torch.equal(fast(**given)["parts"][1], model(**given)["parts"][1])
        assert said[0].filename == __file__


def test_outputs_have_the_types_of_the_networks():
    torch.manual_seed(0)
    model = Wrapped(lambda self, x: (self.body(x)["classes"], x.sum(-1), x.argmax(-1)), body=Heads()).eval()
    x = torch.randn(4, 5, 8)
    fast = optimize(model, x, backends=["fused"], precisions="bfloat16", cache=False)
    with torch.no_grad():
        assert [each.dtype for each in fast(x)] == [each.dtype for each in model(x)]
        assert torch.allclose(fast(x)[0], model(x)[0], atol=0.1)


def test_what_only_python_does_is_not_lost():
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.GELU()), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with pytest.raises(sw.SkipwayError, match="has a forward hook, which is lost in this backend"):
        optimize(model, torch.randn(3, 4), backends=["fused"], cache=False)
    model = Wrapped(lambda self, x: self.map(x.mul_(2)), map=nn.Linear(4, 4))
    with pytest.raises(sw.SkipwayError, match="lost in this backend"):
        optimize(model, torch.randn(3, 4), backends=["fused"], cache=False)
