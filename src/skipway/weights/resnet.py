"""Key maps of torchvision, timm and Hugging Face for ResNets and for a single block."""

from __future__ import annotations

from dataclasses import replace

from skipway.models.resnet import Block, ResNet
from skipway.weights.keymap import KeyMap, KeyRule, module_rule, with_base_names
from skipway.weights.stored_config import stated_differences
from skipway.weights.tables import register_config, register_keymap, register_misfit

__all__: list[str] = []

BRANCH = (("branch.conv{k}", "conv{k}"), ("branch.norm{k}", "bn{k}"))
PROJECTION = (
    ("shortcut.map.conv", "downsample.0"),
    ("shortcut.map.norm", "downsample.1"),
    # a downsample that the user gave to the constructor
    ("shortcut.map", "downsample"),
)
# timm counts the pooling, also where there is nothing to pool
POOLED = (("shortcut.map.conv", "downsample.1"), ("shortcut.map.norm", "downsample.2"))
GATE = (("branch.gate.squeeze", "se.fc1"), ("branch.gate.excite", "se.fc2"))
# timm numbers norms in order, so the one before the branch comes first
PREACTIVATION = (
    ("pre.norm", "norm1"),
    ("branch.conv{k}", "conv{k}"),
    ("branch.norm{k}", "norm{k+1}"),
    ("shortcut.map.conv", "downsample.conv"),
)
HUGGINGFACE = (
    ("branch.conv{k+1}", "layer.{k}.convolution"),
    ("branch.norm{k+1}", "layer.{k}.normalization"),
    ("shortcut.map.conv", "shortcut.convolution"),
    ("shortcut.map.norm", "shortcut.normalization"),
)

OUTSIDE = (("stem.conv", "conv1"), ("stem.norm", "bn1"), ("head.classifier", "fc"))
DEEP_STEM = (
    ("stem.conv1", "conv1.0"),
    ("stem.norm1", "conv1.1"),
    ("stem.conv2", "conv1.3"),
    ("stem.norm2", "conv1.4"),
    ("stem.conv3", "conv1.6"),
    ("stem.norm3", "bn1"),
)
OUTSIDE_V2 = (("stem", "stem"), ("head.norm", "norm"), ("head.classifier", "head.fc"))
OUTSIDE_HUGGINGFACE = (
    ("stem.conv", "resnet.embedder.embedder.convolution"),
    ("stem.norm", "resnet.embedder.embedder.normalization"),
    ("head.classifier", "classifier.1"),
)

Names = tuple[tuple[str, str], ...]


def resnet_rules(names: Names, ours: str = "", theirs: str = "") -> tuple[KeyRule, ...]:
    """One row for each pair of module names, prefixed by `ours` and `theirs`."""
    return tuple(module_rule(ours + a, theirs + b) for a, b in names)


def resnet_keymap(library: str, outside: Names, block: Names, where: str = "layer{i+1}.{j}.") -> KeyMap:
    """The table of a network: what is outside the chain, and its blocks, which stand at `where`."""
    return KeyMap(library, (*resnet_rules(outside), *resnet_rules(block, "stages.{i}.{j}.", where)))


def has_pooled_shortcut(block: Block) -> bool:
    """True if the shortcut of a block is a pooled projection."""
    return hasattr(getattr(block.shortcut, "map", None), "pool")


register_keymap(Block, KeyMap("torchvision", resnet_rules((*BRANCH, *PROJECTION))))
register_keymap(Block, KeyMap("timm", resnet_rules((*BRANCH, *PROJECTION, *GATE))))
register_keymap(Block, KeyMap("timm", resnet_rules((*BRANCH, *POOLED, *GATE))), when=has_pooled_shortcut)
register_keymap(ResNet, resnet_keymap("torchvision", OUTSIDE, (*BRANCH, *PROJECTION)))
register_keymap(ResNet, resnet_keymap("timm", (*OUTSIDE, *DEEP_STEM), (*BRANCH, *PROJECTION, *GATE)))
register_keymap(
    ResNet,
    resnet_keymap("timm", (*OUTSIDE, *DEEP_STEM), (*BRANCH, *POOLED, *GATE)),
    when=lambda model: model.config.shortcut == "pooled",
)
register_keymap(
    ResNet,
    resnet_keymap("timm", OUTSIDE_V2, PREACTIVATION, "stages.{i}.blocks.{j}."),
    when=lambda model: model.config.placement == "preactivation",
)
FROM_HUGGINGFACE = resnet_keymap(
    "huggingface", OUTSIDE_HUGGINGFACE, HUGGINGFACE, "resnet.encoder.stages.{i}.layers.{j}."
)
register_keymap(ResNet, replace(FROM_HUGGINGFACE, rules=with_base_names("resnet", FROM_HUGGINGFACE.rules)))
POOLS = "shortcut='pooled'; its ResNet projects with a stride; timm has a pooled projection"
for library in ("torchvision", "huggingface"):
    register_misfit(ResNet, library, lambda model: POOLS if model.config.shortcut == "pooled" else None)
    register_misfit(Block, library, lambda block: POOLS if has_pooled_shortcut(block) else None)
# the stride of a bottleneck stands on its 3 × 3, and the first stage keeps the size of the map
FIXED = {"act": "relu", "downsample_in_bottleneck": False, "downsample_in_first_stage": False}
STATED = {name: name for name in FIXED} | {"act": "hidden_act"}
register_config(ResNet, "huggingface", lambda model, described: stated_differences(FIXED, described, STATED, {}))
