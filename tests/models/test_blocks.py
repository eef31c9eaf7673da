"""BasicBlock and Bottleneck against the classic hand-written ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import skipway as sw
from benchmarks.twin import ClassicBasicBlock, ClassicBottleneck, ClassicResNet
from skipway.schemes import all_schemes

PAIRS = [(sw.BasicBlock, ClassicBasicBlock), (sw.Bottleneck, ClassicBottleneck)]


def classic_downsample(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def randomised(module: nn.Module) -> nn.Module:
    """Norms with statistics and affine parameters of their own, so that nothing hides."""
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            for tensor in (each.weight.data, each.bias.data, each.running_mean):
                tensor.normal_()
            each.running_var.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize(("ours", "classic"), PAIRS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_classic_block(ours, classic, stride, training):
    change = stride == 2
    in_channels = 8 if change else 8 * ours.expansion
    dim = 8 * ours.expansion
    theirs = randomised(
        classic(in_channels, 8, stride, classic_downsample(in_channels, dim, stride) if change else None)
    )
    block = ours(in_channels, 8, stride, classic_downsample(in_channels, dim, stride) if change else None)
    sw.load(block, theirs.state_dict(), names="torchvision")
    theirs.train(training)
    block.train(training)
    x = torch.randn(4, in_channels, 9, 9, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    out, expected = block(x), theirs(z)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-5, atol=1e-6)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    from skipway.weights.tables import find_keymap

    keymap = find_keymap(block, "torchvision")
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[keymap.find(name)[1][0]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        block.branch.norm1.running_var, theirs.bn1.running_var, rtol=1e-6, atol=1e-6
    )  # statistics move alike


@pytest.mark.parametrize(("ours", "classic"), PAIRS)
def test_has_the_classic_constructor_and_keys(ours, classic):
    assert (sw.BasicBlock.expansion, sw.Bottleneck.expansion) == (1, 4)
    block = ours(8, 4, 2, classic_downsample(8, 4 * ours.expansion, 2))
    exported = sw.weights.export_names(block, "torchvision")
    assert set(exported) == set(classic(8, 4, 2, classic_downsample(8, 4 * ours.expansion, 2)).state_dict())
    assert all(conv.bias is None for conv in block.modules() if isinstance(conv, nn.Conv2d))
    strides = [conv.stride for conv in block.branch.modules() if isinstance(conv, nn.Conv2d)]
    assert strides == ([(2, 2), (1, 1)] if ours is sw.BasicBlock else [(1, 1), (2, 2), (1, 1)])


@pytest.mark.parametrize(
    ("name", "block", "layers"),
    [("resnet18", ClassicBasicBlock, (2, 2, 2, 2)), ("resnet50", ClassicBottleneck, (3, 4, 6, 3))],
)
def test_the_network_equals_the_classic_network(name, block, layers):
    theirs = randomised(ClassicResNet(block, layers, classes=7)).double().eval()
    model = sw.build(name, classes=7, dtype=torch.float64).eval()
    sw.load(model, theirs.state_dict(), names="torchvision")
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-9, atol=1e-9)
    assert set(sw.weights.export_names(model, "torchvision")) == set(theirs.state_dict())


SMALL = {
    "fracconnections": "fracconnections(2)",  # of two channels
    "gatedstreams": "gatedstreams(2)",
    "hyperconnections": "hyperconnections(2)",
    "mhc": "mhc(n=2, iterations=3)",
}
"""Schemes of several streams with the fewest that differ; gradients of iterations are those of each of them."""


@pytest.mark.parametrize("scheme", [SMALL.get(name, name) for name in all_schemes("conv")])
@pytest.mark.parametrize("ours", [sw.BasicBlock, sw.Bottleneck])
def test_gradcheck(ours, scheme):
    """Analytic gradients equal numerical ones, for the input and every parameter, in float64."""
    block = ours(
        4,
        2 if ours is sw.BasicBlock else 1,
        downsample=sw.projection(4, 2) if ours is sw.BasicBlock else None,
        scheme=scheme,
    )
    block = awake(block).double().eval()
    samples = 2 if block.streams is None else block.streams.count
    x = torch.randn(samples, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in block.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    parameters = [p.detach().clone().requires_grad_() for p in block.parameters()]
    assert torch.autograd.gradcheck(run, (x, *parameters), atol=1e-4)


def awake(block: nn.Module) -> nn.Module:
    """No parameter at exactly zero, so that every path carries signal and no ReLU stands on its kink."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def test_a_block_alone_initialises_itself_and_inside_a_network_waits():
    assert not sw.BasicBlock(4, 4, scheme="fixup").branch.conv2.weight.any()
    inside = sw.BasicBlock(4, 4, scheme="fixup", site=sw.Site(dim=4, index=1, depth=3))
    assert inside.branch.conv2.weight.any()


def test_a_missing_downsample_names_the_way_out():
    with pytest.raises(sw.SkipwayError, match=r"downsample=skipway.projection\(64, 128, stride=2\)"):
        sw.BasicBlock(64, 128, stride=2)
    with pytest.raises(sw.SkipwayError, match="use Bottleneck"):
        sw.BasicBlock(64, 64, groups=32)


def test_blocks_survive_deepcopy_and_state_dict():
    block = sw.Bottleneck(16, 4, scheme="layerscale")
    twin = copy.deepcopy(block)
    other = sw.Bottleneck(16, 4, scheme="layerscale")
    other.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 5, 5)
    for each in (block, twin, other):
        each.eval()
    torch.testing.assert_close(twin(x), block(x), rtol=0, atol=0)
    torch.testing.assert_close(other(x), block(x), rtol=0, atol=0)


def test_a_given_downsample_stays_as_it_is():
    """Somebody's trained projection is not initialised anew."""
    downsample = classic_downsample(8, 16, 2)
    before = {key: value.clone() for key, value in downsample.state_dict().items()}
    block = sw.BasicBlock(8, 16, 2, downsample, scheme="fixup")
    assert not block.branch.conv2.weight.any()
    for key, value in downsample.state_dict().items():
        assert torch.equal(value, before[key])
