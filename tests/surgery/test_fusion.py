"""Folding: outputs stay, for every scheme in every family; what stays is what has to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

import skipway as sw
from skipway.nn import Bias, Branch, DropPath, Gain, LinearMap, Multiply, Residual, ScaledStandardConv2d
from skipway.surgery.fusion import fuse_with_report

SPECS = [
    "plain",
    "identity",
    "preactivation",
    "skipinit",
    "skipinit(init=0.5, norm='remove')",
    "rezero",
    "fixup",
    "layerscale",
    "normfree(gain=1.0)",
    "deepnorm",
    "depthscaled",
    "preactivation + layerscale + stochasticdepth(0.2)",
]
SMALL = {"classes": 5, "width": 8, "stem_width": 8}
TOKENS = {"depth": 2, "dim": 16, "heads": 2, "patch": 8, "image": 32, "classes": 5}
MODELS = {
    "resnet": ("resnet-cifar", {"depth": 14, "shortcut": "projection", **SMALL}),
    "bottleneck": ("resnet-imagenet14", SMALL),
    "preactivation": ("wrn", {"depth": 10, **SMALL}),
    "squeeze": ("se-resnet", {"depth": 18, **SMALL, "squeeze": 4}),
    "vit": ("vit-tiny-16", TOKENS),
    "vit, residual post-norm": ("vit-tiny-16", {**TOKENS, "norm": "respost"}),
    "cait": ("cait-xxs24", TOKENS),
    "convnext": ("convnext", {"depth": 5, "classes": 5, "width": 8}),
    "convnextv2": ("convnextv2", {"depth": 5, "classes": 5, "width": 8, "squeeze": 4}),
    "swin": ("swin-tiny", {"dim": 8, "heads": 2, "blocks": (2, 2), "window": 2, "image": 32, "classes": 5}),
    "swinv2": ("swinv2-tiny", {"dim": 8, "heads": 2, "blocks": (2, 2), "window": 2, "image": 32, "classes": 5}),
}


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """Every parameter and statistic away from its start, as after training."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim <= 1 and name in ("weight", "gain"):
                parameter.uniform_(0.5, 1.5)
            elif parameter is not None:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make(model: str, scheme: str) -> nn.Module:
    name, options = MODELS[model]
    return trained(sw.build(name, scheme=scheme, **options))


