"""Tiny networks of every language model that transformers has: random weights, a few channels, an example to call with.

    python -m benchmarks.language_models            # which build, and why others do not

A class stands for an architecture: those of transformers' tables for causal, masked and translating models, and for
speech. Sizes are set by the names that configurations give them, in the configurations inside of them, too; what that
does not settle is in `SETTINGS`, one row for each model.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.peers import import_transformers
from skipway.zoo.random_inputs import find_inputs

__all__ = ["LAYERS", "TASKS", "TOKENS", "build_language_model", "language_models"]

LAYERS, TOKENS = 4, 12
TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "translating": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "transcribing": "MODEL_FOR_CTC_MAPPING_NAMES",
}
"""Tables of transformers, architecture → class, by what the models are for."""

SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "emb_dim", "word_embed_proj_dim", "embed_dim"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads"), 4),
    **dict.fromkeys(("encoder_num_hidden_layers", "decoder_num_hidden_layers"), LAYERS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("ffn_hidden_size", "n_inner", "encoder_intermediate_size", "decoder_intermediate_size"), 64),
    **dict.fromkeys(("vocab_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "encoder_num_key_value_heads"), 2),
    **dict.fromkeys(("decoder_num_key_value_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_selected_experts", "moe_top_k"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "num_expert_groups"), 1),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_conv"), 4),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("eos_token_id", "sep_token_id", "mask_token_id", "cls_token_id"), 1),
    "first_k_dense_replace": 1,
    "max_position_embeddings": 80,
    "n_positions": 80,
    "rotary_dim": 4,
    "sliding_window": 8,
    "vocab_size_per_layer_input": 64,
}
"""Settings under the names that configurations give them; each takes those that it has."""

MIXED = ["linear_attention", "full_attention"] * 2
STATE_SPACE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
GEMMA_3N = {
    "intermediate_size": [64] * LAYERS,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
}
SETTINGS: dict[str, Mapping[str, Any]] = {
    "bailing_hybrid": {"layer_types": MIXED, "linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_token": 2},
    "bamba": {**STATE_SPACE, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * LAYERS,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "head_dim": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "esm": {"mask_token_id": 2, "pad_token_id": 1, "vocab_size": 64},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n": {"text_config": GEMMA_3N},
    "gemma3n_text": GEMMA_3N,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**STATE_SPACE, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": MIXED, "linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_token": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp": {
        "hc_count": 4,
        "hc_lowrank": 8,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
    },
    "wav2vec2-bert": {"vocab_size": 64},
    "wav2vec2-conformer": {"vocab_size": 64},
    "neomme": {"head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "ReformerForMaskedLM": {"is_decoder": False, "axial_pos_embds": False},
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0, "chunk_size": 16},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {
        "layer_types": ["linear_attention", "hybrid"] * 2,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
}
"""Settings of single architectures or classes beside `SIZES`; None leaves one to the configuration."""


def language_models() -> Iterator[tuple[str, str, str]]:
    """Architecture, task and class of every language model, each class once."""
    import_transformers()
    tables = importlib.import_module("transformers.models.auto.modeling_auto")
    seen = set()
    for task, table in TASKS.items():
        for architecture, names in sorted(getattr(tables, table).items()):
            name = names[0] if isinstance(names, tuple | list) else names
            if name not in seen:
                seen.add(name)
                yield architecture, task, name


def shrunk(kind: type, settings: Mapping[str, Any]) -> Any:
    """The configuration of a class with small sizes, those of configurations inside of it included."""
    known = kind()
    inner = {
        name: shrunk(type(value), settings.get(name, {})).to_dict()
        for name, value in vars(known).items()
        if hasattr(value, "to_diff_dict")
    }
    accepted = {*inspect.signature(kind.__init__).parameters, *vars(known), *getattr(kind, "attribute_map", {})}
    sizes = {name: value for name, value in SIZES.items() if name in accepted and is_set(known, name)}
    if "qk_rope_head_dim" in sizes:
        sizes.pop("head_dim", None)  # is that one
        sizes["num_key_value_heads"] = 4  # keys and values are made of one small vector for all heads
    sizes |= {name: value for name, value in settings.items() if not isinstance(value, Mapping) or name not in inner}
    return kind(**{name: value for name, value in (inner | sizes).items() if value is not None})


def is_set(config: Any, name: str) -> bool:
    """Whether a configuration has a value of this name; some layers have one of their own, which is one."""
    try:
        return getattr(config, name, None) is not None
    except (AttributeError, RuntimeError):  # transformers' AmbiguousGlobalPerLayerAttributeError
        return True


def build_language_model(name: str, architecture: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny network of a class, in evaluation mode and initialised from seed 0, and what it is called with."""
    transformers = import_transformers()
    kind = getattr(transformers, name)
    settings = SETTINGS.get(name) or SETTINGS.get(architecture or kind.config_class.model_type, {})
    torch.manual_seed(0)
    model = kind(shrunk(kind.config_class, settings)).eval()
    example = {each.name: each.draw(2) for each in find_inputs(model)}
    if "input_ids" in example:
        example["input_ids"] = torch.randint(2, 64, (2, TOKENS))
    example.pop("labels", None)
    if "decoder_input_ids" in inspect.signature(model.forward).parameters and model.config.is_encoder_decoder:
        example["decoder_input_ids"] = torch.randint(2, 64, (2, TOKENS))
    return model, example


def main() -> int:
    """Build all, and say what does not."""
    warnings.filterwarnings("ignore")
    built, problems = [], {}
    for architecture, task, name in language_models():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue  # the classes that are asked for
        try:
            model, example = build_language_model(name, architecture)
            with torch.no_grad():
                model(**example)
        except Exception as problem:  # the table shows it
            problems[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:140] if str(problem) else ''}"
            print(f"- {name} ({architecture}, {task}): {problems[name]}", flush=True)
        else:
            built.append(name)
            print(f"+ {name} {sum(p.numel() for p in model.parameters()):,}", flush=True)
    print(f"{len(built)} of {len(built) + len(problems)} classes build")
    return 0


if __name__ == "__main__":
    sys.exit(main())
