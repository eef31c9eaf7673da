"""Key maps of torchvision, timm and Hugging Face for ConvNeXt.

timm's sizes whose MLP is made of 1 × 1 convolutions differ from ours in axes of length 1 only. The norm of Hugging
Face's head has ε = 1e-12 unless its config says otherwise; ours is the authors', 1e-6.
"""

from __future__ import annotations

from skipway.models.convnext import ConvNeXt
from skipway.weights.keymap import KeyMap, KeyRule, module_rule, with_base_names
from skipway.weights.stored_config import stated_differences
from skipway.weights.tables import register_config, register_keymap

__all__: list[str] = []

STAGES = 4
BLOCK = "stages.{i}.blocks.{j}"

TIMM = (
    module_rule("stem.conv", "stem.0"),
    module_rule("stem.post.norm", "stem.1"),
    module_rule("stages.{i}.downsample.norm", "stages.{i}.downsample.0"),
    module_rule("stages.{i}.downsample.conv", "stages.{i}.downsample.1"),
    module_rule(f"{BLOCK}.branch.conv", f"{BLOCK}.conv_dw"),
    module_rule(f"{BLOCK}.branch.inside.norm", f"{BLOCK}.norm"),
    module_rule(f"{BLOCK}.branch.fc{{k}}", f"{BLOCK}.mlp.fc{{k}}"),
    KeyRule(f"{BLOCK}.branch.response.gain", f"{BLOCK}.mlp.grn.weight"),
    KeyRule(f"{BLOCK}.branch.response.bias", f"{BLOCK}.mlp.grn.bias"),
    KeyRule(f"{BLOCK}.scale.gain", f"{BLOCK}.gamma"),
    module_rule("head.norm", "head.norm"),
    module_rule("head.classifier", "head.fc"),
)


def convnext_torchvision_rules(stage: int) -> tuple[KeyRule, ...]:
    """The rows of one stage: there the layers between stages are counted with the stages."""
    ours, theirs = f"stages.{stage}.blocks.{{j}}", f"features.{2 * stage + 1}.{{j}}"
    return (
        module_rule(f"stages.{stage}.downsample.norm", f"features.{2 * stage}.0"),
        module_rule(f"stages.{stage}.downsample.conv", f"features.{2 * stage}.1"),
        module_rule(f"{ours}.branch.conv", f"{theirs}.block.0"),
        module_rule(f"{ours}.branch.inside.norm", f"{theirs}.block.2"),
        module_rule(f"{ours}.branch.fc1", f"{theirs}.block.3"),
        module_rule(f"{ours}.branch.fc2", f"{theirs}.block.5"),
        KeyRule(f"{ours}.scale.gain", f"{theirs}.layer_scale"),
    )


TORCHVISION = (
    module_rule("stem.conv", "features.0.0"),
    module_rule("stem.post.norm", "features.0.1"),
    *(row for stage in range(STAGES) for row in convnext_torchvision_rules(stage)),
    module_rule("head.norm", "classifier.0"),
    module_rule("head.classifier", "classifier.2"),
)


def convnext_huggingface_rules(root: str) -> tuple[KeyRule, ...]:
    """The rows of one model class; its names in memory (transformers 5) are those in its files."""
    stage = f"{root}.encoder.stages.{{i}}"
    layer = f"{stage}.layers.{{j}}"
    return (
        module_rule("stem.conv", f"{root}.embeddings.patch_embeddings"),
        module_rule("stem.post.norm", f"{root}.embeddings.layernorm"),
        module_rule("stages.{i}.downsample.norm", f"{stage}.downsampling_layer.0"),
        module_rule("stages.{i}.downsample.conv", f"{stage}.downsampling_layer.1"),
        module_rule(f"{BLOCK}.branch.conv", f"{layer}.dwconv"),
        module_rule(f"{BLOCK}.branch.inside.norm", f"{layer}.layernorm"),
        module_rule(f"{BLOCK}.branch.fc{{k}}", f"{layer}.pwconv{{k}}"),
        KeyRule(f"{BLOCK}.branch.response.gain", f"{layer}.grn.weight"),
        KeyRule(f"{BLOCK}.branch.response.bias", f"{layer}.grn.bias"),
        KeyRule(f"{BLOCK}.scale.gain", f"{layer}.layer_scale_parameter"),
        module_rule("head.norm", f"{root}.layernorm"),
        module_rule("head.classifier", "classifier"),
    )


register_keymap(ConvNeXt, KeyMap("timm", TIMM))
register_keymap(ConvNeXt, KeyMap("torchvision", TORCHVISION))
register_keymap(
    ConvNeXt,
    KeyMap("huggingface", with_base_names("convnext", convnext_huggingface_rules("convnext"))),
    when=lambda model: not model.config.response,
)
register_keymap(
    ConvNeXt,
    KeyMap("huggingface", with_base_names("convnextv2", convnext_huggingface_rules("convnextv2"))),
    when=lambda model: model.config.response,
)
register_config(
    ConvNeXt,
    "huggingface",
    lambda model, described: stated_differences({"act": "gelu"}, described, {"act": "hidden_act"}, {}),
)
