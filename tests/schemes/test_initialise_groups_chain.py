"""initialise_, param_groups and chain on networks of ours and on somebody's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import skipway as sw
from skipway.nn import Bias, Gain, Residual, ScaledStandardConv2d
from skipway.optim.groups import layer_indices
from skipway.schemes import all_schemes


class Own(nn.Module):
    """Somebody's network from our blocks."""

    def __init__(self, scheme: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(*(sw.BasicBlock(8, 8, scheme=scheme) for _ in range(4)))
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.body(self.stem(x)).mean((2, 3)))


def test_initialise_counts_the_branches_of_somebodys_own_network():
    """Fixup's L is that of the network at hand: 4^(-1/2) of He's deviation."""
    model = sw.initialise_(Own("fixup"))
    assert [c.site.index for c in sw.chain(model)] == [0, 1, 2, 3]
    deviations = torch.stack([c.path[0].weight.std() for c in sw.chain(model)])
    assert deviations.mean().item() == pytest.approx((2 / 72) ** 0.5 / 2, rel=0.1)


def test_initialise_says_what_it_cannot_know():
    model = Own("fixup")
    model.body.append(sw.BasicBlock(8, 8, scheme="rezero"))
    with pytest.raises(sw.SkipwayError, match="were built with fixup.*, rezero.*; name one"):
        sw.initialise_(model)

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3))

    model = Own("fixup")
    model.table = Table()
    with pytest.raises(sw.SkipwayError, match=r"table \(Table\) holds parameters but has no reset_parameters"):
        sw.initialise_(model)
    with pytest.raises(sw.SkipwayError, match="holds no skipway.nn.Residual"):
        sw.initialise_(nn.Linear(2, 2))


def deepnorm_with(parametrise, connection: int) -> nn.Module:
    """A small network one of whose maps is computed."""
    model = sw.build("vit-tiny-16", depth=1, dim=8, heads=2, patch=4, image=8, classes=3, scheme="deepnorm")
    parametrise(sw.chain(model)[connection].path[0].module)
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("connection", [0, 1], ids=["values", "mlp"])
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_weights_that_weight_norm_computes_start_as_plain_ones_do_however_often(norm, connection):
    x, outputs = torch.randn(2, 3, 8, 8), []
    for parametrise, times in ((lambda module: module, 1), (norm, 1), (norm, 2)):
        model = deepnorm_with(parametrise, connection)
        for _ in range(times):
            torch.manual_seed(0)
            sw.initialise_(model)
        outputs.append(model(x))
    torch.testing.assert_close(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[1])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_reset_that_fills_whatever_parameters_there_are_draws_under_weight_norm_what_it_draws_of_plain_weights(norm):
    """torch's recurrent layers draw all of `parameters()` from U(−b, b), b = 1/√hidden, of deviation b/√3."""
    model, bound = Own("fixup"), 64**-0.5
    model.memory = norm(nn.LSTM(8, 64), "weight_hh_l0")
    sw.initialise_(model)
    weight = model.memory.weight_hh_l0.detach()
    assert float(weight.abs().max()) == pytest.approx(bound, rel=1e-2)
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=2e-2)


class Rotation(nn.Linear):
    """A layer that resets what weight norm computes its weight from: W = g v / ‖v‖ = 1."""

    def reset_parameters(self) -> None:
        if not nn.utils.parametrize.is_parametrized(self):
            super().reset_parameters()
            return
        nn.init.ones_(self.parametrizations.weight.original0)
        nn.init.eye_(self.parametrizations.weight.original1)
        nn.init.zeros_(self.bias)


def test_a_reset_of_what_a_weight_is_computed_from_is_taken_at_its_word():
    model = Own("fixup")
    model.turn = nn.utils.parametrizations.weight_norm(Rotation(4, 4))
    sw.initialise_(model)
    torch.testing.assert_close(model.turn.weight.detach(), torch.eye(4))


