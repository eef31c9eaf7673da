"""Key maps of timm, torchvision and Hugging Face for Swin, V1 and V2."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skipway.models.swin import Swin, SwinConfig
from skipway.weights.keymap import KeyMap, KeyRule, module_rule, with_base_names
from skipway.weights.stored_config import stated_differences
from skipway.weights.tables import register_config, register_keymap, register_misfit

__all__: list[str] = []

BLOCK = "stages.{i}.{j}"
BRANCH = f"{BLOCK}.attention.branch"
STAGES = 4
"""Number of stages for which torchvision's names are written out; they count stages and mergings together."""


class WithoutKeys:
    """torchvision's V2 has a bias for queries, keys and values, and sets that of the keys to 0 in every forward."""

    def to_ours(self, tensor: Tensor) -> Tensor:
        query, _, value = tensor.chunk(3)
        return torch.cat((query, value))

    def to_theirs(self, tensor: Tensor) -> Tensor:
        query, value = tensor.chunk(2)
        return torch.cat((query, torch.zeros_like(query), value))


def swin_norm_rules(ours: str, first: str, second: str) -> tuple[KeyRule, ...]:
    """The norms of a block, before the branches in V1 and after them in V2."""
    return tuple(
        module_rule(f"{ours}.{branch}.{place}", theirs)
        for branch, theirs in (("attention", first), ("mlp", second))
        for place in ("pre.norm", "branch.end.norm")
    )


def swin_position_rules(ours: str, theirs: str, function: str) -> tuple[KeyRule, ...]:
    """Learned relative positions (V1's table or V2's function) and V2's logit scale."""
    return (
        KeyRule(f"{ours}.position.table", f"{theirs}.relative_position_bias_table"),
        KeyRule(f"{ours}.position.inner", f"{theirs}.{function}.0.weight"),
        KeyRule(f"{ours}.position.inner_bias", f"{theirs}.{function}.0.bias"),
        KeyRule(f"{ours}.position.outer", f"{theirs}.{function}.2.weight"),
        KeyRule(f"{ours}.norm_q.log_scale", f"{theirs}.logit_scale"),
    )


def swin_timm_rules() -> tuple[KeyRule, ...]:
    """timm's rows; its mergings stand at the start of a stage."""
    theirs = "layers.{i}.blocks.{j}"
    return (
        module_rule("stem.patch", "patch_embed.proj"),
        module_rule("stem.norm", "patch_embed.norm"),
        *swin_norm_rules(BLOCK, f"{theirs}.norm1", f"{theirs}.norm2"),
        module_rule(f"{BRANCH}.qkv", f"{theirs}.attn.qkv"),
        KeyRule(f"{BRANCH}.bias.bias", (f"{theirs}.attn.q_bias", f"{theirs}.attn.v_bias")),
        *swin_position_rules(BRANCH, f"{theirs}.attn", "cpb_mlp"),
        module_rule(f"{BRANCH}.proj", f"{theirs}.attn.proj"),
        module_rule(f"{BLOCK}.mlp.branch.fc{{k}}", f"{theirs}.mlp.fc{{k}}"),
        module_rule("stages.{i}.merge.norm", "layers.{i+1}.downsample.norm"),
        module_rule("stages.{i}.merge.reduction", "layers.{i+1}.downsample.reduction"),
        module_rule("head.norm", "norm"),
        module_rule("head.classifier", "head.fc"),
    )


def swin_torchvision_rules(stage: int) -> tuple[KeyRule, ...]:
    """torchvision's rows of one stage and the merging that follows."""
    block, theirs = f"stages.{stage}.{{j}}", f"features.{2 * stage + 1}.{{j}}"
    ours = f"{block}.attention.branch"
    return (
        *swin_norm_rules(block, f"{theirs}.norm1", f"{theirs}.norm2"),
        module_rule(f"{ours}.qkv", f"{theirs}.attn.qkv"),
        KeyRule(f"{ours}.bias.bias", f"{theirs}.attn.qkv.bias", WithoutKeys()),
        *swin_position_rules(ours, f"{theirs}.attn", "cpb_mlp"),
        module_rule(f"{ours}.proj", f"{theirs}.attn.proj"),
        module_rule(f"{block}.mlp.branch.fc1", f"{theirs}.mlp.0"),
        module_rule(f"{block}.mlp.branch.fc2", f"{theirs}.mlp.3"),
        module_rule(f"stages.{stage}.merge.norm", f"features.{2 * stage + 2}.norm"),
        module_rule(f"stages.{stage}.merge.reduction", f"features.{2 * stage + 2}.reduction"),
    )


