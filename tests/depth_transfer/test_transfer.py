"""Depth transfer against theory, and what it refuses.

Theory. Residual nets y = Π(1 + L^(−p) W_l) x start at W = 0, where ∂y/∂W_l = L^(−p) x for each of the L maps. With the
mean square to y* = a x, a close to 1, gradient descent has the sharpness Σ_l |∂y/∂W_l|² ∝ L · L^(−2p), so that its best
rate goes as L^(2p − 1). A step of Adam moves each entry by the rate, and y by L · L^(−p) of it: L^(1 − p).
"""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import skipway as sw
from skipway.depth_transfer import design as designs
from skipway.depth_transfer.analysis import Analysis
from skipway.depth_transfer.batches import as_training_batches
from skipway.depth_transfer.design import made_design
from skipway.depth_transfer.regression import Estimate
from skipway.depth_transfer.result import SchemeRates, advice
from skipway.depth_transfer.runs import TrainingPlan
from skipway.depth_transfer.search import BestRate
from skipway.errors import DataError, SkipwayError
from skipway.optim.optimizers import parse_optimizer

DIM = 4


class LinearBlock(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.map, self.factor = nn.Linear(DIM, DIM, bias=False), factor
        nn.init.zeros_(self.map.weight)

    def forward(self, x):
        return x + self.factor * self.map(x)


class NormedBlock(nn.Module):
    """Pre-norm with a random map: a branch of unit size, independent of all others."""

    def __init__(self, factor):
        super().__init__()
        self.norm, self.map, self.factor = nn.LayerNorm(64), nn.Linear(64, 64, bias=False), factor
        nn.init.normal_(self.map.weight, std=64**-0.5)

    def forward(self, x):
        return x + self.factor * self.map(self.norm(x))


def linear_net(power):
    return lambda depth: nn.Sequential(*(LinearBlock(depth**-power) for _ in range(depth)))


def normed_net(power):
    return lambda depth: nn.Sequential(*(NormedBlock(depth**-power) for _ in range(depth)), nn.Linear(64, 3))


def nearly_identity(gain=1.02):
    """Batches with directions that are learned fast and slowly."""
    draw = torch.Generator().manual_seed(0)
    scales = torch.tensor([1, 0.5, 0.25, 0.125])
    return [(x := torch.randn(32, DIM, generator=draw) * scales, gain * x) for _ in range(24)]


def far_off(depth):
    head = nn.Linear(DIM, 3)
    nn.init.constant_(head.bias, 0)
    head.bias.data[0] = 10
    return nn.Sequential(*(LinearBlock(1.0) for _ in range(depth)), head)


def noisy_classes(count=8):
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 64, generator=draw), torch.randint(3, (32,), generator=draw)) for _ in range(count)]


@pytest.mark.parametrize(
    ("power", "expected"),
    [(0, -1), (0.5, 0), (1, 1)],
)
def test_best_rate_of_linear_residual_nets_goes_with_depth_as_theory_says(power, expected):
    found = sw.transfer(
        linear_net(power),
        [2, 16],
        nearly_identity(),
        optimizer="sgd(momentum=0.0)",
        steps=12,
        seeds=2,
        schemes=["own"],
        warmup=0,
    )
    assert found.schemes[0].power.value == pytest.approx(expected, abs=0.15)
    assert found.answer == ("carries" if expected == 0 else "does not carry")
    assert [each.branches for each in found.schemes[0].rates] == [2, 16]


