"""`rescheme` and `undo` on networks that others wrote: what is promised is kept, what cannot be done is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

import skipway as sw
from skipway.errors import SkipwayError
from skipway.nn import DropPath, Gain, Multiply
from skipway.surgery import Operation, rescheme, undo


class InPlace(nn.Module):
    """A bottleneck as everybody writes it: out += shortcut."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class Functional(nn.Module):
    """Functional activations, and an addition written x + f(x)."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(functional.relu(self.norm(x)))


class InSequence(nn.Module):
    """A branch that is one nn.Sequential."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Looping(nn.Module):
    """A branch whose forward runs all of its children, whatever they are."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = functional.relu(child(x)) + 0.1
        return x


class Around(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class ChannelsLast(nn.Module):
    """Swin's way: maps of (N, H, W, C)."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 8), nn.Linear(8, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Tuples(nn.Module):
    """A branch that puts out more than what is added, as attention in transformers does."""

    def __init__(self, kind: Callable[..., object]) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(6, 6), kind

    def forward(self, x: Tensor) -> object:
        out = functional.gelu(self.linear(x))
        return self.kind((out, x.mean()))


class OfTuples(nn.Module):
    def __init__(self, kind: Callable[..., object]) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(6), Tuples(kind)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))[0]


class TokenMixing(nn.Module):
    """MLP-Mixer's way: the branch's last module of its own puts out (N, C, T); the one behind it runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.mix = nn.LayerNorm(6), nn.Linear(4, 4)
        self.norm2, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mix(functional.gelu(self.norm1(x)).transpose(1, 2)).transpose(1, 2))
        return x + self.drop_path(self.down(functional.gelu(self.up(self.norm2(x)))))


class Wider(nn.Module):
    """ReXNet's way: the branch has more channels than the stream, and adds to the first of them."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.dim, self.up, self.down = dim, nn.Conv2d(dim, 8, 1), nn.Conv2d(8, dim + 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.down(functional.relu(self.up(x)))
        return torch.cat([x + out[:, : self.dim], out[:, self.dim :]], 1)


class Block(nn.Module):
    """A pre-norm MLP connection."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(dim), nn.Linear(dim, 8), nn.GELU(), nn.Linear(8, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Twice(nn.Module):
    """One block that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


def images() -> Tensor:
    return torch.randn(2, 6, 5, 5)


def images3() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def tokens() -> Tensor:
    return torch.randn(2, 4, 6)


def encoder(norm_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


# networks, their input, and how many connections are dressed
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "in place": (lambda: nn.Sequential(InPlace(), InPlace()), images, 2),
    "functional": (lambda: nn.Sequential(nn.Conv2d(6, 6, 1), Functional(), Functional()), images, 2),
    "sequential branch": (lambda: nn.Sequential(InSequence(), InSequence()), images, 2),
    "encoder": (encoder, tokens, 4),
    "post-norm encoder": (lambda: encoder(norm_first=False), tokens, 4),
    "NHWC": (lambda: nn.Sequential(ChannelsLast(), ChannelsLast()), lambda: torch.randn(2, 5, 5, 6), 2),
    "tuples": (lambda: nn.Sequential(OfTuples(tuple), OfTuples(tuple)), tokens, 2),
    "lists": (lambda: nn.Sequential(OfTuples(list)), tokens, 1),
    "wider": (lambda: nn.Sequential(Wider(), Wider(9)), images, 2),
    "token mixing": (TokenMixing, tokens, 2),
    "ours": (lambda: sw.build("resnet8", classes=3), lambda: torch.randn(2, 3, 8, 8), 3),
    "ours, ViT": (lambda: sw.build("vit-tiny-16", depth=2, dim=12, heads=2, image=8, patch=4), images3, 4),
}


