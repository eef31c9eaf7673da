"""`probe` and `Probe`: theory by hand, anybody's network, and no trace in what is observed."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from tests.process_group import one_rank
from torch import nn

import skipway as sw
from benchmarks.peers import import_timm, import_transformers
from skipway.diagnosis.subject import Subject, output_channels
from skipway.probes import MEASURES, Measure, Probe, probe
from skipway.probes.measures import (
    branch_gradient,
    cosine,
    distinctness,
    is_finite,
    largest_magnitude,
    rms,
    std,
    swallowed_share,
    token_distinctness,
    variance,
)
from skipway.probes.mixing_matrix import depth_mixing
from skipway.probes.objective import compute_loss


class Linear(nn.Module):
    """y = x + a W x with an orthogonal W, so that the variance grows by 1 + a² and the gradient likewise."""

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.map, self.factor = nn.Linear(width, width, bias=False), factor
        nn.init.orthogonal_(self.map.weight)

    def forward(self, x):
        return x + self.factor * self.map(x)


def linear_chain(depth: int, factor: float, width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width, bias=False), *(Linear(width, factor) for _ in range(depth)))


def peer(load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except ImportError:
        pytest.skip("the peer is not installed")


def traces(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_the_variance_of_a_sum():
    """Var(x + F) = Var x + Var F + 2 Cov(x, F), and without correlation each block multiplies it by 1 + a²."""
    signals = probe(linear_chain(6, 0.5), torch.randn(512, 64), measures=list(MEASURES))
    for row in signals.connections.values():
        covariance = 2 * row["cosine"] * row["skip"] * row["branch"]
        assert row["skip"] ** 2 + row["branch"] ** 2 + covariance == pytest.approx(row["stream"] ** 2, rel=1e-4)
        assert row["variance_branch"] == pytest.approx(0.25 * row["variance_before"], rel=2e-2)
        assert row["largest"] >= row["stream"] == pytest.approx(math.sqrt(row["variance_after"]), rel=1e-2)
        assert row["finite"] == 1.0
    first, last = signals["1"], signals["6"]
    assert math.log(last["variance_after"] / first["variance_before"]) == pytest.approx(6 * math.log(1.25), rel=0.2)


def test_the_gradient_of_a_linear_chain_by_hand():
    """For L = ⟨c, y_L⟩ the gradient before block k is Π (I + a W_j)ᵀ c over the blocks j ≥ k."""
    depth, model = 4, linear_chain(4, 0.7)
    x, c = torch.randn(8, 64), torch.randn(8, 64)
    signals = probe(model, x, c, lambda output, c: (output * c).sum())
    gradient = c
    for k in range(depth, 0, -1):
        row, weight = signals[str(k)], model[k].map.weight
        assert row["gradient_after"] == pytest.approx(float(rms(gradient)), rel=1e-5)
        through = 0.7 * gradient @ weight
        assert row["gradient_branch"] == pytest.approx(float(rms(through)), rel=1e-4)
        gradient = gradient + through
        assert row["gradient_before"] == pytest.approx(float(rms(gradient)), rel=1e-5)
    assert signals.loss == pytest.approx((model(x) * c).sum().item(), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_measures_do_not_overflow(scale):
    x, y = torch.randn(1000, dtype=torch.float64), torch.randn(1000, dtype=torch.float64)
    low, other = (scale * x).float(), (scale * y).float()
    assert float(rms(low)) == pytest.approx(scale * float(x.square().mean().sqrt()), rel=1e-5)
    assert float(std(low)) == pytest.approx(scale * float(x.std(correction=0)), rel=1e-5)
    assert float(variance(low)) == pytest.approx(scale**2 * float(x.var(correction=0)), rel=1e-5)
    assert float(largest_magnitude(low)) == pytest.approx(scale * float(x.abs().max()), rel=1e-5)
    assert float(cosine(low, other)) == pytest.approx(float(torch.cosine_similarity(x, y, 0)), abs=1e-5)
    assert all(math.isnan(measure(low, other[:9])) for measure in (cosine, branch_gradient))
    assert [float(is_finite(each)) for each in (low, low * math.inf)] == [1.0, 0.0]


class Stranger(nn.Module):
    """Somebody's network: norm, dropout, an in-place addition, and additions outside of connections."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(depth))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth))
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x + 1)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            branch = self.drop(conv(F.relu(norm(x))))
            branch += x
            x = branch
        return self.head(x.mean((2, 3)))


