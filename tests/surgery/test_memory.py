"""Compute and memory of blocks: the expectation stays, statistics move once, bytes are measured."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.process_group import one_rank
from tests.surgery.test_depth import Net, X
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import skipway as sw
from benchmarks.depth import Live, peak_bytes
from skipway.studies.chains import block_chain
from skipway.surgery import Budget, Every, checkpointed, reversible, skip_compute
from skipway.surgery.saved_tensors import saved_bytes
from skipway.tracing import find_residual_adds, watch
from skipway.tracing.program import Ancestry


def test_what_is_skipped_is_not_computed_and_the_expectation_stays():
    torch.manual_seed(0)
    net = Net()
    net.blocks.eval()  # running statistics, so that the block's output does not depend on the draw
    seen: list[int] = []
    net.blocks[3].conv1.register_forward_hook(lambda _, given, out: seen.append(len(given[0])))
    expected = net.eval().blocks(net.stem(X)).detach()
    operation = skip_compute(net, X, 0.5)
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
    skip_compute(net, X, 0.9)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    compiled(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    torch._dynamo.reset()


def encoder(layers: int = 6, dropout: float = 0.2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


TOKENS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
NETS = {"dropout": (encoder, TOKENS), "batch norm": (lambda: Net(6), X)}
SEGMENTS = [1, 2, Every(4), "squareroot", "a budget"]


def passed(model: nn.Module, x: Tensor, *, autocast: bool = False) -> tuple[Tensor, list[Tensor], Tensor]:
    """Output, gradients of input and parameters by `torch.autograd.grad`, and a number drawn afterwards."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model.train()(x)
    found = torch.autograd.grad(out.float().square().sum(), [x, *model.parameters()])
    return out.detach(), list(found), torch.rand(1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_what_is_computed_again_is_what_was_computed(name, segments, autocast):
    """Equal outputs and gradients: the same random numbers, the same precision, and statistics updated once (P22)."""
    build, x = NETS[name]
    torch.manual_seed(0)
    model = build()
    twin = copy.deepcopy(model)
    operation = checkpointed(model, x, Budget(0.7 * saved_bytes(model, x)) if segments == "a budget" else segments)
    assert operation.touched
    assert operation.report["bytes after"] < operation.report["bytes before"]
    assert (
        operation.report["bytes after"] <= operation.report["bytes at most"] <= operation.report["bytes before"] * 1.2
    )
    (out, mine, drawn), (expected, others, number) = (passed(each, x, autocast=autocast) for each in (model, twin))
    assert torch.equal(out, expected)
    assert drawn == number
    for gradient, other in zip(mine, others, strict=True):
        torch.testing.assert_close(gradient, other)
    for buffer, other in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=0, atol=0)
    keys, classes = list(twin.state_dict()), [type(module) for module in twin.modules()]
    operation.undo()
    assert (list(model.state_dict()), [type(module) for module in model.modules()]) == (keys, classes)
    assert not any(hasattr(module, "block_row") for module in model.modules())


def deep(branches: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *block_chain("skipinit(init=0.1)", branches, width=8), nn.Linear(8, 4))


ROW = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


def kept_tensors(model: nn.Module) -> int:
    """How many tensors autograd keeps, parameters not counted."""
    own, kept = {parameter.data_ptr() for parameter in model.parameters()}, []

    def pack(tensor: Tensor) -> None:
        kept.append(tensor.data_ptr() not in own)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: ROW):
        model.train()(ROW)
    return sum(kept)


