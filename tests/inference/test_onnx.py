"""ONNX files of every family, run by onnxruntime."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.inference import onnx as export
from skipway.inference.onnx import check_agreement, export_onnx, export_program

TOKENS = {"depth": 1, "dim": 16, "heads": 2, "patch": 8, "image": 16, "classes": 5}
MODELS = {
    "resnet": ("resnet-cifar", {"blocks": (1, 1), "squeeze": 4, "width": 8, "stem_width": 8}),
    "vit": ("vit-tiny-16", {**TOKENS, "registers": 1}),
    "cait": ("cait-xxs24", {**TOKENS, "class_blocks": 1}),
    "convnext": ("convnextv2", {"blocks": (1, 1), "width": 8, "classes": 5}),
    "swin": ("swin-tiny", {"dim": 8, "heads": 2, "blocks": (2,), "window": 2, "image": 16, "classes": 5}),
    "swinv2": ("swinv2-tiny", {"dim": 8, "heads": 2, "blocks": (1, 1), "window": 2, "image": 16, "classes": 5}),
}
needs_onnx = pytest.mark.skipif(
    any(export.find_spec(package) is None for package in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra 'onnx' is not installed",
)


@needs_onnx
@pytest.mark.parametrize(
    ("family", "scheme", "sides", "options"),
    [
        ("resnet", "normfree(gain=1.0)", "dynamic", {}),
        ("resnet", "hyperconnections(2)", "dynamic", {"blocks": (1,)}),
        ("resnet", "gatedstreams(2)", "dynamic", {"blocks": (1,)}),
        ("vit", "mhc(n=2, iterations=2)", "dynamic", {}),
        ("cait", "orthogonal + layerscale(init=0.1)", "dynamic", {}),
        ("convnext", "identity", "dynamic", {}),
        ("swin", "skipinit(init=0.5) + stochasticdepth(0.5)", "dynamic", {"blocks": (1,)}),
        ("swinv2", "identity", "fixed", {"blocks": (2, 1)}),
    ],
)
def test_every_family_runs_elsewhere(tmp_path, family, scheme, sides, options):
    """At other batch sizes than the example's; the check itself compares with the model. Each operator takes its time
    to trace, so several streams have as few branches as use all of theirs; ResNet and ViT without a scheme are traced
    in tests/trials/test_export_files.py.

    Windows that are padded for some sizes and not for others are traced as they are for one: free sides fail in both
    versions of Swin, and are tried where there is least to trace.
    """
    name, fixed = MODELS[family]
    model = sw.build(name, scheme=scheme, **{**fixed, **options})
    remarks: list[str] = []
    images = torch.randn(1, 3, 16, 16)
    worst = export_onnx(model, images, tmp_path / "model.onnx", sides=sides, remark=remarks.append)
    assert bool(remarks) == (family == "swin" and sides == "dynamic")
    assert worst is not None
    assert worst < 1e-5
    assert all(module.training for module in model.modules())
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


class Net(nn.Module):
    """A network that does what `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.map = how, nn.Linear(4, 2)

    def forward(self, x):
        if self.how == "fixed":
            return self.map(x.new_zeros(len(x), 4) + x)
        if self.how == "writes":
            return self.map(x.mul_(0.5))
        if self.how == "not a number":
            return self.map(x) * (math.nan if torch.compiler.is_exporting() else 2)
        return self.map(x) * (1 if torch.compiler.is_exporting() else 2)


@needs_onnx
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("fixed", "fixes its batch size at 2"),
        ("differs", "tolerance=0.0001 allows"),
        ("not a number", "differs from the model by inf"),
    ],
)
def test_a_wrong_file_is_not_left_behind(tmp_path, how, message):
    with pytest.raises(sw.SkipwayError, match=message):
        export_onnx(Net(how), torch.zeros(2, 4), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_there_has_to_be_a_folder(tmp_path):
    with pytest.raises(sw.SkipwayError, match="there is no folder"):
        export_onnx(Net("fine"), torch.zeros(2, 4), tmp_path / "gone" / "model.onnx")


class Counting(nn.Module):
    """A network that counts its passes and keeps what it was given last."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.given, self.passes = nn.Linear(4, 2), None, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if not torch.compiler.is_exporting():
            self.given, self.passes = x, self.passes + 1
        self.seen += 1
        return self.map(x)


def test_the_passes_of_an_export_leave_no_trace_in_the_model(tmp_path):
    model = Counting()
    numbers = torch.get_rng_state()
    export_program(model, torch.zeros(2, 4), tmp_path / "model.pt2")
    assert (model.seen.item(), model.given, model.passes) == (0, None, 0)
    assert torch.equal(torch.get_rng_state(), numbers)


def test_a_file_that_could_not_be_checked_is_told(tmp_path, monkeypatch):
    """Also by `TrainedClassifier.export`, which returns the path alone."""
    monkeypatch.setattr(export, "find_spec", lambda name: name)
    monkeypatch.setattr(export, "export_verified", lambda *given: None)  # as without onnxruntime
    with pytest.warns(UserWarning, match="was not compared with the model, since onnxruntime is not installed"):
        assert export_onnx(nn.Linear(4, 2), torch.zeros(2, 4), tmp_path / "model.onnx") is None


def test_without_the_extra_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(sw.MissingExtraError, match=r"onnx, which is not installed: pip install 'skipway\[onnx\]'"):
        export_onnx(Net("fine"), torch.zeros(2, 4), tmp_path / "model.onnx")


@pytest.mark.parametrize(("how", "worst"), [("differs", r"[\d.]+"), ("not a number", "inf")])
def test_a_program_that_computes_something_else_is_not_left_behind(tmp_path, how, worst):
    with pytest.raises(sw.SkipwayError, match=rf"model\.pt2 differs from the model by {worst}, .*=0\.0001 allows"):
        export_program(Net(how), torch.zeros(2, 4), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []
    assert export_program(Net(how), torch.zeros(2, 4), tmp_path / "model.pt2", tolerance=None) > 0.1


@pytest.mark.parametrize("write", [pytest.param(export_onnx, marks=needs_onnx), export_program])
def test_a_network_that_writes_into_its_input_is_compared_on_the_same_input(tmp_path, write):
    x = torch.ones(2, 4)
    assert write(Net("writes"), x, tmp_path / "model.pt2") < 1e-5
    assert torch.equal(x, torch.ones(2, 4))


def test_no_number_is_no_agreement_and_equal_infinities_are_one():
    """In any batch, the largest output being a finite one."""
    one, none, never = torch.tensor([2.0, -math.inf]), torch.tensor([math.nan, 1.0]), torch.tensor([2.0, 1.0])
    assert check_agreement([(one, one)], "the file", 1e-4) == 0
    for pairs in ([(one, one), (never, none)], [(none, none)], [(never, one)]):
        assert check_agreement(pairs, "the file", None) == math.inf
        with pytest.raises(sw.SkipwayError, match="the file differs from the model by inf"):
            check_agreement(pairs, "the file", 1e-4)
