"""Kernels: every implementation against plain torch, forward and backward; types, layouts, compile, export."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product

import pytest
import torch
from torch import nn

from skipway import kernels
from skipway.errors import SkipwayError
from skipway.kernels import autotune, dense_conv, dispatch, onednn
from skipway.kernels.autotune import KERNELS, Implementation, Kernel
from skipway.kernels.dispatch import KernelMode, PackedKernelMode, bfloat16_kernels
from skipway.kernels.epilogue import product_of_linear, product_of_patches
from skipway.kernels.matmul import PackedWeight, pack_weight, packed_linear
from skipway.surgery.acceleration import accelerate

D = torch.float64


def maps(n, c, h, w, dtype, last=True):
    x = torch.randn(n, c, h, w, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


# each kernel with arguments from (dtype, odd sizes or round ones)
def linear(dtype, odd):
    m, k, n = (37, 5, 3) if odd else (2048, 64, 64)
    return kernels.linear, (torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype), torch.randn(n, dtype=dtype))


def residual(dtype, odd):
    n, c, side = (3, 5, 7) if odd else (4, 8, 8)
    mask = torch.tensor([0.0, 2.0, *[1.0] * (n - 2)], dtype=dtype).view(-1, 1, 1, 1)
    pair = (maps(n, c, side, side, dtype), maps(n, c, side, side, dtype))
    return kernels.residual, (*pair, torch.randn(c, 1, 1, dtype=dtype), mask)


def depthwise(dtype, odd):
    n, c, h, w, k = (2, 3, 5, 9, 3) if odd else (2, 4, 14, 14, 7)
    return kernels.depthwise, (
        maps(n, c, h, w, dtype),
        torch.randn(c, 1, k, k, dtype=dtype) / k,
        torch.randn(c, dtype=dtype),
    )


def window_attention(dtype, odd):
    n, heads, tokens, d = (4, 3, 5, 7) if odd else (8, 2, 49, 8)
    shapes = (*[(n, heads, tokens, d)] * 3, (2, heads, tokens, tokens))
    return kernels.attention, tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def attention(dtype, odd):
    n, heads, tokens, d = (3, 2, 5, 7) if odd else (8, 3, 65, 16)
    return kernels.attention, tuple(torch.randn(n, heads, tokens, d, dtype=dtype) for _ in range(3))


def causal_attention(dtype, odd):
    n, heads, tokens, d = (3, 2, 5, 7) if odd else (2, 2, 150, 8)  # more rows than a block has
    return kernels.attention, (*(torch.randn(n, heads, tokens, d, dtype=dtype) for _ in range(3)), None, True)


def pointwise(dtype, odd):
    return filters(3, 5, 3, 3, 7, 1, dtype) if odd else filters(4, 16, 8, 8, 32, 1, dtype)


def patches(dtype, odd):
    return filters(3, 5, 8, 10, 7, 3, dtype) if odd else filters(4, 3, 8, 16, 16, 4, dtype)


def filters(n, c, height, width, out, side, dtype):
    weight = torch.randn(out, c, side, side, dtype=dtype) / (c**0.5 * side)
    return kernels.convolve_patches, (maps(n, c, height, width, dtype), weight, torch.randn(out, dtype=dtype))


def convolution(dtype, odd):
    n, c, side, out, k, stride, padding = (3, 5, 7, 3, 5, 2, 1) if odd else (4, 16, 8, 32, 3, 1, 1)
    weight = torch.randn(out, c, k, k, dtype=dtype) / (c**0.5 * k)
    return kernels.convolve, (maps(n, c, side, side, dtype), weight, torch.randn(out, dtype=dtype), stride, padding)


ALL = [linear, pointwise, patches, convolution, residual, depthwise, attention, causal_attention, window_attention]
NAMES = sorted({each.name for kernel in KERNELS for each in kernel.implementations} - {"triton"})


def run(function, arguments, name):
    """Output and gradients of one implementation."""
    given = [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    if function is kernels.residual:  # a mask has no gradient
        given[3].requires_grad_(False)
    with kernels.only(name):
        y = function(*given)
        torch.manual_seed(0)
        (y * torch.randn(y.shape).to(y)).sum().backward()
    return y.detach(), [a.grad for a in given if isinstance(a, torch.Tensor) and a.requires_grad]


@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_implementation_agrees_with_the_reference(make, odd, dtype):
    torch.manual_seed(1)
    function, arguments = make(dtype, odd)
    as_is = run(function, arguments, "reference")
    allowed = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.06}[dtype]
    for name in NAMES:
        y, gradients = run(function, arguments, name)
        for found, expected in zip([y, *gradients], [as_is[0], *as_is[1]], strict=True):
            assert found.dtype == expected.dtype
            assert (found - expected).abs().max() <= allowed * expected.abs().max().clamp_min(1), name


def test_the_cases_reach_every_implementation(monkeypatch):
    """Else the comparison above would compare the reference with itself."""
    monkeypatch.setattr(onednn, "has_amx", lambda: False)  # where it rounds float32, one of them is not taken
    reached = set()

    def recorded(kernel, each):
        def compute(*given):
            reached.add((kernel.name, each.name))
            return each.compute(*given)

        return replace(each, compute=compute)

    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "implementations", tuple(recorded(kernel, each) for each in kernel.implementations))
    for make in ALL:
        for name in NAMES:
            run(*make(torch.float32, False), name)
    own = [kernel for kernel in KERNELS if kernel not in (product_of_linear, product_of_patches)]  # test_native.py
    known = {(kernel.name, each.name) for kernel in own for each in kernel.implementations}
    elsewhere = ("reference", "triton", "packed", "operator", "tiles", "native")
    expected = {each for each in known if each[1] not in elsewhere}
    assert expected
    assert expected <= reached, expected - reached


@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
def test_derivatives(make):
    """Against differences of the outputs, with the operators in use."""
    torch.manual_seed(2)
    function, arguments = make(D, True)
    given = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    if function is kernels.residual:  # a mask has no gradient
        given[3].requires_grad_(False)
    for name in ("blocks", "tiles", "product"):
        with kernels.only(name):
            assert torch.autograd.gradcheck(function, tuple(given), fast_mode=True)


OPERATORS = {
    linear: "linear",
    patches: "convolution",
    convolution: "convolution",
    residual: "residual",
    depthwise: "depthwise",
    attention: "attention",
}


@pytest.mark.parametrize("make", OPERATORS, ids=lambda f: f.__name__)
def test_operators_are_proper(make):
    """torch's own check of schema, autograd registration and shape function."""
    arguments = list(make(torch.float32, True)[1])
    arguments += {attention: [None, False, True], convolution: [False], patches: [3, 0, False]}.get(make, [])
    given = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    if make is residual:
        given[3].requires_grad_(False)
    operator = getattr(torch.ops.skipway, OPERATORS[make]).default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, tuple(given), test_utils=tests)


