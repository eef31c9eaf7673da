"""What timm, torchvision and Hugging Face call the parameters of a ViT (DeiT, DINOv2, CLIP's tower too)."""

from __future__ import annotations

from skipway.models.vit import ViT
from skipway.weights.keymap import KeyMap, Rule, rule
from skipway.weights.tables import register

__all__: list[str] = []

TIMM = (
    Rule("stem.token", "cls_token"),
    Rule("stem.registers", "reg_token"),
    Rule("stem.position", "pos_embed"),
    rule("stem.patch", "patch_embed.proj"),
    rule("stem.post.norm", "norm_pre"),
    rule("blocks.{i}.attention.pre.norm", "blocks.{i}.norm1"),
    rule("blocks.{i}.attention.branch.end.norm", "blocks.{i}.norm1"),
    rule("blocks.{i}.attention.branch.qkv", "blocks.{i}.attn.qkv"),
    rule("blocks.{i}.attention.branch.norm_q", "blocks.{i}.attn.q_norm"),
    rule("blocks.{i}.attention.branch.norm_k", "blocks.{i}.attn.k_norm"),
    rule("blocks.{i}.attention.branch.proj", "blocks.{i}.attn.proj"),
    Rule("blocks.{i}.attention.scale.gain", "blocks.{i}.ls1.gamma"),
    rule("blocks.{i}.mlp.pre.norm", "blocks.{i}.norm2"),
    rule("blocks.{i}.mlp.branch.end.norm", "blocks.{i}.norm2"),
    rule("blocks.{i}.mlp.branch.fc{k}", "blocks.{i}.mlp.fc{k}"),
    Rule("blocks.{i}.mlp.scale.gain", "blocks.{i}.ls2.gamma"),
    rule("head.classifier", "head"),
)

LAYER = "encoder.layers.encoder_layer_{i}"
TORCHVISION = (
    Rule("stem.token", "class_token"),
    Rule("stem.position", "encoder.pos_embedding"),
    rule("stem.patch", "conv_proj"),
    rule("blocks.{i}.attention.pre.norm", f"{LAYER}.ln_1"),
    Rule("blocks.{i}.attention.branch.qkv.weight", f"{LAYER}.self_attention.in_proj_weight"),
    Rule("blocks.{i}.attention.branch.qkv.bias", f"{LAYER}.self_attention.in_proj_bias"),
    rule("blocks.{i}.attention.branch.proj", f"{LAYER}.self_attention.out_proj"),
    rule("blocks.{i}.mlp.pre.norm", f"{LAYER}.ln_2"),
    # in memory, and in the files that torchvision publishes
    *(rule(f"blocks.{{i}}.mlp.branch.fc{k}", f"{LAYER}.mlp.{at}") for k, at in ((1, "0"), (2, "3"))),
    *(rule(f"blocks.{{i}}.mlp.branch.fc{k}", f"{LAYER}.mlp.linear_{k}") for k in (1, 2)),
    rule("head.norm", "encoder.ln"),
    rule("head.classifier", "heads.head"),
)


def huggingface(root: str) -> tuple[Rule, ...]:
    """The rows of one Hugging Face model class; names in memory first (transformers 5), then those in its files."""
    memory, file = f"{root}.layers.{{i}}", f"{root}.encoder.layer.{{i}}"
    rows: list[Rule] = [
        Rule("stem.token", f"{root}.embeddings.cls_token"),
        Rule("stem.registers", f"{root}.embeddings.register_tokens"),
        Rule("stem.position", f"{root}.embeddings.position_embeddings"),
        rule("stem.patch", f"{root}.embeddings.patch_embeddings.projection"),
        rule("head.norm", f"{root}.layernorm"),
        rule("head.classifier", "classifier"),
    ]
    for layer in (memory, file):
        rows += [
            rule("blocks.{i}.attention.branch.qkv", *(f"{layer}.attention.{x}_proj" for x in "qkv")),
            rule("blocks.{i}.attention.branch.proj", f"{layer}.attention.o_proj"),
            *(rule("blocks.{i}.attention.pre.norm", f"{layer}.{name}") for name in ("layernorm_before", "norm1")),
            *(rule("blocks.{i}.mlp.pre.norm", f"{layer}.{name}") for name in ("layernorm_after", "norm2")),
            rule("blocks.{i}.mlp.branch.fc{k}", f"{layer}.mlp.fc{{k}}"),
            Rule("blocks.{i}.attention.scale.gain", f"{layer}.layer_scale1.lambda1"),
            Rule("blocks.{i}.mlp.scale.gain", f"{layer}.layer_scale2.lambda1"),
        ]
    rows += [
        rule(
            "blocks.{i}.attention.branch.qkv", *(f"{file}.attention.attention.{x}" for x in ("query", "key", "value"))
        ),
        rule("blocks.{i}.attention.branch.proj", f"{file}.attention.output.dense"),
        rule("blocks.{i}.mlp.branch.fc1", f"{file}.intermediate.dense"),
        rule("blocks.{i}.mlp.branch.fc2", f"{file}.output.dense"),
    ]
    return tuple(rows)


# timm's two names say where the norm stands: before the pooling, or behind a mean
register(ViT, KeyMap("timm", (*TIMM, rule("head.norm", "norm"))))
register(
    ViT,
    KeyMap("timm", (*TIMM, rule("head.norm", "fc_norm"))),
    when=lambda model: model.config.pooling == "mean",
)
register(ViT, KeyMap("torchvision", TORCHVISION))
register(
    ViT,
    KeyMap(
        "huggingface",
        tuple(row for root in ("vit", "dinov2", "dinov2_with_registers") for row in huggingface(root)),
        ignored=(r".*\.mask_token",),
    ),
)
