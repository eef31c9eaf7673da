"""What every scheme keeps in what is done with networks: wrappers, layouts, types, weights, export, operations."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from tests.process_group import one_rank
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import skipway as sw
from skipway.errors import SkipwayError
from skipway.schemes import all_schemes
from skipway.schemes import parse_scheme as read
from skipway.training.distributed import shard_connections

TRANSFORMER = {"depth": 2, "dim": 16, "heads": 2, "patch": 8, "image": 16, "classes": 3}
CONVOLUTIONAL = {"depth": 8, "width": 4, "stem_width": 4, "placement": "preactivation", "classes": 3}
PAIRS = [
    *(("vit-tiny-16", name) for name in all_schemes("attention")),
    *(("resnet-cifar", name) for name in all_schemes("conv")),
]
SEVERAL = [pair for pair in PAIRS if read(pair[1]).open() is not None]


def build(family: str, scheme: str, **options) -> nn.Module:
    """A small network whose parameters are all off their start, so that nothing hides behind a zero."""
    network = sw.build(family, scheme=scheme, **{**(TRANSFORMER if "vit" in family else CONVOLUTIONAL), **options})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16)


def gradients(network: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss by the names of the parameters, those of wrappers left out."""
    torch.manual_seed(5)  # of stochastic depth
    network.zero_grad()
    F.cross_entropy(network(x).float(), torch.arange(2)).backward()
    taken = {}
    for name, parameter in network.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        taken[name.removeprefix("module.")] = full.clone()
    return taken


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == expected.keys()
    largest = max(float(each.abs().max()) for each in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=tolerance * max(largest, 1.0), msg=name)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    with one_rank():
        yield


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # earlier outputs are handed on as they are
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("family", "scheme"), PAIRS)
def test_sharded_and_replicated_networks_have_the_same_gradients(family, scheme):
    """Several streams share the batch axis, and FSDP2 shards connection by connection; scalars it does not take."""
    network, x = build(family, scheme), images()
    expected = gradients(copy.deepcopy(network), x)
    replicated = nn.parallel.DistributedDataParallel(copy.deepcopy(network))
    assert_same(gradients(replicated, x), expected)
    if any(parameter.ndim == 0 for parameter in network.parameters()):
        with pytest.raises(SkipwayError, match="scalars have none.*sharding='none'"):
            shard_connections(network, x.device, 1)
        return
    assert_same(gradients(shard_connections(network, x.device, 1), x), expected)


@pytest.mark.parametrize(("family", "scheme"), PAIRS)
def test_recomputed_connections_have_the_same_gradients(family, scheme):
    network, x = build(family, scheme), images()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0  # else the second computation counts twice
    expected = gradients(network, x)
    for connection in sw.chain(network):
        residual = connection.residual
        residual.forward = lambda *args, forward=residual.forward: checkpoint(forward, *args, use_reentrant=False)
    assert_same(gradients(network, x), expected)


@pytest.mark.parametrize("scheme", list(all_schemes("conv")))
def test_channels_last_is_kept(scheme):
    """From the image to the last connection, forward and backward, with the values of the other layout."""
    network, x = build("resnet-cifar", scheme, classes=2), images()
    expected = gradients(copy.deepcopy(network), x)
    network.to(memory_format=torch.channels_last)
    layouts = []

    def record(residual: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        y = y if isinstance(y, torch.Tensor) else y[-1]  # earlier outputs, the latest last
        layouts.append(y.is_contiguous(memory_format=torch.channels_last))
        if y.requires_grad:
            y.register_hook(lambda g: layouts.append(g.is_contiguous(memory_format=torch.channels_last)))

    for connection in sw.chain(network):
        connection.residual.register_forward_hook(record)
    assert_same(gradients(network, x.contiguous(memory_format=torch.channels_last)), expected)
    assert len(layouts) == 2 * len(sw.chain(network))
    assert all(layouts[: len(sw.chain(network))])


@pytest.mark.parametrize(("family", "scheme"), PAIRS)
def test_autocast_and_bfloat16_train(family, scheme):
    """Outputs within what 8 bits explain, and a finite gradient for every parameter that has one in float32."""
    network, x = build(family, scheme), images()
    torch.manual_seed(5)
    exact = network(x)
    expected = gradients(network, x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(5)
        mixed = network(x)
        ours = gradients(network, x)
    narrow = copy.deepcopy(network).bfloat16()
    torch.manual_seed(5)
    for out in (mixed, narrow(x.bfloat16())):
        assert (out.float() - exact).abs().max() < 0.1 * exact.abs().max() + 0.02
    for name, gradient in gradients(narrow, x.bfloat16()).items():
        for each in (ours[name], gradient):
            assert torch.isfinite(each).all(), name
            assert each.any() or expected[name].abs().max() < 1e-5, name


@pytest.mark.parametrize(("family", "scheme"), PAIRS)
def test_fused_networks_compute_the_same(family, scheme):
    network, x = build(family, scheme).eval(), images()
    torch.testing.assert_close(sw.fuse(copy.deepcopy(network))(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "scheme"), PAIRS)
def test_features_of_stages_and_connections(family, scheme):
    network, x = build(family, scheme).eval(), images()
    plain = build(family, "identity").eval()
    shapes = [each.shape for each in sw.stage_features(plain, x)]
    assert [each.shape for each in sw.stage_features(network, x)] == shapes
    streams = sw.features(network, x, ["0:before", "0:branch", "-1:after"])
    assert all(torch.isfinite(each).all() for each in streams.values())
    samples = read(scheme).open()
    count = 1 if samples is None else samples.count
    assert [len(each) for each in streams.values()] == [2 * count, 2, 2 * count]


@pytest.mark.parametrize(("family", "scheme"), PAIRS)
def test_weights_load_at_another_depth(family, scheme):
    """Blocks of the same number are taken, so that the shallower network is found again in the deeper one."""
    network, x = build(family, scheme).eval(), images()
    deeper = build(family, scheme, depth=4 if "vit" in family else 14).eval()
    sw.load(deeper, network.state_dict(), adapt=("depth",))
    again = sw.load(build(family, scheme).eval(), deeper.state_dict(), adapt=("depth",))
    torch.testing.assert_close(again(x), network(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "scheme"), SEVERAL)
@pytest.mark.parametrize("operation", [sw.reversible, sw.checkpointed, sw.shorten, sw.deepen])
def test_operations_on_blocks_take_several_streams_or_say_why_not(operation, family, scheme):
    network, x = build(family, scheme, **({} if "vit" in family else {"depth": 14})).eval(), images()
    expected, before = network(x), copy.deepcopy(network.state_dict())
    arguments = {sw.shorten: (1,), sw.deepen: (1,)}.get(operation, ())
    refusal = ""
    try:
        operation(network, x, *arguments).undo()
    except SkipwayError as error:
        refusal = str(error)
    assert not refusal or "it mixes several streams" in refusal
    torch.testing.assert_close(network(x), expected, rtol=0, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