def left(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def assert_same(folded: nn.Module, model: nn.Module, x: Tensor) -> None:
    expected = copy.deepcopy(model).eval()(x)
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("model", MODELS)
def test_outputs_are_equal_and_the_original_is_untouched(model, spec):
    network = make(model, spec)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    done = fuse_with_report(network)
    assert network.training
    assert not done.model.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert len(before) == len(network.state_dict())
    assert_same(done.model, network, torch.randn(2, 3, 32, 32))
    # the report is about every norm and factor that there was
    gone = set(left(network, _BatchNorm, Gain, Multiply, Bias, DropPath, ScaledStandardConv2d))
    assert gone <= done.fused.keys() | done.kept.keys()
    assert set(left(done.model, _BatchNorm, Gain, Multiply, Bias)) == done.kept.keys()


@pytest.mark.parametrize("spec", ["identity", "skipinit", "layerscale", "depthscaled", "zeroinit"])
def test_nothing_is_left_to_fold_in_a_resnet(spec):
    folded = sw.fuse(make("bottleneck", spec))
    assert left(folded, _BatchNorm, Gain, Multiply) == []
    assert type(folded.stages[0][0].scale) is nn.Identity


@pytest.mark.parametrize("model", ["vit", "cait", "convnext", "swin", "swinv2"])
def test_gains_of_transformers_and_convnext_go(model):
    """Swin V2's branch closes with a LayerNorm, whose affine takes the gain."""
    done = fuse_with_report(make(model, "layerscale + stochasticdepth(0.1)"))
    assert left(done.model, Gain, DropPath) == []
    hosts = {home for name, home in done.fused.items() if name.endswith("scale")}
    assert all(home.endswith("norm" if model == "swinv2" else ("proj", "fc2")) for home in hosts)


def test_standardised_weights_are_standardised_once():
    network = make("resnet", "normfree(gain=1.0)")
    folded = sw.fuse(network)
    assert left(folded, ScaledStandardConv2d, Gain) == []
    torch.testing.assert_close(
        folded.stages[0][0].branch.conv1.weight, network.stages[0][0].branch.conv1.standardised()
    )


def test_exact_in_double_precision():
    network = make("resnet", "preactivation + layerscale").double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(sw.fuse(network)(x), network(x), rtol=1e-12, atol=1e-12)


def test_the_weights_are_those_that_torch_fuses():
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    network = trained(nn.Sequential(conv, norm)).eval()
    expected, folded = fuse_conv_bn_eval(conv, norm), sw.fuse(network)
    torch.testing.assert_close(folded[0].weight, expected.weight)
    torch.testing.assert_close(folded[0].bias, expected.bias)


def test_a_report_fits_on_a_screen():
    report = fuse_with_report(make("resnet", "identity"))
    lines = str(report).splitlines()
    assert lines[0] == f"{len(report.fused)} fused"
    assert f"{len(report.kept)} kept" in lines
    assert len(lines) < 20


def test_twice_is_once():
    once = fuse_with_report(make("squeeze", "skipinit"))
    twice = fuse_with_report(once.model)
    assert not twice.fused
    assert twice.kept.keys() == once.kept.keys()


def test_folded_networks_are_still_chains_that_export():
    network, x = make("resnet", "skipinit"), torch.randn(2, 3, 32, 32)
    folded = sw.fuse(network)
    assert len(sw.chain(folded)) == len(sw.chain(network))
    assert all(connection.branch.closing_norm() is None for connection in sw.chain(folded))
    assert_same(torch.export.export(folded, (x,)).module(), network, x)


def test_a_gate_and_an_activation_keep_the_gain_behind_them():
    kept = fuse_with_report(make("squeeze", "skipinit")).kept
    assert kept["stages.0.0.scale"] == "after stages.0.0.branch.gate (SqueezeExcitation)"
    kept = fuse_with_report(make("resnet", "rezero")).kept
    assert kept["stages.0.0.scale"] == "after stages.0.0.branch.act2 (ReLU)"


def test_a_bias_does_not_go_into_a_branch_of_one_token():
    """The branch is zero on the other tokens, the bias is not."""
    done = fuse_with_report(make("cait", "fixup"))
    assert "concatenates zeros" in done.kept["class_blocks.0.attention.scale.bias"]
    assert done.fused["class_blocks.0.attention.scale.multiplier"] == "class_blocks.0.attention.branch.proj"


def shared() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(4), conv, nn.BatchNorm2d(4))


def tied() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    network[2].weight = network[0].weight
    return network


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4))


def hooked() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    network[0].register_forward_hook(lambda module, args, output: output + 1)
    return network


def own_forward() -> nn.Module:
    class Doubled(nn.Conv2d):
        def forward(self, input):
            return super().forward(input).square()

    return nn.Sequential(Doubled(4, 4, 1), nn.BatchNorm2d(4))


def own_sequence() -> nn.Module:
    class Backwards(nn.Sequential):
        def forward(self, input):
            return self[0](self[1](input))

    return Backwards(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def batch_statistics() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))


def another_axis() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), Gain(4, spatial=2))


def two_scales() -> nn.Module:
    return Residual(nn.Linear(4, 4), scale=Gain(4, spatial=1))


def undeclared() -> nn.Module:
    class Squared(Branch):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(4, 4)

        def path(self):
            return [LinearMap(self.map)]

        def forward(self, h):
            return self.map(h).square()

    return Residual(Squared(), scale=Gain(init=0.5, spatial=0))


@pytest.mark.parametrize(
    "build",
    [
        *(shared, tied, weight_normed, hooked, own_forward, own_sequence, batch_statistics, another_axis, two_scales),
        undeclared,
    ],
)
def test_what_cannot_be_folded_exactly_is_left_alone(build):
    network = trained(build())
    done = fuse_with_report(network)
    assert not done.fused
    assert done.kept
    assert_same(done.model, network, torch.randn(2, 4, 4, 4))


