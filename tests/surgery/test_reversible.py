"""`reversible`: gradients are those of the streams with everything kept, bytes do not grow, everything goes back."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.surgery.test_depth import Net, X, state
from torch import Tensor, nn

import skipway as sw
from benchmarks.depth import peak_bytes
from skipway.studies.chains import block_chain
from skipway.surgery import reversible
from skipway.surgery.saved_tensors import saved_bytes


def encoder(layers: int = 3, dropout: float = 0.2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


TOKENS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
NETS = {"transformer": (encoder, TOKENS), "batch norm": (lambda: Net(5), X)}


def keep_everything(model: nn.Module) -> nn.Module:
    """The same two streams without the inversion."""
    for module in model.modules():
        if hasattr(module, "block_row"):
            module.block_row.inverts = False
    return model


def pair(build, x: Tensor) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    inverting = build().to(x.dtype)
    reversible(inverting, x)
    return inverting, keep_everything(copy.deepcopy(inverting))


def passed(model: nn.Module, x: Tensor, *, autocast: bool = False) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model.train()(x)
        trained = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(out.double().square().sum(), [x, *trained])
    return out.detach(), list(found)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_gradients_are_those_of_the_two_streams_with_everything_kept(name, dtype, tolerance):
    build, x = NETS[name]
    inverting, keeping = pair(build, x.to(dtype))
    (out, mine), (expected, others) = passed(inverting, x.to(dtype)), passed(keeping, x.to(dtype))
    assert torch.equal(out, expected)
    largest = max(float(gradient.abs().max()) for gradient in others)
    assert max(float((a - b).abs().max()) for a, b in zip(mine, others, strict=True)) <= tolerance * largest
    for buffer, other in zip(inverting.buffers(), keeping.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=0, atol=0)  # updated once (P22)


def test_the_equation():
    """(u, v) ← (v, u + R(v)), y = u + v − x, written out."""
    inverting, _ = pair(lambda: encoder(3, 0.0), TOKENS)
    blocks = [copy.deepcopy(block) for block in inverting.layers]
    for block in blocks:
        block.__class__ = nn.TransformerEncoderLayer
    u = v = TOKENS
    for block in blocks:
        u, v = v, u + block.train()(v) - v
    torch.testing.assert_close(inverting.train()(TOKENS), u + v - TOKENS)


@pytest.mark.parametrize("name", NETS)
def test_what_is_kept_does_not_grow_with_the_number_of_blocks(name):
    x = NETS[name][1]
    kept, before = [], []
    for blocks in (4, 12):
        model = encoder(blocks) if name == "transformer" else Net(blocks)
        before.append(saved_bytes(model, x))
        reversible(model, x)
        kept.append(saved_bytes(model, x))
    assert kept[0] == kept[1]
    assert before[1] > 2 * before[0]


def test_autocast_frozen_parameters_and_backward():
    inverting, keeping = pair(lambda: encoder(4, 0.1), TOKENS)
    for model in (inverting, keeping):
        model.layers[1].requires_grad_(False)
        model.layers[2].norm1.requires_grad_(False)
    (out, mine), (expected, others) = passed(inverting, TOKENS, autocast=True), passed(keeping, TOKENS, autocast=True)
    torch.testing.assert_close(out, expected)
    for gradient, other in zip(mine, others, strict=True):
        assert float((gradient - other).norm()) <= 2e-2 * float(other.norm()) + 1e-3
    inverting(TOKENS).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in inverting.parameters())
    inverting.requires_grad_(False)
    assert not inverting(TOKENS).requires_grad


def test_a_weight_that_two_blocks_share_gets_both_gradients():
    def tied() -> nn.Module:
        model = encoder(3, 0.0)
        model.layers[2].linear1.weight = model.layers[0].linear1.weight
        return model

    x = TOKENS.double()
    inverting, keeping = pair(tied, x)
    for mine, other in zip(passed(inverting, x)[1], passed(keeping, x)[1], strict=True):
        torch.testing.assert_close(mine, other)


def test_what_all_blocks_are_given_beside_x_gets_its_gradient():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, shift: Tensor, *, factor: float) -> Tensor:
            return x + factor * torch.tanh(self.linear(x) + shift)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.shift = nn.ModuleList(Shifted() for _ in range(3)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            shift = self.shift(x)
            for block in self.blocks:
                x = block(x, shift, factor=0.5)
            return x

    x = TOKENS.double()
    inverting, keeping = pair(Model, x)
    for mine, other in zip(passed(inverting, x)[1], passed(keeping, x)[1], strict=True):
        torch.testing.assert_close(mine, other)


def test_undo_is_exact_and_others_wait_for_it():
    torch.manual_seed(0)
    net = Net().eval()
    keys, classes, before = state(net)
    operation = reversible(net, X)
    assert operation.report["gradient difference"] < 1e-5
    assert operation.report["difference"] > 1e-3  # another function
    assert state(net)[0] == keys
    with pytest.raises(sw.SkipwayError, match="was made reversible; undo that first"):
        sw.rescheme(net, X, "skipinit")
    operation.undo()
    assert state(net)[:2] == (keys, classes)
    assert not hasattr(net.blocks[0], "block_row")
    assert torch.equal(state(net)[2], before)


class Between(Net):
    """Runs the blocks itself; what it does between the second and the third is to be said."""

    def __init__(self, between: str) -> None:
        super().__init__(4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x, kept = self.stem(x), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 1:
                kept.append(x)
                x = x * 2 if self.between == "done" else x
        out = self.head(self.norm(x).mean((2, 3)))
        if self.between == "read":
            return out + self.head(kept[0].mean((2, 3)))
        return (out, kept[0]) if self.between == "put out" else out


@pytest.mark.parametrize(
    ("between", "reason"),
    [("done", "something is done with it in between"), ("read", "read by the model"), ("put out", "by the model too")],
)
def test_chains_end_where_something_else_happens(between, reason):
    model = Between(between)
    operation = reversible(model, X)
    assert list(operation.touched.values()) == [f"two streams through blocks.{n}, blocks.{n + 1}" for n in (0, 2)]
    model = Between(between)
    model.blocks = nn.Sequential(nn.Identity(), *model.blocks[:2], nn.Identity())  # nothing but that break
    with pytest.raises(sw.SkipwayError, match=rf"no two blocks .* follow one another: blocks\.1: .*{reason}"):
        reversible(model, X)


def test_refusals():
    net = Net()
    keys, classes, _ = state(net)
    with pytest.raises(sw.SkipwayError, match="no block that adds to x"):
        reversible(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(sw.SkipwayError, match="gradients through the inversion differ"):
        reversible(net, X, tolerance=0)
    for block in net.blocks:
        block.forward = block.forward
    with pytest.raises(sw.SkipwayError, match="was replaced on the instance"):
        reversible(net, X)
    assert state(net)[:2] == (keys, classes)

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x += torch.tanh(self.linear(x))
            return x

    with pytest.raises(sw.SkipwayError, match="writes into what it is given"):
        reversible(nn.Sequential(nn.Linear(8, 8), Writing(), Writing()), TOKENS)


def small(branches: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *block_chain("skipinit(init=0.1)", branches, width=8), nn.Linear(8, 4))


ROW = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


def test_the_peak_is_flat_in_depth():
    """Of all live tensors in a step, gradients of parameters aside: at most 2 % from 10 to 80 branches."""
    peaks, labels = [], torch.zeros(64, dtype=torch.long)
    for branches in (10, 80):
        model = small(branches)
        reversible(model, ROW[:2])
        peaks.append(peak_bytes(model, ROW, labels))
    assert peaks[1] <= 1.02 * peaks[0]


def test_a_branch_runs_twice_in_a_step_and_not_more():
    model, runs = small(6), []
    reversible(model, ROW[:2])
    for block in model[1:-1]:
        block.branch.register_forward_hook(lambda module, given, out: runs.append(id(module)))
    model(ROW).sum().backward()
    assert sorted(map(runs.count, set(runs))) == [2] * 6


def test_a_connection_of_ours_is_the_two_streams_of_anybodys_block():
    """What adds its branch alone is not added and taken away again; gradients are the same, of the input alone too."""
    model = small(5).double()
    reversible(model, ROW[:2].double())
    hooked = copy.deepcopy(model)
    for block in hooked[1:-1]:
        block.post.register_forward_hook(lambda module, given, out: None)
    x, y = (ROW.double().requires_grad_() for _ in range(2))
    for mine, other in zip(
        torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]),
        torch.autograd.grad(hooked(y).square().sum(), [y, *hooked.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(
        torch.autograd.grad(model(x).square().sum(), x), torch.autograd.grad(hooked(y).square().sum(), y)
    )


def test_compiled():
    inverting, keeping = pair(lambda: encoder(2, 0.0), TOKENS)
    compiled = torch.compile(inverting, backend="aot_eager", fullgraph=True)
    for mine, other in zip(passed(compiled, TOKENS)[1], passed(keeping, TOKENS)[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_a_module_that_is_put_in_later_gets_its_gradient():
    model = small(4)
    reversible(model, ROW[:2])
    model[2].branch.fc2 = nn.Linear(8, 8)
    model(ROW).sum().backward()
    assert model[2].branch.fc2.weight.grad is not None
