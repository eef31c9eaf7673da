"""Families of residual networks: one frozen config, one module and one table of cited variants each."""

from skipway.models import cait, convnext, gpt, resnet, swin, vit
from skipway.models.cait import CaiT, CaiTConfig
from skipway.models.convnext import ConvNeXt, ConvNeXtConfig
from skipway.models.family import Family, Variant, build, families, find_config, variants
from skipway.models.gpt import GPT, GPTConfig
from skipway.models.resnet import BasicBlock, Bottleneck, ResNet, ResNetConfig, projection
from skipway.models.swin import Swin, SwinConfig
from skipway.models.vit import ViT, ViTConfig

__all__ = [
    "GPT",
    "BasicBlock",
    "Bottleneck",
    "CaiT",
    "CaiTConfig",
    "ConvNeXt",
    "ConvNeXtConfig",
    "Family",
    "GPTConfig",
    "ResNet",
    "ResNetConfig",
    "Swin",
    "SwinConfig",
    "Variant",
    "ViT",
    "ViTConfig",
    "build",
    "cait",
    "convnext",
    "families",
    "find_config",
    "gpt",
    "projection",
    "resnet",
    "swin",
    "variants",
    "vit",
]
