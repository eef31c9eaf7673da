"""Residual warm-ups put on networks of others, fused and folded at their end, exported as constants before it."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.errors import CheckpointError
from skipway.inference.onnx import export_onnx, export_program
from skipway.nn import Multiply, ResidualWarmup, find_warmups, warmup_state
from skipway.surgery.fusion import fuse_with_report
from skipway.weights.export import export_names
from skipway.zoo.sources import import_library


def layers() -> tuple[nn.Module, torch.Tensor]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval(), torch.randn(2, 5, 16)


def library(name: str):
    """A library beside any torchvision, or a skip."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return import_library(name)


def gpt2() -> tuple[nn.Module, torch.Tensor]:
    transformers = library("transformers")
    config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=20, n_positions=8)
    return transformers.GPT2LMHeadModel(config).eval(), torch.arange(10).view(2, 5)


def timm_vit() -> tuple[nn.Module, torch.Tensor]:
    timm = library("timm")
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "depth": 3, "num_classes": 3}
    return timm.models.VisionTransformer(**options).eval(), torch.randn(2, 3, 16, 16)


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(x)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("make", [layers, gpt2, timm_vit])
def test_networks_of_others_compute_what_they_did_until_the_clock_is_set(make):
    model, x = make()
    before, state = output(model, x), {key: value.clone() for key, value in model.state_dict().items()}
    operation = sw.rescheme(model, x, "prores(10)")
    assert torch.equal(output(model, x), before)
    assert not warmup_state(model).running
    assert sw.set_step(model, 15) == 6
    assert warmup_state(model).factors == pytest.approx((1, 1, 0.75, 0.75, 0.5, 0.5))
    assert not torch.allclose(output(model, x), before)
    operation.undo()
    assert torch.equal(output(model, x), before)
    assert not list(find_warmups(model))
    assert state.keys() == model.state_dict().keys()


def test_from_scratch_the_clock_stands_at_0():
    model, x = layers()
    sw.rescheme(model, x, "prores(10)", start="scheme")
    assert warmup_state(model).factors == (0.0,) * 6
    assert torch.equal(output(model, x), x)


def test_a_share_of_the_training_stands_at_its_end_too():
    model, x = layers()
    before = output(model, x)
    sw.rescheme(model, x, "prores(0.5)")
    assert torch.equal(output(model, x), before)
    sw.set_step(model, 0, total=60)
    assert warmup_state(model).end == 30


def test_folding_needs_a_warm_up_that_is_over():
    model, x = layers()
    keys, before = list(model.state_dict()), output(model, x)
    sw.rescheme(model, x, "prores(10)")
    sw.set_step(model, 20)
    stays = sw.fold_gains(model, x).refused
    assert {*stays} == {"layers.2.dropout1.residual_scale", "layers.2.dropout2.residual_scale"}
    assert all("0.667 at step 20 of 30" in reason for reason in stays.values())
    sw.set_step(model, 30)
    sw.fold_gains(model, x)
    assert list(model.state_dict()) == keys
    assert torch.equal(output(model, x), before)


def test_folding_says_that_a_warm_up_has_a_hook():
    model, x = layers()
    sw.rescheme(model, x, "prores(10)")
    sw.set_step(model, 30)
    for module in model.modules():
        if isinstance(module, ResidualWarmup):
            module.register_forward_hook(lambda *_: None)
    stays = sw.fold_gains(model, x).refused
    assert set(stays.values()) == {"it has hooks, or another forward than its class"}


@pytest.mark.parametrize("scheme", ["prores(10)", "prores(10) + layerscale(0.3)", "layerscale(0.3) + prores(10)"])
def test_fusing_needs_a_warm_up_that_is_over(scheme):
    network = sw.build("resnet-cifar", depth=8, width=4, stem_width=4, scheme=scheme).eval()
    x = torch.randn(2, 3, 8, 8)
    sw.set_step(network, 15)
    done = fuse_with_report(network)
    torch.testing.assert_close(done.model(x), network(x), rtol=1e-4, atol=1e-5)
    kept = {name: reason for name, reason in done.kept.items() if "step 15 of 30" in reason}
    assert len(kept) == 2  # the first is over
    assert all("an export freezes it" in reason for reason in kept.values())
    sw.set_step(network, 30)
    done = fuse_with_report(network)
    torch.testing.assert_close(done.model(x), network(x), rtol=1e-4, atol=1e-5)
    assert not list(find_warmups(done.model))
    assert not [name for name in done.kept if "scale" in name]
    assert {type(c.residual.scale) for c in sw.chain(done.model)} == {nn.Identity}


@pytest.mark.parametrize("step", [15, 30])
def test_a_program_holds_the_factors_as_constants(tmp_path, step):
    network = sw.build("resnet-cifar", depth=8, width=4, stem_width=4, scheme="prores(10)").eval()
    x = torch.randn(2, 3, 8, 8)
    sw.set_step(network, step)
    remarks: list[str] = []
    assert export_program(network, x, tmp_path / "net.pt2", sides="fixed", remark=remarks.append) < 1e-5
    assert [remark for remark in remarks if f"step {step} of 30, where the factors are 0.5 to 1" in remark] == (
        remarks if step == 15 else []
    )
    program = torch.export.load(tmp_path / "net.pt2")
    torch.testing.assert_close(program.module()(x), network(x))
    assert not [name for name in program.state_dict if "scale" in name]
    assert len(list(find_warmups(network))) == 3, "the network itself is left alone"


def test_onnx_files_hold_them_too(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    network = sw.build("resnet-cifar", depth=8, width=4, stem_width=4, scheme="prores(10)").eval()
    sw.set_step(network, 15)
    remarks: list[str] = []
    export_onnx(network, torch.randn(2, 3, 8, 8), tmp_path / "net.onnx", sides="fixed", remark=remarks.append)
    assert "step 15 of 30" in remarks[0]


def test_other_libraries_get_a_network_whose_warm_up_is_over():
    size = {"depth": 1, "dim": 16, "heads": 2, "patch": 8, "image": 16, "classes": 3}
    network = sw.build("vit-tiny-16", scheme="prores(10)", **size)
    with pytest.raises(CheckpointError, match=r"timm has nothing like 'blocks.0.attention.scale'"):
        export_names(network, "timm")
    sw.set_step(network, 10)
    plain = sw.build("vit-tiny-16", **size)
    assert export_names(network, "timm").keys() == export_names(plain, "timm").keys()
    assert "blocks.0.attention.scale.step" in export_names(network, "skipway")


def test_accelerated_networks_follow_the_clock():
    network = sw.build("resnet-cifar", depth=8, width=4, stem_width=4, scheme="prores(10)").eval()
    x = torch.randn(2, 3, 8, 8)
    sw.accelerate(network)
    outputs = []
    for step in (0, 15):
        sw.set_step(network, step)
        outputs.append(network(x))
    assert not torch.allclose(*outputs)


def test_blocks_that_are_added_have_the_clock_of_their_neighbours():
    network = sw.build("vit-tiny-16", depth=2, dim=16, heads=2, patch=8, image=16, classes=3, scheme="prores(10)")
    x = torch.randn(2, 3, 16, 16)
    sw.set_step(network, 20)
    network.eval()
    before = output(network, x)
    sw.deepen(network, x, 4)
    torch.testing.assert_close(output(network, x), before)
    assert sw.set_step(network, 21) == len(sw.chain(network))
    assert not warmup_state(network).running
    assert {type(warmup) for warmup in find_warmups(network)} == {ResidualWarmup}
    assert not [module for module in network.modules() if isinstance(module, Multiply)]
