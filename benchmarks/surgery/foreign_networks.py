"""Tiny networks that others wrote, with random weights, no dropout, and an example of what each is called with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import import_timm, import_transformers

__all__ = ["CONFIGS", "LIBRARIES", "NETWORKS", "build", "configured"]

Built = tuple[nn.Module, Any]
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
OLDER = {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4}
VISION = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 4}
PYRAMID = {"image_size": 32, "depths": [2, 2], "num_channels": 3}
STACKS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 64,
}
SPEECH = {
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
WAVES = {
    **{k: v for k, v in SMALL.items() if k != "vocab_size"},
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}


def tokens(length: int = 12) -> Tensor:
    return torch.randint(3, 60, (3, length), generator=torch.Generator().manual_seed(0))


def padded() -> dict[str, Tensor]:
    """Token ids of which one sample ends in padding."""
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[2, 9:] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def images(side: int) -> Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))


def signals(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def configured(name: str, **changed: Any) -> Any:
    """A network of transformers without dropout, with these values of its config changed."""
    library = import_transformers()
    kind, config, options = CONFIGS[name]
    settings = getattr(library, config)(**{**options, **changed})
    for entry, value in vars(settings).items():
        if ("drop" in entry or "pdrop" in entry) and isinstance(value, float):
            setattr(settings, entry, 0.0)
    return getattr(library, kind)(settings)


def transformer(name: str) -> Built:
    return configured(name), EXAMPLES.get(name, padded)()


def image_model(name: str, side: int = 32, **options: Any) -> Callable[[], Built]:
    """A network of timm."""
    return lambda: (import_timm().create_model(name, **options), images(side))


class Branch(nn.Module):
    """A branch of two maps."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).relu())


class Blocks(nn.Module):
    """Blocks that are all given the same other arguments."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        for block in self.blocks:
            x = block(x, *others)
        return x


class Convolved(nn.Module):
    """A block of a temporal convolution network: causal, with weight norm (Bai et al. 2018)."""

    def __init__(self, dilation: int, normed: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.pad = nn.ConstantPad1d((2 * dilation, 0), 0.0)
        self.one = normed(nn.Conv1d(16, 16, 3, dilation=dilation))
        self.two = normed(nn.Conv1d(16, 16, 3, dilation=dilation))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.pad(self.one(self.pad(x)).relu()))


class Conditioned(nn.Module):
    """A block of a diffusion transformer: shift, scale and gate come from a condition (Peebles & Xie 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16, elementwise_affine=False)
        self.modulation, self.branch = nn.Linear(8, 48), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c).unsqueeze(1).chunk(3, -1)
        return x + gate * self.branch(self.norm(x) * (1 + scale) + shift)


class Recurrent(nn.Module):
    """A block whose branch is an LSTM over the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lstm = nn.LayerNorm(16), nn.LSTM(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lstm(self.norm(x))[0]


class Added(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class TwoHeads(nn.Module):
    """Two outputs in a mapping, and the features between them."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Sequential(Added(), Added()), nn.Sequential(Added(), Added())
        self.one, self.two = nn.Linear(16, 5), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        middle = self.early(x)
        return {"early": self.one(middle), "features": [middle], "late": self.two(self.late(middle))}


class Denoiser(nn.Module):
    """DnCNN: the noise is subtracted from the image (Zhang et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        inner = [each for _ in range(3) for each in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.net(x)


class Subtracting(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x - super().forward(x)


def encoder(batch_first: bool, norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first, norm_first=norm_first, dropout=0.0)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def causal_encoder() -> Built:
    """torch's encoder with a causal mask."""
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    return encoder(True, True), {"src": signals(3, 7, 16), "mask": mask, "is_causal": True}


def padded_encoder() -> Built:
    """torch's encoder, sequence first, with a padding mask."""
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 5:] = True
    return encoder(False, True), {"src": signals(7, 3, 16), "src_key_padding_mask": mask}


def decoder() -> Built:
    """torch's decoder on the states of an encoder."""
    layer = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True, norm_first=True, dropout=0.0)
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    return nn.TransformerDecoder(layer, 3), {"tgt": signals(3, 7, 16), "memory": signals(3, 5, 16), "tgt_mask": mask}


def temporal(normed: Callable[[nn.Module], nn.Module]) -> Callable[[], Built]:
    return lambda: (nn.Sequential(*(Convolved(2**n, normed) for n in range(3))), signals(3, 16, 12))


def decoder_ids() -> dict[str, Tensor]:
    return {**padded(), "decoder_input_ids": tokens(7)}


CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", OLDER),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "intermediate_size": 64,
            "attention_types": [[["global", "local"], 2]],
        },
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", {**OLDER, "rotary_dim": 4}),
    "OPT": ("OPTForCausalLM", "OPTConfig", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "Bloom": ("BloomForCausalLM", "BloomConfig", {**OLDER, "hidden_size": 32}),
    "Falcon": ("FalconForCausalLM", "FalconConfig", {k: v for k, v in SMALL.items() if k != "intermediate_size"}),
    "CodeGen": ("CodeGenForCausalLM", "CodeGenConfig", {**OLDER, "rotary_dim": 4}),
    "MPT": ("MptForCausalLM", "MptConfig", {"vocab_size": 64, "d_model": 32, "n_layers": 4, "n_heads": 4}),
    "Phi": ("PhiForCausalLM", "PhiConfig", SMALL),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Llama without cache": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "use_cache": False}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 8}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 8}),
    "OLMo": ("OlmoForCausalLM", "OlmoConfig", SMALL),
    "Mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 4},
    ),
    "BERT": ("BertModel", "BertConfig", SMALL),
    "RoBERTa": ("RobertaModel", "RobertaConfig", SMALL),
    "ELECTRA": ("ElectraModel", "ElectraConfig", {**SMALL, "embedding_size": 32}),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
    "BART": ("BartForConditionalGeneration", "BartConfig", STACKS),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {**STACKS, **SPEECH}),
    "Wav2Vec2": ("Wav2Vec2Model", "Wav2Vec2Config", WAVES),
    "ViT of transformers": ("ViTModel", "ViTConfig", VISION),
    "DINOv2": ("Dinov2Model", "Dinov2Config", VISION),
    "CLIP's vision": ("CLIPVisionModel", "CLIPVisionConfig", VISION),
    "Swin of transformers": (
        "SwinModel",
        "SwinConfig",
        {**PYRAMID, "patch_size": 2, "embed_dim": 16, "num_heads": [2, 2], "window_size": 4},
    ),
    "ConvNeXt of transformers": (
        "ConvNextModel",
        "ConvNextConfig",
        {**PYRAMID, "num_stages": 2, "hidden_sizes": [16, 32]},
    ),
}
"""Networks of transformers: their class, that of the config, and its values."""
EXAMPLES: dict[str, Callable[[], Any]] = {
    "Mamba": lambda: {"input_ids": tokens()},
    "T5": decoder_ids,
    "BART": decoder_ids,
    "Whisper": lambda: {"input_features": signals(3, 8, 32), "decoder_input_ids": tokens(7)},
    "Wav2Vec2": lambda: signals(3, 800),
    "ViT of transformers": lambda: images(16),
    "DINOv2": lambda: images(16),
    "CLIP's vision": lambda: images(16),
    "Swin of transformers": lambda: images(32),
    "ConvNeXt of transformers": lambda: images(32),
}
"""What those of them are called with that take something else than padded tokens."""
TRANSFORMERS: dict[str, Callable[[], Built]] = {name: partial(transformer, name) for name in CONFIGS}
PATCHES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
TIMM: dict[str, Callable[[], Built]] = {
    "resnet18": image_model("resnet18", num_classes=5),
    "resnet10t": image_model("resnet10t", num_classes=5),
    "resnet18 features": image_model("resnet18", features_only=True),
    "preact resnetv2": image_model("resnetv2_18", num_classes=5),
    "convnext": image_model("convnext_atto", num_classes=5, depths=(2, 2, 2, 2), dims=(8, 16, 24, 32)),
    "vit": image_model("vit_tiny_patch16_224", **PATCHES),
    "swin": image_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 2),
        num_classes=5,
        drop_path_rate=0.0,
    ),
    "mixer": lambda: (
        import_timm().models.mlp_mixer.MlpMixer(img_size=32, patch_size=8, embed_dim=32, num_blocks=4, num_classes=5),
        images(32),
    ),
    "cait": image_model("cait_xxs24_224", **{**PATCHES, "depth": 3}),
    "efficientnet": image_model("efficientnet_b0", num_classes=5),
    "mobilenetv3": image_model("mobilenetv3_small_050", num_classes=5),
    "regnet": image_model("regnetx_002", num_classes=5),
}
TORCH: dict[str, Callable[[], Built]] = {
    "encoder, causal": causal_encoder,
    "encoder, sequence first, padded": padded_encoder,
    "encoder, post-norm": lambda: (encoder(True, False), signals(3, 7, 16)),
    "decoder": decoder,
    "TCN, old weight norm": temporal(nn.utils.weight_norm),
    "TCN, weight norm": temporal(nn.utils.parametrizations.weight_norm),
    "DiT": lambda: (Blocks(*(Conditioned() for _ in range(3))), (signals(3, 7, 16), signals(3, 8))),
    "LSTM": lambda: (Blocks(*(Recurrent() for _ in range(3))), signals(3, 7, 16)),
    "two heads": lambda: (TwoHeads(), signals(3, 7, 16)),
    "DnCNN": lambda: (Denoiser(), images(8)),
    "subtracting": lambda: (Blocks(*(Subtracting() for _ in range(3))), signals(3, 7, 16)),
}
LIBRARIES: dict[str, dict[str, Callable[[], Built]]] = {"torch": TORCH, "timm": TIMM, "transformers": TRANSFORMERS}
"""Networks by the library that has to be installed."""
NETWORKS: dict[str, Callable[[], Built]] = {**TORCH, **TIMM, **TRANSFORMERS}


def build(name: str) -> Built:
    """One of the networks, always with the same weights, and its example."""
    torch.manual_seed(0)
    return NETWORKS[name]()
