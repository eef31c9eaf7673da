"""Key maps both ways, strict loading, and files that must not be trusted."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import skipway as sw
from benchmarks.twin import ClassicBottleneck, ClassicResNet
from skipway.weights import Rule, export_names, match


@given(st.integers(0, 99), st.integers(0, 9999), st.integers(1, 3), st.sampled_from(["weight", "bias", "a.b.c"]))
@settings(max_examples=50, deadline=None)
def test_rules_read_both_ways(i, j, k, leaf):
    row = Rule("stages.{i}.{j}.branch.conv{k}.{leaf}", "layer{i+1}.{j}.conv{k}.{leaf}")
    ours = f"stages.{i}.{j}.branch.conv{k}.{leaf}"
    (theirs,) = row.to_theirs(ours)
    assert theirs == f"layer{i + 1}.{j}.conv{k}.{leaf}"
    assert row.to_ours(theirs) == ours
    assert row.to_ours("layer0.1.conv1.weight") is None


def test_files_of_both_kinds_load(tmp_path):
    theirs = ClassicResNet(ClassicBottleneck, (1, 1, 1, 1), classes=3)
    state = theirs.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "c.pt")
    x = torch.randn(2, 3, 32, 32)
    for name in ("a.safetensors", "b.pth", "c.pt"):
        model = sw.build("resnet-imagenet14", block="bottleneck", classes=3).eval()
        assert sw.load(model, tmp_path / name, names="torchvision") is model
        torch.testing.assert_close(model(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_old_files_without_batch_counters_load():
    state = {k: v for k, v in sw.build("resnet20").state_dict().items() if "num_batches" not in k}
    report = match(sw.build("resnet20"), state)
    assert report.fits
    assert len(report.absent) == 19


def test_what_does_not_fit_is_named_and_nothing_changes():
    """P24: strict, and the model is as it was."""
    model = sw.build("resnet20")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = export_names(sw.build("resnet20", classes=7), "torchvision")
    state["layer9.0.conv1.weight"] = torch.zeros(1)
    del state["conv1.weight"]
    with pytest.raises(sw.CheckpointError) as caught:
        sw.load(model, state, names="torchvision")
    text = str(caught.value)
    assert "conv1.weight (for stem.conv.weight)" in text
    assert "layer9.0.conv1.weight" in text
    assert "head.classifier.weight: (7, 64) in the file, (10, 64) in the model" in text
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("scheme", ["depthscaled", "normfree", "deepnorm", "plain", "skipinit"])
def test_what_another_library_cannot_compute_is_not_exported(scheme):
    with pytest.raises(sw.CheckpointError, match="nothing like"):
        export_names(sw.build("resnet20", scheme=scheme), "torchvision")


def test_a_gain_has_no_name_elsewhere():
    with pytest.raises(sw.CheckpointError, match="no name for 'stages.0.0.scale.gain'"):
        export_names(sw.build("resnet20", scheme="layerscale"), "torchvision")


class Payload:
    """What a hostile pickle does."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("kind", ["pickle", "torch", "nested"])
def test_code_in_a_checkpoint_never_runs(tmp_path, kind):
    marker = tmp_path / "marker"
    file = tmp_path / "weights.pth"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Payload(str(marker))))
    elif kind == "torch":
        torch.save(Payload(str(marker)), file)
    else:
        torch.save({"state_dict": {"a": torch.zeros(1), "b": Payload(str(marker))}}, file)
    with pytest.raises(sw.CheckpointError, match=r"would run code|damaged"):
        sw.load(sw.build("resnet20"), file)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.safetensors", None, "no such file"),
        ("weights.txt", b"hello", "suffix"),
        ("weights.safetensors", b"", "damaged"),
        ("weights.safetensors", b"\xff" * 64, "damaged"),
        ("weights.pth", b"<html>not found</html>", r"damaged|would run code"),
        ("weights.pth", b"", "damaged"),
    ],
)
def test_files_that_are_not_weights(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(sw.CheckpointError, match=message):
        sw.load(sw.build("resnet20"), tmp_path / name)


def test_truncated_files_are_refused(tmp_path):
    save_file(sw.build("resnet20").state_dict(), tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for share in (0.001, 0.1, 0.5, 0.999):
        (tmp_path / "cut.safetensors").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(sw.CheckpointError, match="damaged"):
            sw.load(sw.build("resnet20"), tmp_path / "cut.safetensors")


def test_unknown_names():
    with pytest.raises(sw.CheckpointError, match="did you mean 'torchvision'"):
        sw.load(sw.build("resnet20"), {}, names="torchvison")
