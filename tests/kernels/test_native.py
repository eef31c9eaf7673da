"""Passes written in C, and products with epilogues, against torch's operators one after the other."""

from __future__ import annotations

import shutil
import sys
import tempfile

import pytest
import torch
from torch.nn import functional as F

from skipway.hardware.processor import cpu_flags, has_amx
from skipway.kernels import native
from skipway.kernels.epilogue import (
    FUNCTIONS,
    Activation,
    Epilogue,
    Geometry,
    pack_convolution,
    pack_linear,
    product_of_linear,
    product_of_patches,
)
from skipway.kernels.layer_norm import layer_norm
from skipway.kernels.native import (
    attention_by_tiles,
    has_native,
    native_depthwise,
    native_gelu_,
    native_layer_norm,
    native_max_pool,
    takes_depthwise,
    takes_max_pool,
    takes_tiles,
)
from skipway.kernels.sdpa import attention_forward

NAN, INF = float("nan"), float("inf")
compiled = pytest.mark.skipif(native.library() is None, reason="no C compiler")
vectors = pytest.mark.skipif(native.library() is None or native.library().gelu is None, reason="no AVX512-BF16")
tiles = pytest.mark.skipif(
    native.library() is None or native.library().attention is None, reason="no matrix units (AMX)"
)


@compiled
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 96), (33, 384), (1, 1), (2, 1000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_norm(dtype, shape, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3 + 100).to(dtype)  # a mean that is far from zero
    weight, bias = torch.randn(2, shape[-1]).to(dtype)
    assert has_native(x, weight, bias, 1e-6)
    expected = F.layer_norm(x.double(), shape[-1:], weight.double(), bias.double(), 1e-6)
    ours = native_layer_norm(x, weight, bias, 1e-6)
    theirs = F.layer_norm(x, shape[-1:], weight, bias, 1e-6)
    assert ours.dtype == dtype
    off = (theirs.double() - expected).abs().max()
    assert (ours.double() - expected).abs().max() <= 1.1 * off + 1e-5


@compiled
@pytest.mark.parametrize("first", [0.0, 1e3, 1e5])
def test_layer_norm_of_a_row_with_an_outlier(first):
    torch.manual_seed(0)
    x = torch.randn(8, 4096)
    x[:, 0] += first
    weight, bias = torch.ones(4096), torch.zeros(4096)
    expected = F.layer_norm(x.double(), (4096,))
    off = [(norm(x, weight, bias) - expected).abs().max() for norm in (
        lambda x, weight, bias: native_layer_norm(x, weight, bias, 1e-5),
        lambda x, weight, bias: F.layer_norm(x, (4096,), weight, bias),
    )]  # fmt: skip
    assert off[0] <= max(2 * off[1], 2e-6 * expected.abs().max())


@compiled
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_layer_norm_of_a_row_that_is_not_finite_is_nan_and_the_others_stay(value):
    x = torch.randn(3, 64)
    x[1, 5] = value
    ours = native_layer_norm(x, torch.ones(64), torch.zeros(64), 1e-5)
    assert ours[1].isnan().all()
    assert ours[[0, 2]].isfinite().all()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="compilers of other systems know other options")
def test_where_there_is_a_compiler_it_builds():
    found = native.library()
    assert found is not None
    # an old compiler does not know the instructions, and a system may not let a process have tiles
    assert found.gelu is None or "avx512_bf16" in cpu_flags()
    assert found.attention is None or has_amx()


@vectors
@pytest.mark.parametrize("threads", [1, 2])
def test_gelu(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite()][:-3]  # a size that no vector divides
    expected = F.gelu(x.double())
    ours = native_gelu_(x.clone()).double()
    rounding = expected.abs() * 2**-8
    assert ((ours - expected).abs() <= rounding + 1e-4).all()
    for value in (NAN, INF):
        assert str(native_gelu_(torch.tensor([value]).bfloat16()).item()) == str(value)


