"""The residual warm-up: its schedules against the authors' code, its clock in state dicts, casts and averages."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import skipway as sw
from skipway.errors import SkipwayError
from skipway.nn import Multiply, ResidualWarmup, find_warmups, warmup_state
from skipway.schemes import parse_scheme

VIT = {"dim": 16, "heads": 2, "patch": 8, "image": 16, "classes": 3}


def reference(schedule: str, end: int, blocks: int, step: int) -> np.ndarray:
    """a(l, t) of all blocks, as in the authors' torchrun_main.py (github.com/dandingsky/ProRes, lines 361 to 414)."""
    ends = np.linspace(end // blocks, end, blocks)
    layer = np.arange(1, blocks + 1)
    floor = {"0": 0.0, "L": 1 / blocks, "sqrt-L": np.sqrt(1 / blocks), "sqrt-l": 1 / np.sqrt(layer)}
    kind, _, rest = schedule.partition("-")
    if kind == "fix":
        return np.broadcast_to(floor[rest], blocks)
    if kind == "stagewise":
        since = (step - np.concatenate(([0], ends[:-1]))) / np.diff(ends, prepend=0)
        return np.clip(floor[rest] + (1 - floor[rest]) * since, floor[rest], 1)
    if schedule == "equal":
        ends = np.array([end] * blocks)
    elif schedule == "reverse":
        ends = np.flip(ends)
    share = step / ends
    return np.clip({"sqrt": np.sqrt(share), "square": share**2}.get(rest, share), 0.0, 1.0)


def factors(schedule: str, blocks: int, step: int, kind: str, warmup: int | float = 7, total: int | None = None):
    """a of every branch of a network of so many blocks."""
    branches = 1 if kind == "conv" else 2
    scheme, depth = sw.ProRes(warmup, schedule), branches * blocks
    scales = [scheme.scale(sw.Site(dim=4, index=index, depth=depth, kind=kind)) for index in range(depth)]
    sw.set_step(nn.ModuleList(scales), step, total)
    return [float(scale(torch.ones(()))) for scale in scales]


SCHEDULES = [
    *("linear", "linear-sqrt", "linear-square", "equal", "reverse"),
    *("stagewise-0", "stagewise-L", "stagewise-sqrt-L", "stagewise-sqrt-l", "fix-L", "fix-sqrt-L", "fix-sqrt-l"),
]


@pytest.mark.parametrize("blocks", [1, 6])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_those_of_the_authors_code(schedule, blocks):
    for step in (0, 1, 10, 7 * blocks - 1, 7 * blocks, 100):
        expected = reference(schedule, 7 * blocks, blocks, step)
        np.testing.assert_allclose(factors(schedule, blocks, step, "conv"), expected, atol=1e-6)
        np.testing.assert_allclose(factors(schedule, blocks, step, "mlp"), np.repeat(expected, 2), atol=1e-6)
        whole = factors(schedule, blocks, step, "conv", warmup=0.25, total=4 * 7 * blocks)
        np.testing.assert_allclose(whole, expected, atol=1e-6)


def test_the_papers_equation():
    """a(l, t) = min(t / (T l), 1), T = 1000 (eq. 3)."""
    for step in (0, 1, 999, 1000, 2500, 6000):
        expected = [min(step / (1000 * layer), 1.0) for layer in range(1, 7)]
        np.testing.assert_allclose(factors("linear", 6, step, "conv", warmup=1000), expected, rtol=1e-6)


def test_fixed_schedules_have_no_clock():
    network = sw.build("vit-tiny-16", depth=2, scheme="prores(schedule='fix-L')", **VIT)
    assert {c.residual.scale.factor for c in sw.chain(network)} == {0.5}
    assert all(isinstance(c.residual.scale, Multiply) for c in sw.chain(network))
    assert sw.set_step(network, 5) == 0


NETWORKS = [("resnet20", {"width": 4, "stem_width": 4, "classes": 3}), ("vit-tiny-16", {"depth": 2, **VIT})]


@pytest.mark.parametrize(("name", "options"), NETWORKS)
@pytest.mark.parametrize("other", ["", "layerscale + ", "perinorm + ", "keel + "])
def test_at_step_0_the_network_is_its_shortcuts_and_no_branch_has_a_gradient(name, options, other):
    network = sw.build(name, scheme=f"{other}prores", **options)
    calls = []
    for connection in sw.chain(network):
        connection.residual.register_forward_hook(lambda r, args, y: calls.append((r, args[0], y)))
    network(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert len(calls) == len(sw.chain(network))
    for residual, x, y in calls:
        torch.testing.assert_close(y, residual.post(residual.shortcut(x, residual.pre(x))), rtol=0, atol=0)
        assert all(not p.grad.any() for p in residual.branch.parameters())
    assert all(p.grad.any() for p in network.head.classifier.parameters())


def test_variance_at_a_step_is_the_sum_of_the_squared_factors():
    """Var(x_l) = Var(x_0) + Σ a(i, t)², with branches of variance 1 (Peri-LN), whose sum over blocks stays below
    2 (t/T)² π²/6.
    """
    size = {"dim": 64, "heads": 2, "patch": 8, "image": 32, "classes": 2}
    network = sw.build("vit-tiny-16", depth=4, scheme="perinorm + prores(10)", **size)
    variances = []
    for connection in sw.chain(network):
        connection.residual.register_forward_hook(lambda _, args, y: variances.append(y.detach().var().item()))
    network.stem.register_forward_hook(lambda _, args, y: torch.randn_like(y))
    sw.set_step(network, 15)
    network(torch.randn(4, 3, 32, 32))
    squares = np.repeat([min(15 / (10 * layer), 1) ** 2 for layer in range(1, 5)], 2)
    np.testing.assert_allclose(variances, 1 + np.cumsum(squares), rtol=0.05)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_the_size_of_adams_step_does_not_depend_on_the_factor(optimizer):
    """With a loss that is linear in the output the gradient of a branch is a times what it is at a = 1."""
    torch.manual_seed(0)
    x, direction = torch.randn(8, 6), torch.randn(8, 6)
    moved = []
    for step in (3, 300):
        torch.manual_seed(1)
        connection = sw.Residual(nn.Linear(6, 6), scale=ResidualWarmup(300))
        sw.set_step(connection, step)
        before = connection.branch.weight.detach().clone()
        chosen = optimizer(connection.parameters(), lr=0.1)
        (connection(x) * direction).sum().backward()
        chosen.step()
        moved.append(connection.branch.weight.detach() - before)
    ratio = moved[0] / moved[1]
    expected = torch.ones(6, 6) if optimizer is torch.optim.Adam else torch.full((6, 6), 0.01)
    torch.testing.assert_close(ratio, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", [each for each in SCHEDULES if not each.startswith("fix")])
def test_at_the_end_every_factor_is_exactly_1(schedule):
    for blocks in range(1, 30):
        assert set(factors(schedule, blocks, 7 * blocks, "conv")) == {1.0}


def small(scheme: str = "prores(4)") -> nn.Module:
    return sw.build("resnet-cifar", depth=8, width=4, stem_width=4, classes=3, scheme=scheme)


def test_the_clock_survives_state_dicts_casts_and_copies():
    network = small("layerscale + prores(1000)").double()
    sw.set_step(network, 1001)
    steps = {int(warmup.step) for warmup in find_warmups(network)}
    assert steps == {1001}
    loaded = small("layerscale + prores(1000)")
    loaded.load_state_dict(network.state_dict())
    cast = copy.deepcopy(network).bfloat16().half().float()  # a step beyond 256 is no number of bfloat16
    for other in (loaded, cast, copy.deepcopy(network)):
        assert warmup_state(other) == warmup_state(network)
    assert cast(torch.randn(2, 3, 8, 8)).dtype == torch.float32
    assert network.bfloat16()(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_plain_network_has_no_new_names():
    assert not [name for name in small("identity").state_dict() if "step" in name or "end" in name]
    own = {f"{c.name}.scale.{name}" for c in sw.chain(small()) for name in ("step", "end")}
    assert set(small().state_dict()) - set(small("identity").state_dict()) == own
    assert not [parameter for parameter in small().parameters() if not parameter.is_floating_point()]


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_of_weights_keep_the_step(use_buffers):
    """torch's average copies buffers, or averages them in their type; ours copies counters."""
    from skipway.training.ema import ModelEMA

    network = small()
    average = torch.optim.swa_utils.AveragedModel(network, use_buffers=use_buffers)
    ours = ModelEMA(network, 0.9)
    for step in range(1, 4):
        sw.set_step(network, step)
        average.update_parameters(network)
        ours.update(network, step)
    if not use_buffers:
        assert warmup_state(average).step == 3
    with ours.applied(network):
        assert warmup_state(network).step == 3
    sw.set_step(average, 5)  # and any loop can set it
    assert warmup_state(average).step == 5


def test_moving_the_clock_compiles_nothing_anew():
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    network, counter = small(), CompileCounter()
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    outputs = []
    for step in range(5):
        assert sw.set_step(compiled, step) == 3
        outputs.append(compiled(x).detach())
    assert counter.frame_count == 1
    torch.testing.assert_close(outputs[4], network(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[4], outputs[1])


def test_initialising_sets_the_clock_back():
    network = small("prores(0.5)")
    fresh = warmup_state(network)
    assert fresh.end is None
    sw.set_step(network, 7, total=40)
    assert (warmup_state(network).step, warmup_state(network).end) == (7, 20)
    sw.initialise_(network)
    assert warmup_state(network) == fresh


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_scheme("prores(0)"), r"prores.warmup=0: the rule is a whole number of steps"),
        (lambda: parse_scheme("prores(1.5)"), r"a share of the training, 0 < warmup <= 1"),
        (lambda: parse_scheme("prores(schedule='linaer')"), "one of 'linear', 'linear-sqrt'"),
        (lambda: sw.set_step(small(), -1), "step=-1: the rule is a whole number of optimizer steps, at least 0"),
        (lambda: sw.set_step(small(), 3, total=0), "total=0"),
        (lambda: sw.set_step(small("prores(0.25)"), 3), r"0.25 of the training, .* set_step\(model, step, total\)"),
    ],
)
def test_wrong_values_are_refused_in_words(call, message):
    with pytest.raises(SkipwayError, match=message):
        call()


def test_no_step_is_set_where_one_is_refused():
    network = nn.Sequential(small("prores(10)"), small("prores(0.25)"))
    with pytest.raises(SkipwayError, match="whose length is not known"):
        sw.set_step(network, 3)
    assert {int(warmup.step) for warmup in find_warmups(network)} == {0}


def test_a_network_without_a_warm_up_is_left_alone():
    assert sw.set_step(nn.Linear(2, 2), 5, 10) == 0
    assert warmup_state(nn.Linear(2, 2)) is None
