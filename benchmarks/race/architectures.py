"""The same architecture in every library: ours by name or as a chain of any length, theirs by our config."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import nn

from skipway.errors import SkipwayError
from skipway.models import ConvNeXtConfig, ResNetConfig, SwinConfig, ViTConfig, families, find_config
from skipway.models.family import build, resolve
from skipway.zoo import import_library

__all__ = ["CHAINS", "LIBRARIES", "PEERS", "AbsentError", "aliases", "config_of", "make_model", "missing_libraries"]

CLASSES = 10


class AbsentError(SkipwayError):
    """A library does not have a network."""


def vit_chain(branches: int) -> ViTConfig:
    """A narrow ViT of that many branches, two in each block."""
    return ViTConfig(dim=32, blocks=max(1, branches // 2), heads=2, patch=8, image=32, classes=CLASSES)


def resnet_chain(branches: int) -> ResNetConfig:
    """A narrow ResNet for images of 32 pixels, its branches shared out over the three stages."""
    blocks = tuple((branches + place) // 3 for place in range(3))
    return replace(find_config("resnet20")[1], blocks=blocks, width=8, stem_width=8, classes=CLASSES)


CHAINS: dict[str, Callable[[int], Any]] = {"vit": vit_chain, "resnet": resnet_chain}
"""Families that are built at any number of branches: `vit@1000`."""


def config_of(network: str, size: int) -> Any:
    """The config of a network: a name of ours, timm's or torchvision's, or FAMILY@BRANCHES.

    Args:
        network: "resnet50", "vit_small_patch16_224", "vit@1000".
        size: side of the images, in pixels.

    Raises:
        SkipwayError: no such network, or not at that size.

    >>> config_of("vit@1000", 32).branches, config_of("resnet50", 224).branches, config_of("resnet@8", 32).blocks
    (1000, 16, (2, 3, 3))
    """
    chain = re.fullmatch(r"(?P<family>[^@]+)@(?P<branches>\d+)", network)
    if chain is None:
        _, config = find_config(network)
    elif chain["family"] not in CHAINS or int(chain["branches"]) < 3:
        raise SkipwayError(
            f"{network}: the rule is FAMILY@BRANCHES with FAMILY one of {', '.join(CHAINS)} and at least 3 branches"
        )
    else:
        config = CHAINS[chain["family"]](int(chain["branches"]))
    known = {field.name for field in fields(config)}
    return replace(config, image=size) if "image" in known and config.image != size else config


@cache
def aliases(network: str) -> tuple[str, ...]:
    """Entry points of other libraries that make the same network.

    >>> aliases("vit-small-16")
    ('vit_small_patch16_224', 'deit_small_patch16_224')
    """
    if "@" in network:
        return ()
    config = find_config(network)[1]
    return tuple(alias for family in families() for alias in family.aliases if find_config(alias)[1] == config)


def make_model(library: str, network: str, size: int) -> nn.Module:
    """A network as a library makes it, with fresh weights and without stochastic depth.

    Args:
        library: one of `LIBRARIES`.
        network: see `config_of`.
        size: side of the images, in pixels.

    Raises:
        AbsentError: the library does not have this network.
        SkipwayError: the library is not installed, or no such network.

    >>> type(make_model("skipway", "vit@8", 32)).__name__
    'ViT'
    """
    return LIBRARIES[library](network, size, config_of(network, size))


def missing_libraries() -> tuple[str, ...]:
    """The peers that are not installed."""
    return tuple(name for name in PEERS if find_spec(name) is None)


def make_ours(network: str, size: int, config: Any) -> nn.Module:
    if "@" not in network:
        name, own = resolve(network, {})
        known = {field.name for field in fields(config)}
        options: dict[str, Any] = {**own, "image": size} if "image" in known else own
        return build(name, **options)
    family = "vit" if isinstance(config, ViTConfig) else "resnet-cifar"
    own = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    return build("vit-tiny-16" if family == "vit" else "resnet20", **own)


def make_timm(network: str, size: int, config: Any) -> nn.Module:
    library = import_library("timm", network)
    if isinstance(config, ViTConfig) and "@" in network:
        return library.models.VisionTransformer(
            img_size=size,
            patch_size=config.patch,
            embed_dim=config.dim,
            depth=config.blocks,
            num_heads=config.heads,
            mlp_ratio=config.ratio,
            num_classes=config.classes,
        )
    name = entry_point("timm", network, library.is_model)
    sized = isinstance(config, ViTConfig | SwinConfig) and size != library.get_pretrained_cfg(name).input_size[-1]
    return library.create_model(name, **({"img_size": size} if sized else {}))


def make_torchvision(network: str, size: int, config: Any) -> nn.Module:
    models = import_library("torchvision", network).models
    if isinstance(config, ViTConfig):
        return models.VisionTransformer(
            image_size=size,
            patch_size=config.patch,
            num_layers=config.blocks,
            num_heads=config.heads,
            hidden_dim=config.dim,
            mlp_dim=int(config.dim * config.ratio),
            num_classes=config.classes,
        )
    model = models.get_model(entry_point("torchvision", network, models.list_models().__contains__), weights=None)
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return model


def entry_point(library: str, network: str, has: Callable[[str], bool]) -> str:
    """The library's own name of a network."""
    for name in aliases(network):
        if has(name):
            return name
    raise AbsentError(f"{library} has no {network}")