@pytest.mark.parametrize("make", OPERATORS, ids=lambda f: f.__name__)
def test_compile_sees_through(make):
    """One graph, with the operator in it, and the same numbers."""
    torch.manual_seed(3)
    function, arguments = make(torch.float32, make is not linear)  # a small linear map is left to torch
    targets = []

    def record(graph, given):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(function, backend=record, fullgraph=True)
    assert torch.allclose(compiled(*arguments), function(*arguments), atol=1e-4)
    assert any(f"skipway.{OPERATORS[make]}" in target for target in targets), targets


def test_export_sees_through():
    class Net(nn.Module):
        def forward(self, x, w):
            return kernels.depthwise(x, w)

    given = torch.randn(2, 3, 5, 5), torch.randn(3, 1, 3, 3)
    program = torch.export.export(Net(), given)
    assert any("skipway.depthwise" in str(node.target) for node in program.graph.nodes)
    assert torch.allclose(program.module()(*given), Net()(*given), atol=1e-5)


@pytest.mark.parametrize("make", [linear, patches, convolution, depthwise, attention, window_attention])
def test_autocast_lowers(make):
    """As autocast does with a matrix product."""
    function, arguments = make(torch.float32, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert function(*arguments).dtype == torch.bfloat16


def test_windows_under_autocast_learn_what_they_learn_in_the_same_type():
    qkv, position = torch.randn(2, 4, 4, 12, requires_grad=True), torch.randn(2, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = kernels.windowed_attention(qkv, position, 1, 1)
    expected = kernels.windowed_attention(qkv.bfloat16(), position, 1, 1)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.sum().backward()
    assert (qkv.grad.dtype, position.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_comes_out_is_shaped_laid_out_and_typed_as_the_compiler_was_told(dtype):
    """Backward operators too; q, k and v as slices of one tensor, gradients in another layout than the map."""
    operators, tests = torch.ops.skipway, ("test_schema", "test_faketensor")
    q, k, v = torch.randn(3, 5, 3, 2, 8, dtype=dtype).permute(2, 0, 3, 1, 4).unbind()
    qkv, position = torch.randn(2, 4, 4, 12, dtype=dtype), torch.randn(2, 4, 4)
    x, planes = maps(2, 6, 7, 7, dtype), torch.randn(2, 6, 7, 7, dtype=dtype)
    w, c = torch.randn(2, 6, dtype=dtype).unbind()
    wide = maps(6, 6, 3, 3, dtype)
    taps, mask = torch.randn(6, 1, 3, 3, dtype=dtype), torch.ones(2, 1, 1, 1, dtype=dtype)
    for operator, given in {
        "attention": (q, k, v, None, True, False),
        "attention_backward": (v, q, k, v, torch.randn(1, 2, 5, 5, dtype=dtype), False, q.new_empty(0)),
        "windowed_attention": (qkv, position, 1, 1),
        "windowed_attention_backward": (torch.randn(2, 4, 4, 4, dtype=dtype), qkv, position, 1, 1),
        "depthwise": (x, taps, c),
        "depthwise_backward": (planes, x, taps, True, True),
        "convolution": (planes, wide, c, 2, 1, True),
        "convolution_backward": (c.new_ones(2, 6, 4, 4), x, wide, 2, 1, True, True, True),
        "residual_backward": (x, planes, w.view(-1, 1, 1), mask),
    }.items():
        torch.library.opcheck(getattr(operators, operator).default, given, test_utils=tests)
    torch.library.opcheck(operators.convolution.default, (planes, wide, c, 3, 0, False), test_utils=tests)
    patches = (c.new_ones(2, 6, 2, 2), x, wide, 3, 0, False, True, True)
    torch.library.opcheck(operators.convolution_backward.default, patches, test_utils=tests)


def test_a_wrong_implementation_is_refused():
    wrong = kernels.Kernel("wrong", lambda x: x, kernels.Implementation("lie", lambda x: x + 1))
    assert wrong.select(torch.ones(3)).name == "reference"
    assert "differs" in next(iter(wrong.chosen.values())).refused["lie"]


def test_an_implementation_of_another_type_is_refused():
    """The rest of a network would compute in it, and a compiled one read other bytes than there are."""
    zeros = Kernel("typed", lambda x: x * 0, Implementation("lowered", lambda x: (x * 0).bfloat16()))
    assert zeros(torch.randn(3)).dtype == torch.float32
    (choice,) = zeros.chosen.values()
    assert "torch.bfloat16" in choice.refused["lowered"]


def test_sums_in_float32_of_rounded_numbers_differ_as_rounded_numbers_do():
    rounded = Kernel(
        "sums", lambda x: (x * 1.01).float().sum(0), Implementation("exact", lambda x: (x.float() * 1.01).sum(0))
    )
    torch.manual_seed(0)
    rounded(torch.randn(100, 7).bfloat16())
    (choice,) = rounded.chosen.values()
    assert not choice.refused


def test_what_is_not_finite_is_left_to_the_reference_and_measured_later():
    """The first steps of a gradient scaler overflow, and a diverging run ends in NaN."""
    double = Kernel("double", lambda x: x + x, Implementation("product", lambda x: 2 * x))
    for bad in (float("inf"), float("nan")):
        assert torch.equal(double(torch.tensor([bad, 1.0])).isfinite(), torch.tensor([False, True]))
    assert not double.chosen
    double(torch.ones(2))
    assert len(double.chosen) == 1


def test_autocast_ends_before_a_kernel():
    """Logits stay in float32: a product of widened numbers is not narrowed again."""
    seen = []
    watched = Kernel("watched", lambda x: seen.append((x @ x).dtype) or x)
    with torch.autocast("cpu", torch.bfloat16):
        watched(torch.ones(2, 2))
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_an_implementation_that_fails_while_it_is_timed_is_refused():
    calls = []

    def compute(x):
        calls.append(x)
        if len(calls) > 2:
            raise RuntimeError("no memory\nat all")
        return x + x

    kernel = Kernel("double", lambda x: x + x, Implementation("greedy", compute))
    assert torch.equal(kernel(torch.ones(2)), torch.full((2,), 2.0))
    (choice,) = kernel.chosen.values()
    assert choice.implementation == "reference"
    assert choice.refused == {"greedy": "no memory"}
    assert list(choice.seconds) == ["reference"]


def test_packed_weights_are_not_kept_by_the_kernel_that_was_measured_with_them():
    held = [weakref.ref(weight := torch.randn(8, 8))]
    x = torch.randn(4, 8)
    packed_linear(x, weight, None, PackedWeight(packed := pack_weight(weight, 4)))
    count = len(packed_linear.chosen)
    held.append(weakref.ref(packed))
    packed_linear(x, weight, None, PackedWeight(packed))
    del weight, packed
    gc.collect()
    assert [each() for each in held] == [None, None]
    assert len(packed_linear.chosen) == count


def test_an_implementation_that_fails_is_refused():
    def fail(x):
        raise RuntimeError("no such operator")

    failing = kernels.Kernel("failing", lambda x: x, kernels.Implementation("fail", fail))
    assert failing.select(torch.ones(3)).name == "reference"


def test_switched_off(monkeypatch):
    for value, expected in (("off", False), ("on", True)):
        monkeypatch.setenv("SKIPWAY_KERNELS", value)
        spec = spec_from_file_location(f"autotune_{value}", autotune.__file__)  # it is read when the module is
        fresh = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, fresh)
        spec.loader.exec_module(fresh)
        assert fresh.enabled() is expected
    with pytest.raises(SkipwayError, match="no kernel has such an implementation"), kernels.only("magic"):
        pass


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.depthwise(torch.ones(1, 2, 4, 4), torch.ones(2, 1, 2, 2)), "k odd"),
        (lambda: kernels.attention(*[torch.ones(3, 1, 2, 2)] * 3, torch.ones(2, 1, 2, 2)), "divisor"),
        (lambda: kernels.attention(*[torch.ones(3, 1, 2, 2)] * 3, torch.ones(1, 1, 2, 2), True), "-inf"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(SkipwayError, match=message):
        call()


class Everything(nn.Module):
    """All that is routed, at sizes that are worth it."""

    def __init__(self):
        super().__init__()
        self.point, self.depth = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 7, padding=3, groups=32)
        self.norm, self.map = nn.BatchNorm2d(32), nn.Linear(32, 192)

    def forward(self, x):
        x = self.norm(self.depth(self.point(x))).flatten(2).mT
        q, k, v = self.map(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_routed_functions_are_the_same():
    torch.manual_seed(5)
    plain, routed = Everything(), Everything()
    routed.load_state_dict(plain.state_dict())
    x = maps(65, 16, 15, 17, torch.float32)  # few tokens: what is measured is measured often
    y = plain(x)
    y.square().mean().backward()
    seen = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(str(func).split(".default")[0])
            return func(*args, **kwargs or {})

    with KernelMode(), Watch():
        z = routed(x)
    z.square().mean().backward()
    assert {f"skipway.{name}" for name in ("linear", "convolution", "depthwise", "attention")} <= seen
    assert torch.allclose(y, z, atol=1e-5)
    for (name, ours), theirs in zip(routed.named_parameters(), plain.parameters(), strict=True):
        scale = theirs.grad.abs().max()
        assert (ours.grad - theirs.grad).abs().max() <= 1e-3 * scale + 1e-7, name
    for ours, theirs in zip(routed.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(ours.double(), theirs.double(), atol=1e-6)


@pytest.mark.parametrize("bytes_of_logits", [1 << 21, 1 << 13])
@pytest.mark.parametrize("tokens", [5, 300])
def test_causal_attention_is_torchs(tokens, bytes_of_logits, monkeypatch):
    """Blocks of several images, and of a few rows of one, whose gradients of keys are summed."""
    monkeypatch.setattr("skipway.kernels.sdpa.CACHE", bytes_of_logits)
    q, k, v = (torch.randn(2, 3, tokens, 8, dtype=D, requires_grad=True) for _ in range(3))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    with kernels.only("blocks"):
        found = kernels.attention(q, k, v, causal=True)
        assert torch.allclose(found, expected)
        for ours, theirs in zip(torch.autograd.grad((found * weight).sum(), (q, k, v)), gradients, strict=True):
            assert torch.allclose(ours, theirs)


def test_attention_over_197_tokens_keeps_its_weights_and_has_the_gradients_of_float64():
    """An image's tokens with heads of 64: the weights are kept, and what bfloat16 rounds is all that differs."""
    q, k, v, weight = (torch.randn(1, 2, 197, 64).bfloat16() for _ in range(4))
    bias = torch.randn(1, 2, 197, 197).bfloat16()
    wide, narrow = ([each.to(dtype).requires_grad_() for each in (q, k, v, bias)] for dtype in (D, torch.bfloat16))
    logits = wide[0] @ wide[1].mT / 8 + wide[3]
    expected = torch.autograd.grad(logits.softmax(-1) @ wide[2], wide, weight.to(D))
    shapes = []
    with (
        kernels.only("blocks"),
        torch.autograd.graph.saved_tensors_hooks(lambda each: shapes.append(each.shape) or each, lambda each: each),
    ):
        y = kernels.attention(*narrow)
        for ours, right in zip(torch.autograd.grad(y, narrow, weight), expected, strict=True):
            assert (ours.to(D) - right).norm() <= 0.01 * right.norm()
    assert shapes.count((2, 197, 197)) + shapes.count((1, 2, 197, 197)) == 2  # the bias and the weights


def test_causal_attention_is_routed_and_other_masks_are_not():
    q = torch.randn(2, 4, 64, 32)
    calls = []
    with KernelMode(), kernels.only("blocks"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("skipway.kernels.dispatch.attention", lambda *given: calls.append(given[3:]) or given[0])
        nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        nn.functional.scaled_dot_product_attention(q, q[:, :, :9], q[:, :, :9], is_causal=True)  # torch's alignment
        nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(64, 64, dtype=torch.bool))
    assert calls == [(None, True)]


@pytest.mark.parametrize(("tokens", "causal", "ours"), [(64, False, True), (400, False, False), (400, True, True)])
def test_attention_in_bfloat16_is_the_same_in_every_run(tokens, causal, ours, monkeypatch):
    """By one implementation and without a measurement; torch's where that is the faster, and in float32."""
    seen = []
    monkeypatch.setattr(
        "skipway.kernels.dispatch.attention", lambda *given: seen.append(given[4]) or kernels.attention(*given)
    )
    monkeypatch.setattr(kernels.Kernel, "measure", lambda *given: pytest.fail("measured"))
    x = torch.randn(4, tokens, 3, 4, 32, requires_grad=True)

    def gradient(lower: bool) -> torch.Tensor:
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind()
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return torch.autograd.grad(y.float().square().sum(), x)[0]

    expected = gradient(True)
    with bfloat16_kernels():
        found, again, exact = gradient(True), gradient(True), gradient(False)
    assert seen == [causal, causal] * ours
    assert torch.equal(found, again)
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()
    torch.testing.assert_close(exact, gradient(False))


@pytest.mark.parametrize(("side", "stride", "ours"), [(4, 4, True), (4, 2, False), (1, 1, False)])
def test_patches_in_bfloat16_are_products_in_training(monkeypatch, side, stride, ours):
    """Nothing is measured, so that a run can be repeated bit for bit; in float32 torch's convolution is left alone."""
    seen, product = [], dispatch.multiply_patches
    monkeypatch.setattr(dispatch, "multiply_patches", lambda *given: seen.append(1) or product(*given))
    monkeypatch.setattr(kernels.Kernel, "measure", lambda *given: pytest.fail("measured"))
    layer, x = nn.Conv2d(3, 8, side, stride), torch.randn(2, 3, 210, 211)

    def gradients(lower: bool) -> list[torch.Tensor]:
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            y = layer(given)
        return [y, *torch.autograd.grad(y.float().square().sum(), [given, *layer.parameters()])]

    expected, exact = gradients(True), gradients(False)
    with bfloat16_kernels():
        found, again, full = gradients(True), gradients(True), gradients(False)
    assert len(seen) == 2 * ours
    for one, other, theirs in zip(found, again, expected, strict=True):
        assert torch.equal(one, other)
        assert (one - theirs).abs().max() < 0.03 * theirs.abs().max()
    assert found[0].stride() == expected[0].stride()
    assert all(map(torch.equal, full, exact))


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"stride": (2, 1)}, {"dilation": 2}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("amx", [False, True])
def test_weights_with_slow_gradients_are_learnt_by_products(monkeypatch, amx, options):
    """On AMX, by a rule in place of a measurement; in pieces of the batch, summed in float32. Without bfloat16 in the
    processor torch's own gradient of a bias is off by more than ours.
    """
    seen, product = [], dense_conv.weight_gradient_by_product
    monkeypatch.setattr(dense_conv, "has_amx", lambda: amx)
    monkeypatch.setattr(dense_conv, "PIECE", 1 << 16)
    monkeypatch.setattr(dense_conv, "weight_gradient_by_product", lambda *given: seen.append(1) or product(*given))
    monkeypatch.setattr(kernels.Kernel, "measure", lambda *given: pytest.fail("measured"))
    layer = nn.Conv2d(64, 128, 3, padding=1, **options).to(memory_format=torch.channels_last)
    x = maps(64, 64, 4, 4, torch.float32)

    def gradients(model: nn.Module, lower: bool) -> list[torch.Tensor]:
        given = x.to(layer.weight.dtype).clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            y = model(given)
        return [y, *torch.autograd.grad(y.float().sin().sum(), [given, *model.parameters()])]

    exact, rounded = gradients(layer, False), gradients(layer, True)
    with bfloat16_kernels():
        found, again, full = gradients(layer, True), gradients(layer, True), gradients(layer, False)
        with torch.no_grad():
            assert layer(x).shape == found[0].shape
    assert len(seen) == 2 * (amx and options in ({}, {"stride": 2}))
    for one, other, right, theirs in zip(found, again, exact, rounded, strict=True):
        assert torch.equal(one, other)
        assert (one - right).norm() < max(0.02 * right.norm(), 1.01 * (theirs - right).norm())
        assert one.stride() == right.stride()
    assert all(map(torch.equal, full, exact))


def test_weights_that_torch_learns_fast_are_left_to_it(monkeypatch):
    """Many pixels, few channels; a gradient that nobody asks for; another layout than the rule was measured in."""
    monkeypatch.setattr(dense_conv, "has_amx", lambda: True)
    wide, small = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(256, 256, 3, padding=1)
    slow = partial(dense_conv.has_slow_weight_gradient, stride=1, padding=1)
    assert slow(maps(128, 256, 4, 4, torch.float32), small.weight)
    assert not slow(maps(128, 256, 4, 4, torch.float32, last=False), small.weight)
    assert not slow(maps(2, 256, 4, 4, torch.float32), small.weight), "torch takes well under a millisecond"
    assert not slow(maps(128, 64, 16, 16, torch.float32), wide.weight)
    assert dense_conv.has_slow_weight_gradient(maps(300, 64, 16, 16, torch.float32), torch.ones(256, 64, 1, 1), 2, 0)


@pytest.mark.parametrize("make", [patches, convolution, depthwise], ids=lambda f: f.__name__)
def test_gradients_that_nobody_asks_for_are_not_computed(make, monkeypatch):
    """Those of frozen weights, for one, behind which something is trained."""
    function, (x, weight, *rest) = make(torch.float32, True)
    x.requires_grad_()
    name = "depthwise" if make is depthwise else "convolution"
    kernel = next(each for each in KERNELS if each.name == f"{name} to weight")
    monkeypatch.setattr(kernel, "implementations", ())
    function(x, weight, *rest).sum().backward()
    assert x.grad is not None
    with pytest.raises((IndexError, ValueError)):
        function(x, weight.requires_grad_(), *rest).sum().backward()


def test_autocast_leaves_float64_alone():
    """As torch's own functions do."""
    layer, x = nn.Conv2d(3, 8, 4, 4).double(), torch.randn(2, 3, 210, 210, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float64
        with bfloat16_kernels(), KernelMode():
            assert layer(x).dtype == torch.float64


INTERPRETED = """
import torch
from skipway import kernels
from skipway.kernels import triton_launch
torch.manual_seed(0)  # a sum that nearly cancels is not within 1e-5 of itself
last = dict(memory_format=torch.channels_last)
for dtype, allowed in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
    a, b = (torch.randn(3, 5, 7, 9).to(dtype).contiguous(**last) for _ in range(2))
    t, u = (torch.randn(2, 300, 7).to(dtype) for _ in range(2))
    mask = torch.tensor([0.0, 2.0, 1.0], dtype=dtype)
    for gain in (None, torch.tensor(0.3, dtype=dtype), torch.randn(5, 1, 1).to(dtype)):
        for m in (None, mask.view(-1, 1, 1, 1)):
            assert triton_launch.supports_residual(a, b, gain, m)
            y = triton_launch.launch_residual(a, b, gain, m)
            expected = a.double() + b.double() * (1 if gain is None else gain) * (1 if m is None else m)
            assert (y - expected).abs().max() < allowed * expected.abs().max(), (dtype, gain, m)
            assert y.stride() == b.stride()
    assert torch.allclose(triton_launch.launch_residual(t, u, torch.ones(7, dtype=dtype), None), t + u, atol=allowed)
    with kernels.only("triton"):
        x = a.float().requires_grad_()
        kernels.residual(x, 2 * x, torch.ones(5, 1, 1)).sum().backward()
        assert torch.allclose(x.grad, torch.full_like(x, 3.0))


def compared(function, *inputs):
    # by Triton, and in plain torch in double precision
    found = []
    for name, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        given = [each.to(dtype).requires_grad_() if each.is_floating_point() else each for each in inputs]
        with kernels.only(name):
            y = function(*given)
            weight = torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)
            weight = weight.contiguous(**last) if y.ndim == 4 and not y.is_contiguous() else weight
            found.append((y.detach(), *torch.autograd.grad(y, given, weight)))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max(), (ours.shape, (ours - theirs).abs().max())


# tails of tiles, 4 × 7 pixels, and of channels, 64 or 32; every tap of a program is some hundred steps here
for count, channels, height, width, side in ((1, 16, 5, 7, 7), (2, 33, 5, 8, 3)):
    x = torch.randn(count, channels, height, width).contiguous(**last)
    assert triton_launch.supports_depthwise(x, torch.ones(channels, 1, side, side), None)
    compared(kernels.depthwise, x, torch.randn(channels, 1, side, side), torch.randn(channels))
cases = (14, 21, 1, 16, 7, 3, 3), (7, 7, 3, 32, 7, 0, 0), (8, 4, 2, 16, 4, 2, 0)
for height, width, heads, d, side, down, across in cases:
    qkv, position = torch.randn(2, height, width, 3 * heads * d), torch.randn(heads, side**2, side**2)
    assert triton_launch.supports_windows(qkv, position, down, across)
    compared(lambda a, b: kernels.windowed_attention(a, b, down, across), qkv, position)
torch.manual_seed(1)  # as above
cases = ((3, 5, 7, 9), (5, 1, 1)), ((2, 300, 7), (7,)), ((2, 30, 300), ())
for shape, size in cases:
    gain = torch.randn(size)
    dy, branch = torch.randn(shape), torch.randn(shape)
    if len(shape) == 4:
        dy, branch = dy.contiguous(**last), branch.contiguous(**last)
    m = torch.rand(shape[0]).view(-1, *[1] * (len(shape) - 1))
    compared(lambda a, b, g: kernels.residual(a, b, g, m.to(a.dtype)), dy, branch, gain)
    compared(lambda a, b: kernels.residual(a, b, None, m.to(a.dtype)), dy, branch)
    to_branch, to_gain = triton_launch.launch_residual_backward(dy, branch, gain, m)
    assert torch.allclose(to_branch, dy * gain * m, atol=1e-6)
    expected = (dy * m * branch).sum_to_size(gain.shape if gain.numel() > 1 else (1,) * len(shape))
    to_gain = to_gain.sum() if gain.numel() == 1 else to_gain.view(gain.shape)
    assert torch.allclose(to_gain, expected, rtol=1e-4, atol=1e-3)
# in 16 bits what is measured is taken: nothing is refused but for its time
for each in kernels.autotune.KERNELS:
    each.chosen.clear()
x, y = (torch.randn(2, 5, 4, 4, dtype=torch.bfloat16).contiguous(**last).requires_grad_() for _ in range(2))
gain = torch.randn(5, 1, 1, dtype=torch.bfloat16, requires_grad=True)
mask = torch.ones(2, 1, 1, 1, dtype=torch.bfloat16)
(kernels.residual(x, y, gain, mask) * torch.randn_like(x)).sum().backward()
kernels.depthwise(x, torch.randn(5, 1, 3, 3, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
# the interpreter's products of bfloat16 are wrong
qkv, position = torch.randn(1, 8, 4, 96, dtype=torch.float16, requires_grad=True), torch.randn(2, 16, 16)
(kernels.windowed_attention(qkv, position.requires_grad_(), 2, 2) * torch.randn(1, 8, 4, 32)).sum().backward()
found = [choice for choice in kernels.choices() if "triton" in choice.seconds or choice.refused]
assert not [choice for choice in found if choice.refused], found
names = {choice.kernel for choice in found}
assert names >= {"residual", "residual backward", "depthwise", "windows", "windows backward"}, names
print("equal")
"""


def test_windowed_attention_is_swins_attention():
    from skipway.models.transformer import TOKEN_KIT
    from skipway.nn import Window, WindowAttention
    from skipway.nn.placement import PRE_NORM

    torch.manual_seed(0)
    for shift, height, width in ((0, 8, 4), (2, 8, 12), (2, 4, 8)):
        branch = WindowAttention(16, 2, Window(4, shift=shift), kit=TOKEN_KIT, placement=PRE_NORM)
        torch.nn.init.normal_(branch.position.table)
        h = torch.randn(2, height, width, 16)
        down, across = branch.window.shifts(height, width)
        y = branch.proj(kernels.windowed_attention(branch.qkv(h), branch.position(), down, across))
        assert torch.allclose(y, branch(h), atol=1e-5)


def test_triton_programs_under_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "equal"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_are_taken_only_where_they_exist_and_are_quicker(dtype):
    """Without AVX-512 torch packs nothing in bfloat16; no processor's packs hold float64."""
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 512).to(dtype), torch.randn(1024, 256, dtype=dtype)
    kernels.clear_choices()
    with torch.no_grad(), PackedKernelMode(layer, len(x)) as taken:
        y = layer(x)
    expected = layer(x)
    assert (y - expected).abs().max() <= {torch.bfloat16: 2e-2}.get(dtype, 1e-5) * expected.abs().max()
    measured = [choice for choice in kernels.choices() if choice.kernel == "packed linear"]
    assert len(measured) == len(taken.packed)
    assert dtype != torch.float64 or not measured
    assert all({*choice.seconds, *choice.refused} == {"reference", "packed"} for choice in measured)


@pytest.mark.parametrize("last", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maps_lie_in_memory_as_those_of_torch(last, dtype):
    """Those of one channel or pixel, and 1 × 1 filters, are contiguous in both layouts: their strides decide."""
    of_x, of_weight = (torch.channels_last if each else torch.contiguous_format for each in last)
    for channels, out, (size, side) in product((1, 3), (1, 4), ((1, 1), (4, 1), (4, 2))):
        x = torch.randn(2, channels, size, size, dtype=dtype).to(memory_format=of_x)
        weight = torch.randn(out, channels, side, side, dtype=dtype).to(memory_format=of_weight)
        taps = torch.randn(channels, 1, 3, 3, dtype=dtype).to(memory_format=of_weight)
        expected = nn.functional.conv2d(x, weight, stride=side)
        assert dispatch.multiply_patches(x, weight, None).stride() == expected.stride()
        for name in ("reference", "product", "other layout"):
            with kernels.only(name):
                assert kernels.convolve_patches(x, weight).stride() == expected.stride(), (x.shape, weight.shape)
                assert kernels.convolve(x, weight, stride=side).stride() == expected.stride()
                found = kernels.depthwise(x, taps)
            assert found.stride() == nn.functional.conv2d(x, taps, padding=1, groups=channels).stride(), x.shape


def test_an_accelerated_network_of_one_channel_can_flatten_by_view(monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.point, self.embed, self.head = nn.Conv2d(2, 1, 1), nn.Conv2d(1, 6, 7, 7), nn.Linear(24, 3)

        def forward(self, x):
            return self.head(self.embed(self.point(x)).view(len(x), -1))

    monkeypatch.setattr(dispatch, "LARGE", 0)
    model, x = Net(), torch.randn(2, 2, 14, 14)
    expected = model(x)
    accelerate(model)
    for name in ("reference", "product"):
        with kernels.only(name):
            torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", ["reference", "blocks", "onednn"])
@pytest.mark.parametrize(
    ("q", "options"),
    [
        (torch.randn(2, 4, 6, 8), {}),
        (torch.randn(2, 6, 4, 8).transpose(1, 2), {}),
        (torch.randn(2, 6, 3, 4, 8).permute(2, 0, 3, 1, 4)[0], {"is_causal": True}),
        (torch.randn(6, 2, 4, 8).permute(1, 2, 0, 3), {"attn_mask": torch.randn(1, 4, 6, 6)}),
        (torch.randn(2, 6, 4, 8).transpose(1, 2), {"attn_mask": torch.randn(1, 4, 6, 6, requires_grad=True)}),
        (torch.randn(2, 8, 4, 6).permute(0, 2, 3, 1), {}),
        (torch.randn(6, 4, 8).transpose(0, 1).expand(2, 4, 6, 8), {}),
    ],
    ids=["contiguous", "tokens first", "causal slice", "sequence first", "learned mask", "strided", "expanded"],
)
def test_attention_lies_in_memory_as_that_of_torch(q, options, name, monkeypatch):
    """As q, with heads side by side in most networks, which then view them as channels without a copy."""
    monkeypatch.setattr(dispatch, "LARGE_ATTENTION", 0)
    for v in (q, q[..., :5]):
        expected = nn.functional.scaled_dot_product_attention(q, q, v, **options)
        with KernelMode(), kernels.only(name):
            found = nn.functional.scaled_dot_product_attention(q, q, v, **options)
        assert found.stride() == expected.stride()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_attention_of_several_types_under_autocast_is_as_that_of_torch(monkeypatch):
    """Queries and keys that a norm in float32 made beside values in bfloat16; autocast casts before it chooses."""
    monkeypatch.setattr(dispatch, "LARGE_ATTENTION", 0)
    q = torch.randn(2, 6, 4, 8).transpose(1, 2)
    attend = nn.functional.scaled_dot_product_attention
    with torch.autocast("cpu", torch.bfloat16):
        expected = attend(q, q, q.bfloat16())
        with KernelMode(), kernels.only("blocks"):
            found = attend(q, q, q.bfloat16())
    assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2)  # products of bfloat16
