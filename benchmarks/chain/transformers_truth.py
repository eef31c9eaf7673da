"""The right answers of `chain` for tiny networks of transformers, counted by reading the forward of their layers.

Four layers of a stack add 4 times as often as the forward of one layer does; what a model adds once is told beside it.
The rows say nothing about refused additions, of which most are rotary embeddings and positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import import_transformers

__all__ = ["TINY", "TinyTruth", "build_tiny"]

LAYERS = 4
TOKENS = 12
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), LAYERS
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("vocab_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    "num_decoder_layers": LAYERS,
}
"""Settings under the names that configurations give them; each takes those that it has."""


@dataclass(frozen=True)
class TinyTruth:
    """The connections of one model.

    Args:
        model: its class in transformers.
        connections: in one forward pass.
        source: what adds.
        settings: of its configuration, beside `SIZES`.
        given: the argument that it is called with: "ids", "both" (ids for an encoder and a decoder), "image", "sound"
            or "spectrum".
    """

    model: str
    connections: int
    source: str
    settings: Mapping[str, Any]
    given: str = "ids"


def encoders(
    source: str, *models: str, given: str = "ids", layer: int = 2, extra: int = 0, **settings: Any
) -> list[TinyTruth]:
    return [TinyTruth(model, layer * LAYERS + extra, source, settings, given) for model in models]


IMAGE = {"image_size": 32, "patch_size": 8}
TINY: list[TinyTruth] = [
    *encoders(
        "attention and feed-forward of a layer, normed after the sum",
        *("BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel", "MPNetModel", "ElectraModel"),
        *("DistilBertModel", "AlbertModel", "Data2VecTextModel", "ErnieModel", "RoFormerModel", "SplinterModel"),
        *("RoCBertModel", "MegatronBertModel", "DebertaV2Model", "OpenAIGPTModel", "XLNetModel"),
    ),
    *encoders("FNetLayer: a Fourier transform and a feed-forward network", "FNetModel"),
    *encoders("attention and feed-forward of a layer, normed before", "EsmModel", pad_token_id=1, mask_token_id=2),
    *encoders("attention and feed-forward of a layer, normed before", "ModernBertModel", pad_token_id=0),
    *encoders(
        "attention and feed-forward of a block, normed before",
        *("GPT2Model", "GPTBigCodeModel", "BloomModel", "MptModel", "OPTModel", "XGLMModel", "BioGptModel"),
        *("CTRLModel", "LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "GemmaModel", "Gemma2Model"),
        *("OlmoModel", "Olmo2Model", "StableLmModel", "Starcoder2Model", "PersimmonModel", "GraniteModel"),
        *("NemotronModel", "GlmModel", "Phi3Model", "HeliumModel", "SmolLM3Model", "ArceeModel", "ApertusModel"),
        *("RwkvModel",),
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    ),
    *encoders(
        "attention and feed-forward, the latter of experts whose outputs are summed within",
        *("MixtralModel", "OlmoeModel", "Qwen2MoeModel", "Qwen3MoeModel", "GptOssModel", "GraniteMoeModel"),
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    ),
    *encoders("GPTNeoBlock.forward", "GPTNeoModel", attention_types=[[["global", "local"], 2]]),
    *encoders("residual + attention + feed-forward in CohereDecoderLayer.forward: two additions", "CohereModel"),
    *encoders(
        "attention + feed-forward + residual: one addition of both branches",
        *("GPTJModel", "CodeGenModel", "GPTNeoXModel", "FalconModel", "PhiModel"),
        layer=1,
        rotary_dim=4,
    ),
    *encoders("MambaBlock.forward: one mixer, which adds D x to its scan", "MambaModel", layer=2),
    *encoders(
        "Mamba2Block.forward: one mixer, which adds D x to its scan", "Mamba2Model", layer=2, head_dim=8, num_heads=8
    ),
    *encoders(
        "an encoder layer adds 2 times, a decoder layer 3 times",
        *("BartModel", "MBartModel", "PegasusModel", "MarianModel", "M2M100Model", "BlenderbotModel", "T5Model"),
        *("MT5Model", "UMT5Model", "PLBartModel"),
        given="both",
        layer=5,
        d_kv=8,
        pad_token_id=0,
    ),
    *encoders(
        "WhisperEncoderLayer 2 times, WhisperDecoderLayer 3 times",
        "WhisperModel",
        given="spectrum",
        layer=5,
        pad_token_id=0,
    ),
    *encoders(
        "an encoder layer 2 times; once hidden_states + pos_conv_embed(hidden_states)",
        *("Wav2Vec2Model", "HubertModel", "WavLMModel", "Data2VecAudioModel"),
        given="sound",
        extra=1,
    ),
    *encoders(
        "attention and feed-forward of a layer",
        *("ViTModel", "DeiTModel", "BeitModel", "Dinov2Model", "CLIPVisionModel", "ViTMAEModel"),
        *("ViTMSNModel", "IJepaModel", "Dinov2WithRegistersModel", "PixtralVisionModel"),
        given="image",
        **IMAGE,
    ),
    *encoders(
        "attention and feed-forward of a layer; once residual + mlp in the head that pools by attention",
        "SiglipVisionModel",
        given="image",
        extra=1,
        **IMAGE,
    ),
    *encoders("attention and feed-forward of a layer", "CLIPTextModel", "SiglipTextModel", "AltCLIPTextModel"),
]


def build_tiny(truth: TinyTruth) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model of a row, of random weights and in evaluation mode, and what it is called with."""
    transformers = import_transformers()
    transformers.logging.set_verbosity_error()  # special tokens are beyond a tiny vocabulary
    kind = getattr(transformers, truth.model)
    config = kind.config_class()
    sizes = {name: size for name, size in SIZES.items() if hasattr(config, name)}
    sizes |= {name: value for name, value in truth.settings.items() if hasattr(config, name)}
    ids = torch.randint(3, 60, (2, TOKENS))
    given = {
        "ids": {"input_ids": ids},
        "both": {"input_ids": ids, "decoder_input_ids": ids},
        "image": {"pixel_values": torch.randn(2, 3, 32, 32)},
        "sound": {"input_values": torch.randn(2, 4000)},
        "spectrum": {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": ids[:1]},
    }[truth.given]
    return kind(kind.config_class(**sizes)).eval(), given
