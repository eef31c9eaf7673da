"""Kernels in whole networks, and inference on other backends: equal outputs, refusals, undo."""

from __future__ import annotations

import copy
import itertools
import sys
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import skipway as sw
from skipway.errors import MissingExtraError, SkipwayError
from skipway.hardware import allocator
from skipway.hardware.allocator import keep_memory
from skipway.inference.backend_selection import BackendComparison
from skipway.inference.backends import BACKENDS, Backend, Choice
from skipway.inference.optimized_model import optimize
from skipway.kernels.dispatch import KernelMode
from skipway.surgery.acceleration import accelerate

NETWORKS = {
    "resnet-cifar": (lambda: sw.build("resnet20", scheme="layerscale(init=0.5)"), (16, 3, 32, 32)),
    "vit": (
        lambda: sw.build("vit-tiny-16", depth=2, image=64, classes=10, scheme="layerscale(init=0.5)"),
        (8, 3, 64, 64),
    ),
    "convnext": (lambda: sw.build("convnext-tiny", width=16, blocks=(1, 1, 1, 1), classes=10), (8, 3, 64, 64)),
    "swin": (
        lambda: sw.build("swin-tiny", dim=32, heads=2, blocks=(2, 2), window=4, image=64, classes=10),
        (8, 3, 64, 64),
    ),
}

ROUTED = {
    "resnet-cifar": {"linear", "conv2d"},
    "vit": {"linear", "conv2d", "scaled_dot_product_attention"},
    "convnext": {"linear", "conv2d"},
    "swin": {"linear", "conv2d"},
}
"""Functions of torch that kernels compute; the attention of Swin is a method of its own."""