def test_the_square_root():
    """Chen et al. 2016: what is kept grows as √L where the ordinary chain's grows as L, as numbers and as bytes."""
    numbers, most, before = [], [], []
    depths = (9, 36, 144)
    for branches in depths:
        model = deep(branches)
        report = checkpointed(model, ROW, "squareroot").report
        numbers.append(kept_tensors(model))
        most.append(report["bytes at most"])
        before.append(report["bytes before"])
    assert before[2] / before[0] == pytest.approx(16, rel=0.1)
    assert most[2] / most[0] == pytest.approx(4, rel=0.25)
    assert all(number <= 6 * branches**0.5 for number, branches in zip(numbers, depths, strict=True))


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3, 0.2])
def test_a_budget_is_kept_and_used(share):
    """The peak is within the budget, as measured, and what fits is not computed again."""
    model = deep(48)
    whole = saved_bytes(model, ROW)
    report = (operation := checkpointed(model, ROW, Budget(share * whole))).report
    assert report["bytes at most"] <= share * whole
    again = int(operation.title.split()[2])
    assert again <= {0.9: 8, 0.5: 26, 0.3: 36, 0.2: 42}[share]
    labels = torch.zeros(16, dtype=torch.long)
    assert peak_bytes(model, ROW, labels) <= share * whole + 6 * ROW.nbytes  # what is not kept, but passed on


def test_a_budget_that_holds_all_changes_nothing_and_one_that_holds_nothing_is_refused():
    model = deep(8)
    assert not checkpointed(model, ROW, Budget(1e9)).touched
    classes = [type(module) for module in model.modules()]
    with pytest.raises(sw.SkipwayError, match=r"with any choice of segments .* bytes are kept"):
        checkpointed(model, ROW, Budget(100))
    assert [type(module) for module in model.modules()] == classes


def test_counting_what_is_kept_keeps_nothing():
    assert peak_kept(lambda: saved_bytes(deep(64), ROW)) < 0.3 * saved_bytes(deep(64), ROW)


def peak_kept(action) -> int:
    with Live(nn.Module()) as live:
        action()
    parameters = sum(parameter.nbytes for parameter in deep(64).parameters())
    return live.peak() - parameters


class Neighbours(nn.Module):
    """Means over neighbours, twice, by a matrix that autograd keeps."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix, self.map = matrix, nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.matrix, torch.sparse.mm(self.matrix, self.map(x)))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_tensors_are_counted_once_by_their_parts(layout):
    """16 values and their places: two numbers each, or one each and 17 borders."""
    matrix, parts = torch.eye(16).to_sparse(), 16 * (2 * 8 + 4)
    if layout != torch.sparse_coo:
        form = {"size": (16, 16), "layout": layout, "check_invariants": True}
        matrix = torch.sparse_compressed_tensor(torch.arange(17), torch.arange(16), torch.ones(16), **form)
        parts = 16 * (8 + 4) + 17 * 8
    assert saved_bytes(Neighbours(matrix), ROW) == ROW.nbytes + parts


def test_others_see_the_blocks_one_by_one_and_none_can_be_called_alone():
    model = encoder(4, 0.0)
    names = [connection.name for connection in sw.chain(model, TOKENS)]
    lone = model.layers[2](TOKENS).detach()
    checkpointed(model, TOKENS, 4)
    assert [connection.name for connection in sw.chain(model, TOKENS)] == names
    with torch.no_grad():
        torch.testing.assert_close(model.layers[2](TOKENS), lone)
    with pytest.raises(sw.SkipwayError, match="given something else than their output"):
        model.layers[2](TOKENS)
    twin = copy.deepcopy(model)
    twin.train()(TOKENS).sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_compiled():
    torch.manual_seed(0)
    model = Net(2)
    twin = copy.deepcopy(model)
    checkpointed(model, X, 2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mine, others = (
        torch.autograd.grad(net.train()(X).square().sum(), list(net.parameters())) for net in (compiled, twin)
    )
    for gradient, other in zip(mine, others, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)
    for buffer, other in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)
    torch._dynamo.reset()


@pytest.mark.parametrize("operate", [lambda m: checkpointed(m, X, 2), lambda m: reversible(m, X)])
def test_data_parallel(operate):
    """One process over gloo: every gradient arrives once, and is the one without DDP."""
    torch.manual_seed(0)
    model = Net(4)
    operate(model)
    twin = copy.deepcopy(model)
    with one_rank():
        spread = nn.parallel.DistributedDataParallel(model)
        for net in (spread, twin):
            net.train()(X).square().sum().backward()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_reading_a_chain_looks_at_every_value_a_few_times():
    """Work in proportion to the depth: what is looked behind per value does not grow with the chain."""
    looks = []
    for branches in (40, 120):
        program = watch(deep(branches), ROW)
        count = 0
        plain = Ancestry.look_back

        def look(self, number, plain=plain):
            nonlocal count
            count += 1
            plain(self, number)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ancestry, "look_back", look)
            assert len(find_residual_adds(program)[0]) == branches
        looks.append(count / len(program))
    assert looks[1] == pytest.approx(looks[0], rel=0.1)


def test_bad_input():
    with pytest.raises(sw.SkipwayError, match="between 0 and 1"):
        skip_compute(Net(), X, 1.0)
    with pytest.raises(sw.SkipwayError, match="no block"):
        checkpointed(nn.Linear(4, 4), torch.randn(2, 4))
    for wrong in (0, True, "every(0)", "budget(0)", "cube"):
        with pytest.raises(sw.SkipwayError):
            checkpointed(Net(), X, wrong)


class AddsInPlace(nn.Module):
    """x += F(relu(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x)
        x += self.map(h)
        return x


def test_blocks_that_add_in_place_are_computed_for_the_samples_that_are_drawn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), *(AddsInPlace() for _ in range(3)))
    skip_compute(model, ROW, 0.5, rising=False)
    block = model[1].train()
    stream = torch.randn(16, 8)
    found = block(stream.clone()).detach()
    drawn = (found != stream).any(1)
    assert drawn.sum() == 8
    change = block.map(stream.relu()).detach()
    torch.testing.assert_close((found - stream)[drawn], 2 * change[drawn])
    model.train()(ROW).square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in model.parameters())