@pytest.mark.parametrize(
    ("scheme", "based"),
    [("depthscaled(exponent=1)", "depthscaled(exponent=1, base=2)"), ("depthscaled", "depthscaled(base=2)")],
)
def test_depth_scaling_with_its_own_rates_makes_the_best_rate_carry(scheme, based):
    """DepthScaled's base gives SGD the rate times m^(2p − 1), which undoes the power of theory."""
    found = sw.transfer(
        linear_net(0),
        [2, 16],
        nearly_identity(),
        optimizer="sgd(momentum=0.0)",
        steps=12,
        seeds=2,
        schemes=["own", scheme],
        warmup=0,
    )
    own, scaled = found.schemes
    assert own.answer == "does not carry"
    assert scaled.answer == "carries"
    assert scaled.power.value == pytest.approx(0, abs=0.15)
    # the base of the scheme is the shallowest network, which it leaves as it is
    assert scaled.scheme == based
    assert scaled.rates[0].lr == own.rates[0].lr
    assert "sw.rescheme(model, example" in scaled.code
    assert any("take depthscaled" in sentence for sentence in found.advice)


@pytest.mark.parametrize(("power", "summed"), [(0, 0.5), (0.5, 0.0), (1, -0.5)])
def test_coordinates_of_independent_branches_add_up_as_theory_says(power, summed):
    """L independent branches of size L^(−p) have a sum of size L^(1/2 − p)."""
    found = sw.transfer(normed_net(power), [4, 8, 16], noisy_classes(), sweep=False, lr=1e-3, schemes=["own"])
    powers = {each.name: each for each in found.coordinates}
    assert powers["branch"].power.value == pytest.approx(-power, abs=0.05)
    assert powers["sum"].power.value == pytest.approx(summed, abs=0.1)
    assert powers["sum"].growth == ("flat" if summed == 0 else "grows" if summed > 0 else "falls")
    # steps of Adam change branches by as much each, all in the same direction: L^(1 − p)
    assert powers["stream change"].power.value == pytest.approx(1 - power, abs=0.25)
    assert found.schemes == ()


def test_completep_makes_the_first_steps_change_the_stream_alike_at_all_depths():
    make = normed_net(0)
    schemes = ["own", "depthscaled(exponent=1)"]
    found = sw.transfer(make, [4, 16], noisy_classes(), sweep=False, lr=1e-3, schemes=schemes)
    own, scaled = (each.power.value for each in found.coordinates if each.name == "stream change")
    assert (own, scaled) == pytest.approx((1, 0), abs=0.25)


def test_interrupted_sweep_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
    batches = nearly_identity()
    arguments = {"optimizer": "sgd", "steps": 8, "seeds": 2, "schemes": ["own"]}
    whole = sw.transfer(linear_net(0), [2, 4], batches, **arguments)
    count = []

    def interrupt(text, seconds):
        count.append(seconds)
        if len(count) == 5:
            raise KeyboardInterrupt

    file = tmp_path / "new" / "runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sw.transfer(linear_net(0), [2, 4], batches, runs=file, progress=interrupt, **arguments)
    assert len(file.read_text().splitlines()) == 5
    with file.open("a") as cut:
        cut.write('{"settings": "')  # an interruption in the middle of a line
    more = []
    again = sw.transfer(
        linear_net(0), [2, 4], batches, runs=file, progress=lambda text, s: more.append(text), **arguments
    )
    assert again.schemes[0].rates[1].loss == pytest.approx(whole.schemes[0].rates[1].loss, rel=1e-5)
    assert again.schemes[0].power.value == pytest.approx(whole.schemes[0].power.value, abs=1e-3)
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    assert len(lines) == 5 + len(more)
    nothing = []
    sw.transfer(linear_net(0), [2, 4], batches, runs=file, progress=lambda t, s: nothing.append(t), **arguments)
    assert nothing == []


def test_runs_of_a_network_that_has_changed_are_refused(tmp_path):
    arguments = {"optimizer": "sgd", "steps": 8, "seeds": 1, "schemes": ["own"], "runs": tmp_path / "runs.jsonl"}
    sw.transfer(linear_net(0), [2, 4], nearly_identity(), **arguments)
    with pytest.raises(SkipwayError, match="the network or its batches have changed since"):
        sw.transfer(linear_net(0), [2, 4], nearly_identity(gain=1.1), **arguments)
    (tmp_path / "runs.jsonl").write_text("no json\n{}\n")
    with pytest.raises(DataError, match="line 1: no JSON"):
        sw.transfer(linear_net(0), [2, 4], nearly_identity(), **arguments)


