"""Changing depth and taking norms out: what is promised is measured, and everything can be taken back."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

import skipway as sw
from skipway.surgery import deepen, influence, lesion, remove_norm, shorten, undo


class Block(nn.Module):
    """conv-bn-relu-conv-bn with an identity skip, as everybody writes it."""

    def __init__(self, after: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2, self.after = nn.BatchNorm2d(6), nn.BatchNorm2d(6), after

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += x
        return F.relu(out) if self.after else out


class Net(nn.Module):
    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


X = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def state(model: nn.Module) -> tuple[list[str], list[type], Tensor]:
    with torch.no_grad():
        return list(model.state_dict()), [type(module) for module in model.modules()], model(X)


OPERATIONS = {
    "lesion": lambda m: lesion(m, X, ["blocks.1"]),
    "shorten": lambda m: shorten(m, X, 2),
    "deepen": lambda m: deepen(m, X, 3),
    "fold": lambda m: remove_norm(m, X, how="fold"),
    "skipinit": lambda m: remove_norm(m, X),
    "calibrate": lambda m: remove_norm(m, X, calibrate=True),
}


@pytest.mark.parametrize("operate", OPERATIONS.values(), ids=OPERATIONS)
def test_every_operation_is_taken_back_exactly(net, operate):
    keys, classes, output = state(net)
    operation = operate(net)
    assert operation.touched
    assert "difference" in str(operation)
    undo(operation)
    assert state(net)[:2] == (keys, classes)
    assert torch.equal(state(net)[2], output)
    with pytest.raises(sw.SkipwayError, match="undone already"):
        operation.undo()


def test_a_lesion_is_the_skip_alone(net):
    expected = nn.Sequential(net.stem, *(b for n, b in enumerate(net.blocks) if n != 1))(X)
    lesion(net, X, ["blocks.1"])
    torch.testing.assert_close(net.blocks(net.stem(X)), expected)  # relu(x + 0) is x behind a relu
    with pytest.raises(sw.SkipwayError, match="blocks.1"):
        lesion(net, X, ["nonsense"])


def test_the_least_influential_blocks_go(net):
    with torch.no_grad():
        net.blocks[2].bn2.weight.mul_(1e-3)
        net.blocks[2].bn2.bias.mul_(1e-3)
    measured = influence(net, X)
    assert next(iter(measured)) == "blocks.2"
    assert len(measured) == 4
    operation = shorten(net, X, 3)
    assert list(operation.touched) == ["blocks.2"]
    assert "blocks.2.conv1.weight" not in net.state_dict()
    assert operation.report["difference"] < 0.05
    with pytest.raises(sw.SkipwayError, match="0 <= to"):
        shorten(net, X, 9)


def test_a_score_of_ones_own_decides(net):
    first = net.blocks[0]
    measured = influence(net, X, score=lambda model: float(model.blocks[0] is first))
    assert measured["blocks.0"] == 1
    assert sum(measured.values()) == 1


def test_copies_start_silent_and_learn(net):
    keys, _, before = state(net)
    operation = deepen(net, X, 2)
    assert operation.report["difference"] <= 1e-6
    torch.testing.assert_close(net(X), before)
    assert set(keys) < set(net.state_dict())
    net.train()(X).square().sum().backward()
    added = {name: p for name, p in net.named_parameters() if name not in keys}
    closing = [p for name, p in added.items() if name.endswith("bn2.weight")]
    assert len(closing) == 2
    assert all(bool(p.grad.any()) for p in closing)
    with pytest.raises(sw.SkipwayError, match="1 <= by <= 4"):
        deepen(net, X, 9)


def test_behind_post_norm_a_copy_is_no_identity():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    for block in model.layers:
        nn.init.normal_(block.norm2.bias)
    x = torch.randn(2, 3, 8)
    before, keys = model(x), list(model.state_dict())
    with pytest.raises(sw.SkipwayError, match="not the identity"):
        deepen(model, x, 1)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("how", ["fold", "skipinit"])
def test_without_norms_the_function_stays_and_training_goes_on(net, how):
    _, _, before = state(net)
    operation = remove_norm(net, X, how=how)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    torch.testing.assert_close(net(X), before, rtol=1e-4, atol=1e-5)
    assert operation.touched["blocks.0.bn1"] == "into blocks.0.conv1"
    assert operation.touched["norm"] == "a factor and a shift in its place"  # behind a rectifier, not behind a map
    net.train()(X).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    gains = [name for name, _ in net.named_parameters() if "residual_scale" in name]
    assert len(gains) == (4 if how == "skipinit" else 0)


def test_shared_maps_are_not_folded_into():
    shared = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(shared, nn.BatchNorm2d(4), nn.ReLU(), shared, nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 4, 3, 3)
    before = model(x)
    operation = remove_norm(model, x, how="fold")
    assert set(operation.touched.values()) == {"a factor and a shift in its place"}
    torch.testing.assert_close(model(x), before)


def test_nothing_to_fold_is_said():
    with pytest.raises(sw.SkipwayError, match="nothing to fold"):
        remove_norm(nn.Linear(3, 3), torch.randn(2, 3))


@pytest.mark.parametrize(
    "scheme",
    ["attentionresiduals", "attentionresiduals(blocks=None)", "fracconnections", "dualresidual", "denseformer"],
)
def test_a_lesion_of_what_no_single_stream_carries_is_a_branch_of_zeros(scheme):
    torch.manual_seed(0)
    model = sw.build("vit-tiny-16", scheme=scheme, depth=2, classes=4, dim=8, heads=2, patch=4, image=8).eval()
    x = torch.randn(2, 3, 8, 8)
    handle = model.get_submodule("blocks.0.mlp").drop.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    expected = model(x)
    handle.remove()
    whole = model(x)
    operation = lesion(model, x, ["blocks.0.mlp"])
    torch.testing.assert_close(model(x), expected)
    operation.undo()
    assert torch.equal(model(x), whole)
    assert not torch.equal(expected, whole)


@pytest.mark.parametrize("scheme", ["attentionresiduals", "denseformer", "x0residual", "valueresiduals"])
def test_what_hands_on_earlier_outputs_is_not_left_out(scheme):
    model = sw.build("vit-tiny-16", scheme=scheme, depth=2, classes=4, dim=8, heads=2, patch=4, image=8)
    with pytest.raises(sw.SkipwayError, match="earlier outputs"):
        shorten(model, torch.zeros(1, 3, 8, 8), 1)


@pytest.mark.parametrize(
    ("scheme", "said"),
    [("identity", False), ("layerscale", False), ("depthscaled", True), ("keel", True), ("prores(10)", True)],
)
def test_factors_that_follow_the_depth_are_said_to_be_those_before(scheme, said):
    """A block more or less changes L; what was multiplied by a function of L stays, as outputs have to."""
    options = {"depth": 3, "dim": 8, "heads": 2, "patch": 8, "image": 16, "classes": 2}
    model = sw.build("vit-tiny-16", scheme=scheme, **options).eval()
    sw.set_step(model, 60) if "prores" in scheme else None
    operation = sw.shorten(model, torch.randn(2, 3, 16, 16), 2)
    assert ("depth" in operation.refused) == said
    if said:
        assert scheme.partition("(")[0] in operation.refused["depth"]


TRAINED = {
    "all": ({"conv.weight", "conv.bias", "norm.weight", "norm.bias"}, {"conv.weight", "conv.bias"}),
    "biases alone": ({"conv.bias", "norm.bias"}, {"conv.bias"}),
    "the norm's bias alone": ({"norm.bias"}, {"conv.bias"}),
    "weights alone": ({"conv.weight", "norm.weight"}, {"conv.weight"}),
    "norms alone": ({"norm.weight", "norm.bias"}, {"conv.weight", "conv.bias"}),
    "none": (set(), set()),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", TRAINED)
def test_what_was_trained_is_trained_within_the_map(case, bias):
    """A parameter is trained if one was that went into it, whatever its neighbour is."""
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1, bias=bias), norm=nn.BatchNorm2d(4))).eval()
    given, expected = TRAINED[case]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in given)
    operation = remove_norm(model, X, how="fold")
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
    assert ("trained from now on" in operation.touched["norm"]) == (case == "norms alone")


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_factor_is_trained_as_the_gain_was_and_a_shift_as_the_bias_was(trained):
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)).eval().requires_grad_(False)
    getattr(model[1], trained).requires_grad_(True)
    assert remove_norm(model, X, how="fold").touched == {"1": "a factor and a shift in its place"}
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [f"1.0.{trained}"]


@pytest.mark.parametrize("gone", ["weight", "bias"])
def test_a_norm_may_lack_its_gain_or_its_bias(gone):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model[1].register_parameter(gone, None)
    model.train()(X)
    expected = model.eval()(X)
    remove_norm(model, X, how="fold")
    torch.testing.assert_close(model(X), expected)


COMPUTED = {
    "weight norm": nn.utils.weight_norm,
    "spectral norm": nn.utils.spectral_norm,
    "pruned weight": lambda conv: nn.utils.prune.l1_unstructured(conv, "weight", 0.5),
    "pruned bias": lambda conv: nn.utils.prune.l1_unstructured(conv, "bias", 0.5),
    "parametrization": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_a_norm_behind_a_map_whose_weights_are_computed_is_a_factor_and_a_shift(compute):
    torch.manual_seed(0)
    model = nn.Sequential(compute(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU())
    model.train()(X)
    before = model.eval()(X).detach()
    keys = list(model.state_dict())
    operation = remove_norm(model, X, how="fold")
    assert dict(operation.touched) == {"1": "a factor and a shift in its place"}
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)
    assert list(operation.undo().state_dict()) == keys


def test_a_factor_and_a_shift_keep_the_type_of_the_stream():
    half = {"dtype": torch.bfloat16}
    model = nn.Sequential(nn.Linear(8, 8, **half), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 8, **half)).eval()
    x = torch.randn(4, 8, **half)
    assert remove_norm(model, x, how="fold", tolerance=0.1).touched == {"2": "a factor and a shift in its place"}
    assert model(x).dtype == torch.bfloat16


class TwoNames(nn.Module):
    """A norm that is registered by itself and in a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.tail = nn.Sequential(self.norm, nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.first(x))


