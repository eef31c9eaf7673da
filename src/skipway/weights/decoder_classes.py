"""The decoders of transformers that the GPT family computes: tables that are read in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from skipway.models.gpt import GPTConfig
from skipway.models.gpt.config import Bias

__all__ = ["ACTIVATIONS", "CLASSES", "DROPOUT", "LARGER", "NEUTRAL", "DecoderClass"]

ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "tanhgelu": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast"),
    "silu": ("silu", "swish"),
    "relu": ("relu",),
}
"""Our names of activations and theirs, which compute the same; the first is written."""
LARGER: dict[str, tuple[Bias, ...]] = {
    "none": ("none", "qkv", "attention", "all"),
    "qkv": ("qkv", "attention", "all"),
    "attention": ("attention", "all"),
    "all": ("all",),
}
"""Biases and those that hold them: a network without one computes the same with zeros."""


@dataclass(frozen=True)
class DecoderClass:
    """A language model of transformers, and which of our configs it computes.

    Args:
        kind: its `model_type`.
        architecture: its class.
        names: our field → theirs.
        defaults: their fields, which a file may lack, with the class's values.
        shape: our field → the value that its networks have.
        biases: ours → their fields; what is not there it has not.
        demands: their field → the only value with which it computes what we do.
        rotary: whether it has rotary positions.
        any_tokenizer: whether transformers reads any tokenizer beside it; beside a qwen2 it takes Qwen's instead.
    """

    kind: str
    architecture: str
    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    shape: Mapping[str, Any]
    biases: Mapping[Bias, Mapping[str, bool]]
    demands: Mapping[str, Any] = field(default_factory=dict)
    rotary: bool = True
    any_tokenizer: bool = True

    def misfits(self, config: GPTConfig) -> list[str]:
        """What of a config of ours its networks have not, in words."""
        own = {name: getattr(config, name) for name in self.shape}
        found = [f"{name}={own[name]!r} (there {value!r})" for name, value in self.shape.items() if own[name] != value]
        if self.bias_for(config) is None:
            found.append(f"bias={config.bias!r}")
        even = config.head_dim is None or config.head_dim * config.heads == config.dim
        if not self.rotary and not even:
            found.append(f"head_dim={config.head_dim} (there dim / heads)")
        if not self.rotary and config.groups not in (None, config.heads):
            found.append(f"groups={config.groups} (there {config.heads})")
        if self.rotary and config.dim % config.heads:
            found.append(f"dim={config.dim}, heads={config.heads} (there heads divides dim)")
        return found

    def bias_for(self, config: GPTConfig) -> Bias | None:
        """The fewest biases of its networks that hold those of a config; None: it has not so many."""
        return next((bias for bias in LARGER[config.bias] if bias in self.biases), None)


OF_LLAMA = {
    "dim": "hidden_size",
    "blocks": "num_hidden_layers",
    "heads": "num_attention_heads",
    "groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden": "intermediate_size",
    "act": "hidden_act",
    "epsilon": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
}
LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": 11008,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
}
QWEN_DEFAULTS = LLAMA_DEFAULTS | {
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
}
OF_GPT2 = {
    "dim": "n_embd",
    "blocks": "n_layer",
    "heads": "n_head",
    "hidden": "n_inner",
    "act": "activation_function",
    "epsilon": "layer_norm_epsilon",
    "tied": "tie_word_embeddings",
    "vocab": "vocab_size",
    "context": "n_positions",
}
GATED = {"norm": "pre", "rms": True, "position": "rotary", "gated": True}

CLASSES: dict[str, DecoderClass] = {
    each.kind: each
    for each in (
        DecoderClass(
            "gpt2",
            "GPT2LMHeadModel",
            OF_GPT2,
            {
                "n_embd": 768,
                "n_layer": 12,
                "n_head": 12,
                "n_inner": None,
                "activation_function": "gelu_new",
                "layer_norm_epsilon": 1e-5,
                "tie_word_embeddings": True,
                "vocab_size": 50257,
                "n_positions": 1024,
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "add_cross_attention": False,
            },
            {"norm": "pre", "rms": False, "position": "learned", "gated": False, "head_norm": False},
            {"all": {}},
            {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
            rotary=False,
        ),
        DecoderClass(
            "llama",
            "LlamaForCausalLM",
            OF_LLAMA,
            LLAMA_DEFAULTS,
            {**GATED, "head_norm": False},
            {
                "none": {"attention_bias": False, "mlp_bias": False},
                "attention": {"attention_bias": True, "mlp_bias": False},
                "all": {"attention_bias": True, "mlp_bias": True},
            },
            {"rope_interleaved": False},
        ),
        DecoderClass(
            "mistral",
            "MistralForCausalLM",
            OF_LLAMA,
            LLAMA_DEFAULTS
            | {"num_key_value_heads": 8, "intermediate_size": 14336}
            | {"max_position_embeddings": 131072, "sliding_window": 4096},
            {**GATED, "head_norm": False},
            {"none": {}},
            {"sliding_window": None},
        ),
        DecoderClass(
            "qwen2",
            "Qwen2ForCausalLM",
            OF_LLAMA,
            QWEN_DEFAULTS,
            {**GATED, "head_norm": False},
            {"qkv": {}},
            {"use_sliding_window": False},
            any_tokenizer=False,
        ),
        DecoderClass(
            "qwen3",
            "Qwen3ForCausalLM",
            OF_LLAMA,
            QWEN_DEFAULTS | {"head_dim": 128},
            {**GATED, "head_norm": True},
            {"none": {"attention_bias": False}, "attention": {"attention_bias": True}},
            {"use_sliding_window": False},
        ),
    )
}
"""By `model_type`."""

DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout")
NEUTRAL = (
    *("_attn_implementation", "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward"),
    *("dtype", "eos_token_id", "gradient_checkpointing", "id2label", "initializer_range", "is_encoder_decoder"),
    *("is_llama_config", "label2id", "layer_types", "max_window_layers", "model_type", "n_ctx"),
    *("original_max_position_embeddings", "output_attentions", "output_hidden_states", "output_past"),
    *("pad_token_id", "partial_rotary_factor", "pretraining_tp", "problem_type", "reorder_and_upcast_attn"),
    *("return_dict", "rope_parameters", "rope_scaling", "sliding_window", "summary_activation"),
    *("summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    *("task_specific_params", "torch_dtype", "transformers.js_config", "transformers_version", "unk_token_id"),
    "use_cache",
)
"""Fields that change no logit, and those that are read by functions of their own."""