class Remembering(nn.Module):
    """A network that adds a tenth of the number of its calls, which it counts somewhere."""

    def __init__(self, depth, where):
        super().__init__()
        self.blocks, self.where = linear_net(0)(depth), where
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.log, self.other = 0, [], SimpleNamespace(calls=0)

    def forward(self, x):
        if self.where == "buffer":
            self.seen = self.seen + 1
        elif self.where == "attribute":
            self.calls += 1
        elif self.where == "list":
            self.log.append(1)
        else:
            self.other.calls += 1
        return self.blocks(x) + (self.seen + self.calls + len(self.log) + self.other.calls) / 10


@pytest.mark.parametrize("where", ["buffer", "attribute", "list", "object"])
def test_every_rate_starts_from_the_network_as_it_was_made(where, tmp_path):
    """Blocks start at 0, so that the first loss on a batch is that of x + 0.1 at every rate and depth."""
    found = sw.transfer(
        lambda depth: Remembering(depth, where), [1, 2], nearly_identity()[0], steps=8, seeds=1,
        optimizer="sgd", schemes=["own"], warmup=0, runs=tmp_path / "runs.jsonl",
    )  # fmt: skip
    firsts = [json.loads(line)["losses"][0] for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    x, y = nearly_identity()[0]
    same = [first == pytest.approx(float((x + 0.1 - y).square().mean()), rel=1e-5) for first in firsts]
    remarked = any("begins at a loss of" in remark for remark in found.remarks)
    assert all(same) is not remarked
    assert remarked is (where == "object")  # which is left as it is, see attribute_restoration


def test_caller_s_random_numbers_go_on_where_they_were():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    sw.transfer(linear_net(0), [2, 4], nearly_identity(), sweep=False, schemes=["own"], seeds=1)
    assert torch.equal(torch.rand(3), expected)


def fails(depth):
    raise RuntimeError("no such depth")


def plain_first(depth):
    """The first block has no shortcut."""
    return nn.Sequential(nn.Linear(DIM, DIM), *(LinearBlock(1.0) for _ in range(depth - 1)))


X, Y = torch.randn(8, DIM), torch.randn(8, DIM)


@pytest.mark.parametrize(
    ("make", "depths", "batches", "message"),
    [
        (linear_net(0), [4], (X, Y), "depths=\\[4\\]: the rule is at least two different whole numbers"),
        (linear_net(0), [2, 4], None, "gives a network without a batch"),
        (linear_net(0), [2, 4], X, "hold no targets"),
        (linear_net(0), [2, 4], 3, "batches=int: the rule is a DataLoader"),
        (linear_net(0), [2, 4], iter([]), "yields no batch"),
        (lambda depth: nn.Sequential(LinearBlock(1.0)), [2, 4], (X, Y), "do not grow with depth"),
        (
            plain_first,
            [1, 2, 4],
            (X, Y),
            "depths=\\[1, 2, 4\\]: the rule is a residual connection at .* none at 1; leave",
        ),
        (lambda depth: "net", [2, 4], (X, Y), "gives a str; the rule is a torch.nn.Module"),
        (fails, [2, 4], (X, Y), "fails\\(depth=2\\) raises RuntimeError: no such depth"),
        (lambda: nn.Linear(4, 4), [2, 4], (X, Y), "takes no argument, and none of them is known to be the depth"),
        ("timm:resnet18", [2, 4], None, "has no depth to set"),
        ("gpt-mikro", [2, 4], None, "did you mean"),
    ],
)
def test_what_cannot_be_swept_is_refused(make, depths, batches, message):
    with pytest.raises(SkipwayError, match=message):
        sw.transfer(make, depths, batches, steps=8, seeds=1, schemes=["own"])


def test_one_batch_and_little_learning_are_remarked_upon():
    one = sw.transfer(linear_net(0), [2, 4], (X, Y), steps=8, seeds=1, schemes=["own"], sweep=False)
    assert any("one batch is used in every step" in remark for remark in one.remarks)
    nothing_to_learn = [(x := torch.randn(32, DIM), x + 3 * torch.randn(32, DIM)) for _ in range(8)]
    noise = sw.transfer(linear_net(0), [1, 2], nothing_to_learn, steps=8, seeds=1, schemes=["own"])
    assert any("little is learned" in remark for remark in noise.remarks)
    assert not any("one batch" in remark for remark in noise.remarks)
    # logits of size 10 for labels at random: the loss falls far, down to that of the frequencies
    guesses = [(x, torch.randint(3, (32,), generator=torch.Generator().manual_seed(n))) for n, (x, _) in
               enumerate(nothing_to_learn)]  # fmt: skip
    large = sw.transfer(far_off, [1, 2], guesses, steps=8, seeds=1, schemes=["own"], optimizer="sgd")
    assert any("how frequent classes are, a loss of 1." in remark for remark in large.remarks)


@pytest.mark.parametrize("name", ["gpt-nano(dim=32, heads=2)", "vit(dim=16, heads=2)", "resnet(width=4, stem_width=4)"])
def test_families_bring_their_own_data_and_say_so(name):
    depths = [8, 14] if "resnet" in name else [1, 2]
    found = sw.transfer(name, depths, sweep=False, seeds=1, samples=8)
    assert any("no data are given" in remark for remark in found.remarks)
    assert {each.name for each in found.coordinates} >= {"stream", "sum", "branch", "stream change", "output change"}
    assert {each.scheme.partition("(")[0] for each in found.coordinates} == {"own", "depthscaled"}
    assert [row.branches for row in found.sizes if row.scheme == "own"] == ([3, 6] if "resnet" in name else [2, 4])


@pytest.mark.parametrize("scheme", ["depthscaled(exponent=0.5, base=8)", "layerscale", "depthscaled + stochasticdepth"])
def test_short_specs_read_back_as_the_same_scheme(scheme):
    parsed = designs.parse_scheme(scheme)
    assert designs.parse_scheme(designs.spec_of(parsed)) == parsed


def spoilt(value, place=3):
    """Batches, one of which holds a value."""
    batches = [(x.clone(), y) for x, y in nearly_identity()]
    batches[place][0][0, 0] = value
    return batches


def fails_at(place):
    def read():
        for number, batch in enumerate(nearly_identity()):
            if number == place:
                raise OSError("row 96 is cut")
            yield batch

    return read()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (spoilt(float("nan")), "batches=list: a batch has inputs that are not finite"),
        (fails_at(3), "batches=generator: batch 4 cannot be read: OSError: row 96 is cut"),
    ],
)
def test_batches_that_fail_are_named_and_no_rate_is_blamed(batches, message):
    with pytest.raises(SkipwayError, match=message):
        sw.transfer(linear_net(0.5), [2, 4], batches, steps=8, seeds=1, optimizer="sgd", schemes=["own"])


