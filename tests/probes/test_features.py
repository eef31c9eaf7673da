"""Feature taps: what passes around the connections of every family, and maps per stage."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipway as sw
from benchmarks.peers import import_timm, randomise_
from skipway.nn import StageMap
from skipway.probes.features import stage_maps
from skipway.probes.mixing_matrix import depth_mixing
from skipway.probes.signal_check import check_signal

TINY = {"classes": 5}
MODELS = {
    "resnet": ("resnet-cifar", {"depth": 14, "width": 8, "stem_width": 8, **TINY}),
    "resnet, pool": ("resnet-pool", {"depth": 11, "width": 8, "stem_width": 8, **TINY}),
    "resnet, patch": ("resnet-patch", {"depth": 14, "width": 8, "stem_width": 8, **TINY}),
    "resnet, imagenet": ("resnet-imagenet14", {"width": 8, "stem_width": 8, **TINY}),
    "vit": ("vit-tiny-16", {"depth": 5, "dim": 16, "heads": 2, "patch": 8, "image": 32, "registers": 2, **TINY}),
    "vit, mean": (
        "vit-tiny-16",
        {"depth": 2, "dim": 16, "heads": 2, "patch": 8, "image": 32, "pooling": "mean", **TINY},
    ),
    "cait": ("cait-xxs24", {"depth": 4, "dim": 16, "heads": 2, "patch": 8, "image": 32, **TINY}),
    "convnext": ("convnext", {"depth": 5, "width": 8, **TINY}),
    "swin": ("swin-tiny", {"dim": 8, "heads": 2, "blocks": (2, 2), "window": 2, "image": 32, **TINY}),
}


def make(name: str, scheme: str = "skipinit(init=0.5)") -> nn.Module:
    variant, options = MODELS[name]
    return sw.build(variant, scheme=scheme, **options).eval()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_taps_obey_the_equation_of_the_connection(name):
    """y = post(shortcut(x, h) + drop(scale(F))), with x, F and y as the taps give them."""
    model = make(name)
    x = torch.randn(2, 3, 32, 64)
    names = [c.name for c in sw.chain(model)]
    got = sw.features(model, x, [f"{name}:{point}" for name in names for point in ("before", "branch", "after")])
    for connection in sw.chain(model):
        r = connection.residual
        before, branch, after = (got[f"{connection.name}:{point}"] for point in ("before", "branch", "after"))
        h = r.pre(before)
        torch.testing.assert_close(branch, r.branch(h))
        torch.testing.assert_close(after, r.post(r.shortcut(before, h) + r.drop(r.scale(branch))))
    assert list(sw.features(model, x)) == [f"{name}:after" for name in names]
    assert hooks(model) == 0


def test_the_stream_runs_from_connection_to_connection():
    model, x = make("resnet"), torch.randn(1, 3, 8, 8)
    got = sw.features(
        model, x, ["stem", "0:before", "0:after", "1:before", "stages.0", "1:after", "2:before", "-1:after"]
    )
    for one, other in (("stem", "0:before"), ("0:after", "1:before"), ("stages.0", "1:after"), ("1:after", "2:before")):
        assert torch.equal(got[one], got[other])
    assert torch.equal(model.head(got["-1:after"]), model(x))


def test_gradients_flow_through_the_taps():
    model, x = make("vit"), torch.randn(1, 3, 32, 32)
    got = sw.features(model, x, ["0:before", "-1:after", "0:branch"])
    (gradient,) = torch.autograd.grad(got["-1:after"].square().sum(), got["0:before"])
    stream = got["0:before"].detach().requires_grad_()
    (expected,) = torch.autograd.grad(model.blocks(stream).square().sum(), stream)
    torch.testing.assert_close(gradient, expected)


def test_modules_that_work_in_place_do_not_change_a_tap():
    model = sw.build("se-resnet", depth=18, width=8, stem_width=8, squeeze=4, classes=5).eval()
    gate = model.stages[0][0].branch.gate
    assert gate.act.inplace
    names = ["stages.0.0.branch.norm2", "stages.0.0.branch.gate.squeeze"]
    got = sw.features(model, torch.randn(2, 3, 32, 32), names)
    expected = gate.squeeze(got["stages.0.0.branch.norm2"].mean((2, 3), keepdim=True))
    assert (expected < 0).any()
    torch.testing.assert_close(got["stages.0.0.branch.gate.squeeze"], expected)


def test_a_block_of_ours_in_somebodys_network():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), sw.BasicBlock(8, 8), nn.Flatten())
    got = sw.features(model, torch.randn(1, 3, 8, 8), ["0", "1:before", "1:after"])
    assert torch.equal(got["0"], got["1:before"])
    assert torch.equal(model[1](got["1:before"].clone()), got["1:after"])
    assert torch.equal(sw.features(model[1], got["0"], [":after"])[":after"], got["1:after"])
    with pytest.raises(sw.SkipwayError, match=r"Sequential does not say.*stage_maps\(\)"):
        sw.stage_features(model, torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("stages.0.7:after", "did you mean 'stages.0.[0-9]:after'"),
        ("99:after", "numbers 0 to 5"),
        ("stages.0.0:behind", "unknown point 'behind'"),
        ("stagse.0", "did you mean 'stages.0'"),
        ("zzz", "submodules of stem, stages, head"),
    ],
)
def test_unknown_taps_name_what_there_is(tap, message):
    with pytest.raises(sw.SkipwayError, match=message):
        sw.features(make("resnet"), torch.zeros(1, 3, 8, 8), [tap])


def test_hooks_go_whatever_happens():
    model = make("vit")
    with pytest.raises(sw.SkipwayError, match="multiples of its patch"):
        sw.features(model, torch.zeros(1, 3, 7, 7))
    assert hooks(model) == 0

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.idle = Pair(), nn.Identity()

        def forward(self, x):
            return self.pair(x)[0]

    net = Net()
    with pytest.raises(sw.SkipwayError, match="'pair' yields a tuple"):
        sw.features(net, torch.zeros(1), ["pair"])
    with pytest.raises(sw.SkipwayError, match="did not meet 'idle'"):
        sw.features(net, torch.zeros(1), ["idle"])
    assert hooks(net) == 0


STAGES = {
    "resnet": [(8, 1), (16, 2), (32, 4)],
    "resnet, pool": [(8, 2), (16, 4), (32, 8)],
    "resnet, patch": [(8, 2), (16, 4), (32, 8)],
    "resnet, imagenet": [(32, 4), (64, 8), (128, 16), (256, 32)],
    "vit": [(16, 8)] * 4,
    "vit, mean": [(16, 8)] * 2,
    "cait": [(16, 8)] * 4,
    "convnext": [(8, 4), (16, 8), (32, 16), (64, 32)],
    "swin": [(8, 4), (16, 8)],
}


@pytest.mark.parametrize("name", MODELS)
def test_stage_features_are_maps_in_every_family(name):
    model = make(name)
    maps = sw.stage_features(model, torch.randn(2, 3, 32, 64))
    declared = stage_maps(model)
    assert [(stage.channels, stage.reduction) for stage in declared] == STAGES[name]
    assert [tuple(each.shape) for each in maps] == [(2, c, 32 // r, 64 // r) for c, r in STAGES[name]]


def test_a_token_stands_where_its_patch_is():
    """The patch map alone, without positions and blocks, is the identity of places: token (i, j) is patch (i, j)."""
    model = make("vit", "layerscale(init=0.0)")
    with torch.no_grad():
        model.stem.position.zero_()
    x = torch.randn(1, 3, 32, 64)
    for each in sw.stage_features(model, x):
        torch.testing.assert_close(each, model.stem.patch(x))


def test_swins_maps_are_those_in_front_of_the_merging():
    model, x = make("swin"), torch.randn(1, 3, 32, 32)
    first, second = sw.stage_features(model, x)
    stream = model.stem(x)
    for block in model.stages[0][:2]:
        stream = block(stream)
    torch.testing.assert_close(first.permute(0, 2, 3, 1), stream)
    torch.testing.assert_close(second.permute(0, 2, 3, 1), model.stages[1](model.stages[0].merge(stream)))


def test_dense_heads_take_the_quarters_of_a_vit():
    """The published choices: DPT and DINOv2, blocks 2, 5, 8, 11 of 12; 5, 11, 17, 23 of 24; 9, 19, 29, 39 of 40."""
    for blocks, expected in ((12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (40, [9, 19, 29, 39])):
        model = sw.build("vit-tiny-16", depth=blocks, device="meta")
        assert [stage.path for stage in stage_maps(model)] == [f"blocks.{number}" for number in expected]


def test_any_network_can_declare_its_stages():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 4, 2, 2)

        def forward(self, x):
            return self.body(x).mean((2, 3))

        def stage_maps(self):
            return (StageMap("body", 4, 2),)

    net, x = Net(), torch.randn(1, 3, 4, 4)
    assert torch.equal(sw.stage_features(net, x)[0], net.body(x))


@pytest.mark.parametrize(("name", "names", "first"), [("resnet26", "torchvision", 1), ("convnext_atto", "timm", 0)])
def test_stage_features_are_timms(name, names, first):
    """timm's `features_only` is the reference; for ResNets it has the stem in front."""
    try:
        timm = import_timm()
    except ImportError:
        pytest.skip("timm is not installed")
    full, theirs = timm.create_model(name), timm.create_model(name, features_only=True).eval()
    randomise_(full)
    ours = sw.load(sw.build(name), full.state_dict(), names=names).eval()
    state = full.state_dict()
    dotted = {key: key.replace("stages_", "stages.").replace("stem_", "stem.") for key in theirs.state_dict()}
    theirs.load_state_dict({key: state[full_key] for key, full_key in dotted.items()})
    x = torch.randn(1, 3, 64, 64)
    for one, other in zip(sw.stage_features(ours, x), theirs(x)[first:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    info = theirs.feature_info
    assert [stage.channels for stage in stage_maps(ours)] == info.channels()[first:]
    assert [stage.reduction for stage in stage_maps(ours)] == info.reduction()[first:]


def test_points_of_a_strangers_connections():
    """x, F(x) and y = x + F(x) as they are added; also where the sum overwrites an operand."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x + torch.tanh(self.first(x))
            out = torch.sin(self.second(x))
            out += x
            return out

    model, x = nn.Sequential(nn.Linear(4, 8), Block(), Block()), torch.randn(3, 4)
    got = sw.features(model, x, ["0", "1:1:before", "1:1:after", "1:2:before", "1:2:branch", "-1:after", "2"])
    assert torch.equal(got["0"], got["1:1:before"])
    assert torch.equal(got["1:1:after"], got["1:2:before"])
    assert torch.equal(got["1:2:branch"], torch.sin(model[1].second(got["1:2:before"])))
    assert torch.equal(got["-1:after"], got["2"])
    assert list(sw.features(model, x)) == [f"{block}:{number}:after" for block in (1, 2) for number in (1, 2)]
    (gradient,) = torch.autograd.grad(got["-1:after"].sum(), got["1:1:before"])
    assert gradient.abs().sum() > 0
    assert hooks(model) == 0
    with pytest.raises(sw.SkipwayError, match="there are no residual connections"):
        sw.features(nn.Linear(4, 4), x, ["0:before"])


def test_an_example_of_keyword_arguments():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = sw.Residual(nn.Linear(4, 4))

        def forward(self, *, x, scale):
            return self.body(x * scale)

    model, x = Named(), torch.randn(2, 4)
    got = sw.features(model, {"x": x, "scale": 2.0}, ["0:before", "0:after"])
    assert torch.equal(got["0:before"], 2 * x)
    assert torch.equal(got["0:after"], model(x=x, scale=2.0))


def statement(x, f):
    for each in f:
        x += each(x)
    return x


def functional(x, f):
    for each in f:
        x = F.relu(each(x) + x, inplace=True)
    return x


def given_memory(x, f):
    for each in f:
        x = torch.add(x, each(x), out=x)
    return x


@pytest.mark.parametrize("form", [statement, functional, given_memory])
def test_what_a_network_writes_into_afterwards_is_kept_as_it_was(form):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3))

        def forward(self, x):
            return form(x.clone(), self.blocks)

    model, x = Network(), torch.randn(2, 4)
    with torch.no_grad():
        got = sw.features(
            model, x, [f":{number}:{point}" for number in (1, 2) for point in ("before", "branch", "after")]
        )
    torch.testing.assert_close(got[":1:before"], x)
    for number in (1, 2):
        torch.testing.assert_close(got[f":{number}:before"] + got[f":{number}:branch"], got[f":{number}:after"])
    assert not torch.equal(got[":1:after"], got[":2:after"])


def test_what_torchscript_writes_into_is_kept_as_it_was():
    model, x = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.ReLU(inplace=True))), torch.randn(8, 4)
    torch.testing.assert_close(sw.features(model, x, ["0"])["0"], model[0](x))


def test_a_batched_function_that_writes_into_its_own_tensors():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x):
            def add_one(row):
                y = row * 2
                y += 1
                return y

            return torch.func.vmap(add_one)(self.f(x))

    model, x = Net(), torch.randn(3, 4)
    torch.testing.assert_close(sw.features(model, x, ["f"])["f"], model.f(x))


def test_a_connection_that_no_call_adds_is_named():
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.weight = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.ones(1, 2)

        def forward(self, x):
            return (self.weight @ torch.stack([x, self.f(x)]).flatten(1)).view_as(x)

    with pytest.raises(sw.SkipwayError, match="cannot be observed"):
        sw.features(Stacked(), torch.randn(2, 4))
    with pytest.raises(sw.SkipwayError, match="cannot be observed"):
        depth_mixing(Stacked(), torch.randn(2, 4))
    assert check_signal(Stacked(), torch.randn(2, 4)) == []


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_that_are_written_into():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            h = self.a(x)
            F.relu(torch.nested.as_nested_tensor(list(h)), inplace=True)
            return h

    model, x = Net(), torch.randn(2, 3, 4)
    torch.testing.assert_close(sw.features(model, x, ["a"])["a"], model.a(x))