@vectors
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("images", "channels", "height", "width", "side"),
    [(2, 16, 8, 14, 7), (1, 20, 11, 9, 5), (3, 40, 1, 30, 3), (1, 3, 2, 1, 7), (2, 32, 7, 7, 7)],
)
@pytest.mark.parametrize("biased", [True, False])
def test_depthwise_convolutions(images, channels, height, width, side, biased, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    x = torch.randn(images, channels, height, width).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, 1, side, side).bfloat16()
    bias = torch.randn(channels).bfloat16() if biased else None
    assert takes_depthwise(x, weight, bias, (1, 1), (side // 2, side // 2))
    wide = None if bias is None else bias.double()
    expected = F.conv2d(x.double(), weight.double(), wide, padding=side // 2, groups=channels)
    ours = native_depthwise(x, weight, bias)
    assert ours.stride() == x.stride()
    assert ((ours.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-4).all()


@vectors
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("side", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2), (1, 1, 0)])
def test_max_pooling_is_that_of_torch_nan_and_all(side, stride, padding, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.randn(2, 20, 9, 7).bfloat16().contiguous(memory_format=torch.channels_last)
    x[0, 3, 4, 5], x[1, 2, 3, 4], x[1, 7] = NAN, INF, -INF
    assert takes_max_pool(x, side, stride, padding)
    ours, theirs = native_max_pool(x, side, stride, padding), F.max_pool2d(x, side, stride, padding)
    assert torch.equal(ours.nan_to_num(9.0), theirs.nan_to_num(9.0))
    assert ours.stride() == theirs.stride()


@vectors
@pytest.mark.parametrize(
    ("channels", "side", "stride", "padding"),
    [(8, 3, (2, 2), (1, 1)), (8, 3, (1, 1), (0, 0)), (8, 9, (1, 1), (4, 4)), (4, 3, (1, 1), (1, 1))],
)
def test_convolutions_that_are_not_ours(channels, side, stride, padding):
    x = torch.randn(1, 8, 10, 10).bfloat16().contiguous(memory_format=torch.channels_last)
    assert not takes_depthwise(x, torch.randn(channels, 1, side, side).bfloat16(), None, stride, padding)
    plain = torch.randn(8, 1, 3, 3).bfloat16()
    assert not takes_depthwise(x.contiguous(), plain, None, (1, 1), (1, 1))
    assert not takes_depthwise(x, plain, torch.zeros(8), (1, 1), (1, 1))
    assert takes_depthwise(x, plain, None, (1, 1), (1, 1))


def test_without_a_compiler_torch_computes(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    x = torch.randn(4, 8)
    assert native.library() is None
    assert not has_native(x, torch.ones(8), torch.zeros(8), 1e-5)
    q = torch.randn(1, 1, 4, 32, dtype=torch.bfloat16)
    assert not takes_tiles(q, q, q, None, False, False)
    assert torch.equal(layer_norm(x, torch.ones(8), torch.zeros(8), 1e-5), F.layer_norm(x, (8,), eps=1e-5))


def test_a_compiler_that_fails_leaves_torch(monkeypatch):
    monkeypatch.setattr(native, "compilers", lambda: [["false"], ["true"]])  # the second one writes nothing
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    assert native.library() is None


@compiled
@pytest.mark.parametrize("named", ["false", "env cc", "no-such-compiler --wrapped"])
def test_a_compiler_of_the_environment_may_have_options_or_fail(named, monkeypatch):
    monkeypatch.setenv("CC", named)
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    assert native.library() is not None


def test_no_folder_to_build_in_leaves_torch(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    x = torch.randn(4, 8)
    assert native.library() is None
    assert torch.equal(layer_norm(x, torch.ones(8), torch.zeros(8), 1e-5), F.layer_norm(x, (8,), eps=1e-5))


def attention_in_double(q, k, v, bias=None):
    logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    if bias is not None:
        logits.unflatten(0, (-1, len(bias))).add_(bias.double())
    return logits.softmax(-1).nan_to_num() @ v.double()


@tiles
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("images", "heads", "rows", "keys", "dims", "biases"),
    [
        (2, 3, 197, 197, 64, None),
        (4, 2, 49, 49, 32, (2, 2)),
        (4, 3, 49, 49, 32, (2, 1)),
        (1, 1, 1, 1, 2, None),
        (2, 2, 33, 70, 24, (1, 2)),
        (2, 2, 33, 70, 24, (1, 1)),
        (3, 1, 16, 500, 80, None),
    ],
)
def test_attention(images, heads, rows, keys, dims, biases, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    q = torch.randn(images, rows, heads, dims).bfloat16().transpose(1, 2)
    k, v = torch.randn(images, keys, 2, heads, dims).bfloat16().permute(2, 0, 3, 1, 4)
    bias = torch.randn(*biases, rows, keys).bfloat16() if biases else None
    assert takes_tiles(q, k, v, bias, False, False)
    ours, kept = attention_by_tiles(q, k, v, bias, False, False)
    expected = attention_in_double(q, k, v, bias)
    assert kept.numel() == 0
    assert ours.shape == expected.shape
    assert (ours.double() - expected).abs().max() <= 2**-7 * expected.abs().max()  # two roundings to bfloat16


@tiles
def test_hidden_keys_count_for_nothing_and_hidden_rows_are_zero():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 40, 32).bfloat16()
    bias = torch.zeros(1, 1, 40, 40).bfloat16()
    bias[..., 20:] = -INF
    bias[..., 7, :] = -INF
    ours, _ = attention_by_tiles(q, k, v, bias, False, False)
    seen, _ = attention_by_tiles(q, k[:, :, :20], v[:, :, :20], None, False, False)
    assert ours[0, 0, 7].count_nonzero() == 0
    assert torch.allclose(ours[0, 0, 8:].float(), seen[0, 0, 8:].float(), atol=0.02)


@tiles
@pytest.mark.parametrize("value", [NAN, INF])
def test_attention_to_what_is_not_finite_is_not_finite(value):
    q, k, v = torch.randn(3, 1, 2, 40, 32).bfloat16()
    v[0, 1, 3, 4] = value
    ours, _ = attention_by_tiles(q, k, v, None, False, False)
    theirs = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    k[0, 0, 5, 6] = NAN
    assert attention_by_tiles(q, k, v, None, False, False)[0][0, 0].isnan().all()


@tiles
@pytest.mark.parametrize(
    "change",
    [
        lambda q: {"causal": True},
        lambda q: {"keep_weights": True},
        lambda q: {"q": q.float(), "k": q.float(), "v": q.float()},
        lambda q: {"k": q[..., :16]},
        lambda q: {"v": q[:, :, :5]},
        lambda q: {"bias": torch.zeros(1, 2, 8, 8)},
        lambda q: {"bias": torch.zeros(1, 2, 8, 9).bfloat16()},
        lambda q: {"bias": torch.zeros(3, 2, 8, 8).bfloat16()},
        lambda q: {"bias": torch.zeros(1, 3, 8, 8).bfloat16()},
        lambda q: {"q": q.mT.contiguous().mT},
        lambda q: {"q": q[..., :3], "k": q[..., :3], "v": q[..., :3]},
    ],
)
def test_tiles_do_not_take(change):
    q = torch.randn(2, 2, 8, 32).bfloat16()
    given = {"q": q, "k": q, "v": q, "bias": None, "causal": False, "keep_weights": False}
    assert takes_tiles(**given)
    assert not takes_tiles(**{**given, **change(q)})


@tiles
def test_attention_without_gradients_is_measured_with_tiles():
    q = torch.randn(2, 2, 64, 32).bfloat16()
    out, _ = attention_forward(q, q, q, None, False, False)
    assert any("tiles" in each.seconds for each in attention_forward.chosen.values())
    assert torch.allclose(out.float(), F.scaled_dot_product_attention(q, q, q).float(), atol=0.05)


ACTIVATIONS = [
    *(Activation(name) for name in ("relu", "sigmoid", "tanh", "swish", "hardswish", "hardsigmoid")),
    Activation("hardtanh", (0.0, 6.0)),
    Activation("leaky_relu", (0.1,)),
    Activation("gelu", (), "none"),
    Activation("gelu", (), "tanh"),
]
EPILOGUES = [Epilogue(), *(Epilogue(None, each) for each in ACTIVATIONS), Epilogue("add"), Epilogue("mul")]


def test_every_activation_is_tried():
    assert {each.name for each in ACTIVATIONS} == set(FUNCTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_linear_maps_with_epilogues(epilogue, dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 8).to(dtype), torch.randn(6, 8).to(dtype), torch.randn(6).to(dtype)
    other = torch.randn(3, 5, 6).to(dtype) if epilogue.joined else None
    packed = pack_linear(weight, 15)
    given = (x, weight, bias, other, epilogue, packed)
    compare_implementations(product_of_linear, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("epilogue", [*EPILOGUES, Epilogue("add", Activation("relu"))], ids=str)
@pytest.mark.parametrize(("groups", "side"), [(1, 3), (8, 3), (1, 1)])
def test_convolutions_with_epilogues(epilogue, dtype, groups, side):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(8, 8 // groups, side, side).to(dtype), torch.randn(8).to(dtype)
    geometry = Geometry((2, 1) if side == 3 else (1, 1), (side // 2, side // 2), (1, 1), groups)
    other = torch.randn(2, 8, 3 if side == 3 else 6, 5).to(dtype) if epilogue.joined else None
    packed = pack_convolution(weight, geometry, x.shape)
    if groups > 1 and epilogue.joined and epilogue.activation and dtype is torch.bfloat16:
        pytest.skip("torch fails there, so that it is refused where it is measured")
    compare_implementations(product_of_patches, (x, weight, bias, other, epilogue, geometry, packed))


def compare_implementations(kernel, given):
    wide = [each.double() if isinstance(each, torch.Tensor) else each for each in given]
    expected = kernel.implementation("reference").compute(*wide)
    taken = [each for each in kernel.implementations if each.supports(*given)]
    assert len(taken) > 1
    for each in taken:
        off = (each.compute(*given).double() - expected).abs().max() / expected.abs().max()
        assert off <= {torch.float32: 1e-5, torch.bfloat16: 2e-2}[given[0].dtype], each.name


def test_an_activation_after_another_tensor_is_left_to_torch_in_linear_maps():
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    epilogue = Epilogue("add", Activation("relu"))
    given = (x, weight, None, x, epilogue, pack_linear(weight, 4))
    assert [each.name for each in product_of_linear.implementations if each.supports(*given)] == ["reference"]
    assert torch.allclose(product_of_linear(*given), F.relu(x @ weight.mT + x), atol=1e-5)
