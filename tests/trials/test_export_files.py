"""An exported file was for one image size and one type of numbers, and stayed behind when its check failed.

| trial | input | right value |
|---|---|---|
| E1 | networks that take any image size (ResNet, ViT) | a file that agrees with torch at sizes never traced |
| E1 | networks with one size, or whose traced program holds for some sizes only | a file of that size; the reason |
| E1 | `sides="fixed"`; a torch.export program; inputs that are no images | one size; free sides alike; as before |
| E1 | `opset` | the file has it, or our error |
| E2 | bfloat16, float64, parts of a network in another type | a file in float32, and said |
| E2 | float16 | our error with a way out, or a file within the tolerance asked for |
| E2 | failing network, several outputs, operator that ONNX lacks, full disk, Ctrl-C | our error; older files stay |
| E2 | a folder in place of a file, a missing folder, names with spaces and letters of any script | named; written |
| D11 | token ids as input of `optimize`; float64 networks | outputs keep their type |
"""

from __future__ import annotations

import copy
import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.inference.test_onnx import MODELS, needs_onnx
from torch import nn

import skipway as sw
from skipway.cli import main
from skipway.inference import onnx as export
from skipway.inference.backend_selection import BackendComparison
from skipway.inference.onnx import export_onnx, export_program

pytestmark = needs_onnx


def run_file(path, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def input_shape(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path).get_inputs()[0].shape


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_files_for_any_image_size(tmp_path, family):
    """At sizes other than those that were traced or checked."""
    model = sw.build(MODELS[family][0], **MODELS[family][1]).eval()
    remarks: list[str] = []
    export_onnx(model, torch.zeros(1, 3, 16, 16), tmp_path / "m.onnx", remark=remarks.append)
    assert remarks == []
    for size in ((16, 16), (56, 24), (16, 120), (88, 88)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(run_file(tmp_path / "m.onnx", images), model(images).detach(), rtol=1e-4, atol=1e-5)


class OneSize(nn.Module):
    """A network whose map after the pooling fits one image size, or that has a side as a constant."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.conv, self.pool = how, nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(6)
        self.map = nn.Linear({"flat": 4 * 64, "constant": 4, "pooled": 4 * 36}[how], 2)

    def forward(self, x):
        x = self.conv(x)
        if self.how == "constant":
            return self.map(x.sum((2, 3)) / (int(x.shape[2]) * 8))
        return self.map((self.pool(x) if self.how == "pooled" else x).flatten(1))


@pytest.mark.parametrize(
    ("how", "reason"), [("flat", "the network fails at"), ("constant", "export fails"), ("pooled", "export fails")]
)
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_files_for_one_image_size_say_why(tmp_path, how, reason, kind):
    """`int()` of a side is a constant of torch.export's; pooling to 6 x 6 from smaller maps differs in onnxruntime."""
    model, remarks = OneSize(how).eval(), []
    path, images = tmp_path / f"m.{kind}", torch.randn(3, 3, 8, 8)
    if kind == "onnx":
        export_onnx(model, images, path, remark=remarks.append)
    else:
        export_program(model, images, path, remark=remarks.append)
    for remark in remarks:
        assert f"m.{kind} is for images of 8 x 8 only: " in remark
        assert reason in remark
    if kind == "onnx":
        shape = input_shape(path)
        assert shape == ["batch", 3, 8, 8] if remarks else isinstance(shape[2], str)
        torch.testing.assert_close(run_file(path, images), model(images).detach(), rtol=1e-4, atol=1e-5)
    assert remarks or how == "constant" or kind == "pt2"


def test_sides_can_be_fixed_and_programs_have_free_ones(tmp_path):
    model = sw.build(MODELS["resnet"][0], **MODELS["resnet"][1]).eval()
    export_onnx(model, torch.zeros(1, 3, 16, 16), tmp_path / "m.onnx", sides="fixed")
    assert input_shape(tmp_path / "m.onnx") == ["batch", 3, 16, 16]
    assert export_program(model, torch.zeros(1, 3, 16, 16), tmp_path / "m.pt2") < 1e-5
    images = torch.randn(2, 3, 40, 24)
    torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(images), model(images))
    with pytest.raises(sw.SkipwayError, match="sides='any': the rule is dynamic or fixed"):
        export_onnx(model, torch.zeros(1, 3, 16, 16), tmp_path / "n.onnx", sides="any")


@pytest.mark.parametrize("opset", [20])
def test_the_opset_is_the_one_asked_for(tmp_path, opset):
    onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU())
    export_onnx(model, torch.zeros(1, 3, 8, 8), tmp_path / "m.onnx", opset=opset)
    assert {each.domain: each.version for each in onnx.load(tmp_path / "m.onnx").opset_import}[""] == opset


