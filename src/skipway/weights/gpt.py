"""Key maps of Hugging Face for the decoders of the GPT family: GPT-2, and Llama, Qwen2 and Qwen3, which share names."""

from __future__ import annotations

from torch import Tensor

from skipway.models.gpt import GPT
from skipway.weights.decoder_config import config_differences, describe_misfit, read_decoder_config
from skipway.weights.keymap import KeyMap, KeyRule, module_rule, with_base_names
from skipway.weights.tables import register_config, register_keymap, register_misfit

__all__: list[str] = []

ATTENTION, MLP = "blocks.{i}.attention.branch", "blocks.{i}.mlp.branch"


class Transposed:
    """The matrices of GPT-2's `Conv1D`, (in, out)."""

    def to_ours(self, tensor: Tensor) -> Tensor:
        return tensor.mT.contiguous() if tensor.ndim == 2 else tensor

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return self.to_ours(tensor)


def head_shares(model: GPT) -> tuple[int, int, int]:
    """How the rows of `qkv` are shared out among queries, keys and values."""
    groups = model.config.groups or model.config.heads
    return model.config.heads, groups, groups


GPT2 = (
    KeyRule("stem.token", "transformer.wte.weight"),
    KeyRule("stem.position", "transformer.wpe.weight"),
    module_rule("blocks.{i}.attention.pre.norm", "transformer.h.{i}.ln_1"),
    module_rule(f"{ATTENTION}.qkv", "transformer.h.{i}.attn.c_attn", convert=Transposed()),
    module_rule(f"{ATTENTION}.proj", "transformer.h.{i}.attn.c_proj", convert=Transposed()),
    module_rule("blocks.{i}.mlp.pre.norm", "transformer.h.{i}.ln_2"),
    module_rule(f"{MLP}.fc1", "transformer.h.{i}.mlp.c_fc", convert=Transposed()),
    module_rule(f"{MLP}.fc2", "transformer.h.{i}.mlp.c_proj", convert=Transposed()),
    module_rule("head.norm", "transformer.ln_f"),
    module_rule("head.classifier", "lm_head"),
)
LLAMA = (
    KeyRule("stem.token", "model.embed_tokens.weight"),
    module_rule("blocks.{i}.attention.pre.norm", "model.layers.{i}.input_layernorm"),
    module_rule(
        f"{ATTENTION}.qkv", *(f"model.layers.{{i}}.self_attn.{name}_proj" for name in "qkv"), shares=head_shares
    ),
    *(module_rule(f"{ATTENTION}.norm_{name}", f"model.layers.{{i}}.self_attn.{name}_norm") for name in "qk"),
    module_rule(f"{ATTENTION}.proj", "model.layers.{i}.self_attn.o_proj"),
    module_rule("blocks.{i}.mlp.pre.norm", "model.layers.{i}.post_attention_layernorm"),
    module_rule(f"{MLP}.fc1", *(f"model.layers.{{i}}.mlp.{name}_proj" for name in ("gate", "up"))),
    module_rule(f"{MLP}.fc2", "model.layers.{i}.mlp.down_proj"),
    module_rule("head.norm", "model.norm"),
    module_rule("head.classifier", "lm_head"),
)
MASKS = (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",)
FREQUENCIES = (r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
"""Constants that stand in files of older versions."""


def register_names(learned: bool, tied: bool) -> None:
    """Register the names for networks with these positions and this head."""
    rules = with_base_names("transformer", GPT2) if learned else with_base_names("model", LLAMA)
    copies = {"lm_head.weight": rules[0].sources[0]} if tied else {}
    register_keymap(
        GPT,
        KeyMap("huggingface", rules, MASKS if learned else FREQUENCIES, copies=copies),
        when=lambda model: (model.config.position == "learned", model.config.tied) == (learned, tied),
    )


for learned in (True, False):
    for tied in (True, False):
        register_names(learned, tied)
register_misfit(GPT, "huggingface", lambda model: describe_misfit(model.config))
register_config(
    GPT,
    "huggingface",
    lambda model, described: config_differences(model.config, read_decoder_config(described, "config.json")),
)