def shuffled():
    """A loader as a user makes it, without a generator."""
    x = torch.randn(64, DIM, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, 1.02 * x), batch_size=8, shuffle=True)


def test_a_loader_that_shuffles_gives_the_same_batches_in_another_session(tmp_path):
    read = []
    for state in (1, 2):
        torch.manual_seed(state)
        batches = as_training_batches(shuffled(), 8)
        read.append([batches.at(seed, step)[0] for seed in range(2) for step in range(8)])
        assert torch.initial_seed() == state
    assert all(map(torch.equal, *read))
    assert not torch.equal(read[0][0], read[0][8])  # another order in the next round

    def make(depth):
        return linear_net(0)(depth), shuffled()

    file, trained = tmp_path / "runs.jsonl", []
    for state in (1, 2):
        torch.manual_seed(state)
        sw.transfer(
            make, [2, 4], steps=8, seeds=1, optimizer="sgd", schemes=["own"], runs=file,
            progress=lambda text, seconds: trained.append(text),
        )  # fmt: skip
    assert len(trained) == len(file.read_text().splitlines())  # the second call has trained nothing


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"clip": 0.0}, "clip=0.0: the rule is clip > 0"),
        ({"clip": -1}, "clip=-1: the rule is clip > 0"),
        ({"warmup": -1}, "warmup=-1: the rule is a whole number of steps, from 0 to 8"),
        ({"warmup": 9}, "warmup=9: the rule is a whole number of steps, from 0 to 8"),
    ],
)
def test_choices_out_of_range_are_refused(choice, message):
    with pytest.raises(SkipwayError, match=message):
        sw.transfer(linear_net(0), [2, 4], (X, Y), steps=8, seeds=1, schemes=["own"], **choice)