@pytest.mark.parametrize("opset", [3, 99])
def test_an_opset_that_is_not_there(tmp_path, opset, caplog):
    with pytest.raises(sw.SkipwayError, match=rf"opset={opset}|cannot be exported"):
        export_onnx(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), torch.zeros(1, 3, 8, 8), tmp_path / "m", opset=opset)
    assert list(tmp_path.iterdir()) == []
    assert not [record for record in caplog.records if record.levelname != "DEBUG"], "the converter's own traceback"


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("part", [False, True])
def test_other_types_are_written_in_float32(tmp_path, kind, part):
    model, example = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU()).eval(), torch.zeros(1, 3, 8, 8)
    single = copy.deepcopy(model).to(kind).float()
    if part:
        model.register_buffer("unused", torch.ones(2, dtype=kind))
    else:
        model, example = model.to(kind), example.to(kind)
    remarks: list[str] = []
    export_onnx(model, example, tmp_path / "m.onnx", sides="fixed", remark=remarks.append)
    (remark,) = remarks
    assert "the file computes in float32" in remark
    assert str(kind).removeprefix("torch.") in remark
    assert part or next(model.parameters()).dtype == kind
    if not part:
        images = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(run_file(tmp_path / "m.onnx", images), single(images).detach())


def test_half_precision_has_a_way_out(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()).half()
    with pytest.raises(sw.SkipwayError, match=r"half precision needs some 1e-2, or give model.float\(\)"):
        export_onnx(model, torch.zeros(1, 3, 32, 32).half(), tmp_path / "m.onnx", sides="fixed", tolerance=1e-7)
    assert list(tmp_path.iterdir()) == []
    assert (
        export_onnx(model, torch.zeros(1, 3, 32, 32).half(), tmp_path / "m.onnx", sides="fixed", tolerance=1e-2) < 0.1
    )


class Faulty(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.how, self.map = how, nn.Linear(4, 2)

    def forward(self, x):
        if self.how == "fails":
            raise ZeroDivisionError("by zero")
        if self.how == "several":
            return self.map(x), x
        if self.how == "mapping":
            return {"logits": self.map(x)}
        if self.how == "branch" and torch.compiler.is_exporting():
            return self.map(x) if bool(x.sum() > 0) else self.map(-x)
        if self.how == "operator":
            return torch.linalg.eigvals(self.map(x)[:2].double()).real.float()
        return self.map(x)


FAULTS = {
    "fails": "fails on its example of shape .2, 4.: ZeroDivisionError: by zero",
    "several": "returns a tuple; the rule is one tensor",
    "mapping": "returns a dict; the rule is one tensor",
    "branch": "this Faulty cannot be exported",
    "operator": "this Faulty cannot be exported",
}


@pytest.mark.parametrize(("how", "older"), [*((how, True) for how in FAULTS), ("operator", False)])
def test_nothing_is_left_of_a_failure(tmp_path, how, older):
    if older:
        (tmp_path / "m.onnx").write_text("older")
    with pytest.raises(sw.SkipwayError, match=FAULTS[how]):
        export_onnx(Faulty(how), torch.zeros(2, 4), tmp_path / "m.onnx")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("m.onnx", "older")] * older


