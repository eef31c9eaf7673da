"""Other networks of the benchmark: language models of ours, of torch and of transformers, timm's smallest models,
regressions and segmentations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import skipway as sw
from benchmarks.trainability.nets import IN_PLACE, start_
from benchmarks.trainability.tasks import CONTEXT, VOCAB

__all__ = ["Segmenter", "TableNet", "TorchDecoder", "Transformers", "own_decoder", "start_decoder", "timm_model"]

DIM, HEADS = 32, 2
OURS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {"rms": True, "gated": True, "act": "silu", "position": "rotary", "bias": "none", "tied": False},
    "qwen": {"rms": True, "gated": True, "act": "silu", "position": "rotary", "bias": "none", "head_norm": True},
}


def own_decoder(name: str, blocks: int, start: str, norm: str) -> nn.Module:
    """A decoder of ours in the style of one of `OURS`."""
    size = {"dim": DIM, "heads": HEADS, "blocks": blocks, "vocab": VOCAB, "context": CONTEXT}
    return start_decoder(sw.build("gpt-micro", norm=norm, **OURS[name], **size), blocks, start)


@torch.no_grad()
def start_decoder(model: nn.Module, blocks: int, start: str) -> nn.Module:
    """Change the start in place: "own" as built; "1/√L" last maps of branches times 1/√L; "table" of deviation 1."""
    if start == "1/√L":
        for connection in sw.chain(model, torch.zeros(2, CONTEXT, dtype=torch.long)):
            connection.multiply_((2 * blocks) ** -0.5)
    elif start == "table":
        nn.init.normal_(next(p for p in model.parameters() if p.shape == (VOCAB, DIM)))
    return model


class TorchDecoder(nn.Module):
    """Layers of torch with a causal mask and positions, started as torch starts them: a table of deviation 1."""

    def __init__(self, blocks: int, norm: str) -> None:
        super().__init__()
        first = norm == "pre"
        self.table, self.positions = nn.Embedding(VOCAB, DIM), nn.Embedding(CONTEXT, DIM)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, 0.0, "gelu", batch_first=True, norm_first=first)
        last = nn.LayerNorm(DIM) if first else None
        self.blocks = nn.TransformerEncoder(layer, blocks, norm=last, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.positions(torch.arange(ids.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.blocks(x, mask=mask, is_causal=True))


class Transformers(nn.Module):
    """A causal language model of transformers by its architecture, logits alone.

    Args:
        name: "gpt2", "llama", "gpt_neox" or "opt".
        blocks: number of layers.
    """

    def __init__(self, name: str, blocks: int) -> None:
        super().__init__()
        from skipway.zoo.sources import import_library

        transformers = import_library("transformers")
        size = {"vocab_size": VOCAB, "hidden_size": DIM, "num_attention_heads": HEADS, "num_hidden_layers": blocks}
        more = {
            "gpt2": {"n_positions": CONTEXT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
            "llama": {"intermediate_size": 3 * DIM, "max_position_embeddings": CONTEXT},
            "gpt_neox": {"intermediate_size": 4 * DIM, "max_position_embeddings": CONTEXT},
            "opt": {"ffn_dim": 4 * DIM, "max_position_embeddings": CONTEXT, "word_embed_proj_dim": DIM, "dropout": 0.0},
        }[name]
        tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
        config = transformers.AutoConfig.for_model(name, **size, **more, **tokens, use_cache=False)
        self.model = transformers.AutoModelForCausalLM.from_config(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def timm_model(name: str) -> nn.Module:
    """One of timm's smallest models for images of 32×32."""
    from skipway.zoo.sources import import_library

    timm = import_library("timm")
    try:
        return timm.create_model(name, num_classes=10, img_size=32)
    except TypeError:  # convolutional models take any size
        return timm.create_model(name, num_classes=10)


class TableNet(nn.Module):
    """Ten numbers to one through residual or plain layers; outputs in units of `scale`, as where the targets were not
    brought to deviation 1.

    Args:
        depth: weight layers; two to a residual connection.
        act: "relu", "tanh" or "gelu".
        style: "plain", "residual", "residual-norm" (a LayerNorm before each branch) or "batch-norm" (plain).
        scale: the network's output is divided by it.
    """

    def __init__(self, depth: int, act: str, style: str, scale: float, width: int = 48) -> None:
        super().__init__()
        self.style, self.scale, self.act = style, scale, IN_PLACE[act]
        self.input = nn.Linear(10, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        kinds = {"residual-norm": nn.LayerNorm, "batch-norm": nn.BatchNorm1d}
        make = kinds.get(style, lambda width: nn.Identity())
        self.norms = nn.ModuleList([make(width) for _ in range(depth // (1 + style.startswith("residual")))])
        self.output = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        if self.style.startswith("residual"):
            for norm, first, second in zip(self.norms, self.layers[::2], self.layers[1::2], strict=True):
                x = x + second(self.act(first(norm(x))))
        else:
            for norm, layer in zip(self.norms, self.layers, strict=True):
                x = self.act(norm(layer(x)))
        return self.output(x) / self.scale


def double_conv(inputs: int, outputs: int, norm: str) -> nn.Sequential:
    """Two 3×3 convolutions, each with a norm ("bn" or "none") and a rectifier."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1)]
        layers += [nn.BatchNorm2d(outputs)] if norm == "bn" else []
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Segmenter(nn.Module):
    """U-Net (Ronneberger et al. 2015) of two levels with long skips, or the same without them, and residual
    convolutions between.

    Args:
        depth: 3×3 convolutions; those beyond 10 in residual pairs at the bottom.
        style: "unet", "no-skips" (the long ones left out) or "he" (U-Net with He's start).
        norm: "bn" or "none".
    """

    def __init__(self, depth: int, style: str, norm: str, width: int = 8) -> None:
        super().__init__()
        self.skips = style != "no-skips"
        self.down1, self.down2 = double_conv(1, width, norm), double_conv(width, 2 * width, norm)
        self.bottom = double_conv(2 * width, 2 * width, norm)
        self.pairs = nn.ModuleList([double_conv(2 * width, 2 * width, norm) for _ in range(max(0, depth - 10) // 2)])
        self.up2 = double_conv(2 * width * (1 + self.skips), width, norm)
        self.up1 = double_conv(width * (1 + self.skips), width, norm)
        self.head = nn.Conv2d(width, 1, 1)
        start_(self, "he" if style == "he" else "default")

    def forward(self, x: Tensor) -> Tensor:
        pool, grow = nn.functional.max_pool2d, nn.functional.interpolate
        first = self.down1(x)
        second = self.down2(pool(first, 2))
        x = self.bottom(pool(second, 2))
        for pair in self.pairs:
            x = x + pair(x)
        x = grow(x, scale_factor=2.0)
        x = self.up2(torch.cat([x, second], 1) if self.skips else x)
        x = grow(x, scale_factor=2.0)
        return self.head(self.up1(torch.cat([x, first], 1) if self.skips else x))