def swin_huggingface_rules(root: str) -> tuple[KeyRule, ...]:
    """The rows that Hugging Face's two classes share."""
    theirs = f"{root}.encoder.layers.{{i}}"
    return (
        module_rule("stem.patch", f"{root}.embeddings.patch_embeddings.projection"),
        module_rule("stem.norm", f"{root}.embeddings.norm"),
        *swin_norm_rules(BLOCK, f"{theirs}.blocks.{{j}}.layernorm_before", f"{theirs}.blocks.{{j}}.layernorm_after"),
        module_rule("stages.{i}.merge.norm", f"{theirs}.downsample.norm"),
        module_rule("stages.{i}.merge.reduction", f"{theirs}.downsample.reduction"),
        module_rule("head.norm", f"{root}.layernorm"),
        module_rule("head.classifier", "classifier"),
    )


def swin_in_memory_rules(theirs: str) -> tuple[KeyRule, ...]:
    """V1's branches as transformers 5 names them in memory."""
    return (
        module_rule(f"{BRANCH}.qkv", *(f"{theirs}.attention.{name}_proj" for name in "qkv")),
        module_rule(f"{BRANCH}.proj", f"{theirs}.attention.o_proj"),
        KeyRule(
            f"{BRANCH}.position.table",
            f"{theirs}.attention.relative_position_bias.relative_position_bias_table",
        ),
        module_rule(f"{BLOCK}.mlp.branch.fc{{k}}", f"{theirs}.mlp.fc{{k}}"),
    )


def swin_in_file_rules(theirs: str) -> tuple[KeyRule, ...]:
    """The branches as they are named in files, V2's in memory too."""
    inner = f"{theirs}.attention.self"
    return (
        module_rule(f"{BRANCH}.qkv", *(f"{inner}.{name}" for name in ("query", "key", "value"))),
        KeyRule(f"{BRANCH}.bias.bias", (f"{inner}.query.bias", f"{inner}.value.bias")),
        module_rule(f"{BRANCH}.proj", f"{theirs}.attention.output.dense"),
        *swin_position_rules(BRANCH, inner, "continuous_position_bias_mlp"),
        module_rule(f"{BLOCK}.mlp.branch.fc1", f"{theirs}.intermediate.dense"),
        module_rule(f"{BLOCK}.mlp.branch.fc2", f"{theirs}.output.dense"),
    )


def uses_cosine_attention(model: Swin) -> bool:
    """True if the model belongs to Hugging Face's class for V2."""
    return model.config.attention == "cosine"


def window_differences(config: SwinConfig, windows: Sequence[int], learned: Sequence[int]) -> list[str]:
    """In which windows a V2 differs from the one that weights are of, which no weight shows, in words.

    Args:
        config: of the model, which may have other windows on purpose if it states what they were learned at.
        windows: of the weights' network, per stage.
        learned: at which its position functions were learned.
    """
    rows = [("learned_window", config.learned_windows, tuple(learned))]
    if config.learned_window is None:
        rows.insert(0, ("window", config.windows, tuple(windows)))
    return [f"{name}={own} in the model, {name}={theirs} in the file" for name, own, theirs in rows if own != theirs]