@pytest.mark.parametrize("place", ["write_onnx_file", "verify_onnx"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), MemoryError()], ids=repr
)
def test_nothing_is_left_after_an_interruption(tmp_path, monkeypatch, place, error):
    def interrupt(model, file, *args):
        file.write_text("half")
        raise error

    monkeypatch.setattr(export, "write_onnx_file", lambda model, file, *args: file.write_text("whole"))
    monkeypatch.setattr(export, place, interrupt)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else sw.SkipwayError) as caught:
        export_onnx(Faulty("fine"), torch.zeros(2, 4), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
    assert not isinstance(error, OSError) or "cannot be written: the disk is full" in str(caught.value)


def test_a_full_disk_is_said_as_such(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("skipway.checkpoint.files.os.replace", refuse)
    with pytest.raises(sw.SkipwayError, match="m.onnx cannot be written: the disk is full"):
        export_onnx(Faulty("fine"), torch.zeros(2, 4), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["модель a'b\".onnx", "no-suffix"])
def test_names_of_any_kind(tmp_path, name):
    export_onnx(Faulty("fine"), torch.zeros(2, 4), tmp_path / name)
    assert run_file(tmp_path / name, torch.zeros(5, 4)).shape == (5, 2)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(sw.SkipwayError, match="is a folder; give the name of a file"):
        export_onnx(Faulty("fine"), torch.zeros(2, 4), tmp_path)
    with pytest.raises(sw.SkipwayError, match=r"cannot be written: .*too long"):
        export_onnx(Faulty("fine"), torch.zeros(2, 4), tmp_path / ("a" * 300))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(64, 32), nn.Linear(32, 64)

    def forward(self, ids):
        return self.out(self.embedding(ids))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_outputs_of_backends_keep_their_type(precision, backend, monkeypatch):
    if (precision, backend) == ("bfloat16", "onnxruntime"):
        pytest.skip("onnxruntime computes in float32 only")
    model, ids = Tokens().eval(), torch.randint(0, 64, (2, 12))
    monkeypatch.setattr(BackendComparison, "time", lambda self, *given: None)
    fast = sw.optimize(model, ids, backends=[backend], precisions=precision)
    assert fast(ids).dtype == torch.float32
    torch.testing.assert_close(fast(ids), model(ids).detach(), rtol=0.1, atol=0.05)
    if backend == "onnxruntime":  # which takes no float64
        return
    double = nn.Linear(4, 2).double().eval()
    fast = sw.optimize(double, torch.zeros(2, 4).double(), backends=[backend], precisions=precision, tolerance=0.05)
    assert fast(torch.zeros(2, 4).double()).dtype == torch.float64


def test_the_command_says_and_stores_it(tmp_path, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
    monkeypatch.chdir(tmp_path)
    quick = ["--model", "resnet", "--depth", "8", "--width", "4", "--epochs", "1", "--batch-size", "512"]
    assert main(["train", *quick, "--device", "cpu", "--precision", "float32", "--out", "run", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["export", "run", "--onnx", "free.onnx", "--opset", "18"]) == 0
    assert isinstance(input_shape("free.onnx")[2], str)
    stored = {entry.key: json.loads(entry.value) for entry in onnx.load("free.onnx").metadata_props}
    assert stored["model"]["name"] == "resnet"
    assert stored["preprocessing"]["size"] == 8
    assert np.isfinite(stored["preprocessing"]["mean"]).all()
    capsys.readouterr()
    assert main(["export", "run", "--onnx", "old.onnx", "--opset", "3"]) == 2
    text = capsys.readouterr().err
    assert "--opset 3" in text or "cannot be exported" in text
    assert not Path("old.onnx").exists()
