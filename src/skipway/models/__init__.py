"""Families of residual networks: one frozen config, one module and one table of cited variants each."""

from skipway.models import resnet, vit
from skipway.models.family import Family, Variant, build, families, find_config, variants
from skipway.models.resnet import BasicBlock, Bottleneck, ResNet, ResNetConfig, projection
from skipway.models.vit import ViT, ViTConfig

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "Family",
    "ResNet",
    "ResNetConfig",
    "Variant",
    "ViT",
    "ViTConfig",
    "build",
    "families",
    "find_config",
    "projection",
    "resnet",
    "variants",
    "vit",
]
