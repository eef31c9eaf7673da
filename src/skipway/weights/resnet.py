"""What torchvision calls the parameters of the ResNets and of a block alone (timm uses the same names for v1)."""

from __future__ import annotations

from skipway.models.resnet import Block, ResNet
from skipway.weights.keymap import KeyMap, rule
from skipway.weights.tables import register

__all__: list[str] = []

BLOCK = (
    ("branch.conv{k}", "conv{k}"),
    ("branch.norm{k}", "bn{k}"),
    ("shortcut.map.conv", "downsample.0"),
    ("shortcut.map.norm", "downsample.1"),
    # a downsample that the user gave to the constructor
    ("shortcut.map", "downsample"),
)

register(Block, KeyMap("torchvision", tuple(rule(ours, theirs) for ours, theirs in BLOCK)))
register(
    ResNet,
    KeyMap(
        "torchvision",
        (
            rule("stem.conv", "conv1"),
            rule("stem.norm", "bn1"),
            *(rule(f"stages.{{i}}.{{j}}.{ours}", f"layer{{i+1}}.{{j}}.{theirs}") for ours, theirs in BLOCK),
            rule("head.classifier", "fc"),
        ),
    ),
)