def shaken(model: nn.Module) -> nn.Module:
    """Away from zeros and ones, where mistakes would hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def made(name: str) -> tuple[nn.Module, Tensor, int]:
    build, example, count = NETS[name]
    return shaken(build()).eval(), example(), count


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def gains(model: nn.Module) -> list[nn.Parameter]:
    return [module.gain for module in model.modules() if isinstance(module, Gain)]


def assert_same(model: nn.Module, keys: dict[str, Tensor], types: list[type]) -> None:
    assert list(model.state_dict()) == list(keys)
    assert all(torch.equal(value, keys[key]) for key, value in model.state_dict().items())
    assert kinds(model) == types


@pytest.mark.parametrize("name", NETS)
def test_outputs_stay_gradients_reach_and_undo_puts_back(name):
    model, x, count = made(name)
    keys, types = state(model), kinds(model)
    with torch.no_grad():
        expected = model(x)
    operation = rescheme(model, x, "layerscale")
    assert len(operation.touched) == count, operation
    assert not operation.refused
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
    new = set(model.state_dict()) - set(keys)
    assert set(keys) <= set(model.state_dict())
    assert len(new) == count
    assert all(key.endswith("residual_scale.gain") for key in new)
    model(x).square().mean().backward()
    assert all(gain.grad is not None and gain.grad.abs().max() > 0 for gain in gains(model)[-count:])
    assert undo(operation) is model
    assert_same(model, keys, types)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", NETS)
def test_a_gain_of_zero_silences_every_branch_with_and_without_gradients(name):
    """torch's fused layers, containers and forwards that loop all have to let the gain act once."""
    model, x, count = made(name)
    before = len(gains(model))
    rescheme(model, x, "skipinit")
    with torch.no_grad():
        for gain in gains(model):
            gain.fill_(2.0)
    slow = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow, rtol=1e-5, atol=1e-5)
        for gain in gains(model):
            gain.fill_(0.0)
        silent = model(x)
    assert len(gains(model)) == before + count
    if name in ("functional", "sequential branch", "NHWC", "tuples", "lists", "encoder"):
        stem = model[0](x) if name == "functional" else x  # type: ignore[index]
        torch.testing.assert_close(silent, stem)
    assert not torch.allclose(silent, slow)


def test_a_gain_acts_once_behind_a_sequential():
    model = InSequence().eval()
    x = images()
    branch = model(x) - x
    operation = rescheme(model, x, "skipinit")
    with torch.no_grad():
        gains(model)[0].fill_(3.0)
    assert operation.touched == {"": "body.2"}
    torch.testing.assert_close(model(x), x + 3 * branch)


def test_a_scale_per_channel_stands_on_the_channels_of_a_transposed_branch():
    model, x = TokenMixing().eval(), tokens()
    assert rescheme(model, x, "layerscale").touched == {":1": "mix", ":2": "down"}
    assert model.mix.residual_scale.shape == (6, 1)
    assert model.down.residual_scale.shape == (6,)


def test_a_branch_wider_than_the_stream_is_scaled_as_a_whole():
    model, x = Wider().eval(), images()
    assert rescheme(model, x, "layerscale").touched == {"": "down"}
    assert model.down.residual_scale.shape == (9, 1, 1)
    with torch.no_grad():
        gains(model)[0].zero_()
        assert torch.equal(model(x), functional.pad(x, (0, 0, 0, 0, 0, 3)))


def test_a_slice_whose_rest_goes_elsewhere_is_no_branch_to_scale():
    class Gated(Wider):
        def forward(self, x: Tensor) -> Tensor:
            out = self.down(functional.relu(self.up(x)))
            return (x + out[:, : self.dim]) * out[:, self.dim :].mean(1, keepdim=True)

    with pytest.raises(SkipwayError, match="read by something else too"):
        rescheme(Gated().eval(), images(), "layerscale")


def test_a_branch_that_would_run_the_scale_twice_is_left_alone():
    model = Around(Looping()).eval()
    keys, types = state(model), kinds(model)
    with pytest.raises(SkipwayError, match="runs 2 times"):
        rescheme(model, images(), "layerscale")
    assert_same(model, keys, types)


def test_training_mode_computes_the_same():
    for name in ("in place", "functional", "encoder"):
        model, x, _ = made(name)
        twin = copy.deepcopy(model).train()
        rescheme(model.train(), x, "layerscale")
        assert all(module.training for module in model.modules())
        torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-6)
        torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize("training", [True, False])
def test_modes_stay(training):
    model, x, _ = made("in place")
    model.train(training)
    model[0].bn1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    rescheme(model, x, "stochasticdepth(probability=0.5)")
    after = {name: module.training for name, module in model.named_modules()}
    assert {name: after[name] for name in modes} == modes
    assert after["0.bn2.residual_scale"] is training
    torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)


