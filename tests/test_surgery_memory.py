"""Compute and memory of blocks: the expectation stays, statistics move once, bytes are measured."""

from __future__ import annotations

import pytest
import torch
from tests.test_surgery_depth import Net, X, state
from torch import nn

import skipway as sw
from skipway.surgery import checkpointed, skip_compute


def test_what_is_skipped_is_not_computed_and_the_expectation_stays():
    torch.manual_seed(0)
    net = Net()
    net.blocks.eval()  # running statistics, so that the block's output does not depend on the draw
    seen: list[int] = []
    net.blocks[3].conv1.register_forward_hook(lambda _, given, out: seen.append(len(given[0])))
    expected = net.eval().blocks(net.stem(X)).detach()
    operation = skip_compute(net, 0.5, X)
    assert operation.report["difference"] == 0
    seen.clear()
    stream = net.stem(X).detach()
    block, plain = net.blocks[3], type(net.blocks[3]).__mro__[1]
    block.training = True
    draws = torch.stack([block(stream) for _ in range(600)]).detach()
    assert seen == [4] * 600
    torch.testing.assert_close(draws.mean(0), plain.forward(block, stream).detach(), rtol=0.2, atol=0.15)
    block.training = False
    operation.undo()
    assert not hasattr(net.blocks[3], "skipped")
    torch.testing.assert_close(net.eval().blocks(net.stem(X)), expected)


def test_every_parameter_has_a_gradient_and_the_graph_is_whole():
    torch.manual_seed(0)
    net = Net()
    skip_compute(net, 0.9, X)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    compiled(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    torch._dynamo.reset()


def test_checkpointing_keeps_less_and_computes_the_same():
    torch.manual_seed(0)
    net = Net(6)
    twin = Net(6)
    twin.load_state_dict(net.state_dict())
    operation = checkpointed(net, X)
    assert operation.report["bytes after"] < 0.6 * operation.report["bytes before"]
    for model in (net, twin):
        model.train()(X).square().sum().backward()
    for (name, mine), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)
    for mine, other in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, other)  # updated once (P22)
    keys, classes, _ = state(twin.eval())
    operation.undo()
    assert state(net.eval())[:2] == (keys, classes)


def test_bad_input():
    with pytest.raises(sw.SkipwayError, match="between 0 and 1"):
        skip_compute(Net(), 1.0, X)
    with pytest.raises(sw.SkipwayError, match="no block"):
        checkpointed(nn.Linear(4, 4), torch.randn(2, 4))
