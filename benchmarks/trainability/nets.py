"""Networks as third parties write them: plain torch, no skipway, with the usual habits (in-place activations,
`x += shortcut`, functional activations, whatever start the layers come with).

All take grey images (N, 1, 8, 8) and give logits (N, 10). `depth` counts the weight layers between stem and head, two
to a residual connection; tiny widths, so that a training step of a deep one costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "MLP",
    "VGG",
    "ConvNeXtLike",
    "Encoder",
    "Mixer",
    "NormResNet",
    "ResidualConvNet",
    "ResidualMLP",
    "SkiplessTransformer",
]

CLASSES = 10
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: F.relu(x, inplace=True),
    "tanh": torch.tanh,
    "gelu": F.gelu,
}


def split_evenly(count: int, stages: int = 3) -> list[int]:
    """`count` layers over at most `stages` stages, the surplus in the first ones.

    >>> split_evenly(8), split_evenly(2)
    ([3, 3, 2], [1, 1])
    """
    stages = min(stages, count)
    return [count // stages + (stage < count % stages) for stage in range(stages)]


def start_(model: nn.Module, start: str) -> None:
    """ "default" leaves torch's U(±1/√fan_in), a gain of 1/√3; "he" is He et al. 2015's for ReLU, "xavier" Glorot's."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and start != "default":
            if start == "he":
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            else:
                nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class MLP(nn.Module):
    """Fully connected, no skips: x = act(W x + b).

    Args:
        depth: hidden layers.
        act: "relu", "tanh" or "gelu".
        start: see `start_`.
        norm: "none", or "post", a LayerNorm before every activation.
    """

    def __init__(self, depth: int, act: str, start: str = "default", norm: str = "none", width: int = 64) -> None:
        super().__init__()
        self.act = IN_PLACE[act]
        self.input = nn.Linear(64, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) if norm == "post" else nn.Identity() for _ in range(depth)])
        self.output = nn.Linear(width, CLASSES)
        start_(self, start)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.input(x.flatten(1)))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.act(norm(layer(x)))
        return self.output(x)