def table_differences(model: Swin, state: Mapping[str, Tensor], *, every: int = 1) -> list[str]:
    """What a file's `relative_coords_table`s, (1, 2w - 1, 2w - 1, 2), show of windows of w tokens. The offset of
    neighbours is log₂(1 + 8 / (v - 1)) / log₂ 8, for the windows of v tokens that the function was learned at.

    Args:
        model: ours.
        state: the file.
        every: how far apart the numbers of stages are in its names.
    """
    config = model.config
    windows, learned = list(config.windows), list(config.learned_windows)
    for key, table in state.items():
        number = re.search(r"(?<![^.])\d+(?![^.])", key)  # the 2 of "swinv2" is no stage
        if number is None or not key.endswith(".relative_coords_table") or not uses_cosine_attention(model):
            continue
        stage = int(number[0]) // every
        dense = not table.is_nested and table.layout == torch.strided and table.is_floating_point()
        if stage >= len(windows) or not dense or table.ndim != 4 or table.shape[1] < 3 or not table.numel():
            continue
        windows[stage] = centre = (table.shape[1] + 1) // 2
        offset = 0.0 if table.is_meta else float(table[0, centre, 0, 0])
        if 1e-3 < offset < 2:
            learned[stage] = round(1 + 8 / (8**offset - 1))
    return window_differences(config, windows, learned)


TABLES = (r".*\.relative_position_index", r".*\.relative_coords_table", r".*\.attn_mask", r".*\.k_bias")

register_keymap(Swin, KeyMap("timm", swin_timm_rules(), TABLES, differences=table_differences))
register_keymap(
    Swin,
    KeyMap(
        "torchvision",
        (
            module_rule("stem.patch", "features.0.0"),
            module_rule("stem.norm", "features.0.2"),
            *(row for stage in range(STAGES) for row in swin_torchvision_rules(stage)),
            module_rule("head.norm", "norm"),
            module_rule("head.classifier", "head"),
        ),
        TABLES,
        differences=partial(table_differences, every=2),
    ),
)
V1, V2 = (f"{root}.encoder.layers.{{i}}.blocks.{{j}}" for root in ("swin", "swinv2"))
UNUSED = (*TABLES, r".*\.mask_token")
register_keymap(
    Swin,
    KeyMap(
        "huggingface",
        with_base_names("swin", (*swin_huggingface_rules("swin"), *swin_in_memory_rules(V1), *swin_in_file_rules(V1))),
        UNUSED,
    ),
)
register_keymap(
    Swin,
    KeyMap(
        "huggingface",
        with_base_names("swinv2", (*swin_huggingface_rules("swinv2"), *swin_in_file_rules(V2))),
        UNUSED,
        differences=table_differences,
    ),
    when=uses_cosine_attention,
)


def describe_swin_misfit(model: Swin) -> str | None:
    """Why no library computes what a Swin does, all of which have V1 and V2 under the same names; None: they do."""
    attention, norm = model.config.attention, model.config.norm
    if norm == {"dot": "pre", "cosine": "respost"}[attention]:
        return None
    return f"attention={attention!r}, norm={norm!r}; it has 'dot' with 'pre' (V1), 'cosine' with 'respost' (V2) alone"


for library in ("timm", "torchvision", "huggingface"):
    register_misfit(Swin, library, describe_swin_misfit)


OF_SWINV2 = {"window_size": 7, "image_size": 224, "patch_size": 4, "pretrained_window_sizes": None}
STATED = {"act": "hidden_act", "epsilon": "layer_norm_eps"}


def swin_config_differences(model: Swin, described: Mapping[str, Any]) -> list[str]:
    """How a Swin differs from the one that a `config.json` of transformers describes, which has smaller windows where
    the map is smaller, whose sides it halves by rounding down.
    """
    found = stated_differences({"act": "gelu", "epsilon": 1e-5}, described, STATED, {})
    if not uses_cosine_attention(model):  # V1's tables show its windows
        return found
    values: dict[str, Any] = {**OF_SWINV2, **described}
    side, image, patch = (least_side(values[name]) for name in ("window_size", "image_size", "patch_size"))
    stages = len(model.config.blocks)
    windows = [min(side, image // patch // 2**stage) for stage in range(stages)]
    learned = (*(values["pretrained_window_sizes"] or ()), *[0] * stages)[:stages]
    return found + window_differences(
        model.config, windows, [int(own) or window for own, window in zip(learned, windows, strict=True)]
    )


def least_side(value: Any) -> int:
    """A side in pixels or tokens, of two the smaller one."""
    return max(1, min(map(int, value)) if isinstance(value, list | tuple) else int(value))


register_config(Swin, "huggingface", swin_config_differences)
