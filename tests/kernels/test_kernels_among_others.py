"""Kernels where others are at work: hooks, transforms of torch.func, tensors of other classes, threads, odd masks."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.func import jvp
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import skipway as sw
from skipway import kernels
from skipway.errors import SkipwayError
from skipway.kernels import autotune, dispatch, onednn, sdpa
from skipway.kernels.autotune import Implementation, Kernel
from skipway.kernels.dispatch import KernelMode
from skipway.kernels.sdpa import attention_weights

INF = float("inf")


class Attend(nn.Module):
    """Attention of a size that is routed."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.map(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_kernels_may_be_measured_within_an_activation_checkpoint():
    """Their timed passes are not those that the checkpoint repeats."""
    kernels.clear_choices()
    model, x = sw.accelerate(Attend()).model, torch.randn(9, 64, 32, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=False)
    y.square().sum().backward()
    found, x.grad = x.grad, None
    assert any(each.kernel == "attention with backward" for each in kernels.choices())
    with kernels.off():
        model(x).square().sum().backward()
    assert_close(x.grad, found, rtol=1e-3, atol=1e-4)


class CheckpointsFunction(Attend):
    """It recomputes attention and no module."""

    def forward(self, x):
        q, k, v = self.map(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return checkpoint(F.scaled_dot_product_attention, q, k, v, use_reentrant=False).transpose(1, 2).flatten(2)


class CheckpointsModule(nn.Module):
    """It recomputes a module."""

    def __init__(self, within):
        super().__init__()
        self.within, self.head = within, nn.Linear(32, 32)

    def forward(self, x):
        return self.head(checkpoint(self.within, x, use_reentrant=False))


@pytest.mark.parametrize(
    ("make", "routed"),
    [
        (CheckpointsFunction, 0),
        (lambda: CheckpointsModule(Attend()), 2),
        (lambda: CheckpointsModule(CheckpointsFunction()), 0),
    ],
    ids=["function", "module", "both"],
)
def test_what_a_checkpoint_repeats_takes_the_route_that_it_took(make, routed, monkeypatch):
    """Behind the forward pass no module of the network is there for a function that is recomputed by itself."""
    seen, route = [], dispatch.route_attention
    spied = {F.scaled_dot_product_attention: lambda *given, **named: seen.append(1) or route(*given, **named)}
    monkeypatch.setattr(dispatch, "ROUTES", {**dispatch.ROUTES, **spied})
    model, x = make(), torch.randn(9, 64, 32)
    model(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    sw.accelerate(model)
    with kernels.only("blocks"):
        model(x).square().sum().backward()
    assert len(seen) == routed
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-3)


def test_a_reference_that_fails_says_so():
    def fail(x):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Kernel("failing", fail, Implementation("other", lambda x: x))(torch.ones(1))


def test_what_supports_dense_memory_alone_is_not_taken_for_a_slice():
    """Both have one shape and one order of strides."""
    dense = Implementation("dense", lambda x: x * 1, lambda x: x.is_contiguous())
    kernel = Kernel("layouts", lambda x: x + torch.zeros(300, 300).sum(), dense)
    assert "dense" in [each.name for each in kernel.implementations if each.supports(torch.ones(4, 8))]
    kernel.select(torch.ones(4, 8))
    kernel.select(torch.ones(4, 16)[:, :8])
    assert len(kernel.chosen) == 2
    assert "dense" not in [*kernel.chosen.values()][1].seconds


def test_texts_of_all_lengths_are_not_measured_anew():
    kernels.clear_choices()
    layer = sw.accelerate(nn.Linear(256, 256), torch.randn(2, 65, 256)).model
    counted = []
    for tokens in (65, 70, 99, 127):
        layer(torch.randn(2, tokens, 256))
        kernels.attention(*[torch.randn(2, 4, tokens, 16)] * 3)
        counted.append(len(kernels.choices()))
    assert counted == counted[:1] * 4


def accelerated():
    torch.manual_seed(0)
    x = torch.randn(32, 8, 32, 32)
    return sw.accelerate(nn.Sequential(nn.Conv2d(8, 16, 1), nn.Flatten(2), nn.Linear(1024, 1024)), x).model, x


def test_transforms_of_torch_func_are_left_to_torch():
    """Operators of others have no forward mode: it would drop the tangent without a word."""
    model, x = accelerated()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    tangents = {name: torch.ones_like(value) for name, value in parameters.items()}

    def run(given):
        return torch.func.functional_call(model, given, (x,)).square().mean()

    with kernels.off():
        slopes, expected = torch.func.grad(run)(parameters), torch.func.jvp(run, (parameters,), (tangents,))[1]
    assert expected != 0
    assert_close(torch.func.jvp(run, (parameters,), (tangents,))[1], expected)
    assert_close(torch.func.grad(run)(parameters), slopes)
    gained = sw.accelerate(sw.build("resnet8", classes=3, scheme="layerscale(init=0.1)")).model.eval()
    images = torch.randn(2, 3, 16, 16)
    slope = torch.func.jvp(gained, (images,), (torch.ones_like(images),))[1]
    with kernels.off():
        assert_close(slope, torch.func.jvp(gained, (images,), (torch.ones_like(images),))[1])
    assert slope.abs().max() > 0


def test_keys_that_all_heads_share_are_broadcast_as_by_torch():
    q, shared = torch.randn(3, 4, 64, 32, requires_grad=True), torch.randn(3, 1, 9, 32, requires_grad=True)
    with KernelMode():
        y = F.scaled_dot_product_attention(q, shared, shared)
    assert_close(y, F.scaled_dot_product_attention(q, shared, shared))
    y.sum().backward()
    with KernelMode():
        every = F.scaled_dot_product_attention(q[:1], q.detach(), q.detach())
    assert every.shape == (3, 4, 64, 32)
    with pytest.raises(SkipwayError, match="expand them first"):
        kernels.attention(q, shared, shared)
    with KernelMode(), pytest.raises(RuntimeError):  # torch has no mask for each window
        F.scaled_dot_product_attention(
            torch.ones(4, 1, 128, 64), *[torch.ones(4, 1, 9, 64)] * 2, torch.ones(2, 1, 128, 9)
        )


@pytest.mark.parametrize("name", ["reference", "blocks", "onednn"])
def test_a_row_without_keys_has_an_output_of_0_as_by_torch(name):
    q, bias = torch.randn(2, 2, 5, 8, requires_grad=True), torch.zeros(2, 2, 5, 5)
    bias[1, :, 3] = -INF
    with kernels.only(name):
        y = kernels.attention(q, q, q, bias)
        (slope,) = torch.autograd.grad(y.square().sum(), q)
    assert_close(y, F.scaled_dot_product_attention(q, q, q, bias))
    assert (y[1, :, 3] == 0).all()
    assert slope.isfinite().all()


def test_logits_of_bfloat16_are_rounded_once():
    """Also where oneDNN multiplies float32 in bfloat16: with 32 channels, q / √32 is no number of bfloat16."""
    torch.manual_seed(0)
    q, k = (4 * torch.randn(1, 1, 64, 32)).bfloat16(), torch.randn(1, 1, 64, 32).bfloat16()
    with onednn.onednn_matmul():
        found = attention_weights(q, k, None, False)
    exact = torch.softmax(q.double() @ k.double().mT / 32**0.5, -1)
    assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)


