"""Base models of Hugging Face are published without a classifier, and without the prefix of their class.

| trial | input | right value |
|---|---|---|
| – | ViTModel, with its pooler, in memory and as saved | read; the pooler left out and named; the features are theirs |
| – | Dinov2Model, with and without registers, with its mask token | read; the features are theirs |
| – | ResNetModel, ConvNextModel, ConvNextV2Model, SwinModel, Swinv2Model | read; the pooled features are theirs |
| – | the same with the prefix of the class that has a classifier | read alike |
| – | any of them without a choice | refused, with `adapt=('classes',)`, which fits |
| – | a folder as published, by `skipway train --start` | trained; the classifier is newly initialised, and said so |
"""

from __future__ import annotations

import pytest
import torch
from tests.trials.test_checkpoint_containers import TRAIN
from tests.weights.test_names import peer
from torch import nn

import skipway as sw
from benchmarks.peers import import_transformers, randomise_
from skipway.cli import main

TOKENS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
OURS = {"depth": 2, "dim": 16, "heads": 2, "patch": 8, "image": 32, "classes": 5}
SWIN = {"image_size": 64, "window_size": 4, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4]}
OUR_SWIN = {"image": 64, "window": 4, "dim": 8, "blocks": (2, 2), "heads": 2, "classes": 5}
CONVNEXT = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 2, 1, 1], "layer_norm_eps": 1e-6}
OUR_CONVNEXT = {"width": 8, "blocks": (1, 2, 1, 1), "classes": 5}
LAYERSCALE = {**OURS, "scheme": "layerscale"}
MODELS = {
    "ViT": ("vit.", {**TOKENS, "intermediate_size": 64}, "vit-tiny-16", {**OURS, "epsilon": 1e-12}),
    "Dinov2": ("dinov2.", TOKENS, "vit-tiny-16", LAYERSCALE),
    "Dinov2WithRegisters": (
        *("dinov2_with_registers.", {**TOKENS, "num_register_tokens": 3}),
        *("vit-tiny-16", {**LAYERSCALE, "registers": 3}),
    ),
    "ResNet": (
        *("resnet.", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic"}),
        *("resnet50", {"width": 8, "stem_width": 8, "blocks": (2, 1), "block": "basic", "classes": 5}),
    ),
    "ConvNext": ("convnext.", CONVNEXT, "convnext-tiny", OUR_CONVNEXT),
    "ConvNextV2": ("convnextv2.", CONVNEXT, "convnextv2-tiny", OUR_CONVNEXT),
    "Swin": ("swin.", SWIN, "swin-tiny", OUR_SWIN),
    "Swinv2": ("swinv2.", SWIN, "swinv2-tiny", OUR_SWIN),
}


def base_model(kind: str) -> nn.Module:
    library = peer("transformers", import_transformers)
    return randomise_(getattr(library, f"{kind}Model")(getattr(library, f"{kind}Config")(**MODELS[kind][1]))).eval()


def our_model(kind: str) -> nn.Module:
    return sw.build(MODELS[kind][2], **MODELS[kind][3]).eval()


@torch.no_grad()
def assert_equal_features(ours: nn.Module, theirs: nn.Module) -> None:
    """What reaches the classifier: the first token, or the pooled map."""
    images = torch.randn(2, 3, 64, 64) if hasattr(theirs.config, "window_size") else torch.randn(2, 3, 32, 32)
    output = theirs(images)
    patches = hasattr(theirs.config, "intermediate_size") or "dinov2" in theirs.config.model_type
    expected = output.last_hidden_state[:, 0] if patches else output.pooler_output.flatten(1)
    ours.head.classifier = nn.Identity()
    torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("form", ["memory", "folder", "prefixed"])
def test_base_models_are_read_with_a_fresh_classifier(tmp_path, kind, form):
    theirs = base_model(kind)
    source = theirs.state_dict()
    if form == "folder":
        theirs.save_pretrained(tmp_path)
        source = tmp_path
    elif form == "prefixed":
        source = {MODELS[kind][0] + key: tensor for key, tensor in source.items()}
    remarks: list[str] = []
    ours = our_model(kind)
    own = {key: tensor.clone() for key, tensor in ours.state_dict().items() if key.startswith("head.classifier")}
    sw.load(ours, source, names="huggingface", adapt="classes", remark=remarks.append)
    assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in own.items())
    assert len(remarks) == (kind == "ViT")
    if kind == "ViT":
        assert "2 names that this model has no use for left out: " in remarks[0]
        assert "pooler.dense.weight" in remarks[0]
    assert_equal_features(ours, theirs)


@pytest.mark.parametrize("kind", MODELS)
def test_the_classifier_is_asked_for(kind):
    with pytest.raises(sw.CheckpointError, match=r"All of it fits with adapt=\('classes',\)\.$"):
        sw.load(our_model(kind), base_model(kind).state_dict(), names="huggingface")
    with pytest.raises(
        sw.CheckpointError, match=r"All of it fits with names='huggingface' and adapt=\('classes',\)\.$"
    ):
        sw.load(our_model(kind), base_model(kind).state_dict())


def test_a_published_folder_at_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    library = peer("transformers", import_transformers)
    width = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 768}
    theirs = library.ViTModel(library.ViTConfig(**width, image_size=16, patch_size=16, num_channels=1))
    theirs.save_pretrained("published")
    given = ["train", "--model", "vit-tiny-16", "--depth", "2", "--size", "16", *TRAIN[6:], "--start", "published"]
    assert main([*given, "--weights-names", "huggingface", "--out", "run"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "newly initialised: head.classifier.weight, head.classifier.bias; left out: pooler.dense" in text