class Diverging(nn.Module):
    """Whose output is beyond all use after any step."""

    def __init__(self):
        super().__init__()
        self.block = LinearBlock(1.0)

    def forward(self, x):
        y = self.block(x)
        return y * math.inf if self.block.map.weight.any() else y


def test_a_depth_that_diverges_at_every_rate_has_no_best_rate():
    """The power is that of the other depths, and the rate of the shallowest does not carry."""

    def make(depth):
        return nn.Sequential(*(LinearBlock(1.0) for _ in range(depth - (depth == 8))), *[Diverging()] * (depth == 8))

    found = sw.transfer(
        make, [2, 4, 8], nearly_identity(), optimizer="sgd(momentum=0.0)", steps=8, seeds=2, schemes=["own"], warmup=0
    )
    (own,) = found.schemes
    assert [rate.known for rate in own.rates] == [True, True, False]
    assert own.power.value == pytest.approx(-1, abs=0.3)
    assert own.answer == "does not carry"
    assert "nan" not in str(found)


def test_under_no_grad_the_trainings_are_trainings():
    with torch.no_grad():
        found = sw.transfer(
            linear_net(0.5), [2, 4], nearly_identity(), steps=8, seeds=1, optimizer="sgd", schemes=["own"], sweep=False
        )
    assert found.coordinates


def test_columns_are_those_of_a_table(tmp_path):
    table = tmp_path / "tales.jsonl"
    table.write_text(json.dumps({"tale": "Once upon a time. " * 9, "note": "What a tale that was! " * 9}) + "\n")
    options = {"steps": 8, "samples": 8}
    with pytest.raises(SkipwayError, match="name one, with columns='note'"):
        designs.choose_design("gpt-nano(context=16)", table, [2], **options)
    _, batches, _ = designs.choose_design("gpt-nano(context=16)", table, [2], **options, columns="tale ")
    assert "tales" in batches.name
    with pytest.raises(SkipwayError, match="columns='tale': the rule is batches from a file"):
        designs.choose_design(linear_net(0), None, [2], **options, columns="tale")


@pytest.mark.parametrize(("schemes", "first"), [(["identity", "own"], "own"), (["identity", "layerscale"], "identity")])
def test_schemes_are_compared_with_the_network_as_it_is_made_wherever_it_stands(schemes, first):
    plan = TrainingPlan(optimizer=parse_optimizer("sgd"), steps=8, seeds=1)
    design, batches, _ = made_design(linear_net(0), nearly_identity(), 2, 8)
    found = Analysis.of(design, batches, plan, [2, 4], schemes, None, torch.device("cpu"), None)
    assert next(iter(found.trainings.schemes)) == first


def test_sentences_name_the_first_scheme():
    rates = (BestRate("a", 2, 2, Estimate(0.1, 0.09, 0.11), 1.0, 2.0, 0.1, Estimate(0, 0, 0), ()),)
    found = [SchemeRates(name, "", rates) for name in ("skipinit", "layerscale")]
    assert any("higher than the network with skipinit" in sentence for sentence in advice(found, ""))
    assert not any("as it is made" in sentence or "own" in sentence for sentence in advice(found, ""))
    found = [SchemeRates(name, "", rates) for name in ("own", "layerscale")]
    assert any("higher than the network as it is made" in sentence for sentence in advice(found, ""))