class DropsInPlace(nn.Module):
    """x + F(x), with dropout in place on x: it writes into x in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.map = nn.Dropout(0.5, inplace=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.map(torch.relu(x))
        return self.drop(x) + h


def test_blocks_that_write_in_training_alone_are_computed_for_the_samples_that_are_drawn():
    """y = x + 2 (d + F(x) − x) on the drawn half, d one of 0 and 2x in each place."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), *(DropsInPlace() for _ in range(3)))
    skip_compute(model, ROW, 0.5, rising=False)
    block = model[1].train()
    stream = torch.randn(16, 8)
    found = block(stream.clone()).detach()
    drawn = (found != stream).any(1)
    assert drawn.sum() == 8
    dropped = (found - stream)[drawn] / 2 + stream[drawn] - block.map(stream.relu()).detach()[drawn]
    either = torch.stack((dropped, dropped - 2 * stream[drawn])).abs().amin(0)
    torch.testing.assert_close(either, torch.zeros(8, 8), rtol=0, atol=1e-5)


def test_no_axis_is_found_by_outputs_that_are_no_numbers():
    model = deep(4)
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    with pytest.raises(sw.SkipwayError, match="no axis of the example holds independent samples"):
        skip_compute(model, ROW, 0.5)


def test_an_operation_draws_none_of_the_numbers_of_its_caller():
    model = deep(4)
    before = torch.get_rng_state()
    skip_compute(model, ROW, 0.5)
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


class Dropped(nn.Module):
    """x + g(dropout(tanh(f(x))))."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop, self.g = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.g(self.drop(torch.tanh(self.f(x))))


@pytest.mark.parametrize("reentrant", [True, False])
def test_within_another_checkpoint_gradients_are_those_of_the_network(reentrant):
    """The outer one computes the network again within a backward pass, where segments are computed for the first time,
    too."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(*(Dropped() for _ in range(3))), torch.randn(16, 8)
    net = copy.deepcopy(plain)
    checkpointed(net, x, 1)
    torch.manual_seed(5)
    plain(x.clone().requires_grad_()).square().sum().backward()
    torch.manual_seed(5)
    checkpoint(net, x.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