def test_type_and_device():
    model, x, _ = made("functional")
    rescheme(model.double(), x.double(), "layerscale")
    assert {gain.dtype for gain in gains(model)} == {torch.float64}
    model, x, _ = made("NHWC")
    rescheme(model.bfloat16(), x.bfloat16(), "layerscale", tolerance=1e-2)
    assert model(x.bfloat16()).dtype == torch.bfloat16
    model, x, _ = made("NHWC")
    operation = rescheme(model.to("meta"), x.to("meta"), "layerscale")
    assert all(gain.is_meta for gain in gains(model))
    assert len(operation.touched) == 2


def test_hooks_stay():
    model, x, _ = made("in place")
    seen: list[str] = []
    handle = model[0].bn2.register_forward_hook(lambda *_: seen.append("forward"))
    model[0].bn2.register_full_backward_hook(lambda *_: seen.append("backward"))
    operation = rescheme(model, x, "layerscale")
    assert operation.touched["0"] == "0.bn2"
    seen.clear()
    model[0].bn2(x.requires_grad_()).sum().backward()
    assert seen == ["forward", "backward"]
    operation.undo()
    seen.clear()
    model[0].bn2(x)
    assert seen == ["forward"]
    handle.remove()


def test_tied_weights_stay_tied():
    model, x, _ = made("NHWC")
    model[1].up.weight = model[0].up.weight
    operation = rescheme(model, x, "layerscale")
    assert model[1].up.weight is model[0].up.weight
    operation.undo()
    assert model[1].up.weight is model[0].up.weight


@pytest.mark.parametrize(("scheme", "start"), [("skipinit(init=0.5)", "divide"), ("depthscaled", "identity")])
def test_a_weight_that_branches_share_is_divided_once(scheme, start):
    model, x, _ = made("NHWC")
    model[1].down.weight = model[0].down.weight
    before = model[0].down.weight.detach().clone()
    rescheme(model, x, scheme, start=start)
    torch.testing.assert_close(model[1].down.weight, before * (2 if start == "divide" else 2**0.5))


def test_a_division_that_would_hit_a_tied_weight_is_put_back():
    model, x = nn.Sequential(Around(nn.Sequential(nn.ReLU(), nn.Linear(6, 6))), nn.Linear(6, 6)).eval(), tokens()
    model[1].weight = model[0].branch[1].weight
    keys, types = state(model), kinds(model)
    with pytest.raises(SkipwayError, match="the output changed by"):
        rescheme(model, x, "skipinit(init=0.5)", start="divide")
    assert_same(model, keys, types)


@pytest.mark.parametrize("name", ["in place", "encoder", "tuples"])
def test_copies_are_independent(name):
    model, x, count = made(name)
    rescheme(model, x, "layerscale")
    twin = copy.deepcopy(model)
    assert kinds(twin) == kinds(model)
    torch.testing.assert_close(twin(x), model(x))
    with torch.no_grad():
        for gain in gains(twin):
            gain.zero_()
    assert all(gain.abs().max() > 0 for gain in gains(model))
    assert not torch.allclose(twin(x), model(x))
    assert len(gains(twin)) == count


@pytest.mark.parametrize("name", ["in place", "sequential branch", "encoder"])
def test_weights_saved_load_into_a_fresh_copy(name, tmp_path):
    model, x, _ = made(name)
    fresh = copy.deepcopy(model)
    rescheme(model, x, "layerscale")
    shaken(model)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    rescheme(shaken(fresh), x, "layerscale")
    fresh.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=True)
    torch.testing.assert_close(fresh(x), model(x))


@pytest.mark.parametrize("name", ["in place", "functional", "sequential branch", "NHWC", "encoder"])
@pytest.mark.filterwarnings("ignore")
def test_compiles_in_one_graph(name):
    model, x, _ = made(name)
    rescheme(model, x, "layerscale + stochasticdepth")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_operated_on_inside():
    model, x, _ = made("NHWC")
    operation = rescheme(torch.compile(model, backend="eager"), x, "layerscale")
    assert operation.model is model


