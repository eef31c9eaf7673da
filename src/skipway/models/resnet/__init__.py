"""The ResNet family: v1, v2, ResNeXt, Wide, squeeze-and-excitation, ImageNet and CIFAR, one network and one config."""

from skipway.models.resnet import variants
from skipway.models.resnet.blocks import CONV_KIT, BasicBlock, Block, Bottleneck, pooled_projection, projection
from skipway.models.resnet.config import ResNetConfig
from skipway.models.resnet.network import ResNet

__all__ = [
    "CONV_KIT",
    "BasicBlock",
    "Block",
    "Bottleneck",
    "ResNet",
    "ResNetConfig",
    "pooled_projection",
    "projection",
    "variants",
]