def test_somebodys_network_folds_where_it_is_plain():
    network = trained(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", groups=1, bias=False)),
            nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
            sw.BasicBlock(4, 8, 2, nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.BatchNorm2d(8)), scheme="layerscale"),
            Residual(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)), scale=Multiply(0.5)),
            Residual(nn.Conv2d(8, 8, 1), scale=Gain(8)),
        )
    )
    done = fuse_with_report(network)
    assert not done.kept
    assert_same(done.model, network, torch.randn(2, 3, 8, 8))


def test_without_values_there_is_nothing_to_fold():
    with pytest.raises(sw.SkipwayError, match="meta device"):
        sw.fuse(sw.build("resnet20", device="meta"))


@pytest.mark.parametrize("trained", ["0.bias", "1.bias", "none"])
@pytest.mark.parametrize("after", [lambda: nn.BatchNorm2d(4), Bias])
def test_a_fused_bias_is_trained_as_what_went_into_it(trained, after):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), after())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == trained)
    fused = sw.fuse(model)
    assert isinstance(fused[1], nn.Identity)
    assert fused[0].bias.requires_grad == (trained != "none")
    assert not fused[0].weight.requires_grad


class AlwaysDropped(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.dropout(input, self.p, True)


class Squared(nn.Identity):
    def forward(self, input: Tensor) -> Tensor:
        return input.square()


class Halved(DropPath):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class HalvedByMask(DropPath):
    def mask(self, x: Tensor) -> Tensor:
        return torch.full((len(x), *(1,) * (x.ndim - 1)), 0.5)


class Rectified(ScaledStandardConv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def hooked_identity() -> nn.Module:
    identity = nn.Identity()
    identity.register_forward_hook(lambda module, given, out: out.square())
    return identity


def replaced(module: nn.Module, method: str = "forward") -> nn.Module:
    """A module with a method of its instance, which no look at its class tells."""
    setattr(module, method, lambda x, *_: x.square())
    return module


class Awake(nn.Dropout):
    def train(self, mode: bool = True):
        return super().train()


class AwakeNorm(nn.BatchNorm2d):
    def train(self, mode: bool = True):
        return super().train()


@pytest.mark.parametrize(
    "between",
    [
        *(lambda: AlwaysDropped(0.5), Squared, lambda: Halved(0.5), lambda: HalvedByMask(0.5), hooked_identity),
        *(lambda: replaced(nn.Identity()), lambda: replaced(DropPath(0.5), "mask"), lambda: Awake(0.5)),
    ],
)
def test_nothing_goes_through_what_is_no_identity(between):
    torch.manual_seed(0)
    module = between()
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), module, nn.BatchNorm2d(4))).eval()
    x = torch.randn(2, 4, 3, 3)
    done = fuse_with_report(model)
    assert list(done.kept) == ["2"]
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(done.model(x), expected)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(replaced(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)),
        nn.Sequential(replaced(nn.Conv2d(4, 4, 1), "_conv_forward"), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), replaced(nn.BatchNorm2d(4))),
        nn.Sequential(nn.Conv2d(4, 4, 1), AwakeNorm(4)),
        nn.Sequential(replaced(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))),
        nn.Sequential(replaced(Residual(nn.Conv2d(4, 4, 1), scale=Gain(4)))),
    ],
)
def test_what_is_replaced_on_the_instance_or_stays_in_training_mode_is_kept(model):
    x, done = torch.randn(2, 4, 3, 3), fuse_with_report(trained(model))
    assert not done.fused
    assert len(done.kept) == 1
    torch.testing.assert_close(done.model(x), model.eval()(x))


def test_a_standardised_map_with_another_forward_is_kept():
    model, x = nn.Sequential(Rectified(4, 4, 1)).eval(), torch.randn(2, 4, 3, 3)
    done = fuse_with_report(model)
    assert list(done.kept) == ["0"]
    torch.testing.assert_close(done.model(x), model(x))
