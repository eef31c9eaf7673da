"""Key map of timm for CaiT; torchvision and Hugging Face have no such model."""

from __future__ import annotations

from skipway.models.cait import CaiT
from skipway.weights.keymap import KeyMap, KeyRule, module_rule
from skipway.weights.tables import register_keymap

__all__: list[str] = []

BLOCK = (
    ("attention.pre.norm", "norm1"),
    ("attention.branch.qkv", "attn.qkv"),
    ("attention.branch.q", "attn.q"),
    ("attention.branch.k", "attn.k"),
    ("attention.branch.v", "attn.v"),
    ("attention.branch.mix_logits", "attn.proj_l"),
    ("attention.branch.mix_weights", "attn.proj_w"),
    ("attention.branch.proj", "attn.proj"),
    ("mlp.pre.norm", "norm2"),
    ("mlp.branch.inner.fc{k}", "mlp.fc{k}"),
    ("mlp.branch.fc{k}", "mlp.fc{k}"),
)
SIDES = (("blocks.{i}", "blocks.{i}"), ("class_blocks.{i}", "blocks_token_only.{i}"))

register_keymap(
    CaiT,
    KeyMap(
        "timm",
        (
            KeyRule("token.token", "cls_token"),
            KeyRule("stem.position", "pos_embed"),
            module_rule("stem.patch", "patch_embed.proj"),
            *(module_rule(f"{ours}.{a}", f"{theirs}.{b}") for ours, theirs in SIDES for a, b in BLOCK),
            *(KeyRule(f"{ours}.attention.scale.gain", f"{theirs}.gamma_1") for ours, theirs in SIDES),
            *(KeyRule(f"{ours}.mlp.scale.gain", f"{theirs}.gamma_2") for ours, theirs in SIDES),
            module_rule("head.norm", "norm"),
            module_rule("head.classifier", "head"),
        ),
    ),
)
