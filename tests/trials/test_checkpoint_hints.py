"""Ways out were offered unasked: a choice that does not help, Python's spelling on the command line.

| trial | input | right value |
|---|---|---|
| C2 | 200 unknown names | no hint |
| C6 | colour weights for grey images, at the command line | `--weights-adapt …,channels` or `--channels 3`; both work |
| C6 | one, two or four channels | summed, or repeated at 3/C, by choice |
| – | weights of timm's names read as torchvision's or ours, with other classes | names and choices that fit, tried |
| – | one parameter missing under the right names | no other library is suggested |
| – | one parameter missing under timm's names, read as ours | "by names='timm' all keys but one fit", and the one |
| – | weights of a ViT for a ResNet | "look like a ViT of timm" |
| – | quantised, complex or 8-bit numbers, tensors without values | refused, the model unchanged |
| – | LoRA adapters, pruned, parametrised or weight-normalised weights, GPTQ | named, with the way to plain weights |
| – | averaged weights as a list without names, beside the others | said to be left out |
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from PIL import Image
from tests.trials.test_checkpoint_containers import TRAIN, network, other

import skipway as sw
from skipway.cli import main
from skipway.weights import export_names


def message(model, state, **options):
    with pytest.raises(sw.CheckpointError) as caught:
        sw.load(model, state, **options)
    return str(caught.value)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_another_number_of_channels_is_a_choice(channels):
    """A grey image through the sum is the image copied to three channels through the old map."""
    source = network()
    model = sw.build("resnet", depth=8, width=4, classes=3, channels=channels)
    assert "adapt=('channels',)" in message(model, source.state_dict())
    sw.load(model, source.state_dict(), adapt=("channels",))
    grey = torch.randn(2, 1, 8, 8)
    if channels == 1:
        torch.testing.assert_close(model.stem.conv(grey), source.stem.conv(grey.expand(-1, 3, -1, -1)))
    else:
        kept = [channel % 3 for channel in range(channels)]
        assert torch.equal(model.stem.conv.weight, source.stem.conv.weight[:, kept] * (3 / channels))


def test_no_hint_where_nothing_helps():
    text = message(network(), {f"wrong{number}": torch.zeros(1) for number in range(200)})
    assert "adapt=" not in text
    assert "names='skipway'" in text
    assert text.count("names=") == 1


@pytest.mark.parametrize("names", ["timm", "torchvision", "huggingface"])
@pytest.mark.parametrize("asked", ["skipway", "torchvision", "timm"])
def test_the_names_that_fit_are_found(names, asked):
    """timm's and torchvision's names of this ResNet are the same."""
    state = export_names(sw.build("resnet18", classes=7), names)
    text = message("resnet18", state, names=asked)
    if {names, asked} <= {"timm", "torchvision"}:
        assert text.endswith("All of it fits with adapt=('classes',).")
    else:
        found = re.search(r"All of it fits with names='(\w+)' and adapt=\('classes',\)\.$", text)
        assert found is not None
        sw.load("resnet18", state, names=found[1], adapt="classes")
    assert "look like" not in text


def test_the_right_names_are_not_doubted():
    """121 of 122 keys fit: the names are not what is wrong."""
    state = export_names(sw.build("resnet18"), "timm")
    del state["bn1.weight"]
    text = message("resnet18", state, names="timm")
    assert "1 missing from the file:\n  bn1.weight (for stem.norm.weight)" in text
    assert text.count("names=") == 1
    assert "look like" not in text
    text = message("resnet18", state)
    assert re.search(r"By names='(timm|torchvision)' 121 keys fit; there would remain:\n1 missing", text)
    assert "bn1.weight (for stem.norm.weight)" in text
    assert "look like" not in text


def test_weights_of_another_family_are_named():
    state = export_names(sw.build("vit-tiny-16", image=32, classes=3, depth=2), "timm")
    text = message(network(), state)
    assert "Its keys look like a ViT of timm." in text
    assert "fits with" not in text


def test_hints_in_the_words_of_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = sw.build("resnet", depth=8, width=4, classes=7, channels=1)
    torch.save(export_names(source, "torchvision"), "c.pth")
    assert main(["train", *TRAIN, "--start", "c.pth", "--out", "a"]) == 4
    text = capsys.readouterr().err
    assert "(--weights-names skipway)" in text
    found = re.search(r"All of it fits with (--weights-names \w+)\.", text)
    assert found is not None
    assert main(["train", *TRAIN, "--start", "c.pth", *found[1].split(), "--out", "b"]) == 0
    assert "newly initialised: head.classifier.weight, head.classifier.bias" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["train", *TRAIN, "--start", "c.pth", "--weights-adapt", "klasses", "--out", "c"]) == 4
    assert "--weights-adapt klasses: unknown choice 'klasses'; did you mean 'classes'?" in capsys.readouterr().err


@pytest.fixture
def grey_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for label, level in (("cat", 60), ("dog", 190)):
        (tmp_path / "d" / label).mkdir(parents=True)
        for number in range(6):
            Image.fromarray(np.full((16, 16), level + number, np.uint8)).save(tmp_path / "d" / label / f"{number}.png")
    return tmp_path / "d"


def test_colour_weights_for_grey_images(grey_images, capsys):
    torch.save(export_names(sw.build("resnet", depth=8, width=4, classes=9), "timm"), "c.pth")
    given = ["train", str(grey_images), *TRAIN, "--start", "c.pth", "--weights-names", "timm"]
    assert main([*given, "--out", "a"]) == 4
    text = capsys.readouterr().err
    assert "All of it fits with --weights-adapt classes,size,channels." in text
    assert "Or take the images in colour: --channels 3." in text
    assert main([*given, "--channels", "3", "--out", "b"]) == 0
    assert main([*given, "--weights-adapt", "classes,channels", "--out", "c"]) == 0
    assert "resampled: stem.conv.weight" in " ".join(capsys.readouterr().out.split())


def test_from_python_the_recipes_names_are_used(grey_images):
    from skipway.recipe import Recipe
    from skipway.training.loop import train

    torch.save({"model": network().state_dict(), "ema": network().state_dict()}, "c.pth")
    recipe = Recipe(grey_images, model="resnet", depth=8, width=4, start=grey_images.parent / "c.pth", device="cpu")
    with pytest.raises(sw.CheckpointError, match="weights_adapt='classes,size,channels'") as caught:
        train(recipe, grey_images.parent / "run")
    assert "channels=3" in str(caught.value)


@pytest.mark.parametrize("kind", [torch.int8, torch.complex64])
def test_numbers_of_another_kind_do_not_fit(kind):
    """Quantised weights are no weights."""
    state = network().state_dict()
    state["head.classifier.weight"] = state["head.classifier.weight"].to(kind)
    assert re.search(r"(int8|complex64) in the file, float32 in the model", message(network(), state))


def test_a_tensor_that_cannot_be_copied_leaves_the_model_as_it_was():
    model, state = network(), other(network().state_dict())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state["head.classifier.weight"] = state["head.classifier.weight"].to("meta")
    with pytest.raises(sw.CheckpointError, match=r"head.classifier.weight: a tensor without values"):
        sw.load(model, state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


FORMS = {
    "LoRA": (lambda net: {"fc.lora_A.weight": torch.zeros(1, 4), "fc.lora_B.weight": torch.zeros(3, 1)}, "merge"),
    "pruned": (lambda net: torch.nn.utils.prune.l1_unstructured(net.head.classifier, "weight", 0.5), "prune.remove"),
    "parametrised": (
        lambda net: torch.nn.utils.parametrizations.orthogonal(net.head.classifier),
        "remove_parametrizations",
    ),
    "GPTQ": (lambda net: {"fc.qweight": torch.zeros(2, dtype=torch.int32)}, "GPTQ"),
    "scales": (lambda net: {"fc.weight_scale_inv": torch.ones(1)}, "scales"),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_another_form_are_named(form):
    """torch's own prune and parametrize rename the weights; leaving such names out is not offered."""
    make, words = FORMS[form]
    source = network()
    more = make(source)
    state = {**source.state_dict(), **(more if isinstance(more, dict) else {})}
    text = message(network(), state)
    assert words in text
    assert "adapt=" not in text


def test_float8_is_refused():
    state = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in network().state_dict().items() if tensor.ndim}
    assert "float8_e4m3fn in the file" in message(network(), state)


def test_averaged_weights_without_names_are_left_out_with_a_remark():
    """torch_ema keeps a list in the order of the parameters."""
    state, remarks = network().state_dict(), []
    averaged = {"decay": 0.9, "shadow_params": list(state.values()), "collected_params": None}
    sw.load(network(), {"model": state, "ema": averaged}, remark=remarks.append)
    assert [sentence for sentence in remarks if f"ema.shadow_params ({len(state)} tensors without names)" in sentence]
