"""Key maps both ways, strict loading, and files that must not be trusted."""

from __future__ import annotations

import json
import pickle
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import skipway as sw
from benchmarks.twin import ClassicBottleneck, ClassicResNet
from skipway.checkpoint.state import load_model_state
from skipway.training.initial_weights import load_initial_weights
from skipway.weights import KeyRule, export_names, match
from skipway.weights.forms import describe_forms


@given(st.integers(0, 99), st.integers(0, 9999), st.integers(1, 3), st.sampled_from(["weight", "bias", "a.b.c"]))
@settings(max_examples=50, deadline=None)
def test_rules_read_both_ways(i, j, k, leaf):
    row = KeyRule("stages.{i}.{j}.branch.conv{k}.{leaf}", "layer{i+1}.{j}.conv{k}.{leaf}")
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
    remarks = []
    for name in ("a.safetensors", "b.pth", "c.pt"):
        model = sw.build("resnet-imagenet14", block="bottleneck", classes=3).eval()
        assert sw.load(model, tmp_path / name, names="torchvision", remark=remarks.append) is model
        torch.testing.assert_close(model(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_old_files_without_batch_counters_load():
    state = {k: v for k, v in sw.build("resnet20").state_dict().items() if "num_batches" not in k}
    report = match(sw.build("resnet20"), state)
    assert report.fits
    assert len(report.absent) == 19


def test_what_does_not_fit_is_named_and_nothing_changes():
    """Strict, and the model is as it was."""
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


@pytest.mark.parametrize("scheme", ["depthscaled", "normfree", "deepnorm", "plain", "skipinit", "orthogonal"])
def test_what_another_library_cannot_compute_is_neither_exported_nor_loaded(scheme):
    model = sw.build("resnet20", scheme=scheme)
    with pytest.raises(sw.CheckpointError, match="nothing like"):
        export_names(model, "torchvision")
    with pytest.raises(sw.CheckpointError, match="nothing like"):
        sw.load(model, export_names(sw.build("resnet20"), "torchvision"), names="torchvision")


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
    remarks = []
    with pytest.raises(sw.CheckpointError, match=r"(w|c)ould run code|damaged|do not fit"):
        sw.load(sw.build("resnet20"), file, remark=remarks.append)
    assert not marker.exists()
    assert kind != "nested" or "io.open" in "".join(remarks)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.safetensors", None, "no such file"),
        ("weights.txt", b"hello", "no file of weights"),
        ("weights.safetensors", b"", "damaged"),
        ("weights.safetensors", b"\xff" * 64, "damaged"),
        ("weights.pth", b"<html>not found</html>", "a page of HTML"),
        ("weights.bin", b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
        ("weights.ckpt", b"\x1f\x8b\x08" + b"0" * 99, "a gzip archive"),
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


TOKENS = {"dim": 16, "heads": 2, "patch": 8, "image": 32, "classes": 5}


def vit(**options):
    return sw.build("vit-tiny-16", **{**TOKENS, "depth": 3, **options})


def swin(**options):
    small = {"dim": 8, "heads": 2, "blocks": (2, 1), "window": 4, "image": 32, "classes": 5}
    return sw.build("swin-tiny", **{**small, **options})


def test_a_name_is_built_first(tmp_path):
    source = sw.build("resnet20", scheme="fixup")
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(sw.CheckpointError, match="stages.0.0.scale.multiplier.gain"):
        sw.load("resnet20", tmp_path / "a.safetensors")
    save_file(sw.build("resnet20").state_dict(), tmp_path / "a.safetensors")
    assert sw.load("resnet20", tmp_path / "a.safetensors").config == sw.build("resnet20").config
    with pytest.raises(sw.SkipwayError, match="did you mean 'resnet"):
        sw.load("resnett20", tmp_path / "a.safetensors")


def shards(folder, state, homes):
    """A folder in Hugging Face's sharded layout."""
    for home in set(homes.values()):
        save_file({key: state[key] for key in state if homes[key] == home}, folder / home)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))


@pytest.mark.parametrize("layout", ["one file", "shards", "pickled"])
def test_folders_in_hugging_faces_layout(tmp_path, layout):
    source = vit()
    state = export_names(source, "huggingface")
    if layout == "one file":
        save_file(state, tmp_path / "model.safetensors")
    elif layout == "pickled":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        shards(tmp_path, state, {key: f"model-0000{n % 2 + 1}-of-00002.safetensors" for n, key in enumerate(state)})
    (tmp_path / "config.json").write_text("{}")
    loaded = sw.load(vit(), tmp_path, names="huggingface")
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[key])


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(sw.CheckpointError, match="a folder without weights"):
        sw.load(vit(), tmp_path)
    state = vit().state_dict()
    shards(tmp_path, state, dict.fromkeys(state, "model-1.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    for change, message in (
        ({"gone.weight": "model-1.safetensors"}, "1 tensor that its files lack, 'gone.weight'"),
        ({"gone.weight": "model-2.safetensors"}, "model-2.safetensors: there is no such file"),
        ({"gone.weight": "../outside.safetensors"}, "outside its folder"),
    ):
        index.write_text(json.dumps({"weight_map": {**table["weight_map"], **change}}))
        with pytest.raises(sw.CheckpointError, match=message):
            sw.load(vit(), tmp_path)
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(sw.CheckpointError, match="damaged or no index"):
            sw.load(vit(), tmp_path)


def test_names_on_the_hub(tmp_path, monkeypatch):
    """Safe files first, pickled ones only where there are no others; one revision on demand."""
    hub = pytest.importorskip("huggingface_hub", reason="the extra 'hub' is not installed")
    asked = []

    def snapshot(repository, revision, allow_patterns):
        asked.append((repository, revision))
        if "pytorch_model.bin" in allow_patterns:
            torch.save(vit().state_dict(), tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    sw.load(vit(), "hf:org/name")
    assert asked == [("org/name", None), ("org/name", None)]
    save_file(vit().state_dict(), tmp_path / "model.safetensors")
    sw.load(vit(), "hf:org/name@v2")
    assert asked[2:] == [("org/name", "v2")]


def test_a_hub_that_does_not_answer(monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="the extra 'hub' is not installed")

    def snapshot(*args, **kwargs):
        raise hub.errors.OfflineModeIsEnabled("no network")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    with pytest.raises(sw.CheckpointError, match="hf:org/name cannot be fetched from the hub: no network"):
        sw.load(vit(), "hf:org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(sw.MissingExtraError, match=r"pip install 'skipway\[hub\]'"):
        sw.load(vit(), "hf:org/name")


def refused(model, state, *, ways, **options):
    """Loading fails, names the choices, and changes nothing."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(sw.CheckpointError, match=f"fits with .*adapt={re.escape(repr(ways))}"):
        sw.load(model, state, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("names", ["skipway", "timm"])
def test_another_number_of_classes_is_a_choice(names):
    source, model = vit(classes=7), vit()
    state = export_names(source, names)
    refused(model, state, names=names, ways=("classes",))
    own = model.head.classifier.weight.clone()
    report = match(model, state, names=names, adapt=("classes",))
    assert report.fresh == ["head.classifier.weight", "head.classifier.bias"]
    sw.load(model, state, names=names, adapt=("classes",))
    assert torch.equal(model.head.classifier.weight, own)
    assert torch.equal(model.blocks[2].mlp.branch.fc2.weight, source.blocks[2].mlp.branch.fc2.weight)


def test_a_file_without_a_classifier_and_one_of_another_width():
    state = {key: value for key, value in vit().state_dict().items() if "classifier" not in key}
    refused(vit(), state, ways=("classes",))
    sw.load(vit(), state, adapt="classes")
    state["head.classifier.weight"], state["head.classifier.bias"] = torch.zeros(5, 99), torch.zeros(5)
    with pytest.raises(sw.CheckpointError, match=r"\(5, 99\) in the file"):
        sw.load(vit(), state, adapt=("classes",))
    # the same number of classes: the choice changes nothing
    source = vit()
    loaded = sw.load(vit(), source.state_dict(), adapt=("classes", "size", "depth"))
    assert torch.equal(loaded.head.classifier.weight, source.head.classifier.weight)


def test_another_image_size_is_a_choice():
    """timm's own resampling is the reference, the class token's row stays."""
    source, model = vit(image=32), vit(image=48)
    state = export_names(source, "timm")
    state["pos_embed"] = state["pos_embed"][None]  # as timm has it
    refused(model, state, names="timm", ways=("size",))
    assert match(model, state, names="timm", adapt=("size",)).resampled.keys() == {"stem.position"}
    sw.load(model, state, names="timm", adapt=("size",))
    assert torch.equal(model.stem.position[0], source.stem.position[0])
    grid = source.stem.position[1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(model.stem.position[1:], grid.flatten(2)[0].T)
    # what a network would do by itself with such an image
    x = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(model.eval()(x), source.eval()(x))


def test_a_table_of_no_square_grid_stays_misshapen():
    state = vit().state_dict()
    state["stem.position"] = torch.zeros(1 + 15, 16)
    with pytest.raises(sw.CheckpointError, match=r"\(16, 16\) in the file, \(17, 16\) in the model"):
        sw.load(vit(), state, adapt=("size",))


def test_windows_of_another_size_are_a_choice():
    """A table that is linear in both offsets stays so in the middle, where bicubic interpolation is exact."""
    source, model = swin(window=8, image=64), swin(window=4, image=64)
    offsets = torch.arange(-7.0, 8.0)
    with torch.no_grad():
        source.stages[0][0].attention.branch.position.table[:, 0] = torch.cartesian_prod(offsets, offsets) @ torch.ones(
            2
        )
    refused(model, source.state_dict(), ways=("size",))
    sw.load(model, source.state_dict(), adapt=("size",))
    table = model.stages[0][0].attention.branch.position.table[:, 0].unflatten(0, (7, 7))
    assert table.shape == (7, 7)
    torch.testing.assert_close(table[3, 3], torch.tensor(0.0), atol=1e-5, rtol=0)
    steps = table[2:5, 2:5].diff(dim=0)
    torch.testing.assert_close(steps, torch.full_like(steps, 15 / 7), rtol=0.02, atol=0)


@pytest.mark.parametrize("names", ["skipway", "huggingface"])
def test_another_depth_is_a_choice(names):
    shallow, deep = vit(depth=2), vit(depth=4)
    state = export_names(deep, names)
    refused(shallow, state, names=names, ways=("depth",))
    report = match(shallow, state, names=names, adapt=("depth",))
    assert len(report.left_out) == len(state) - len(export_names(shallow, names))
    sw.load(shallow, state, names=names, adapt=("depth",))
    assert torch.equal(shallow.blocks[1].mlp.branch.fc1.weight, deep.blocks[1].mlp.branch.fc1.weight)

    state = export_names(shallow, names)
    refused(deep, state, names=names, ways=("depth",))
    own = deep.blocks[3].mlp.branch.fc1.weight.clone()
    report = match(deep, state, names=names, adapt=("depth",))
    assert {key.split(".")[1] for key in report.fresh} == {"2", "3"}
    sw.load(deep, state, names=names, adapt=("depth",))
    assert torch.equal(deep.blocks[3].mlp.branch.fc1.weight, own)
    assert torch.equal(deep.blocks[0].mlp.branch.fc1.weight, shallow.blocks[0].mlp.branch.fc1.weight)


def test_depth_with_batch_norm_and_all_choices_at_once():
    source = sw.build("resnet", depth=32, classes=7)
    state = export_names(source, "torchvision")
    model = sw.build("resnet20")
    refused(model, state, names="torchvision", ways=("classes", "depth"))
    sw.load(model, state, names="torchvision", adapt=("depth", "classes"))
    assert torch.equal(model.stages[2][2].branch.norm2.running_var, source.stages[2][2].branch.norm2.running_var)


def test_a_choice_allows_nothing_else():
    """No choice makes a wrong file a silent success."""
    every = ("classes", "size", "depth")
    for state in ({}, {"a": torch.zeros(1)}, swin().state_dict()):
        with pytest.raises(sw.CheckpointError):
            sw.load(vit(), state, adapt=every)
    half = vit().state_dict()
    del half["blocks.1.mlp.branch.fc1.weight"]
    with pytest.raises(sw.CheckpointError, match="1 missing from the file"):
        sw.load(vit(), half, adapt=every)
    with pytest.raises(sw.CheckpointError, match="scale.gain"):
        sw.load(vit(), vit(depth=4, scheme="layerscale").state_dict(), adapt=every)
    with pytest.raises(sw.CheckpointError, match="did you mean 'classes'"):
        sw.load(vit(), {}, adapt=("class",))


def test_an_unmapped_key_is_named_with_what_comes_closest():
    state = export_names(vit(), "timm")
    state["blocks.7.norm1.weight"] = torch.zeros(16)
    state["blocks.0.attn.qvk.weight"] = torch.zeros(16)
    with pytest.raises(sw.CheckpointError) as caught:
        sw.load(vit(), state, names="timm")
    text = str(caught.value)
    assert "blocks.7.norm1.weight (it would be blocks.7.attention.pre.norm.weight, which this model lacks)" in text
    assert "blocks.0.attn.qvk.weight (no rule matches it; the closest known key is blocks.0.attn.qkv.weight)" in text


# Parameters with two names, wrappers, and networks without memory ---------------------------------------------------


class Tied(nn.Module):
    """A network that is not ours, whose head is its table of tokens."""

    def __init__(self, tokens: int = 5) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(tokens, 4), nn.Linear(4, tokens, bias=False)
        self.head.weight = self.token.weight


@pytest.mark.parametrize("left_out", [None, "token.weight", "head.weight"])
def test_a_shared_parameter_may_stand_in_a_file_once(left_out):
    source = Tied()
    state = {key: tensor for key, tensor in source.state_dict().items() if key != left_out}
    for prefix in ("", "model."):
        model = sw.load(Tied(), {f"{prefix}{key}": tensor for key, tensor in state.items()}, remark=lambda _: None)
        assert torch.equal(model.token.weight, source.token.weight)
        assert model.head.weight is model.token.weight


def test_a_shared_parameter_has_one_value_and_one_shape():
    model = Tied()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state["head.weight"] += 1
    before = model.token.weight.clone()
    message = r"1 unequal to another name .* \(leave out one of the two\):\n  head\.weight \(token\.weight\)"
    with pytest.raises(sw.CheckpointError, match=message):
        sw.load(model, state)
    assert torch.equal(model.token.weight, before)
    with pytest.raises(sw.CheckpointError, match="2 of another shape") as caught:
        sw.load(model, {"token.weight": torch.zeros(7, 4)})
    assert "missing" not in str(caught.value)


def test_a_shared_parameter_may_hold_what_is_no_number():
    state = {key: tensor.clone() for key, tensor in Tied().state_dict().items()}
    for tensor in state.values():
        tensor.flatten()[0] = torch.nan
    with pytest.warns(UserWarning, match="not finite"):
        model = sw.load(Tied(), state)
    assert torch.equal(model.token.weight.isnan(), state["token.weight"].isnan())
    state["head.weight"] = state["head.weight"].nan_to_num()
    with pytest.raises(sw.CheckpointError, match="1 unequal to another name"):
        sw.load(Tied(), state)


def compiled_inside() -> nn.Module:
    model = vit()
    model.blocks[1] = torch.compile(model.blocks[1])
    model.head.classifier = torch.compile(model.head.classifier)
    return model


WRAPPED = {
    "compiled": lambda: torch.compile(vit()),
    "compiled parts": compiled_inside,
    "both, in DataParallel": lambda: nn.DataParallel(torch.compile(compiled_inside())),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("names", ["skipway", "timm"])
def test_a_wrapped_network_takes_the_file_of_the_bare_one(wrap, names):
    source, model = vit(), wrap()
    assert sw.load(model, export_names(source, names), names=names) is model
    loaded = export_names(model, names)
    assert loaded.keys() == export_names(source, names).keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in export_names(source, names).items())


def test_choices_know_a_wrapped_classifier_and_wrapped_blocks():
    model = compiled_inside()
    before = model.head.classifier.weight.clone()
    sw.load(model, vit(classes=9, depth=1).state_dict(), adapt=("classes", "depth"))
    assert torch.equal(model.head.classifier.weight, before)


def test_a_network_without_memory_is_named():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(sw.CheckpointError, match=r"0\.weight of this Sequential is on the meta device"):
        sw.load(model, nn.Sequential(nn.Linear(2, 2)).state_dict())


class Remembering(nn.Linear):
    """A map with extra state, which state_dict makes anew each time."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.seen = [1.0]

    def get_extra_state(self) -> object:
        return torch.tensor(self.seen)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.seen = state.tolist()


class Untyped(Remembering):
    def get_extra_state(self) -> object:
        return {"seen": self.seen}


class Unsettable(nn.Linear):
    def get_extra_state(self) -> object:
        return torch.zeros(1)


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda module: nn.Sequential(torch.compile(module))])
def test_extra_state_goes_through_its_module(wrap):
    source, inner = nn.Sequential(Remembering()), Remembering()
    source[0].seen = [2.0, 3.0]
    report = sw.weights.loader.load_state(wrap(inner), source.state_dict())
    assert "0._extra_state" in report.matched
    assert inner.seen == [2.0, 3.0]
    assert torch.equal(inner.weight, source[0].weight)


def test_extra_state_that_cannot_be_loaded_is_named():
    with pytest.raises(sw.CheckpointError, match="'0._extra_state' of this Sequential is not a tensor but dict"):
        sw.load(nn.Sequential(Untyped()), nn.Sequential(nn.Linear(2, 2)).state_dict())
    model = nn.Sequential(Unsettable(2, 2))
    with pytest.raises(sw.CheckpointError, match="'0._extra_state' cannot be loaded: Unsettable has get_extra_state"):
        sw.load(model, nn.Sequential(Unsettable(2, 2)).state_dict())


class Strict(Remembering):
    def set_extra_state(self, state: torch.Tensor) -> None:
        self.seen = []
        if len(state) > 1:
            raise ValueError("one number")
        super().set_extra_state(state)


def test_extra_state_that_is_refused_leaves_the_network_as_it_was():
    model = nn.Sequential(Remembering(), Strict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    with pytest.raises(sw.CheckpointError, match="'1._extra_state' .* set_extra_state of Strict raises ValueError"):
        sw.load(model, {**state, "1._extra_state": torch.ones(2)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert sw.load(model, state)[1].seen == [2.0]


COMMON = torch.ones(1)


class Returning(Remembering):
    """Extra state that is one tensor of all modules until it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = COMMON

    def get_extra_state(self) -> object:
        return self.kept

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.kept = state


def test_extra_state_of_two_modules_that_return_one_tensor():
    model = nn.Sequential(Returning(), Returning())
    sw.load(model, {**model.state_dict(), "0._extra_state": torch.zeros(1), "1._extra_state": torch.full((1,), 2.0)})
    assert [float(part.kept) for part in model] == [0, 2]
    shared = nn.ModuleDict(dict.fromkeys("ab", Returning()))
    state = {name: tensor for name, tensor in shared.state_dict().items() if name.startswith("b")}
    sw.load(shared, {**state, "b._extra_state": torch.full((1,), 3.0)})  # a file that holds each tensor once
    assert float(shared["a"].kept) == 3


VIT = {"dim": 16, "blocks": 1, "heads": 2, "image": 32, "classes": 3}


@pytest.mark.parametrize("option", [{"norm": "sandwich"}, {"scheme": "perinorm"}])
def test_two_norms_do_not_take_one_name(option):
    """timm's block has one norm per branch: a file of it is another network, and an export would lose a norm."""
    model = sw.build("vit-small-16", **VIT, **option)
    with pytest.raises(sw.CheckpointError, match="one name, 'blocks.0.norm1.weight', for"):
        export_names(model, "timm")
    with pytest.raises(sw.CheckpointError, match="of the same name in the file as another parameter"):
        sw.load(model, export_names(sw.build("vit-small-16", **VIT), "timm"), names="timm")


SWIN = {"dim": 8, "heads": 1, "blocks": (1, 1, 1, 1), "window": 2, "image": 64, "classes": 3}


@pytest.mark.parametrize("names", ["timm", "torchvision", "huggingface"])
def test_norms_elsewhere_than_in_swin_v1_and_v2_are_another_network(names):
    state = export_names(sw.build("swin-tiny", **SWIN), names)
    for norm in ("respost", "sandwich"):
        with pytest.raises(sw.CheckpointError, match=f"norm='{norm}'"):
            sw.load(sw.build("swin-tiny", **SWIN, norm=norm), state, names=names)


class Halving(nn.Linear):
    """A map whose state dict has another number than it computes with."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"] / 2


@pytest.mark.parametrize("load", [sw.load, load_model_state])
def test_a_state_dict_of_copies_is_not_written_into(load):
    model = nn.Sequential(Halving(2, 2))
    before = model[0].bias.clone()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    with pytest.raises(sw.CheckpointError, match=r"'0.weight' cannot be loaded: state_dict\(\) returns a copy"):
        load(model, state)
    assert torch.equal(model[0].bias, before)


@pytest.mark.parametrize("names", ["torchvision", "huggingface"])
def test_a_pooled_shortcut_is_timm_s_alone(names):
    model = sw.build("resnet-imagenet14", block="bottleneck", shortcut="pooled", classes=3)
    with pytest.raises(sw.CheckpointError, match="shortcut='pooled'"):
        export_names(model, names)
    with pytest.raises(sw.CheckpointError, match="shortcut='pooled'"):
        sw.load(model, {}, names=names)
    assert export_names(model, "timm")


@pytest.mark.parametrize("act", ["quickgelu", "tanhgelu"])
def test_torchvision_has_the_exact_gelu_alone(act):
    with pytest.raises(sw.CheckpointError, match=f"act='{act}'"):
        export_names(sw.build("vit-small-16", **VIT, act=act), "torchvision")


def test_a_mask_alone_is_not_pruning():
    assert not describe_forms(["layers.0.blocks.1.attn_mask", "layers.0.blocks.1.attn.qkv.weight"])
    assert "pruned" in describe_forms(["fc.weight_mask", "fc.weight_orig"])[0]


def test_a_network_s_own_n_averaged_is_loaded():
    source, model = nn.Linear(2, 2), nn.Linear(2, 2)
    for each, count in ((source, 3), (model, 0)):
        each.register_buffer("n_averaged", torch.tensor(count))
    assert int(sw.load(model, source.state_dict()).n_averaged) == 3


DESCRIBED = {
    "vit-small-16": (VIT, {"model_type": "vit", "num_attention_heads": 2, "layer_norm_eps": 1e-6}),
    "swin-tiny": (SWIN, {"model_type": "swin", "hidden_act": "gelu", "layer_norm_eps": 1e-5}),
    "swinv2-tiny": (SWIN, {"model_type": "swinv2", "window_size": 2, "image_size": [64, 64]}),
    "resnet-imagenet14": (
        {"block": "bottleneck", "width": 8, "stem_width": 8, "classes": 3},
        {"model_type": "resnet", "downsample_in_bottleneck": False},
    ),
    "convnext-tiny": ({"blocks": (1, 1, 1, 1), "width": 8, "classes": 3}, {"model_type": "convnext"}),
}
"""Networks, and what a config.json of transformers says of them; fields that are not there have the class's values."""


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("vit-small-16", {"num_attention_heads": 4}, "heads=2 in the model, heads=4 in the file"),
        ("vit-small-16", {"hidden_act": "quick_gelu"}, "act='gelu' in the model, act='quickgelu' in the file"),
        ("vit-small-16", {"layer_norm_eps": 1e-3}, "epsilon=1e-06 in the model, epsilon=0.001 in the file"),
        ("swin-tiny", {"hidden_act": "relu"}, "act='gelu' in the model, act='relu' in the file"),
        ("swinv2-tiny", {"window_size": 4}, r"window=\(2, 2, 2, 2\) in the model, window=\(4, 4, 4, 2\) in the file"),
        (
            "swinv2-tiny",
            {"pretrained_window_sizes": [3, 3, 3, 0]},
            r"learned_window=\(2, 2, 2, 2\) in the model, learned_window=\(3, 3, 3, 2\) in the file",
        ),
        ("swinv2-tiny", {"window_size": "many"}, "has a value of another kind"),
        ("resnet-imagenet14", {"downsample_in_bottleneck": True}, "downsample_in_bottleneck=True in the file"),
        ("convnext-tiny", {"hidden_act": "relu"}, "act='gelu' in the model, act='relu' in the file"),
    ],
)
def test_weights_of_an_image_network_beside_a_config_of_another(tmp_path, name, changed, said):
    options, described = DESCRIBED[name]
    model = sw.build(name, **options)
    state = {key: tensor.clone() for key, tensor in export_names(model, "huggingface").items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(described))
    recipe = sw.Recipe(model=name, start=str(tmp_path), weights_names="huggingface")
    example = torch.zeros(1, 3, 32, 32)
    ways = (
        lambda: sw.load(model, tmp_path, names="huggingface"),
        lambda: load_initial_weights(model, recipe, ("a", "b", "c"), example, lambda sentence: None),
    )
    for load in ways:
        load()
    (tmp_path / "config.json").write_text(json.dumps({**described, **changed}))
    for load in ways:
        with pytest.raises(sw.CheckpointError, match=said):
            load()


class Renamed(nn.Module):
    """Weights that were called otherwise, and hold half of what they did, with a table that is computed from them."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(2, 2, bias=False)
        self.register_buffer("table", torch.zeros(2), persistent=False)
        self.register_load_state_dict_pre_hook(self.read_old)
        self.register_load_state_dict_post_hook(lambda module, keys: module.fill())

    def read_old(self, module, state, prefix, metadata, strict, missing, unexpected, errors):
        if (old := state.pop(f"{prefix}kernel", None)) is not None:
            state[f"{prefix}map.weight"] = old / 2
        if f"{prefix}broken" in state:
            errors.append(f"{prefix}broken was never released")

    def fill(self):
        self.table.copy_(self.map.weight.detach().sum(0))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_loading_hooks_are_called(prefix):
    model = nn.Sequential(Renamed(), nn.Linear(2, 1))
    state = {"0.kernel": torch.ones(2, 2), "1.weight": torch.ones(1, 2), "1.bias": torch.ones(1)}
    given = {prefix + name: tensor for name, tensor in state.items()}
    sw.load(model, given, remark=lambda sentence: None)
    assert torch.equal(model[0].map.weight, torch.full((2, 2), 0.5))
    assert torch.equal(model[0].table, torch.ones(2))
    assert list(given) == [prefix + name for name in state]


def test_weight_norm_of_before_parametrizations_loads_as_torch_loads_it():
    made = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
    twin = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
    state = {"0.weight_g": torch.rand(4, 1), "0.weight_v": torch.randn(4, 3), "0.bias": torch.randn(4)}
    sw.load(made, state)
    twin.load_state_dict(state)
    assert torch.equal(made[0].weight, twin[0].weight)


def test_hooks_that_fail_and_methods_in_their_place_are_refused():
    class Own(nn.Linear):
        def _load_from_state_dict(self, *given):
            super()._load_from_state_dict(*given)

    model = nn.Sequential(Renamed())
    before = model[0].map.weight.detach().clone()
    with pytest.raises(sw.CheckpointError, match="a loading hook of 0 reports: 0.broken was never released"):
        sw.load(model, {"0.broken": torch.ones(1), "0.map.weight": torch.ones(2, 2)})
    model.register_load_state_dict_pre_hook(lambda *given: 1 / 0)
    with pytest.raises(sw.CheckpointError, match=r"hook of the network \(Sequential\) raises ZeroDivisionError"):
        sw.load(model, {"0.map.weight": torch.ones(2, 2)})
    assert torch.equal(model[0].map.weight, before)
    with pytest.raises(sw.CheckpointError, match=r"0 \(Own\) loads its weights by a method of its own"):
        sw.load(nn.Sequential(Own(1, 1)), {"0.weight": torch.ones(1, 1), "0.bias": torch.ones(1)})
