"""Key maps of timm, torchvision and Hugging Face for ViT, DeiT, DINOv2 and CLIP's image tower."""

from __future__ import annotations

from skipway.models.vit import ViT
from skipway.weights.keymap import KeyMap, KeyRule, module_rule, with_base_names
from skipway.weights.stored_config import stated_differences
from skipway.weights.tables import register_config, register_keymap, register_misfit

__all__: list[str] = []

TIMM = (
    KeyRule("stem.token", "cls_token"),
    KeyRule("stem.registers", "reg_token"),
    KeyRule("stem.position", "pos_embed"),
    module_rule("stem.patch", "patch_embed.proj"),
    module_rule("stem.post.norm", "norm_pre"),
    module_rule("blocks.{i}.attention.pre.norm", "blocks.{i}.norm1"),
    module_rule("blocks.{i}.attention.branch.end.norm", "blocks.{i}.norm1"),
    module_rule("blocks.{i}.attention.branch.qkv", "blocks.{i}.attn.qkv"),
    module_rule("blocks.{i}.attention.branch.norm_q", "blocks.{i}.attn.q_norm"),
    module_rule("blocks.{i}.attention.branch.norm_k", "blocks.{i}.attn.k_norm"),
    module_rule("blocks.{i}.attention.branch.proj", "blocks.{i}.attn.proj"),
    KeyRule("blocks.{i}.attention.scale.gain", "blocks.{i}.ls1.gamma"),
    module_rule("blocks.{i}.mlp.pre.norm", "blocks.{i}.norm2"),
    module_rule("blocks.{i}.mlp.branch.end.norm", "blocks.{i}.norm2"),
    module_rule("blocks.{i}.mlp.branch.fc{k}", "blocks.{i}.mlp.fc{k}"),
    KeyRule("blocks.{i}.mlp.scale.gain", "blocks.{i}.ls2.gamma"),
    module_rule("head.classifier", "head"),
)

LAYER = "encoder.layers.encoder_layer_{i}"
TORCHVISION = (
    KeyRule("stem.token", "class_token"),
    KeyRule("stem.position", "encoder.pos_embedding"),
    module_rule("stem.patch", "conv_proj"),
    module_rule("blocks.{i}.attention.pre.norm", f"{LAYER}.ln_1"),
    KeyRule("blocks.{i}.attention.branch.qkv.weight", f"{LAYER}.self_attention.in_proj_weight"),
    KeyRule("blocks.{i}.attention.branch.qkv.bias", f"{LAYER}.self_attention.in_proj_bias"),
    module_rule("blocks.{i}.attention.branch.proj", f"{LAYER}.self_attention.out_proj"),
    module_rule("blocks.{i}.mlp.pre.norm", f"{LAYER}.ln_2"),
    # in memory, and in the files that torchvision publishes
    *(module_rule(f"blocks.{{i}}.mlp.branch.fc{k}", f"{LAYER}.mlp.{at}") for k, at in ((1, "0"), (2, "3"))),
    *(module_rule(f"blocks.{{i}}.mlp.branch.fc{k}", f"{LAYER}.mlp.linear_{k}") for k in (1, 2)),
    module_rule("head.norm", "encoder.ln"),
    module_rule("head.classifier", "heads.head"),
)


def vit_huggingface_rules(root: str) -> tuple[KeyRule, ...]:
    """The rows of one Hugging Face model class; names in memory first (transformers 5), then those in its files."""
    memory, file = f"{root}.layers.{{i}}", f"{root}.encoder.layer.{{i}}"
    rows: list[KeyRule] = [
        KeyRule("stem.token", f"{root}.embeddings.cls_token"),
        KeyRule("stem.registers", f"{root}.embeddings.register_tokens"),
        KeyRule("stem.position", f"{root}.embeddings.position_embeddings"),
        module_rule("stem.patch", f"{root}.embeddings.patch_embeddings.projection"),
        module_rule("head.norm", f"{root}.layernorm"),
        module_rule("head.classifier", "classifier"),
    ]
    for layer in (memory, file):
        rows += [
            module_rule("blocks.{i}.attention.branch.qkv", *(f"{layer}.attention.{x}_proj" for x in "qkv")),
            module_rule("blocks.{i}.attention.branch.proj", f"{layer}.attention.o_proj"),
            *(
                module_rule("blocks.{i}.attention.pre.norm", f"{layer}.{name}")
                for name in ("layernorm_before", "norm1")
            ),
            *(module_rule("blocks.{i}.mlp.pre.norm", f"{layer}.{name}") for name in ("layernorm_after", "norm2")),
            module_rule("blocks.{i}.mlp.branch.fc{k}", f"{layer}.mlp.fc{{k}}"),
            KeyRule("blocks.{i}.attention.scale.gain", f"{layer}.layer_scale1.lambda1"),
            KeyRule("blocks.{i}.mlp.scale.gain", f"{layer}.layer_scale2.lambda1"),
        ]
    rows += [
        module_rule(
            "blocks.{i}.attention.branch.qkv", *(f"{file}.attention.attention.{x}" for x in ("query", "key", "value"))
        ),
        module_rule("blocks.{i}.attention.branch.proj", f"{file}.attention.output.dense"),
        module_rule("blocks.{i}.mlp.branch.fc1", f"{file}.intermediate.dense"),
        module_rule("blocks.{i}.mlp.branch.fc2", f"{file}.output.dense"),
    ]
    return tuple(rows)


# timm's two names tell whether the norm precedes the pooling or follows it
register_keymap(ViT, KeyMap("timm", (*TIMM, module_rule("head.norm", "norm"))))
register_keymap(
    ViT,
    KeyMap("timm", (*TIMM, module_rule("head.norm", "fc_norm"))),
    when=lambda model: model.config.pooling == "mean",
)
register_keymap(ViT, KeyMap("torchvision", TORCHVISION))
register_misfit(
    ViT,
    "torchvision",
    lambda model: None if model.config.act == "gelu" else f"act={model.config.act!r}; its ViT has the exact GELU alone",
)
register_keymap(
    ViT,
    KeyMap(
        "huggingface",
        (
            *with_base_names("vit", vit_huggingface_rules("vit")),
            *(row for root in ("dinov2", "dinov2_with_registers") for row in vit_huggingface_rules(root)),
        ),
        ignored=(r".*\.mask_token",),
        unused=(r"(vit\.)?pooler\.dense\.(weight|bias)",),
    ),
)
STATED = {"heads": "num_attention_heads", "epsilon": "layer_norm_eps", "act": "hidden_act"}
OF_VIT = {"num_attention_heads": 12, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
OF_DINOV2 = {**OF_VIT, "layer_norm_eps": 1e-6}
DEFAULTS = {"vit": OF_VIT, "dinov2": OF_DINOV2, "dinov2_with_registers": OF_DINOV2}
register_config(
    ViT,
    "huggingface",
    lambda model, described: stated_differences(
        {name: getattr(model.config, name) for name in STATED}, described, STATED, DEFAULTS
    ),
)