def test_blocks_that_run_twice_are_refused():
    model = Twice().eval()
    keys, types = state(model), kinds(model)
    with pytest.raises(SkipwayError, match=r"runs 2 times in a pass, so a scale after it would be shared"):
        rescheme(model, tokens(), "layerscale")
    assert_same(model, keys, types)


def test_no_connection_says_what_was_looked_at():
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    with pytest.raises(SkipwayError, match=r"refused after a look at 1 addition, the first since"):
        rescheme(Parallel(), images(), "layerscale")
    with pytest.raises(SkipwayError, match="has no residual connection"):
        rescheme(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), tokens(), "layerscale")


@pytest.mark.parametrize("scheme", ["fixup", "normfree", "deepnorm", "preactivation", "plain", "identity"])
def test_schemes_of_another_structure_are_refused(scheme):
    model, x, _ = made("in place")
    keys, types = state(model), kinds(model)
    with pytest.raises(SkipwayError, match=r"cannot be added to a network|inserts nothing after a branch"):
        rescheme(model, x, scheme)
    assert_same(model, keys, types)


@pytest.mark.parametrize(
    ("scheme", "kind", "init"),
    [
        ("layerscale(init=0.1)", Gain, 0.1),
        ("skipinit(init=0.0)", Gain, 0.0),
        ("rezero", Gain, 0.0),
        ("depthscaled", Multiply, None),
        ("stochasticdepth(probability=0.3)", DropPath, None),
        ("layerscale(init=0.1) + stochasticdepth(probability=0.3)", nn.Sequential, 0.1),
        ("layerscale(init=0.1) + depthscaled", nn.Sequential, 0.1),
    ],
)
@pytest.mark.parametrize("start", ["identity", "divide", "scheme"])
def test_schemes_and_how_they_start(scheme, kind, init, start):
    model, x, _ = made("functional")
    keys, types = state(model), kinds(model)
    expected = model(x).detach()
    if start == "divide" and init == 0:
        with pytest.raises(SkipwayError, match="cannot be divided out"):
            rescheme(model, x, scheme, start=start)
        assert_same(model, keys, types)
        return
    operation = rescheme(model, x, scheme, start=start)
    assert isinstance(model[1].conv.residual_scale, kind)
    value = 1.0 if start == "identity" else init
    for gain in gains(model):
        torch.testing.assert_close(gain.detach(), torch.full_like(gain, value))
    changed = start == "scheme" and (init is not None or "depthscaled" in scheme)
    assert torch.allclose(model(x), expected, atol=1e-5) is not changed
    assert (operation.report["difference"] > 1e-3) is changed
    operation.undo()
    assert_same(model, keys, types)
    assert torch.equal(model(x), expected)


def test_resetting_a_preserved_gain_keeps_its_start():
    model, x, _ = made("functional")
    rescheme(model, x, "skipinit")
    gain = model[1].conv.residual_scale
    gain.reset_parameters()
    assert gain.gain.item() == 1


def test_what_changes_the_output_is_put_back():
    """A model whose passes differ cannot be verified."""

    class Restless(Functional):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            Restless.passes += 1
            return super().forward(x) * Restless.passes

    model = Restless().eval()
    keys, types = state(model), kinds(model)
    with pytest.raises(SkipwayError, match=r"more than tolerance=1e-05, so that the model was put back"):
        rescheme(model, images(), "layerscale")
    assert_same(model, keys, types)


def test_outputs_that_are_no_numbers_are_no_proof():
    model, x, _ = made("functional")
    with torch.no_grad():
        model[1].conv.bias[0] = float("nan")
    with pytest.raises(SkipwayError, match="changed by inf"):
        rescheme(model, x, "layerscale")


def test_frozen_parameters_stay_frozen_and_the_gains_learn():
    model, x, count = made("in place")
    model.requires_grad_(False)
    rescheme(model, x, "layerscale")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == count
    assert all(name.endswith("residual_scale.gain") for name in trained)
    model(x).sum().backward()
    assert all(gain.grad is not None for gain in gains(model))