def test_masked_rows_are_looked_for_once_in_a_call(monkeypatch):
    """A mask is as large as an image's logits, and images come in many blocks."""
    seen, look = [], sdpa.hidden_rows
    monkeypatch.setattr(sdpa, "CACHE", 1)
    monkeypatch.setattr(sdpa, "hidden_rows", lambda bias: seen.append(1) or look(bias))
    q, bias = torch.randn(5, 2, 6, 8), torch.zeros(1, 2, 6, 6)
    bias[..., 2, :] = -INF
    out, _ = sdpa.attention_in_blocks(q, q, q, bias, False, False)
    assert (out[:, :, 2] == 0).all()
    assert seen == [1]
    for found, expected in zip(
        sdpa.attention_backward_in_blocks(q, q, q, q, bias, False, q.new_empty(0)),
        sdpa.attention_backward_reference(q, q, q, q, bias, False, q.new_empty(0)),
        strict=True,
    ):
        assert_close(found, expected)
    assert seen == [1] * 3


def derivative(x):
    """Of the kernel, forward."""
    return jvp(lambda x: kernels.linear(x, torch.ones(64, 64)).square().sum(), (x,), (x,))[1]


def test_compiled_transforms_are_seen_too():
    """Without a rule for forward mode, an operator would pass for a constant. d(y²) along x of a linear y is 2 y²."""
    torch.manual_seed(0)
    x = torch.randn(2048, 64)
    expected = 2 * (x @ torch.ones(64, 64)).square().sum()
    assert_close(derivative(x), expected)
    assert_close(torch.compile(derivative, backend="aot_eager")(x), expected)


