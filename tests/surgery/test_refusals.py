"""What cannot be operated on is refused in words, by every operation, and is as before."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tests.process_group import one_rank
from tests.surgery.test_depth import Block, Net, X, state
from tests.surgery.test_survival import OPERATIONS, Operate
from torch import Tensor, nn

import skipway as sw
from skipway.surgery import fold_gains, influence, replace_classifier, rescheme, skip_compute

ALL: dict[str, Callable] = {**OPERATIONS, "influence": influence, "fold_gains": fold_gains}


@pytest.fixture(params=ALL)
def operate(request) -> Operate:
    return ALL[request.param]


class Packed(nn.Module):
    """A map whose weight is 8-bit integers, as they are in int8 inference."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-8, 8, (6, 6), dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.movedim(1, -1), self.weight.float()).movedim(-1, 1)


def test_quantised_weights(operate):
    net = Net().eval()
    net.blocks[1].conv1 = Packed()
    keys, classes, before = state(net)
    with pytest.raises(sw.SkipwayError, match=r"blocks\.1\.conv1 \(Packed\) holds quantised weights"):
        operate(net, X)
    assert state(net)[:2] == (keys, classes)
    assert torch.equal(state(net)[2], before)


@pytest.mark.filterwarnings("ignore")
def test_torchs_own_quantised_modules():
    if "none" in torch.backends.quantized.supported_engines and len(torch.backends.quantized.supported_engines) == 1:
        pytest.skip("this torch has no quantised operators")
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).eval()
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})
    with pytest.raises(sw.SkipwayError, match="holds quantised weights"):
        rescheme(quantised, torch.randn(2, 3, 8), "skipinit")


@pytest.mark.filterwarnings("ignore")
def test_scripted_parts(operate):
    net = Net().eval()
    net.blocks[2] = torch.jit.trace(net.blocks[2], net.stem(X))
    keys = list(net.state_dict())
    with pytest.raises(sw.SkipwayError, match=r"blocks\.2 is a TorchScript module"):
        operate(net, X)
    assert list(net.state_dict()) == keys


def test_no_connection(operate):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
    if operate is influence:
        assert influence(model, X) == {}
        return
    if operate is OPERATIONS["fold"]:
        assert operate(model, X).touched == {"1": "into 0"}  # needs none
        return
    keys, classes, before = state(model)
    with pytest.raises(sw.SkipwayError, match=r"no residual connection|no block|0 blocks|'blocks.2'|nothing to fold"):
        operate(model, X)
    if operate is not OPERATIONS["fixup"]:  # two operations, of which the first is done
        assert state(model)[:2] == (keys, classes)
        assert torch.equal(state(model)[2], before)


class Reading(Block):
    """Leaves out its norm for some inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if bool(x.detach().sum() > 0) else x + self.conv2(x)


@pytest.mark.parametrize("name", ALL)
def test_forwards_that_decide_by_values(name):
    """What would not hold for another input is refused; what holds either way is done."""
    net = Net()
    net.blocks[1] = Reading()
    net.eval()
    keys, classes, before = state(net)
    if name in ("fixup", "fold", "normfree", "skip_compute", "reversible"):
        with pytest.raises(
            sw.SkipwayError, match=r"blocks\.1 \(Reading\) reads values .* another input may take another path"
        ):
            ALL[name](net, X)
        assert state(net)[:2] == (keys, classes)
        assert torch.equal(state(net)[2], before)
        return
    if name in ("influence", "fold_gains", "shorten", "lesion"):
        return  # what they report is about the example
    other = -5 * X.abs()
    twin = copy.deepcopy(net)
    ALL[name](net, X)
    torch.testing.assert_close(net(other), twin(other), rtol=1e-5, atol=1e-5)


def test_a_block_that_runs_twice():
    """It is no block to leave out, to copy or to reverse, and its place behind a branch is two places."""
    net = Net().eval()
    net.blocks[2] = net.blocks[1]
    keys, classes, before = state(net)
    assert set(influence(net, X)) == {"blocks.0", "blocks.3"}
    operation = rescheme(net, X, "skipinit")
    assert all("runs 2 times" in reason for reason in operation.refused.values())
    assert set(operation.touched) == {"blocks.0", "blocks.3"}
    operation.undo()
    for name in ("skip_compute", "checkpointed", "deepen", "fold", "normfree"):
        operation = OPERATIONS[name](net, X)
        assert not any("blocks.1" in name and reason.startswith("into") for name, reason in operation.touched.items())
        operation.undo()
    with pytest.raises(sw.SkipwayError, match="no two blocks"):
        OPERATIONS["reversible"](net, X)
    assert state(net)[:2] == (keys, classes)
    assert torch.equal(state(net)[2], before)


def test_a_failure_half_way_is_taken_back():
    net = Net().eval()
    net.blocks[3].forward = net.blocks[3].forward
    keys, classes, before = state(net)
    with pytest.raises(sw.SkipwayError, match="the forward of this Block was replaced on the instance"):
        skip_compute(net, X, 0.5)
    assert state(net)[:2] == (keys, classes)
    assert torch.equal(state(net)[2], before)
    assert not any(hasattr(block, "skipped") for block in net.blocks)
    refused = sw.surgery.checkpointed(net, X).refused
    assert list(refused) == ["blocks.3"]
    assert "replaced on the instance" in refused["blocks.3"]


CHANGING = {
    **{name: OPERATIONS[name] for name in ("rescheme", "fold", "shorten", "deepen")},
    "replace_classifier": lambda m, x: replace_classifier(m, x, 3),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile], ids=["plain", "compiled"])
def test_parameters_do_not_change_under_data_parallel_training(wrap):
    """Its reducer averages the gradients of those that it was built with, and of no others."""
    torch.manual_seed(0)
    net = Net().eval()
    before = state(net)
    with one_rank():
        ranks = nn.parallel.DistributedDataParallel(net)
        for operate in CHANGING.values():
            with pytest.raises(sw.SkipwayError, match=r"operate on the network in it, model\.module, and wrap that"):
                operate(wrap(ranks), X)
            assert state(net)[:2] == before[:2]
            assert torch.equal(state(net)[2], before[2])
            operate(ranks.module, X).undo()
        for name in ("lesion", "skip_compute", "checkpointed", "reversible"):
            OPERATIONS[name](wrap(ranks), X).undo()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("passed", [False, True])
def test_parameters_do_not_change_once_they_are_sharded(passed):
    """New ones would be in no group whose gradients are averaged; after a pass those of the root are put together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    with one_rank():
        net = fully_shard(Net().eval(), mesh=init_device_mesh("cpu", (1,)))
        if passed:
            net(X)
        before = list(net.state_dict())
        with pytest.raises(sw.SkipwayError, match="FSDP was built with.* operate on the network before it is sharded"):
            rescheme(net, X, "skipinit")
        assert list(net.state_dict()) == before
        OPERATIONS["lesion"](net, X).undo()