def test_a_norm_is_replaced_under_all_its_names():
    model, x = TwoNames().eval(), torch.randn(4, 8)
    model.norm.running_mean.fill_(0.5)
    before, norm = model(x), model.norm
    operation = remove_norm(model, x, how="fold")
    assert model.norm is model.tail[0]
    assert isinstance(model.norm, nn.Identity)
    torch.testing.assert_close(model(x), before)
    operation.undo()
    assert model.norm is model.tail[0] is norm


@pytest.mark.parametrize("part", ["", "blocks.0.conv1", "blocks.0.bn2"])
def test_copies_learn_in_a_frozen_network(net, part):
    """Where everything is frozen, all of a copy is trained; where a part is not, what its branches end in, too."""
    net.requires_grad_(False)
    if part:
        net.get_submodule(part).requires_grad_(True)
    before = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    operation = deepen(net, X, 4)
    added = {name: p for name, p in net.named_parameters() if name not in before}
    after = dict(net.named_parameters())
    assert {name: after[name].requires_grad for name in before} == before
    assert all(p.requires_grad for name, p in added.items() if not (part and name.startswith("blocks.0.")))
    net.train()(X).square().sum().backward()
    closing = [p for name, p in added.items() if name.endswith("bn2.weight")]
    assert len(closing) == 4
    assert all(p.grad is not None and bool(p.grad.any()) for p in closing)
    operation.undo()
    assert {name: p.requires_grad for name, p in net.named_parameters()} == before