class Marked(torch.Tensor):
    """A tensor with rules of its own."""


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.conv2d(torch.ones(8, 8, 64, 64).cfloat(), torch.ones(8, 8, 1, 1).cfloat()),
        lambda: F.conv2d(torch.ones(8, 8, 64, 64), torch.ones(8, 8, 3, 3), None, (1,), (1,)),
        lambda: F.conv2d(torch.ones(8, 8, 64, 64), torch.ones(8, 1, 3, 3), None, (1,), (1,), groups=8),
    ],
    ids=["complex", "one number for both sides", "depthwise"],
)
def test_what_torch_takes_is_computed(call):
    with KernelMode():
        y = call()
    assert_close(y, call())


def test_tensors_of_other_classes_are_left_to_torch(monkeypatch):
    monkeypatch.setattr("skipway.kernels.dispatch.linear", lambda *given: pytest.fail("routed"))
    weight = torch.ones(256, 256).as_subclass(Marked)
    with KernelMode():
        assert type(F.linear(torch.ones(256, 256), weight)) is Marked


def test_restrictions_may_end_in_any_order():
    first, second = kernels.only("onednn"), kernels.off()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not kernels.enabled()
    second.__exit__(None, None, None)
    assert autotune.prescribed() is None


def test_bfloat16_kernels_are_those_of_each_thread_that_asks(monkeypatch):
    """The restriction is the process's, the mode is a thread's."""
    seen, q = [], torch.randn(2, 4, 128, 32, dtype=torch.bfloat16)
    monkeypatch.setattr(dispatch, "route_attention", lambda *given, **named: seen.append(1) or NotImplemented)

    def other():
        with dispatch.bfloat16_kernels():
            F.scaled_dot_product_attention(q, q, q)

    with dispatch.bfloat16_kernels():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [1]
    with kernels.off():
        other()
    assert seen == [1]


def test_the_setting_of_products_outlasts_no_thread():
    """Two threads whose contexts overlap: the one that came first leaves first."""
    matmul = torch.backends.mkldnn.matmul
    before, entered, left = matmul.fp32_precision, threading.Event(), threading.Event()

    def other():
        with onednn.onednn_matmul():
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    with onednn.onednn_matmul():
        thread.start()
        assert entered.wait(10)
    left.set()
    thread.join()
    assert matmul.fp32_precision == before


def test_products_of_other_threads_are_not_rounded(monkeypatch):
    """The setting is the process's, and on AMX it rounds float32, whatever our own products lose by it."""
    monkeypatch.setattr(onednn, "has_amx", lambda: True)
    matmul, seen, weights = torch.backends.mkldnn.matmul, [], sdpa.attention_weights
    before = matmul.fp32_precision
    monkeypatch.setattr(sdpa, "attention_weights", lambda *given: seen.append(matmul.fp32_precision) or weights(*given))
    q = torch.randn(2, 4, 128, 32, dtype=torch.bfloat16, requires_grad=True)
    for name in ("blocks", "onednn"):
        with kernels.only(name):
            kernels.attention(q, q, q).sum().backward()
    assert set(seen) == {before}


def test_what_a_hook_keeps_is_not_overwritten():
    """The end of a branch is an Identity, which returns the tensor that a hook was given."""
    torch.manual_seed(0)
    model, x = sw.build("resnet8", classes=3), torch.randn(2, 3, 32, 32)
    kept = []
    for each in sw.chain(model):
        each.residual.drop.register_forward_hook(lambda module, given, output: kept.append((output, output.clone())))
    sw.accelerate(model).model(x)
    assert kept
    for output, copy in kept:
        assert_close(output, copy)


def test_a_batch_of_any_size_is_convolved_by_one_graph():
    """To the compiler len(x) is a number, and another batch another program."""

    class Net(nn.Module):
        def forward(self, x, weight):
            return kernels.convolve(x, weight, padding=1)

    given = torch.randn(4, 3, 8, 8), torch.randn(5, 3, 3, 3)
    program = torch.export.export(Net(), given, dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    x = torch.randn(7, 3, 8, 8)
    assert_close(program.module()(x, given[1]), F.conv2d(x, given[1], padding=1))