def train(model: nn.Module, connections=None, steps: int = 4) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        x, y = torch.randn(6, 3, 8, 8), torch.randint(4, (6,))
        optimizer.zero_grad()

        def step(x=x, y=y):
            loss = F.cross_entropy(model(x), y) + 0.0 * x.sum()
            loss.backward()
            return loss

        if connections is None:
            loss = step()
        else:
            with Probe(model, connections, list(MEASURES), ["head"]) as watcher:
                loss = step()
            readings = watcher.readings()
            assert all(row.keys() == MEASURES.keys() for row in readings.connections.values())
            assert watcher.edges == []
        optimizer.step()
        losses.append(loss.item())
        probe(model, x, y)
    return losses, {**model.state_dict(), "random": torch.get_rng_state()}


def test_training_is_bit_equal_with_and_without():
    """The chain is watched once, in evaluation mode and with another batch."""
    first = Stranger()
    second = copy.deepcopy(first)
    connections = sw.chain(second, torch.zeros(2, 3, 16, 16))
    assert len(connections) == 3
    plain, observed = train(first), train(second, connections)
    assert plain[0] == observed[0]
    assert all(torch.equal(value, observed[1][name]) for name, value in plain[1].items())
    assert traces(second) == 0


def test_no_reference_to_the_graph_remains():
    model, x, alive = Stranger(), torch.randn(2, 3, 8, 8), []
    connections = sw.chain(model, x)
    model.convs[1].register_forward_hook(lambda _, given, out: alive.append(weakref.ref(out)))
    with Probe(model, connections, list(MEASURES), ["convs.1"]) as watcher:
        model(x).sum().backward()
    gc.collect()
    assert [reference() for reference in alive] == [None]
    assert watcher.readings()["convs.1"]["gradient_after"] > 0


def test_no_hook_stays_on_a_tensor():
    model, x = Stranger().eval(), torch.randn(2, 3, 8, 8, requires_grad=True)
    with Probe(model, sw.chain(model, x)) as watcher:
        loss = model(x).sum()
    before = watcher.readings()
    loss.backward()  # outside: nobody listens any more
    assert watcher.readings().connections == before.connections
    assert all("gradient_after" not in row for row in before.connections.values())


def interrupted(*_):
    raise KeyboardInterrupt


def test_hooks_go_when_the_step_fails():
    model = Stranger()
    connections = sw.chain(model, torch.zeros(2, 3, 8, 8))
    with pytest.raises(RuntimeError), Probe(model, connections, modules=["stem"]):
        model(torch.zeros(2, 5, 8, 8))
    interrupt = model.head.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt), Probe(model, connections):
        model(torch.zeros(2, 3, 8, 8))
    interrupt.remove()
    assert traces(model) == 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_errors_name_the_way_out():
    model, x = Stranger(), torch.zeros(2, 3, 8, 8)
    with pytest.raises(sw.SkipwayError, match="unknown measure 'cosin'; did you mean 'cosine'"):
        probe(model, x, measures=["cosin"])
    with pytest.raises(sw.SkipwayError, match="points=.*the rule is points that exist at one moment"):
        Measure("both", cosine, ("skip", "stream"))
    with Probe(model, sw.chain(model, x)) as watcher:
        model.forward(x)
    with pytest.raises(sw.SkipwayError, match="was not called inside"):
        watcher.readings()
    with pytest.raises(sw.SkipwayError, match="unknown connection ':9'"):
        probe(model, x)[":9"]


def test_a_network_that_skips_layers_at_random_is_refused():
    class Dropping(Stranger):
        def forward(self, x):
            x = self.stem(x)
            for number, conv in enumerate(self.convs):
                if not (self.training and number == 1):
                    x = x + F.relu(conv(x))
            return self.head(x.mean((2, 3)))

    model = Dropping()
    assert len(probe(model.eval(), torch.randn(2, 3, 8, 8))) == 3
    with pytest.raises(sw.SkipwayError, match="not those that were watched"):
        probe(model.train(), torch.randn(2, 3, 8, 8))
    assert traces(model) == 0


