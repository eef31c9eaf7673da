"""`chain(model, example)`: which additions of anybody's forward pass are residual connections, and which are not."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import skipway as sw
from skipway.nn import LinearMap
from skipway.nn.computed_weights import multiply_tensor, set_weight
from skipway.surgery.preconditions import refuse_branching
from skipway.tracing import REASONS, watch


def conv(dim_in: int, dim_out: int, stride: int = 1, size: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim_in, dim_out, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(dim_out)
    )


class Block(nn.Module):
    """A block with two maps, and a way to add that each test gives."""

    def __init__(self, add, stride: int = 1) -> None:
        super().__init__()
        self.first, self.second, self.add = conv(8, 8, stride), conv(8, 8), add
        self.short = conv(8, 8, stride, size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self, x)

    def branch(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def inplace(self, x):
    out = self.branch(x)
    out += x
    return F.relu_(out)


ADDS = {
    "x + f": lambda self, x: x + self.branch(x),
    "f + x": lambda self, x: F.relu(self.branch(x) + x),
    "+=": inplace,
    "add_": lambda self, x: self.branch(x).add_(x),
    "torch.add": lambda self, x: torch.add(self.branch(x), x),
    "half": lambda self, x: self.branch(x) * 0.5 + x,
    "through views": lambda self, x: x.flatten(2).reshape(x.shape) + self.branch(x),
    "drop path": lambda self, x: x + self.branch(x) * x.new_empty(1).bernoulli_(0.9) / 0.9,
}


@pytest.mark.parametrize("add", ADDS.values(), ids=ADDS)
def test_an_identity_skip_is_found_however_it_is_written(add):
    chain = sw.chain(nn.Sequential(conv(3, 8), Block(add)), torch.zeros(2, 3, 8, 8))
    assert [(c.name, c.seen.skip, c.seen.maps) for c in chain] == [("1", "identity", ("1.first.0", "1.second.0"))]
    assert not chain.refused
    assert (chain[0].seen.norms, chain[0].seen.closing) == (("inside", "end"), "1.second.1")


def test_projection_and_pooling_are_told_from_identity():
    project = Block(lambda self, x: self.short(x) + self.branch(x), stride=2)
    pool = Block(lambda self, x: F.avg_pool2d(x, 2) + self.branch(x), stride=2)
    stride = Block(lambda self, x: x[:, :, ::2, ::2] + self.branch(x), stride=2)
    chain = sw.chain(nn.Sequential(project, pool, stride), torch.zeros(1, 8, 16, 16))
    assert [c.seen.skip for c in chain] == ["projection", "pooled", "pooled"]
    assert chain[0].seen.shortcut == ("0.short.0", "0.short.1")


class Norms(nn.Module):
    """A transformer's sublayer with its norm in each of the places it is known in."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2, self.place = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), place
        self.gain = nn.Parameter(torch.full((8,), 1e-4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x) if self.place == "pre" else x
        h = self.gain * self.fc2(F.gelu(self.fc1(h)))
        if self.place == "end":
            h = self.norm(h)
        return self.norm(x + h) if self.place == "post" else x + h


@pytest.mark.parametrize("place", ["pre", "post", "end", "none"])
def test_the_place_of_norms_and_the_scale(place):
    chain = sw.chain(nn.Sequential(*(Norms(place) for _ in range(3))), torch.zeros(2, 5, 8))
    assert len(chain) == 3
    for connection in chain:
        assert connection.seen.norms == (() if place == "none" else (place,))
        scale = connection.seen.scale
        # in front of a norm a factor is no scale of the branch
        assert (scale is None) == (place == "end")
        if scale is not None:
            assert (scale.per_channel, scale.parameters) == (True, (f"{connection.name}.gain",))
    assert [c.site.index for c in chain] == [0, 1, 2]


class Refused(nn.Module):
    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.position = nn.Parameter(torch.zeros(1, 4, 8))
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def rotary(self, x):
    turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
    return self.a(x * self.position.cos() + turned * self.position.sin())


def res2net(self, x):
    first, second = self.a(x).relu().chunk(2, -1)
    return first + second.relu() @ self.b.weight[:4, :4]


REFUSED = {
    "constant": lambda self, x: self.a(x + self.position),
    "attention": lambda self, x: (self.a(x) @ self.b(x).mT + self.c(x)[..., :4]).softmax(-1) @ x,
    "broadcast": lambda self, x: x + self.a(x.mean(1, keepdim=True)).relu(),
    "hierarchical": res2net,
    "parallel": lambda self, x: self.a(x) + self.b(x),
    "rotary": rotary,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_additions_are_refused_with_their_reason(reason):
    chain = sw.chain(Refused(REFUSED[reason]), torch.zeros(2, 4, 8))
    assert len(chain) == 0
    assert [refusal.reason for refusal in chain.refused] == [reason]
    assert REASONS[reason] in str(chain.refused[0])


def test_both_branches_working_is_parallel_and_pyramids_are_refused():
    gate = Refused(lambda self, x: torch.sigmoid(self.b(self.a(x).relu())) + torch.tanh(self.b(self.c(x).relu())))
    assert [r.reason for r in sw.chain(gate, torch.zeros(2, 4, 8)).refused] == ["parallel"]

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.lateral = conv(8, 8, stride=2), conv(8, 8, size=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.lateral(x) + F.interpolate(F.relu(self.down(x)), scale_factor=2)

    assert [r.reason for r in sw.chain(Pyramid(), torch.zeros(1, 8, 8, 8)).refused] == ["pyramid"]


def test_numbers_added_and_biases_are_no_additions():
    chain = sw.chain(Refused(lambda self, x: self.a(x.transpose(1, 2).transpose(1, 2)) + 3), torch.zeros(2, 4, 8))
    assert (len(chain), chain.refused) == (0, ())


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_own_transformer(norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=norm_first, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    chain = sw.chain(model, torch.zeros(2, 5, 16))
    assert [c.name for c in chain] == [f"layers.{n}:{k}" for n in range(3) for k in (1, 2)]
    assert {c.seen.norms for c in chain} == {("pre",) if norm_first else ("post",)}
    assert [c.seen.kind for c in chain] == ["attention", "mlp"] * 3


OURS = {
    "resnet": ({"depth": 8, "classes": 4, "width": 4}, (2, 3, 8, 8)),
    "vit-tiny-16": ({"depth": 2, "classes": 4, "dim": 8, "heads": 2, "image": 32}, (2, 3, 32, 32)),
    "convnext-atto": ({"classes": 4, "width": 8, "blocks": (1, 2)}, (1, 3, 32, 32)),
}


@pytest.mark.parametrize(
    "scheme",
    [name for name in sw.schemes.all_schemes() if name not in ("plain", "layerscale")]
    + ["attentionresiduals(blocks=None)", "attentionresiduals(blocks=1, rescale=False)", "laurel(rank=2, total=None)"],
)
@pytest.mark.parametrize("name", OURS)
def test_watching_finds_what_the_types_say(name, scheme):
    options, shape = OURS[name]
    try:
        model = sw.build(name, scheme=scheme, **options)
    except sw.SkipwayError:
        pytest.skip("the family refuses the scheme")
    typed, watched = sw.chain(model), sw.chain(model, torch.zeros(shape))
    assert [c.name for c in watched] == [c.name for c in typed]
    for own, seen in zip(typed, watched, strict=True):
        assert seen.residual is own.residual
        assert [m.module for m in seen.path] == [m.module for m in own.path]
        assert (seen.site.dim, seen.site.index, seen.site.depth) == (own.site.dim, own.site.index, own.site.depth)


def test_plain_networks_have_none():
    assert len(sw.chain(sw.build("resnet", depth=8, scheme="plain", width=4), torch.zeros(1, 3, 8, 8))) == 0


def test_nothing_is_touched_and_nothing_stays():
    model = sw.build("resnet", depth=8, width=4, classes=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    sw.chain(model, torch.zeros(1, 3, 8, 8))
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_models_on_the_meta_device_and_examples_as_mappings():
    with torch.device("meta"):
        model = Norms("pre")
    assert len(sw.chain(model, {"x": torch.zeros(1, 5, 8)})) == 1


class Reads(nn.Module):
    """Looks at values, so that it cannot run on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Norms("pre")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.sum()) >= 0 else x


def test_a_model_that_reads_values_is_watched_as_it_is():
    assert len(sw.chain(Reads(), torch.zeros(1, 5, 8))) == 1


def test_hooks_of_others_are_given_no_tensors_without_values():
    """They run once, as in any call, and what torch's compute stays part of the program."""
    net, kept = Norms("pre"), []
    first = next(module for module in net.modules() if isinstance(module, nn.Linear))
    nn.utils.weight_norm(first)
    x = torch.randn(1, 5, 8)
    net.eval()(x)
    handle = first.register_forward_hook(lambda module, args, out: kept.append(out))
    expected = len(sw.chain(net, x))
    assert [each.device.type for each in kept] == ["cpu"]
    handle.remove()
    assert watch(net, x).on_meta
    assert len(sw.chain(net, x)) == expected
    with torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: kept.append(out)):
        sw.chain(net, x)
    assert all(each.device.type == "cpu" for each in kept)


def test_hooks_of_others_are_not_run_to_find_what_reads_values():
    net, kept = Norms("pre"), []
    net.register_forward_hook(lambda module, args, out: kept.append(out))
    refuse_branching(net, torch.randn(2, 5, 8), "an operation")
    assert kept == []


@pytest.mark.parametrize(
    ("subtract", "sign"),
    [
        (lambda shift, f: shift - f, -1.0),
        (lambda shift, f: torch.add(shift, f, alpha=-2.0), -2.0),
        (lambda shift, f: torch.rsub(f, shift, alpha=0.5), -0.5),
        (lambda shift, f: f - shift, 1.0),
    ],
)
def test_the_sign_of_a_branch_is_kept_beside_a_constant(subtract, sign):
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.shift = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return x + subtract(self.shift, self.fc(x))

    assert sw.chain(Shifted(), torch.randn(2, 8))[0].seen.weights == (1.0, sign)


def test_what_cannot_be_watched_is_refused_with_a_way_out():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(sw.SkipwayError, match="TorchScript"):
        sw.chain(scripted, torch.zeros(1, 2))
    with pytest.raises(sw.SkipwayError, match="fails on this example"):
        sw.chain(Norms("pre"), torch.zeros(1, 5, 7))
    with pytest.raises(sw.SkipwayError, match="give an example"):
        sw.chain(Norms("pre"))


def test_a_write_into_a_slice_is_followed():
    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x[:, :1] = x[:, :1] + self.fc(x).relu()[:, :1]
            return self.fc(x)

    program = watch(Slices(), torch.zeros(2, 4, 8))
    assert program.depends(len(program) - 1, next(v.number for v in program.values if v.operator == "relu"))


def test_multiplying_a_strangers_branch():
    torch.manual_seed(0)
    block = Block(ADDS["x + f"]).eval()
    x = torch.randn(2, 8, 4, 4)
    (connection,) = sw.chain(block, x)
    before = block(x) - x
    connection.multiply_(0.25)
    torch.testing.assert_close(block(x) - x, 0.25 * before)


@pytest.mark.parametrize("norm", [None, nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_weight_is_written_through_what_computes_it(norm):
    linear, x = nn.Linear(3, 4), torch.randn(2, 3)
    linear = linear if norm is None else norm(linear)
    values = torch.randn(4, 3)
    values[0] = 0
    assert set_weight(linear, "weight", values)
    torch.testing.assert_close(linear(x), x @ values.T + linear.bias)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_maps_that_weight_norm_computes_are_multiplied_and_silenced(norm):
    linear, x = norm(nn.Linear(3, 4)), torch.randn(2, 3)
    linear(x)
    before = linear.weight.detach().clone()
    LinearMap(linear, slice(2, 4)).multiply_(0.5)
    assert torch.equal(linear(x), x @ linear.weight.T + linear.bias)
    torch.testing.assert_close(linear.weight, before * torch.tensor([1, 1, 0.5, 0.5])[:, None])
    LinearMap(linear).zero_()
    assert not linear.weight.any()  # before the next pass, too
    assert torch.equal(linear(x), linear.bias.expand(2, 4))
    LinearMap(linear).multiply_(0.5)
    assert torch.equal(linear(x), linear.bias.expand(2, 4))


def test_maps_that_a_hook_computes_otherwise_are_not_multiplied_without_a_word():
    linear = prune.identity(nn.Linear(3, 4), "weight")
    with pytest.raises(sw.SkipwayError, match="the weight of a map .* is computed in every pass"):
        LinearMap(linear).zero_()


def orthogonal_after_a_step() -> nn.Linear:
    linear = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))
    linear(torch.randn(2, 3)).square().sum().backward()
    torch.optim.SGD(linear.parameters(), 0.1).step()
    return linear


def test_buffers_that_an_inverse_exchanges_are_put_back():
    """The inverse of torch's orthogonal maps puts another base in the place of the old one."""
    linear = orthogonal_after_a_step()
    before, weight = {name: tensor.clone() for name, tensor in linear.state_dict().items()}, linear.weight.detach()
    assert not set_weight(linear, "weight", weight / 2)
    torch.testing.assert_close(linear.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(linear.weight, weight)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 0.98), (torch.float32, 0.9995)], ids=str)
def test_a_factor_that_a_parametrization_undoes_is_not_taken_for_a_rounding(dtype, factor):
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)).to(dtype).eval()
    assert not multiply_tensor(linear, "weight", factor)


def test_weights_with_parametrizations_belong_to_the_module_that_has_them():
    weight_norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(weight_norm(nn.Conv2d(3, 3, 1)), nn.Flatten(), weight_norm(nn.Linear(3, 3, bias=False)))
    program = watch(model, torch.zeros(1, 3, 1, 1))
    assert [program.weight_owner(value) for value in program.values if value.part == "map"] == ["0", "2"]
    classifier = sw.chain(model[2], torch.zeros(1, 3)).classifier
    assert classifier is not None
    assert classifier.module is model[2]


def test_a_weight_that_cannot_be_written_stays_what_it_was():
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    assert not set_weight(linear.eval(), "weight", torch.full((4, 3), 9.0))
    for name, tensor in linear.state_dict().items():
        assert torch.equal(tensor, before[name]), name