def test_twice_is_an_error_and_undo_twice_too():
    model, x, _ = made("sequential branch")
    operation = rescheme(model, x, "layerscale")
    keys, types = state(model), kinds(model)
    with pytest.raises(SkipwayError, match="has a residual_scale already; undo that first"):
        rescheme(model, x, "skipinit")
    assert_same(model, keys, types)
    operation.undo()
    with pytest.raises(SkipwayError, match="was undone already"):
        operation.undo()
    assert len(rescheme(model, x, "skipinit").touched) == 2


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model, x, _ = made("in place")
    keys, types = state(model), kinds(model)
    scale = sw.LayerScale.scale

    def failing(self, site):
        if site.index == 1:
            raise RuntimeError("no more")
        return scale(self, site)

    monkeypatch.setattr(sw.LayerScale, "scale", failing)
    with pytest.raises(RuntimeError, match="no more"):
        rescheme(model, x, "layerscale")
    assert_same(model, keys, types)


def test_modules_that_cannot_be_dressed_are_left_alone_and_said():
    model, x, _ = made("functional")
    model[1].conv.residual_scale = 3
    model[2].conv.forward = model[2].conv.forward
    with pytest.raises(SkipwayError, match=r"has a residual_scale of its own; the forward of this Conv2d was replaced"):
        rescheme(model, x, "layerscale")
    del model[2].conv.forward
    operation = rescheme(model, x, "layerscale")
    assert list(operation.touched) == ["2"]
    assert "left alone: 1: this Conv2d has a residual_scale of its own" in str(operation)


def test_what_something_else_reads_is_left_alone():
    class Read(Block):
        def forward(self, x: Tensor) -> Tensor:
            branch = self.down(self.act(self.up(self.norm(x))))
            return (x + branch) * branch.mean()

    with pytest.raises(SkipwayError, match="read by something else"):
        rescheme(Read(), tokens(), "layerscale")


def test_a_module_that_passes_the_branch_on_elsewhere_is_not_the_place():
    class Elsewhere(Block):
        def __init__(self) -> None:
            super().__init__()
            self.tap = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            branch = self.down(self.act(self.up(self.norm(x))))
            out = x + branch
            self.tap(branch)
            return out

    model = Elsewhere().eval()
    assert rescheme(model, tokens(), "layerscale").touched == {"": "down"}
    model(tokens()).sum().backward()
    assert gains(model)[0].grad is not None


def test_a_factor_behind_the_last_map_is_passed():
    class Scaled(Block):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            return x + functional.dropout(self.gamma * self.down(self.act(self.up(self.norm(x)))), 0.1, self.training)

    operation = rescheme(Scaled().eval(), tokens(), "skipinit")
    assert operation.touched == {"": "down"}
    assert re.match(r"skipinit\(.*\) on Scaled: 1 changed; difference 0\n", str(operation))


def test_bad_input():
    model, x, _ = made("functional")
    with pytest.raises(SkipwayError, match="unknown scheme"):
        rescheme(model, x, "layerscal")
    with pytest.raises(SkipwayError, match="fails on this example"):
        rescheme(model, tokens(), "layerscale")
    assert isinstance(rescheme(model, (x,), sw.LayerScale()), Operation)


def test_torchscript_is_refused():
    with pytest.raises(SkipwayError, match="is a TorchScript module"):
        rescheme(torch.jit.trace(Block().eval(), tokens()), tokens(), "layerscale")


def test_control_flow_that_reads_values_is_followed_on_the_example():
    class Reading(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.abs().sum()) > 0 else x

    model = nn.Sequential(Reading(), Reading()).eval()
    assert rescheme(model, tokens(), "layerscale").touched == {"0": "0.down", "1": "1.down"}


def test_fused_layers_run_part_by_part_until_undo():
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), tokens()
    before = (model.use_nested_tensor, model.layers[1].activation_relu_or_gelu)
    operation = rescheme(model, x, "skipinit")
    assert not model.use_nested_tensor
    assert not model.layers[1].activation_relu_or_gelu
    with torch.no_grad():
        kept = model(x)
        gains(model)[0].zero_()
        assert not torch.allclose(model(x), kept)
    operation.undo(force=True)
    assert (model.use_nested_tensor, model.layers[1].activation_relu_or_gelu) == before


