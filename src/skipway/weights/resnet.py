"""What torchvision, timm and Hugging Face call the parameters of the ResNets, and of a block alone."""

from __future__ import annotations

from skipway.models.resnet import Block, ResNet
from skipway.weights.keymap import KeyMap, Rule, rule
from skipway.weights.tables import register

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
# timm counts norms in order, and so the one in front of the branch first
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


def rows(names: Names, ours: str = "", theirs: str = "") -> tuple[Rule, ...]:
    """A row for each pair of module names, `ours` and `theirs` in front of them."""
    return tuple(rule(ours + a, theirs + b) for a, b in names)


def network(library: str, outside: Names, block: Names, where: str = "layer{i+1}.{j}.") -> KeyMap:
    """The table of a network: what is outside the chain, and its blocks, which stand at `where`."""
    return KeyMap(library, (*rows(outside), *rows(block, "stages.{i}.{j}.", where)))


def pooled(block: Block) -> bool:
    """Whether a block's shortcut is a pooled projection of ours."""
    return hasattr(getattr(block.shortcut, "map", None), "pool")


register(Block, KeyMap("torchvision", rows((*BRANCH, *PROJECTION))))
register(Block, KeyMap("timm", rows((*BRANCH, *PROJECTION, *GATE))))
register(Block, KeyMap("timm", rows((*BRANCH, *POOLED, *GATE))), when=pooled)
register(ResNet, network("torchvision", OUTSIDE, (*BRANCH, *PROJECTION)))
register(ResNet, network("timm", (*OUTSIDE, *DEEP_STEM), (*BRANCH, *PROJECTION, *GATE)))
register(
    ResNet,
    network("timm", (*OUTSIDE, *DEEP_STEM), (*BRANCH, *POOLED, *GATE)),
    when=lambda model: model.config.shortcut == "pooled",
)
register(
    ResNet,
    network("timm", OUTSIDE_V2, PREACTIVATION, "stages.{i}.blocks.{j}."),
    when=lambda model: model.config.placement == "preactivation",
)
register(ResNet, network("huggingface", OUTSIDE_HUGGINGFACE, HUGGINGFACE, "resnet.encoder.stages.{i}.layers.{j}."))