def gradients(model, x):
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def routed(monkeypatch):
    """Names of torch's functions, one for each call that a kernel computed; sizes do not matter."""
    monkeypatch.setattr("skipway.kernels.dispatch.LARGE", 1)
    monkeypatch.setattr("skipway.kernels.matmul.SMALL", 1)
    names, route = [], KernelMode.route

    def record(self, func, args, kwargs):
        result = route(self, func, args, kwargs)
        if result is not NotImplemented:
            names.append(func.__name__)
        return result

    monkeypatch.setattr(KernelMode, "route", record)
    return names


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_accelerated_networks_compute_and_learn_the_same(name, training, routed):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().train(training)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    operation = accelerate(model, x)
    assert operation.report["difference"] < 1e-4
    assert set(routed) == ROUTED[name]
    y, ours = gradients(model, x)
    z, theirs = gradients(plain, x)
    assert torch.allclose(y, z, rtol=1e-3, atol=1e-4 * z.abs().max())
    largest = max(g.abs().max() for g in theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= 2e-3 * largest
    for mine, other in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(mine.double(), other.double(), rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == list(plain.state_dict())
    operation.undo()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_the_bias_of_windows_is_not_written_out_for_every_image(monkeypatch):
    from skipway.kernels import dispatch

    monkeypatch.setattr(dispatch, "LARGE", 1)
    biases = []
    attention = sw.kernels.attention
    monkeypatch.setattr(sw.kernels, "attention", lambda q, k, v, b=None: biases.append(b) or attention(q, k, v, b))
    make, shape = NETWORKS["swin"]
    model = make()
    accelerate(model)
    model(torch.randn(shape))
    assert [len(bias) for bias in biases] == [1, 16, 1, 4]  # windows of an image; every other block is shifted


@pytest.mark.parametrize(
    ("scheme", "watched", "expected"),
    [("identity", False, 9), ("identity", True, 8), ("skipinit", False, 0)],
)
def test_shortcuts_are_added_in_place_where_nobody_needs_the_branch(scheme, watched, expected):
    """A norm's output is not needed backward; a hook that keeps it does need it, and a gain its gradient."""
    torch.manual_seed(0)
    model, x = sw.build("resnet20", scheme=scheme), torch.randn(2, 3, 32, 32)
    plain, kept, seen = copy.deepcopy(model), [], []
    if watched:
        norm = model.get_submodule(sw.chain(model)[0].name).branch.norm2
        norm.register_forward_hook(lambda module, given, out: kept.append((out, out.clone())))
    accelerate(model)

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func is torch.Tensor.add_ and args[0].ndim == 4)
            return func(*args, **(kwargs or {}))

    with Watch():
        y, ours = gradients(model, x)
    z, theirs = gradients(plain, x)
    assert sum(seen) == expected
    assert torch.allclose(y, z, rtol=1e-3, atol=1e-5)
    largest = max(g.abs().max() for g in theirs)
    assert all((mine - other).abs().max() <= 2e-3 * largest for mine, other in zip(ours, theirs, strict=True))
    assert all(torch.equal(out, copied) for out, copied in kept)


def test_stochastic_depth_draws_what_it_drew(monkeypatch):
    """One pass in place of three, from the same random numbers."""
    passes, residual = [], sw.kernels.residual
    monkeypatch.setattr(sw.kernels, "residual", lambda *given: passes.append(given) or residual(*given))
    torch.manual_seed(0)
    model = sw.build(
        "vit-tiny-16", depth=4, image=32, patch=8, classes=5, scheme="layerscale(init=0.5) + stochasticdepth(0.5)"
    ).train()
    x = torch.randn(6, 3, 32, 32)
    torch.manual_seed(1)
    plain = model(x)
    accelerate(model)
    torch.manual_seed(1)
    assert torch.allclose(model(x), plain, atol=1e-4)
    assert len(passes) == len(sw.chain(model))
    assert all(gain is not None and set(mask.unique().tolist()) <= {0.0, 2.0} for *_, gain, mask in passes[-1:])


def test_checkpointed_blocks_are_routed_in_backward_too(routed):
    """A checkpoint calls a block again, outside the network's own forward."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    model = Net()
    accelerate(model)
    loss = model(torch.randn(2, 4, 16, requires_grad=True)).sum()
    forward = routed.copy()
    assert forward.count("linear") >= 2 * len(model.blocks)  # the two maps of each feed-forward part
    loss.backward()
    # recomputation stops at the last tensor that backward needs, which may be before a block's last map
    assert routed[len(forward) :].count("linear") >= forward.count("linear") - len(model.blocks)


def test_accelerate_refuses_and_puts_back():
    model = nn.Sequential(nn.Linear(4, 4))
    operation = accelerate(model)
    with pytest.raises(SkipwayError, match="accelerated already"):
        accelerate(model)
    operation.undo()
    passes = itertools.count()

    class Drifting(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + next(passes)

    model = Drifting(nn.Linear(4, 4))
    with pytest.raises(SkipwayError, match="changed by"):
        accelerate(model, torch.randn(2, 4))
    assert type(model[0]) is nn.Linear


def test_compiled_models_are_left_to_the_compiler(routed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    x = torch.randn(3, 8)
    expected = model(x)
    accelerate(model)
    targets = []

    def record(graph, given):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, backend=record, fullgraph=True)
    assert torch.allclose(compiled(x), expected)
    assert targets
    assert not routed
    assert not [target for target in targets if "skipway" in target]
    model(x)
    assert routed == ["linear"]


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_backend_agrees(backend, precision):
    if precision not in BACKENDS[backend].precisions:
        pytest.skip("not offered")
    if BACKENDS[backend].obstacle(torch.zeros(1), Choice(backend, precision)):
        pytest.skip("not installed")
    torch.manual_seed(0)
    # compiling costs a second an operator
    small = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    model = small if backend in ("inductor", "compiled") else sw.build("resnet8")
    fast = optimize(model, torch.randn(2, 3, 32, 32), precisions=precision, backends=[backend])
    assert fast.backend == backend
    x = torch.randn(2, 3, 32, 32)
    expected = model.eval()(x)
    assert fast(x).dtype == torch.float32
    assert (fast(x) - expected).abs().max() <= {"float32": 1e-4, "bfloat16": 5e-2}[precision] * expected.abs().max()
    other = torch.randn(3, 3, 40, 40)
    if not fast.any_size:  # of the backend, or of its pieces where they were faster
        with pytest.warns(UserWarning, match="run in plain torch, not in"):
            fast(other)
    assert (fast(other) - model(other)).abs().max() <= 0.1 * model(other).abs().max()
    assert backend in str(fast)


def test_backends_that_fail_or_differ_are_refused_with_the_reason(monkeypatch):
    def explode(model, example, choice):
        raise RuntimeError("no such device")

    lying = Backend(lambda model, example, choice: lambda x: model(x) + 1)
    monkeypatch.setitem(BACKENDS.entries, "eager", lying)
    with pytest.raises(SkipwayError, match="no backend agrees.*differs"):
        optimize(sw.build("resnet20"), torch.randn(1, 3, 32, 32), backends=["eager"])
    monkeypatch.setitem(BACKENDS.entries, "eager", Backend(explode))
    with pytest.raises(SkipwayError, match="RuntimeError: no such device"):
        optimize(sw.build("resnet20"), torch.randn(1, 3, 32, 32), backends=["eager"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precisions": "float8"}, "precisions='float8': the rule is some of float32, bfloat16"),
        ({"backends": ["tensort"]}, "unknown backend"),
        ({"backends": ["onnxruntime"], "precisions": "bfloat16"}, "offers float32"),
    ],
)
def test_optimize_refuses(arguments, message):
    with pytest.raises(SkipwayError, match=message):
        optimize(nn.Linear(2, 2), torch.ones(1, 2), **arguments)


@pytest.mark.parametrize("backends", ["Torch", ["TORCH", "torch"]])
def test_backends_are_named_in_any_spelling(backends):
    fast = optimize(nn.Linear(2, 2), torch.ones(1, 2), backends=backends, cache=False)
    assert {each.backend for each in fast.report} == {"original", "torch"}
    assert fast.backend == "torch"


def test_examples_are_one_tensor():
    loader = torch.utils.data.DataLoader([(torch.ones(2), 0), (torch.zeros(2), 1)], batch_size=2)
    fast = optimize(nn.Linear(2, 3), loader, backends=["eager"])
    assert fast.example.shape == (2, 2)
    with pytest.raises(SkipwayError, match="takes one tensor, and the example has keyword arguments input"):
        optimize(nn.Linear(2, 2), {"input": torch.ones(1, 2)}, backends=["openvino"])


@dataclass
class Output(OrderedDict):
    """As transformers return them."""

    logits: torch.Tensor
    cache: list
    mask: torch.Tensor


torch.utils._pytree.register_pytree_node(
    Output,
    lambda output: ([output.logits, output.cache, output.mask], None),
    lambda values, _: Output(*values),
)


class Tokens(nn.Module):
    """Logits of tokens, masked; keys of earlier tokens are in a cache, which is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(9, 64), nn.Linear(64, 9)

    def forward(self, ids, attention_mask=None, cache=None):
        x = self.table(ids)
        cache = [] if cache is None else cache
        cache.append(x)
        seen = torch.cat(cache, 1).cumsum(1)[:, -ids.shape[1] :]
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        return Output(self.out(seen) * mask[..., None], cache, mask)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_language_models_take_and_return(precision, monkeypatch):
    """Outputs of the same class and types; a further mask or a cache, which the example did not have, count."""
    monkeypatch.setattr(BackendComparison, "time", lambda self, *given: None)
    model, ids = Tokens().eval(), torch.randint(0, 9, (2, 5))
    fast = optimize(model, {"ids": ids}, backends=["eager"], precisions=precision)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with torch.no_grad():
        for given in ({"ids": ids}, {"ids": ids, "attention_mask": mask}, {"ids": ids, "cache": [model.table(ids)]}):
            with (
                nullcontext() if given.keys() == {"ids"} else pytest.warns(UserWarning, match="optimize the model for")
            ):
                found = fast(**copy.deepcopy(given))
            expected = model(**copy.deepcopy(given))
            fast.remarked = False
            assert type(found) is Output
            assert len(found.cache) == len(expected.cache)
            assert (found.logits.dtype, found.mask.dtype) == (torch.float32, torch.int64)
            torch.testing.assert_close(found.logits, expected.logits, rtol=0.1, atol=0.1)


def test_outputs_of_recurrent_networks():
    fast, x = optimize(model := nn.LSTM(2, 2), torch.ones(1, 2), backends=["eager"]), torch.ones(1, 2)
    assert torch.equal(fast(x)[1][0], model(x)[1][0])
    with pytest.raises(SkipwayError, match="returns no tensor"):
        optimize(Nothing(), torch.ones(1, 2))


class Nothing(nn.Module):
    def forward(self, x):
        return None


def test_a_backend_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(BACKENDS.entries, "eager", Backend(BACKENDS["eager"].build, ("no_such_package",), "onnx"))
    with pytest.raises(MissingExtraError, match=r"skipway\[onnx\]"):
        optimize(nn.Linear(2, 2), torch.ones(1, 2), backends=["eager"])


def test_the_model_itself_stays_as_it_is():
    model = sw.build("resnet20").train()
    before = copy.deepcopy(model.state_dict())
    optimize(model, torch.randn(2, 3, 32, 32), backends=["eager"])
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept_within_and_given_back_after():
    """A block of 64 MiB lies in the heap while it is kept, and comes from the system's map before and after."""

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

    with keep_memory() as kept:
        if not kept:
            pytest.skip("not glibc")
        torch.ones(1 << 24)
        held = resident()
    assert resident() < held - (1 << 15)


def test_a_threshold_that_no_longer_adapts_is_set(monkeypatch):
    """To set one of glibc's parameters freezes the size from which blocks are mapped, 128 KiB at first."""
    values: dict[int, int] = {}
    monkeypatch.setattr(allocator, "glibc", lambda: SimpleNamespace(mallopt=values.__setitem__))
    with keep_memory(release=False):
        assert values[allocator.MMAP_MAX] == 0
    assert values[allocator.MMAP_MAX] > 0
    assert values[allocator.MMAP_THRESHOLD] == 2**25


@pytest.mark.parametrize(("name", "operator"), [("swin", "windowed_attention"), ("convnext", "depthwise")])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_card_gets_our_kernels_under_the_compiler_too(name, operator, autocast, monkeypatch):
    """Where Triton's programs can run they are operators of the compiled graph: here as if they could."""
    monkeypatch.setattr("skipway.surgery.overrides.runs_triton", lambda x: True)
    monkeypatch.setattr("skipway.kernels.dispatch.LARGE", 1)
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().to(memory_format=torch.channels_last)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    accelerate(model)
    seen = []

    def watching(graph, given):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, backend=watching, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, ours = gradients(compiled, x)
        z, theirs = gradients(plain, x)
    near = 0.1 if autocast else 2e-3
    assert (y - z).abs().max() <= near * z.abs().max()
    largest = max(g.abs().max() for g in theirs)
    assert all((mine - other).abs().max() <= near * largest for mine, other in zip(ours, theirs, strict=True))
    assert any(operator in target for target in seen), sorted(set(seen))


def test_maps_of_broken_windows_on_a_card(monkeypatch):
    """Padded as without: padding tokens are keys like others."""
    monkeypatch.setattr("skipway.surgery.overrides.runs_triton", lambda x: True)
    torch.manual_seed(0)
    model = sw.build("swin-tiny", dim=32, heads=2, blocks=(2, 2), window=4, image=40, classes=10)
    assert accelerate(model, torch.randn(2, 3, 40, 40)).report["difference"] < 1e-4