def test_a_weight_that_is_computed_is_divided_by_its_parameters_and_put_back():
    branch = nn.Sequential(nn.LayerNorm(6), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    model, x = Around(branch).eval(), tokens()
    keys, types = state(model), kinds(model)
    rescheme(model, x, "skipinit(init=0.5)", start="divide").undo(force=True)
    assert_same(model, keys, types)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_weights_that_are_computed_are_not_started_anew(norm):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, dropout=0.0), 2)
    norm(encoder.layers[1].linear1)
    keys, types = state(encoder), kinds(encoder)
    with pytest.raises(SkipwayError, match=r"the weight of layers\.1\.linear1 is computed in every pass"):
        rescheme(encoder, tokens(), "deepnorm", start="scheme")
    assert_same(encoder, keys, types)


def test_convolutions_with_parametrizations_are_not_started_anew():
    model = InSequence()
    nn.utils.parametrizations.weight_norm(model.body[0])
    with pytest.raises(SkipwayError, match=r"the weight of body\.0 is computed in every pass"):
        rescheme(model, torch.randn(2, 6, 4, 4), "fixup", start="scheme")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_maps_that_weight_norm_computes_are_multiplied():
    model = sw.build("vit-tiny-16", depth=1, dim=8, heads=2, patch=4, image=8, classes=3, scheme="deepnorm")
    linear = nn.utils.weight_norm(sw.chain(model)[1].path[0].module)
    model(torch.zeros(1, 3, 8, 8))
    before = linear.weight.detach().clone()
    sw.chain(model).multiply_maps_([(sw.chain(model)[1].path[0], 0.5)] * 2)
    model(torch.zeros(1, 3, 8, 8))
    torch.testing.assert_close(linear.weight, before / 2)


def test_a_division_without_effect_is_put_back():
    """The weight of a map with spectral norm is divided by its largest singular value in each pass."""
    branch = nn.Sequential(nn.LayerNorm(6), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)))
    model, x = Around(branch).eval(), tokens()
    keys, types = state(model), kinds(model)
    with pytest.raises(SkipwayError, match="is computed in every pass from other parameters"):
        rescheme(model, x, "skipinit(init=0.5)", start="divide")
    assert_same(model, keys, types)
    assert rescheme(model, x, "skipinit").touched == {"": "branch.2"}


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.orthogonal, nn.utils.parametrizations.spectral_norm])
def test_what_inverses_exchange_and_reading_advances_is_put_back(norm):
    """An orthogonal map has another base after a write; spectral norm in training goes on with its iteration."""
    model, x = Around(nn.Sequential(nn.LayerNorm(6), nn.ReLU(), norm(nn.Linear(6, 6)))), tokens()
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    keys, types = state(model), kinds(model)
    with pytest.raises(SkipwayError, match="is computed in every pass from other parameters"):
        rescheme(model, x, "skipinit(init=0.5)", start="divide")
    assert_same(model, keys, types)


class Headed(nn.Module):
    """Two connections and a classifier."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Around(nn.Sequential(nn.ReLU(), nn.Linear(6, 6))) for _ in range(2)))
        self.head = nn.Linear(6, 3, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_classifier_that_weight_norm_computes_is_silenced(norm, bias):
    """Fixup, rule 1."""
    model, x = Headed(bias), tokens()
    norm(model.head)
    rescheme(model, x, "fixup", start="scheme")
    assert not model(x).any()


def test_a_classifier_that_is_pruned_is_not_left_as_it_is_without_a_word():
    model, x = Headed(bias=True), tokens()
    prune.identity(model.head, "weight")
    keys, types = state(model), kinds(model)
    with pytest.raises(SkipwayError, match="is computed in every pass from other parameters"):
        rescheme(model, x, "fixup", start="scheme")
    assert_same(model, keys, types)


class ByKeyword(nn.Module):
    """A branch whose maps are called by keyword."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(input=functional.relu(self.a(input=x)))


@pytest.mark.parametrize("scheme", ["normfree", "fixup"])
def test_maps_that_are_called_by_keyword_are_dressed(scheme):
    torch.manual_seed(0)
    model, x = nn.Sequential(ByKeyword(), ByKeyword()), torch.randn(4, 6)
    before = model(x)
    operation = rescheme(model, x, scheme)
    assert len(operation.touched) == 2
    torch.testing.assert_close(model(x), before)