@pytest.mark.parametrize(
    "parametrise",
    [
        nn.utils.spectral_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        lambda module: prune.identity(module, "weight"),
    ],
    ids=["spectral norm by a hook", "spectral norm", "orthogonal", "pruned"],
)
def test_weights_that_take_no_drawn_values_are_refused_before_anything_is_reset(parametrise):
    model = deepnorm_with(parametrise, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(sw.SkipwayError, match=r"the weight of blocks\.0\.mlp\.branch\.fc1 is computed in every pass"):
        sw.initialise_(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("scheme", ["zeroinit", "depthscaled"])
def test_last_maps_that_a_hook_computes_are_multiplied(scheme):
    model = sw.build("vit-tiny-16", depth=1, dim=8, heads=2, patch=4, image=8, classes=3, scheme=scheme)
    connection, x = sw.chain(model)[1], torch.randn(2, 3, 8, 8)
    linear = nn.utils.weight_norm(connection.path[-1].module)
    with torch.no_grad():
        linear.weight_g.fill_(1.0)
        linear.weight_v.normal_()
        model(x)
        before = linear.weight.clone()
        connection.multiply_(0.5)
        model(x)
    torch.testing.assert_close(linear.weight, before / 2)


def test_gains_go_back_to_their_own_value_not_to_one():
    """P7."""
    gain = Gain(3, init=0.25)
    with torch.no_grad():
        gain.gain.fill_(9.0)
    gain.reset_parameters()
    assert (gain.gain == 0.25).all()


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        *(("se-resnet18", scheme) for scheme in all_schemes("conv")),
        *(("vit-tiny-16", scheme) for scheme in all_schemes("attention")),
    ],
)
def test_groups_follow_the_owner_never_the_shape(family, scheme):
    """P4: every parameter in one group; gains, biases and norms are decayed only where the scheme says so."""
    small = {"width": 8, "stem_width": 8, "squeeze": 4} if family == "se-resnet18" else {"dim": 12, "depth": 1}
    model = sw.build(family, scheme=scheme, **small)
    groups = sw.param_groups(model, lr=1.0, weight_decay=0.1)
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            ours = isinstance(module, Gain | Bias)
            map = isinstance(module, nn.Conv2d | nn.Linear) and name == "weight"
            # Fixup's scalars: a tenth of the rate, decayed (the authors' scripts)
            expected = (0.1, 0.1) if ours and scheme == "fixup" else (1.0, 0.1 if map else 0.0)
            expected = (0.01, 0.0) if path.endswith("streams.carry") else expected  # x0residual: compounds with depth
            assert (rate[id(parameter)], decay[id(parameter)]) == expected, (type(module), name)


def test_groups_on_anybodys_model():
    model = nn.Sequential(
        nn.Embedding(3, 4), nn.MultiheadAttention(4, 2), nn.LayerNorm(4), ScaledStandardConv2d(4, 4, 1)
    )
    model[0].weight.requires_grad_(False)
    groups = {g["name"]: len(g["params"]) for g in sw.param_groups(model, lr=1.0, weight_decay=1.0)}
    assert groups == {"weight": 3, "bias": 3, "norm": 2, "gain": 1}


def test_shared_parameters_are_counted_once():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.weight = a.weight
    assert sum(len(g["params"]) for g in sw.param_groups(nn.Sequential(a, b), lr=1.0)) == 3


def test_chain_is_ordered_and_named():
    model = sw.build("resnet20")
    connections = sw.chain(model)
    assert [c.site.index for c in connections] == list(range(9))
    assert all(model.get_submodule(c.name) is c.residual for c in connections)
    assert connections[3].name == "stages.1.0"
    assert connections.classifier.module is model.head.classifier


def test_residual_is_its_equation():
    parts = {name: nn.Linear(4, 4) for name in ("branch", "pre", "scale", "drop", "post")}
    residual = Residual(**parts)
    x = torch.randn(3, 4)
    p = parts
    expected = p["post"](x + p["drop"](p["scale"](p["branch"](p["pre"](x)))))
    torch.testing.assert_close(residual(x), expected)
    assert isinstance(Residual(nn.Identity()).post, nn.Identity)


