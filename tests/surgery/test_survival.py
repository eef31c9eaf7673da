"""What a network could before an operation it can afterwards: copies, files, compilers, exports, ranks, modes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.process_group import one_rank
from tests.surgery.test_depth import Net, X
from torch import nn

import skipway as sw
from skipway.inference.onnx import export_onnx
from skipway.surgery import (
    Operation,
    checkpointed,
    deepen,
    lesion,
    remove_norm,
    rescheme,
    reversible,
    shorten,
    skip_compute,
)
from skipway.tracing import unwrap

Operate = Callable[..., Operation]


def count_blocks(model: nn.Module) -> int:
    """Of a network in wrappers, too; 4 of one without."""
    return len(getattr(unwrap(model), "blocks", range(4)))


# tolerances are for bfloat16 alone
OPERATIONS: dict[str, Operate] = {
    "rescheme": lambda m, x, **loose: rescheme(m, x, "layerscale + stochasticdepth", **loose),
    "fixup": lambda m, x, **loose: (remove_norm(m, x, how="fold", **loose), rescheme(m, x, "fixup", **loose))[1],
    "fold": lambda m, x, **loose: remove_norm(m, x, how="fold", **loose),
    "normfree": lambda m, x, **loose: remove_norm(m, x, how="normfree", **loose),
    "lesion": lambda m, x, **loose: lesion(m, x, [f"blocks.{count_blocks(m) // 2}"]),
    "shorten": lambda m, x, **loose: shorten(m, x, count_blocks(m) - 1),
    "deepen": lambda m, x, **loose: deepen(m, x, count_blocks(m) // 2, **loose),
    "skip_compute": lambda m, x, **loose: skip_compute(m, x, 0.5),
    "checkpointed": lambda m, x, **loose: checkpointed(m, x),
    "reversible": lambda m, x, **loose: reversible(m, x, **loose),
}


@pytest.fixture(params=OPERATIONS)
def operate(request) -> Operate:
    return OPERATIONS[request.param]


@pytest.fixture
def net() -> Net:
    return prepared(4)


@pytest.fixture
def short() -> Net:
    """Two blocks, for what takes its time with each of them."""
    return prepared(2)


def prepared(blocks: int) -> Net:
    torch.manual_seed(0)
    model = Net(blocks)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def test_a_copy_computes_the_same_and_stands_alone(net, operate):
    operate(net, X)
    twin = copy.deepcopy(net)
    expected = net(X).detach()
    assert torch.equal(twin(X), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(net(X), expected)
    assert not torch.allclose(twin(X), expected)
    twin.train()(X).sum().backward()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_weights_go_through_a_file_into_a_fresh_one(net, operate, tmp_path):
    fresh = copy.deepcopy(net)
    operate(net, X)
    operate(fresh, X)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=True)
    assert torch.equal(fresh(X), net(X))


@pytest.mark.filterwarnings("ignore")
def test_the_graph_stays_whole(short, operate):
    operate(short, X)
    torch._dynamo.reset()
    compiled = torch.compile(short, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), short(X))
    torch._dynamo.reset()
    compiled = torch.compile(short.train(), fullgraph=True, backend="aot_eager")
    compiled(X).square().sum().backward()
    assert all(p.grad is not None for p in short.parameters())
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["rescheme", "fixup", "normfree", "shorten", "skip_compute", "checkpointed", "reversible"]
)
def test_exports(short, name, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")  # without it nothing is compared, and the difference is None
    OPERATIONS[name](short, X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gap = export_onnx(short, X, tmp_path / "model.onnx")
    assert gap < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_ranks(net, operate):
    operate(net, X)
    twin = copy.deepcopy(net)
    with one_rank():
        wrapped = nn.parallel.DistributedDataParallel(net)
        for model in (wrapped, twin):
            torch.manual_seed(4)
            model.train()(X).square().mean().backward()
    for (name, parameter), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, other.grad)


def test_shared_weights_stay_shared(net, operate):
    net.blocks[1].conv1.weight = net.blocks[0].conv1.weight
    keys = list(net.state_dict())
    operation = operate(net, X)
    both = [block for block in net.blocks[:2] if hasattr(block, "conv1")]
    assert len({id(block.conv1.weight) for block in both}) == 1
    net.train()(X).sum().backward()
    operation.undo()
    assert net.blocks[1].conv1.weight is net.blocks[0].conv1.weight
    if operate is not OPERATIONS["fixup"]:  # two operations, of which one was undone
        assert list(net.state_dict()) == keys


def test_hooks_fire(net, operate):
    seen: list[str] = []
    for number, block in enumerate(net.blocks):
        block.conv1.register_forward_hook(lambda *_, number=number: seen.append(str(number)))
    stem = net.stem[0].weight
    stem.register_hook(lambda gradient: seen.append("gradient"))
    operation = operate(net, X)
    left = [str(n) for n, block in enumerate(net.blocks) if list(block.parameters())]
    seen.clear()
    net.train()(X).sum().backward()
    assert set(left) <= set(seen)
    if net.stem[0].weight is stem:  # else it was folded into, and is another parameter
        assert seen.count("gradient") == 1
    operation.undo()
    assert all(len(block.conv1._forward_hooks) == 1 for block in net.blocks)


def test_half_precision(net, operate):
    x = X.bfloat16()
    operate(net.bfloat16(), x, tolerance=0.2)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    out = net.train()(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_frozen_parameters_stay(net, operate, training):
    net.train(training)
    net.blocks[0].bn1.train(not training)
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    modes = {name: module.training for name, module in net.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    operate(net, X)
    after = {name: module.training for name, module in net.named_modules()}
    assert {name: after[name] for name in modes.keys() & after.keys()} == {
        name: modes[name] for name in modes.keys() & after.keys()
    }
    left = dict(net.named_buffers())
    assert all(torch.equal(left[name], buffer) for name, buffer in buffers.items() if name in left)
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "residual_" not in name} == {"head.weight", "head.bias"}
    net(X).sum().backward()
    assert net.head.weight.grad is not None


def test_a_fresh_gain_is_not_decayed(net):
    """By role, on a network of somebody else (P4)."""
    remove_norm(net, X, how="normfree")
    groups = sw.param_groups(net, lr=0.1, weight_decay=0.5)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in net.named_parameters() if id(parameter) in decayed}
    assert {name for name in names if "residual_" in name} == set()
    assert "blocks.0.conv1.weight" in names
    gains = next(group for group in groups if group["name"] == "gain")
    # g and m of both maps and the branch's own; and the factor that replaced the last norm
    assert len(gains["params"]) == len(net.blocks) * (2 * 2 + 1) + 1