class NormsIn32Bits(nn.Module):
    """A pre-norm block in bfloat16 with norms in float32, as large models are kept."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.norm1, self.one = nn.LayerNorm(dim), nn.Linear(dim, dim, dtype=torch.bfloat16)
        self.norm2, self.two = nn.LayerNorm(dim), nn.Linear(dim, dim, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(self.norm1(x))
        return x + self.two(self.norm2(x))


@pytest.mark.parametrize("scheme", ["layerscale", "perinorm", "hyperconnections(2)"])
def test_the_type_of_the_stream_stays_where_norms_have_a_wider_one(scheme):
    model, x = nn.Sequential(NormsIn32Bits(), NormsIn32Bits()), torch.randn(4, 8, dtype=torch.bfloat16)
    rescheme(model, x, scheme)
    assert model(x).dtype == torch.bfloat16
    assert {p.dtype for name, p in model.named_parameters() if "residual_" in name} == {torch.bfloat16}


class Zeroed(nn.TransformerEncoderLayer):
    """A layer whose branches start at 0."""

    def __init__(self) -> None:
        super().__init__(8, 1, 16, 0.0, norm_first=True)
        for weights in (self.self_attn.out_proj, self.linear2):
            nn.init.zeros_(weights.weight)
            nn.init.zeros_(weights.bias)


class BatchFirst(nn.TransformerEncoderLayer):
    def __init__(self) -> None:
        super().__init__(8, 1, 16, 0.0, norm_first=True, batch_first=True)


class PositionsFirst(nn.TransformerEncoderLayer):
    def __init__(self) -> None:
        super().__init__(8, 1, 16, 0.0, norm_first=True)


@pytest.mark.parametrize(("kind", "axis"), [(BatchFirst, 0), (PositionsFirst, 1), (Zeroed, 1)])
@pytest.mark.parametrize("samples", [1, 40])
def test_stochastic_depth_drops_samples_whatever_their_axis_is(kind, axis, samples):
    """m ~ Bernoulli(1 - p) for each sample (Huang et al. 2016, eq. 2), which are on axis 1 of (T, N, C)."""
    torch.manual_seed(0)
    layer = kind()
    x = torch.randn(3, samples, 8).movedim(1, axis)
    values = state(layer)
    rescheme(layer, x, "stochasticdepth(0.5)")
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in values.items())
    kept = layer.train().dropout2(torch.ones_like(x)).movedim(axis, 0)
    drawn = kept[:, 0, 0]
    assert torch.equal(kept, drawn[:, None, None].expand_as(kept))
    assert set(drawn.tolist()) <= {0.0, 2.0}
    assert samples == 1 or 10 <= int(drawn.count_nonzero()) <= 30


class AddsFlat(nn.Module):
    """A connection of the tokens of all samples, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.map, self.act = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(8, 8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.mix(x).flatten(0, 1)
        return (tokens + self.act(self.map(tokens))).unflatten(0, x.shape[:2])


def test_stochastic_depth_is_refused_where_rows_are_no_samples():
    model = AddsFlat().eval()
    keys, types = state(model), kinds(model)
    with pytest.raises(SkipwayError, match="no axis with one entry for each sample"):
        rescheme(model, torch.randn(2, 4, 8), "stochasticdepth")
    assert_same(model, keys, types)


class Timed(nn.Module):
    """f(t, x), and an embedding with positions that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.layer = nn.Embedding(9, 8), nn.Embedding(9, 8), BatchFirst()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.layer(x * t if x.is_floating_point() else self.words(x) + self.places(t))


@pytest.mark.parametrize(
    "example",
    [
        (torch.tensor(0.5), torch.randn(3, 4, 8)),
        {"t": torch.arange(4)[None], "x": torch.arange(12).view(3, 4) % 9},
    ],
    ids=["time", "positions"],
)
def test_stochastic_depth_finds_samples_that_the_first_tensor_of_the_example_does_not_hold(example):
    model = Timed().eval()
    assert rescheme(model, example, "stochasticdepth").touched.keys() == {"layer:1", "layer:2"}
    assert [each.axis for each in model.modules() if isinstance(each, DropPath)] == [0, 0]
