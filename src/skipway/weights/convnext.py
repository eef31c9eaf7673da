"""What torchvision, timm and Hugging Face call the parameters of a ConvNeXt.

timm's sizes whose MLP is made of 1 × 1 convolutions differ from ours in axes of length 1 only. The norm of Hugging
Face's head has ε = 1e-12 unless its config says otherwise; ours is the authors', 1e-6.
"""

from __future__ import annotations

from skipway.models.convnext import ConvNeXt
from skipway.weights.keymap import KeyMap, Rule, rule
from skipway.weights.tables import register

__all__: list[str] = []

STAGES = 4
BLOCK = "stages.{i}.blocks.{j}"

TIMM = (
    rule("stem.conv", "stem.0"),
    rule("stem.post.norm", "stem.1"),
    rule("stages.{i}.downsample.norm", "stages.{i}.downsample.0"),
    rule("stages.{i}.downsample.conv", "stages.{i}.downsample.1"),
    rule(f"{BLOCK}.branch.conv", f"{BLOCK}.conv_dw"),
    rule(f"{BLOCK}.branch.inside.norm", f"{BLOCK}.norm"),
    rule(f"{BLOCK}.branch.fc{{k}}", f"{BLOCK}.mlp.fc{{k}}"),
    Rule(f"{BLOCK}.branch.response.gain", f"{BLOCK}.mlp.grn.weight"),
    Rule(f"{BLOCK}.branch.response.bias", f"{BLOCK}.mlp.grn.bias"),
    Rule(f"{BLOCK}.scale.gain", f"{BLOCK}.gamma"),
    rule("head.norm", "head.norm"),
    rule("head.classifier", "head.fc"),
)


def torchvision(stage: int) -> tuple[Rule, ...]:
    """The rows of one stage: there the layers between stages are counted with the stages."""
    ours, theirs = f"stages.{stage}.blocks.{{j}}", f"features.{2 * stage + 1}.{{j}}"
    return (
        rule(f"stages.{stage}.downsample.norm", f"features.{2 * stage}.0"),
        rule(f"stages.{stage}.downsample.conv", f"features.{2 * stage}.1"),
        rule(f"{ours}.branch.conv", f"{theirs}.block.0"),
        rule(f"{ours}.branch.inside.norm", f"{theirs}.block.2"),
        rule(f"{ours}.branch.fc1", f"{theirs}.block.3"),
        rule(f"{ours}.branch.fc2", f"{theirs}.block.5"),
        Rule(f"{ours}.scale.gain", f"{theirs}.layer_scale"),
    )


TORCHVISION = (
    rule("stem.conv", "features.0.0"),
    rule("stem.post.norm", "features.0.1"),
    *(row for stage in range(STAGES) for row in torchvision(stage)),
    rule("head.norm", "classifier.0"),
    rule("head.classifier", "classifier.2"),
)


def huggingface(root: str) -> tuple[Rule, ...]:
    """The rows of one model class; its names in memory (transformers 5) are those in its files."""
    stage = f"{root}.encoder.stages.{{i}}"
    layer = f"{stage}.layers.{{j}}"
    return (
        rule("stem.conv", f"{root}.embeddings.patch_embeddings"),
        rule("stem.post.norm", f"{root}.embeddings.layernorm"),
        rule("stages.{i}.downsample.norm", f"{stage}.downsampling_layer.0"),
        rule("stages.{i}.downsample.conv", f"{stage}.downsampling_layer.1"),
        rule(f"{BLOCK}.branch.conv", f"{layer}.dwconv"),
        rule(f"{BLOCK}.branch.inside.norm", f"{layer}.layernorm"),
        rule(f"{BLOCK}.branch.fc{{k}}", f"{layer}.pwconv{{k}}"),
        Rule(f"{BLOCK}.branch.response.gain", f"{layer}.grn.weight"),
        Rule(f"{BLOCK}.branch.response.bias", f"{layer}.grn.bias"),
        Rule(f"{BLOCK}.scale.gain", f"{layer}.layer_scale_parameter"),
        rule("head.norm", f"{root}.layernorm"),
        rule("head.classifier", "classifier"),
    )


register(ConvNeXt, KeyMap("timm", TIMM))
register(ConvNeXt, KeyMap("torchvision", TORCHVISION))
register(ConvNeXt, KeyMap("huggingface", huggingface("convnext")), when=lambda model: not model.config.response)
register(ConvNeXt, KeyMap("huggingface", huggingface("convnextv2")), when=lambda model: model.config.response)