def test_a_definition_run_again_replaces_the_old_one_and_another_raises():
    """A notebook's cell may be run twice; two schemes of one name may not be."""
    from skipway.registry import Registry

    registry = Registry("thing")

    def define():
        class Thing:
            pass

        return Thing

    first, again = define(), define()
    registry.add("thing", first)
    registry.add("thing", again)
    assert registry["thing"] is again
    with pytest.raises(sw.SkipwayError, match="already registered"):
        registry.add("Thing", int)


def test_activations_work_in_place_only_on_what_is_nobody_elses():
    """Behind a norm, a map or the addition; never on the stream, which the shortcut reads too."""
    network = sw.build("wrn-16-2", scheme="skipinit(norm='remove')")
    for connection in sw.chain(network):
        assert not connection.residual.pre.act.inplace
        assert connection.residual.branch.act1.inplace
    assert sw.build("resnet20").stages[0][0].post.act.inplace
    x = torch.randn(2, 32, 8, 8)
    kept = x.clone()
    network.stages[0][1](x)
    assert torch.equal(x, kept)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.first(x).relu()
        return x + self.second(x).relu()


class Blocks(nn.Module):
    """Two connections in each block, or all of them added by the network itself."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own
        make = (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())) if own else Block
        self.stem, self.blocks, self.head = nn.Linear(3, 4), nn.ModuleList(make() for _ in range(3)), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x) if self.own else block(x)
        return self.head(x)


@pytest.mark.parametrize("own", [False, True])
def test_layer_decay_finds_the_blocks_of_any_network(own):
    """The rate of layer l of L + 1 is multiplied by d^(L + 1 - l): stem, three blocks, head."""
    model = Blocks(own)
    rates = {
        id(parameter): group["lr"]
        for group in sw.param_groups(model, torch.zeros(2, 3), lr=1.0, layer_decay=0.5)
        for parameter in group["params"]
    }
    expected = {"stem": 1 / 16, "blocks.0": 1 / 8, "blocks.1": 1 / 4, "blocks.2": 1 / 2, "head": 1.0}
    for name, parameter in model.named_parameters():
        place = next(place for place in expected if name.startswith(f"{place}."))
        assert rates[id(parameter)] == expected[place], name


class Parts(nn.Module):
    """T5's order: blocks are lists of parts of unlike classes, and the last norm stands before them (OPT)."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.stem = nn.LayerNorm(4), nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"parts": nn.ModuleList((Added(), Block()))}) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            for part in block["parts"]:
                x = part(x)
        return self.last(x)


class Added(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x):
        return x + super().forward(x).relu()


def test_layer_decay_counts_parts_as_one_block_and_goes_by_the_first_use():
    layers = layer_indices(Parts(), torch.zeros(2, 3))
    expected = {"stem": 0, "blocks.0": 1, "blocks.1": 2, "last": 3}
    assert layers == {name: expected[next(p for p in expected if name.startswith(f"{p}."))] for name in layers}


def test_layer_decay_without_blocks_is_said():
    with pytest.warns(UserWarning, match="no blocks"):
        sw.param_groups(nn.Sequential(nn.Linear(3, 2)), torch.zeros(2, 3), lr=1.0, layer_decay=0.5)


@pytest.mark.parametrize(("scheme", "factor"), [("deepnorm", (4 * 3) ** -0.25), ("fixup", 3**-0.5)])
def test_branches_that_share_their_maps_are_multiplied_once(scheme, factor, monkeypatch):
    """DeepNorm's β = (4L)^(-1/4) and Fixup's L^(-1/(2m - 2)) with L = 3, m = 2."""
    first, *others = (sw.BasicBlock(8, 8, scheme=scheme) for _ in range(3))
    for each in others:
        each.branch.conv1.weight = first.branch.conv1.weight
    drawn = torch.randn_like(first.branch.conv1.weight)
    monkeypatch.setattr("skipway.nn.initial.HeNormal.__call__", lambda self, weight: weight.copy_(drawn))
    sw.initialise_(nn.Sequential(first, *others))
    torch.testing.assert_close(first.branch.conv1.weight.detach(), factor * drawn)