def make_transformers(network: str, size: int, config: Any) -> nn.Module:
    library = import_library("transformers", network)
    for kind, translate in HUGGING_FACE.items():
        if isinstance(config, kind):
            name, options = translate(config)
            own = getattr(library, f"{name}Config")(num_labels=config.classes, image_size=size, **options)
            return getattr(library, f"{name}ForImageClassification")(own)
    raise AbsentError(f"transformers has no {network}")


def hugging_face_vit(config: ViTConfig) -> tuple[str, dict[str, Any]]:
    return "ViT", {
        "hidden_size": config.dim,
        "num_hidden_layers": config.blocks,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.dim * config.ratio),
        "patch_size": config.patch,
    }


def hugging_face_resnet(config: ResNetConfig) -> tuple[str, dict[str, Any]]:
    if config.stem != "imagenet" or config.groups != 1 or config.squeeze or config.placement != "original":
        raise AbsentError("transformers has ResNets with the stem of ImageNet alone")
    widening = 4 if config.block == "bottleneck" else 1
    widths = [config.width * 2**stage * widening for stage in range(len(config.blocks))]
    return "ResNet", {
        "depths": list(config.blocks),
        "hidden_sizes": widths,
        "embedding_size": config.stem_width,
        "layer_type": config.block,
    }


def hugging_face_convnext(config: ConvNeXtConfig) -> tuple[str, dict[str, Any]]:
    widths = [config.width * 2**stage for stage in range(len(config.blocks))]
    return "ConvNextV2" if config.response else "ConvNext", {"depths": list(config.blocks), "hidden_sizes": widths}


def hugging_face_swin(config: SwinConfig) -> tuple[str, dict[str, Any]]:
    if config.attention != "dot":
        raise AbsentError("transformers has Swin V2 with other position tables")
    heads = [config.heads * 2**stage for stage in range(len(config.blocks))]
    options = {"embed_dim": config.dim, "depths": list(config.blocks), "num_heads": heads, "drop_path_rate": 0.0}
    return "Swin", {**options, "window_size": config.window}


HUGGING_FACE: dict[type, Callable[[Any], tuple[str, dict[str, Any]]]] = {
    ViTConfig: hugging_face_vit,
    ResNetConfig: hugging_face_resnet,
    ConvNeXtConfig: hugging_face_convnext,
    SwinConfig: hugging_face_swin,
}
LIBRARIES: dict[str, Callable[[str, int, Any], nn.Module]] = {
    "skipway": make_ours,
    "timm": make_timm,
    "torchvision": make_torchvision,
    "transformers": make_transformers,
}
"""Who makes networks; each entry takes a network's name, the side of its images and our config of it."""
PEERS = tuple(name for name in LIBRARIES if name != "skipway")