def test_under_autocast_and_compiled_and_distributed():
    model, x = Stranger().eval(), torch.randn(2, 3, 8, 8)
    y = torch.tensor([0, 1])
    expected = probe(model, x, y).connections
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    assert probe(compiled, x, y).connections == expected
    connections = sw.chain(model, x)
    with Probe(compiled, connections) as watcher:  # a step that calls the compiled model itself
        F.cross_entropy(compiled(x), y).backward()
    assert watcher.readings().connections == expected
    with torch.autocast("cpu", torch.bfloat16):
        low = probe(model, x, y).connections
    for name, row in expected.items():
        assert low[name]["stream"] == pytest.approx(row["stream"], rel=0.02)
    with one_rank():
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert probe(wrapped, x, y).connections == expected
        with Probe(wrapped, connections) as watcher:
            F.cross_entropy(wrapped(x), y).backward()
        assert watcher.readings().connections == expected
        assert traces(model) == 0


def test_plain_torch():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        signals = probe(model, x, measures=["skip", "stream"])
    first = model.layers[0]
    attended = x + first._sa_block(x, None, None)
    assert signals["layers.0:1"]["stream"] == pytest.approx(float(rms(attended)), rel=1e-5)
    assert signals["layers.0:2"]["skip"] == pytest.approx(float(rms(first.norm1(attended))), rel=1e-5)
    assert len(signals) == 6


def test_timm():
    timm = peer(import_timm)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3).train()
    signals = probe(model, torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    assert list(signals.connections) == [f"blocks.{number}:{sub}" for number in range(3) for sub in (1, 2)]
    for row in signals.connections.values():
        assert math.hypot(row["skip"], row["branch"]) == pytest.approx(row["stream"], rel=0.3)
        assert 0 < row["gradient_after"] < row["gradient_before"] * 2
    model = timm.create_model("resnet18", num_classes=4).train()
    means = model.bn1.running_mean.clone()
    signals = probe(model, torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]), measures=["branch", "gradient_after"])
    assert len(signals) == 8
    assert torch.equal(model.bn1.running_mean, means)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_transformers():
    transformers = peer(import_transformers)
    config = transformers.GPT2Config(
        n_layer=3, n_embd=16, n_head=2, vocab_size=50, n_positions=32, activation_function="gelu"
    )
    model = transformers.GPT2LMHeadModel(config).train()
    ids = torch.randint(50, (2, 7))
    signals = probe(model, {"input_ids": ids, "labels": ids})
    assert len(signals) == 6
    assert signals.loss == pytest.approx(math.log(50), rel=0.1)
    assert all(row["gradient_after"] > 0 for row in signals.connections.values())
    connections = sw.chain(model, {"input_ids": ids[:1, :3]})
    with Probe(model, connections, ["branch"]) as watcher:
        model(input_ids=ids, labels=ids).loss.backward()
    assert len(watcher.readings()) == 6


def test_a_table_fits_on_one_screen():
    text = str(probe(linear_chain(60, 0.1, width=8), torch.randn(4, 8)))
    lines = text.splitlines()
    assert len(lines) == 26
    assert lines[13] == "… 36 more"
    assert max(map(len, lines)) <= 120
    assert str(probe(nn.Linear(3, 3), torch.randn(4, 3))) == "no connections"


def test_measures_of_ones_own_and_modules():
    model, x = linear_chain(2, 0.5), torch.randn(16, 64)
    own = [
        Measure("mean", lambda branch: branch.mean(), ("branch",)),
        Measure("std", std, ("stream",)),
        Measure("gradient", rms, ("gradient_after",)),
    ]
    signals = probe(model, x, measures=own, modules=["0"], loss=lambda output, _: output.sum())
    assert signals["1"]["mean"] == pytest.approx((0.5 * model[1].map(model[0](x))).mean().item(), abs=1e-6)
    assert signals["0"]["std"] == pytest.approx(model[0](x).std(correction=0).item(), rel=1e-5)
    assert signals["0"]["gradient"] > 0


