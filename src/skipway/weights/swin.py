"""What timm, torchvision and Hugging Face call the parameters of a Swin, V1 and V2."""

from __future__ import annotations

import torch
from torch import Tensor

from skipway.models.swin import Swin
from skipway.weights.keymap import KeyMap, Rule, rule
from skipway.weights.tables import register

__all__: list[str] = []

BLOCK = "stages.{i}.{j}"
BRANCH = f"{BLOCK}.attention.branch"
STAGES = 4
"""What torchvision's names, which count stages and mergings in one row, are written out for."""


class WithoutKeys:
    """torchvision's V2 has a bias for queries, keys and values, and sets that of the keys to 0 in every forward."""

    def to_ours(self, tensor: Tensor) -> Tensor:
        query, _, value = tensor.chunk(3)
        return torch.cat((query, value))

    def to_theirs(self, tensor: Tensor) -> Tensor:
        query, value = tensor.chunk(2)
        return torch.cat((query, torch.zeros_like(query), value))


def norms(ours: str, first: str, second: str) -> tuple[Rule, ...]:
    """The norms of a block, which stand in front of the branches in V1 and behind them in V2."""
    return tuple(
        rule(f"{ours}.{branch}.{place}", theirs)
        for branch, theirs in (("attention", first), ("mlp", second))
        for place in ("pre.norm", "branch.end.norm")
    )


def positions(ours: str, theirs: str, function: str) -> tuple[Rule, ...]:
    """What is learned of relative positions, V1's table or V2's function, and V2's logit scale."""
    return (
        Rule(f"{ours}.position.table", f"{theirs}.relative_position_bias_table"),
        Rule(f"{ours}.position.inner", f"{theirs}.{function}.0.weight"),
        Rule(f"{ours}.position.inner_bias", f"{theirs}.{function}.0.bias"),
        Rule(f"{ours}.position.outer", f"{theirs}.{function}.2.weight"),
        Rule(f"{ours}.norm_q.log_scale", f"{theirs}.logit_scale"),
    )


def timm() -> tuple[Rule, ...]:
    """timm's rows; its mergings stand at the start of a stage."""
    theirs = "layers.{i}.blocks.{j}"
    return (
        rule("stem.patch", "patch_embed.proj"),
        rule("stem.norm", "patch_embed.norm"),
        *norms(BLOCK, f"{theirs}.norm1", f"{theirs}.norm2"),
        rule(f"{BRANCH}.qkv", f"{theirs}.attn.qkv"),
        Rule(f"{BRANCH}.bias.bias", (f"{theirs}.attn.q_bias", f"{theirs}.attn.v_bias")),
        *positions(BRANCH, f"{theirs}.attn", "cpb_mlp"),
        rule(f"{BRANCH}.proj", f"{theirs}.attn.proj"),
        rule(f"{BLOCK}.mlp.branch.fc{{k}}", f"{theirs}.mlp.fc{{k}}"),
        rule("stages.{i}.merge.norm", "layers.{i+1}.downsample.norm"),
        rule("stages.{i}.merge.reduction", "layers.{i+1}.downsample.reduction"),
        rule("head.norm", "norm"),
        rule("head.classifier", "head.fc"),
    )


def torchvision(stage: int) -> tuple[Rule, ...]:
    """torchvision's rows of one stage and the merging behind it."""
    block, theirs = f"stages.{stage}.{{j}}", f"features.{2 * stage + 1}.{{j}}"
    ours = f"{block}.attention.branch"
    return (
        *norms(block, f"{theirs}.norm1", f"{theirs}.norm2"),
        rule(f"{ours}.qkv", f"{theirs}.attn.qkv"),
        Rule(f"{ours}.bias.bias", f"{theirs}.attn.qkv.bias", WithoutKeys()),
        *positions(ours, f"{theirs}.attn", "cpb_mlp"),
        rule(f"{ours}.proj", f"{theirs}.attn.proj"),
        rule(f"{block}.mlp.branch.fc1", f"{theirs}.mlp.0"),
        rule(f"{block}.mlp.branch.fc2", f"{theirs}.mlp.3"),
        rule(f"stages.{stage}.merge.norm", f"features.{2 * stage + 2}.norm"),
        rule(f"stages.{stage}.merge.reduction", f"features.{2 * stage + 2}.reduction"),
    )


def huggingface(root: str) -> tuple[Rule, ...]:
    """The rows that Hugging Face's two classes share."""
    theirs = f"{root}.encoder.layers.{{i}}"
    return (
        rule("stem.patch", f"{root}.embeddings.patch_embeddings.projection"),
        rule("stem.norm", f"{root}.embeddings.norm"),
        *norms(BLOCK, f"{theirs}.blocks.{{j}}.layernorm_before", f"{theirs}.blocks.{{j}}.layernorm_after"),
        rule("stages.{i}.merge.norm", f"{theirs}.downsample.norm"),
        rule("stages.{i}.merge.reduction", f"{theirs}.downsample.reduction"),
        rule("head.norm", f"{root}.layernorm"),
        rule("head.classifier", "classifier"),
    )


def in_memory(theirs: str) -> tuple[Rule, ...]:
    """V1's branches as transformers 5 names them in memory."""
    return (
        rule(f"{BRANCH}.qkv", *(f"{theirs}.attention.{name}_proj" for name in "qkv")),
        rule(f"{BRANCH}.proj", f"{theirs}.attention.o_proj"),
        Rule(
            f"{BRANCH}.position.table",
            f"{theirs}.attention.relative_position_bias.relative_position_bias_table",
        ),
        rule(f"{BLOCK}.mlp.branch.fc{{k}}", f"{theirs}.mlp.fc{{k}}"),
    )


def in_files(theirs: str) -> tuple[Rule, ...]:
    """The branches as they are named in files, V2's in memory too."""
    inner = f"{theirs}.attention.self"
    return (
        rule(f"{BRANCH}.qkv", *(f"{inner}.{name}" for name in ("query", "key", "value"))),
        Rule(f"{BRANCH}.bias.bias", (f"{inner}.query.bias", f"{inner}.value.bias")),
        rule(f"{BRANCH}.proj", f"{theirs}.attention.output.dense"),
        *positions(BRANCH, inner, "continuous_position_bias_mlp"),
        rule(f"{BLOCK}.mlp.branch.fc1", f"{theirs}.intermediate.dense"),
        rule(f"{BLOCK}.mlp.branch.fc2", f"{theirs}.output.dense"),
    )


def cosine(model: Swin) -> bool:
    """Whether Hugging Face has the model in its class for V2."""
    return model.config.attention == "cosine"


TABLES = (r".*\.relative_position_index", r".*\.relative_coords_table", r".*\.attn_mask", r".*\.k_bias")

register(Swin, KeyMap("timm", timm(), TABLES))
register(
    Swin,
    KeyMap(
        "torchvision",
        (
            rule("stem.patch", "features.0.0"),
            rule("stem.norm", "features.0.2"),
            *(row for stage in range(STAGES) for row in torchvision(stage)),
            rule("head.norm", "norm"),
            rule("head.classifier", "head"),
        ),
        TABLES,
    ),
)
V1, V2 = (f"{root}.encoder.layers.{{i}}.blocks.{{j}}" for root in ("swin", "swinv2"))
UNUSED = (*TABLES, r".*\.mask_token")
register(Swin, KeyMap("huggingface", (*huggingface("swin"), *in_memory(V1), *in_files(V1)), UNUSED))
register(Swin, KeyMap("huggingface", (*huggingface("swinv2"), *in_files(V2)), UNUSED), when=cosine)