class ResidualMLP(nn.Module):
    """x = x + W₂ act(W₁ x), a LayerNorm before the branch ("pre"), after the addition ("post"), or "none".

    Args:
        depth: weight layers, two to a connection.
        act: "relu", "tanh" or "gelu".
        norm: "none", "pre" or "post".
    """

    def __init__(self, depth: int, act: str, norm: str, width: int = 64) -> None:
        super().__init__()
        self.norm, self.act = norm, IN_PLACE[act]
        self.embed = nn.Linear(64, width)
        self.first = nn.ModuleList([nn.Linear(width, width) for _ in range(depth // 2)])
        self.second = nn.ModuleList([nn.Linear(width, width) for _ in range(depth // 2)])
        self.norms = nn.ModuleList(
            [nn.Identity() if norm == "none" else nn.LayerNorm(width) for _ in range(depth // 2)]
        )
        self.final = nn.LayerNorm(width) if norm == "pre" else nn.Identity()
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))
        for first, second, norm in zip(self.first, self.second, self.norms, strict=True):
            shortcut = x
            x = second(self.act(first(norm(x) if self.norm == "pre" else x)))
            x += shortcut
            if self.norm == "post":
                x = norm(x)
        return self.head(self.final(x))


class VGG(nn.Sequential):
    """Simonyan & Zisserman 2015: 3×3 convolutions, max-pools between three stages, no skips; BatchNorm as torchvision's
    `vgg_bn`.

    Args:
        depth: convolutions.
        act: "relu", "tanh" or "gelu".
        start: see `start_`.
        batch_norm: between convolution and activation.
    """

    def __init__(self, depth: int, act: str, start: str, batch_norm: bool, width: int = 8) -> None:
        acts = {"relu": lambda: nn.ReLU(inplace=True), "tanh": nn.Tanh, "gelu": nn.GELU}
        layers: list[nn.Module] = []
        channels = 1
        for stage, count in enumerate(split_evenly(depth)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers.append(nn.Conv2d(channels, width * 2**stage, 3, padding=1))
                channels = width * 2**stage
                if batch_norm:
                    layers.append(nn.BatchNorm2d(channels))
                layers.append(acts[act]())
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
        super().__init__(*layers)
        start_(self, start)


class ScaledBlock(nn.Module):
    """out = relu(shortcut(x) + s · conv(relu(conv(x)))), s a constant."""

    def __init__(self, inplanes: int, planes: int, stride: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1)
        self.shortcut = nn.Conv2d(inplanes, planes, 1, stride) if stride > 1 or inplanes != planes else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.conv1(x), inplace=True)) * self.scale
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu(out, inplace=True)


class ResidualConvNet(nn.Module):
    """Residual convolutions without normalisation, every branch times a constant, He's start.

    Args:
        depth: weight layers, two to a connection.
        scale: of every branch.
    """

    def __init__(self, depth: int, scale: float, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        blocks, channels = [], width
        for stage, count in enumerate(split_evenly(depth // 2)):
            for number in range(count):
                planes = width * 2**stage
                blocks.append(ScaledBlock(channels, planes, 2 if stage and not number else 1, scale))
                channels = planes
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, CLASSES)
        start_(self, "he")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x), inplace=True))
        return self.fc(x.mean((2, 3)))


class PostActivationBlock(nn.Module):
    """He et al. 2015: out = relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class PreActivationBlock(nn.Module):
    """He et al. 2016: out = shortcut(h) + conv(relu(bn(conv(h)))), h = relu(bn(x))."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride > 1 or inplanes != planes:
            self.shortcut = nn.Conv2d(inplanes, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(h)
        out = self.conv2(F.relu(self.bn2(self.conv1(h)), inplace=True))
        out += shortcut
        return out


class NormResNet(nn.Module):
    """The CIFAR ResNet with BatchNorm as everybody writes it.

    Args:
        depth: weight layers, two to a connection.
        placement: "post" (v1) or "pre" (v2).
        start: see `start_`.
    """

    def __init__(self, depth: int, placement: str, start: str, width: int = 8) -> None:
        super().__init__()
        block = PostActivationBlock if placement == "post" else PreActivationBlock
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width) if placement == "post" else nn.Identity()
        layers, channels = [], width
        for stage, count in enumerate(split_evenly(depth // 2)):
            blocks = []
            for number in range(count):
                blocks.append(block(channels, width * 2**stage, 2 if stage and not number else 1))
                channels = width * 2**stage
            layers.append(nn.Sequential(*blocks))
        self.layers = nn.Sequential(*layers)
        self.last = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(True)) if placement == "pre" else nn.Identity()
        self.linear = nn.Linear(channels, CLASSES)
        self.placement = placement
        start_(self, start)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        if self.placement == "post":
            x = F.relu(x, inplace=True)
        x = self.last(self.layers(x))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.linear(torch.flatten(x, 1))


class Patches(nn.Module):
    """2×2 patches through one map, a learned position added: (N, 1, 8, 8) → (N, 16, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, dim, 2, 2)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, dim) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2) + self.pos_embed


class Encoder(nn.Module):
    """`nn.TransformerEncoder` over patches. Like all of its users we get copies of one layer: all layers start equal.

    Args:
        depth: weight layers, four to an encoder layer (two connections).
        placement: "pre" (norm_first) or "post".
        act: "relu" or "gelu".
    """

    def __init__(self, depth: int, placement: str, act: str, dim: int = 32) -> None:
        super().__init__()
        first = placement == "pre"
        self.patches = Patches(dim)
        layer = nn.TransformerEncoderLayer(
            dim, 2, 2 * dim, dropout=0.0, activation=act, batch_first=True, norm_first=first
        )
        norm = nn.LayerNorm(dim) if first else None
        self.encoder = nn.TransformerEncoder(layer, depth // 4, norm=norm, enable_nested_tensor=False)
        self.fc = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(self.patches(x)).mean(dim=1))


class SkiplessLayer(nn.Module):
    """x = attention(norm(x)), x = mlp(norm(x)): nothing is added."""

    def __init__(self, dim: int, norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim) if norm else nn.Identity()
        self.attn = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(dim) if norm else nn.Identity()
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        x, _ = self.attn(x, x, x, need_weights=False)
        return self.fc2(F.gelu(self.fc1(self.norm2(x))))


class SkiplessTransformer(nn.Module):
    """A transformer whose skips were forgotten (Dong et al. 2021: the rank collapses doubly exponentially).

    Args:
        depth: weight layers, four to a layer.
        placement: "pre", a LayerNorm before attention and MLP, or "none".
        start: see `start_`.
    """

    def __init__(self, depth: int, placement: str, start: str, dim: int = 32) -> None:
        super().__init__()
        self.patches = Patches(dim)
        self.layers = nn.Sequential(*(SkiplessLayer(dim, placement == "pre") for _ in range(depth // 4)))
        self.head = nn.Linear(dim, CLASSES)
        start_(self, start)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x)).mean(1))


class ConvNeXtLikeBlock(nn.Module):
    """Liu et al. 2022: x + γ · W₂ gelu(W₁ norm(depthwise(x))), channels last between the maps."""

    def __init__(self, dim: int, gamma: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(gamma * torch.ones(dim)) if gamma > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(F.gelu(self.pwconv1(self.norm(x))))
        if self.gamma is not None:
            x = self.gamma * x
        return shortcut + x.permute(0, 3, 1, 2)


class ConvNeXtLike(nn.Module):
    """One isotropic stage of ConvNeXt blocks on 4×4 patches of 2×2 pixels.

    Args:
        depth: two to a block (its two wide maps; the depthwise one is not counted).
        gamma: start of the layer scale; 0 for none.
    """

    def __init__(self, depth: int, gamma: float, dim: int = 16) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(1, dim, 2, 2)
        self.blocks = nn.Sequential(*(ConvNeXtLikeBlock(dim, gamma) for _ in range(depth // 2)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, CLASSES)
        self.apply(self._init_weights)

    def _init_weights(self, m: nn.Module) -> None:
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.downsample(x)).mean([-2, -1])))


class MixerBlock(nn.Module):
    """Tolstikhin et al. 2021: an MLP over tokens, then one over channels; norm before the branch or after the sum."""

    def __init__(self, dim: int, tokens: int, placement: str) -> None:
        super().__init__()
        self.placement = placement
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp_tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.mlp_channels = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.placement == "pre":
            x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.mlp_channels(self.norm2(x))
        x = self.norm1(x + self.mlp_tokens(x.transpose(1, 2)).transpose(1, 2))
        return self.norm2(x + self.mlp_channels(x))


class Mixer(nn.Module):
    """MLP-Mixer over 2×2 patches.

    Args:
        depth: weight layers, four to a block (two connections).
        placement: "pre" or "post".
    """

    def __init__(self, depth: int, placement: str, dim: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, dim, 2, 2)
        self.blocks = nn.Sequential(*(MixerBlock(dim, 16, placement) for _ in range(depth // 4)))
        self.norm = nn.LayerNorm(dim) if placement == "pre" else nn.Identity()
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))