def test_real_targets_are_regressed_unless_their_rows_are_distributions():
    output = torch.randn(6, 4)
    values, shares = torch.randn(6, 4), torch.rand(6, 4).softmax(1)
    assert torch.equal(compute_loss(output, values), torch.nn.functional.mse_loss(output, values))
    assert torch.equal(compute_loss(output, shares), torch.nn.functional.cross_entropy(output, shares))


@pytest.mark.parametrize("scheme", ["hyperconnections(3)", "mhc(n=3)"])
def test_samples_are_told_apart_though_they_share_an_axis_with_streams(scheme):
    """Equal streams are no equal samples: what a network with one stream measures, up to the start of mHC."""
    options = {"depth": 2, "dim": 16, "heads": 2, "patch": 8, "image": 16, "classes": 3}
    x, rows = torch.randn(4, 3, 16, 16), []
    plain = sw.build("vit-tiny-16", **options)
    for each in ("identity", scheme):
        model = sw.build("vit-tiny-16", scheme=each, **options).eval()
        model.load_state_dict(plain.state_dict(), strict=False)
        signals = sw.probes.probe(model, x, measures=["distinct"], connections=sw.chain(model, x))
        rows.append([row["distinct"] for row in signals.connections.values()])
    assert rows[1] == pytest.approx(rows[0], rel=0.05)


@pytest.mark.parametrize(
    "scheme",
    ["attentionresiduals", "attentionresiduals(blocks=None)", "denseformer", "x0residual", "laurel", "fracconnections"],
)
def test_what_starts_as_a_network_with_one_stream_is_measured_as_one(scheme):
    """The state is read, joined and left behind as one stream is; the gradient of what is added is that of the sum."""
    tables = []
    for name in ("identity", scheme):
        torch.manual_seed(0)
        model = sw.build("vit-tiny-16", scheme=name, depth=2, classes=4, dim=8, heads=2, patch=4, image=8)
        images = torch.randn(4, 3, 8, 8)
        tables.append(probe(model, images, torch.arange(4)).connections)
    plain, found = tables
    assert list(found) == list(plain)
    for name, row in found.items():
        assert {"skip", "branch", "cosine", "stream", "gradient_after"} <= row.keys()
        assert row == pytest.approx({key: plain[name][key] for key in row}, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("scheme", ["hyperconnections(n=2)", "dualresidual"])
def test_equal_streams_are_no_equal_samples(scheme):
    model = sw.build("vit-tiny-16", scheme=scheme, depth=1, classes=4, dim=8, heads=2, patch=4, image=8)
    images = torch.randn(1, 3, 8, 8).expand(4, -1, -1, -1), torch.randn(4, 3, 8, 8)
    same, other = (
        [row["distinct"] for row in probe(model, each, measures=["distinct"]).connections.values()] for each in images
    )
    assert max(same) < 1e-5 < 1e-2 < min(other)


@pytest.mark.parametrize("scheme", ["denseformer", "mudd", "x0residual", "gtrxl", "attentionresiduals(blocks=None)"])
def test_a_join_of_ours_is_measured_between_its_slots(scheme):
    """With weights away from the start: x is what the branch is computed from, and F what the join is given."""
    torch.manual_seed(0)
    model = sw.build("vit-tiny-16", scheme=scheme, depth=2, classes=4, dim=8, heads=2, patch=4, image=8).eval()
    for module in (each.residual.streams or each.residual.join for each in sw.chain(model)):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    sizes = {}
    for each in sw.chain(model):
        each.residual.pre.register_forward_pre_hook(lambda _, args, n=each.name: sizes.update({n: [rms(args[0])]}))
        each.residual.scale.register_forward_hook(lambda _, __, out, n=each.name: sizes[n].append(rms(out)))
    for name, row in probe(model, torch.randn(4, 3, 8, 8), measures=["skip", "branch"]).connections.items():
        assert [row["skip"], row["branch"]] == pytest.approx([float(size) for size in sizes[name]])


class Writing(nn.Module):
    """Subtracts from its input, and from the tokens that it is given, in place, before it adds."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.table = nn.Linear(4, 4), nn.Embedding(9, 4)

    def forward(self, x, tokens):
        x.sub_(5)
        tokens.sub_(1)
        x = x + self.table(tokens)
        return x + self.map(x)


@pytest.mark.parametrize("measure", [probe, depth_mixing, sw.features])
def test_what_a_network_writes_into_are_copies(measure):
    torch.manual_seed(0)
    net, x, tokens = Writing(), torch.randn(3, 4), torch.full((3,), 8)
    plain = x.clone()
    measure(net, (x, tokens))
    assert torch.equal(x, plain)
    assert (tokens == 8).all()


def test_both_passes_of_the_mixing_begin_with_the_same_input():
    torch.manual_seed(0)
    net, x, tokens = Writing(), torch.randn(3, 4), torch.full((3,), 8)
    loss = depth_mixing(net, (x, tokens), torch.zeros(3, 4), loss=nn.functional.mse_loss).loss
    assert loss == pytest.approx(net(x, tokens).square().mean().item())


def test_the_gradient_of_features_reaches_the_input():
    x = torch.randn(3, 4, requires_grad=True)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    (found,) = torch.autograd.grad(sw.features(net, x, ["0"])["0"].sum(), x)
    torch.testing.assert_close(found, net[0].weight.sum(0).expand(3, 4))


def test_a_map_as_wide_as_high_as_deep_is_equal_at_its_positions():
    x = torch.randn(4, 8, 1, 1).expand(4, 8, 8, 8)
    assert float(token_distinctness(x)) == pytest.approx(0, abs=1e-6)


def test_the_channels_of_a_modules_output_may_be_told():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 1, 1, 8).expand(4, 8, 8, 8)
    with Probe(model, (), ["tokens_distinct"], ["0"], {"0": -1}) as watcher:
        model(x)
    assert watcher.readings()["0"]["tokens_distinct"] == pytest.approx(0, abs=1e-6)
    subject = Subject(model, x, targets=torch.zeros(4, 8, 8, 8))
    assert output_channels(subject.program, subject.layers) == {"0": -1}


def test_what_is_not_finite_and_what_is_empty_is_measured():
    far, none = torch.tensor([1.0, torch.inf]), torch.zeros(0)
    assert float(rms(far)) == torch.inf
    assert torch.isnan(cosine(torch.tensor([1.0, torch.nan]), torch.ones(2)))
    assert torch.isnan(rms(none))
    assert float(largest_magnitude(none)) == 0
    assert float(cosine(torch.zeros(2), torch.ones(2))) == 0


def test_complex_numbers_are_measured_by_both_parts():
    x, y = torch.randn(2, 6, 5, 4, dtype=torch.complex128)
    assert float(rms(x)) == pytest.approx(float(x.abs().square().mean().sqrt()))
    assert float(std(x)) == pytest.approx(float((x - x.mean()).abs().square().mean().sqrt()))
    assert float(largest_magnitude(x)) == pytest.approx(float(x.abs().max()))
    parts = [torch.view_as_real(each).flatten() for each in (x, y)]
    assert float(cosine(x, y)) == pytest.approx(float(F.cosine_similarity(*parts, dim=0)))
    assert float(cosine(x, 1j * x)) == pytest.approx(0)
    assert float(cosine(x.real, x)) == pytest.approx(float(x.real.norm() / x.norm()))
    assert float(distinctness(torch.tensor([[1.0], [1j]]))) == pytest.approx(1)
    assert float(token_distinctness(torch.tensor([[[1.0], [-1.0]]]) * 1j)) == pytest.approx(2)
    assert float(swallowed_share(torch.tensor([1j]), torch.tensor([1e-3j]))) == 0.5
    assert [float(is_finite(torch.tensor([complex(0, part)]))) for part in (1.0, math.inf)] == [1, 0]
    (low,) = (rms(torch.full((3,), 1e30j)),)
    assert float(low) == pytest.approx(1e30)


def test_a_complex_stream_and_outputs_of_modules():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4, dtype=torch.complex64)

        def forward(self, x):
            return x + self.f(x)

    model = nn.Sequential(Block())
    found = probe(model, torch.full((8, 4), 1j), measures=["skip", "stream"], modules=["0.f"])
    assert found["0"]["skip"] == pytest.approx(1)
    assert found["0.f"]["stream"] > 0
