"""The published members of the GPT family."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial

from skipway.errors import SkipwayError
from skipway.models.family import FAMILIES, Family, Variant, join_options
from skipway.models.gpt.config import GPTConfig
from skipway.models.gpt.network import GPT
from skipway.nn import parse_rotary_scaling
from skipway.schemes import parse_scheme

__all__ = ["SIZES", "gpt_config", "gpt_name"]

# Radford et al. 2019, sec. 2.3: the last map of each branch starts divided by √L, L branches
GPT2 = GPTConfig(
    dim=768, blocks=12, heads=12, vocab=50257, context=1024, scheme=parse_scheme("depthscaled(how='init')")
)
NANO = replace(GPT2, bias="none", vocab=256, context=256)
LLAMA = GPTConfig(
    dim=2048,
    blocks=16,
    heads=32,
    groups=8,
    hidden=8192,
    rms=True,
    position="rotary",
    act="silu",
    gated=True,
    bias="none",
    vocab=128256,
    context=8192,
)
QWEN3 = replace(LLAMA, head_norm=True, theta=1e6, epsilon=1e-6, vocab=151936, context=40960)

SIZES: dict[str, tuple[GPTConfig, int, str]] = {
    # the authors of minGPT (nano, micro, mini) and nanoGPT (small: its network for characters), here for bytes
    "gpt-nano": (replace(NANO, dim=48, blocks=3, heads=3), 107_856, "minGPT's gpt-nano, for bytes"),
    "gpt-micro": (replace(NANO, dim=128, blocks=4, heads=4), 853_120, "nanoGPT's network for a CPU, for bytes"),
    "gpt-mini": (replace(NANO, dim=192, blocks=6, heads=6), 2_755_008, "minGPT's gpt-mini, for bytes"),
    "gpt-small": (replace(NANO, dim=384, blocks=6, heads=6), 10_818_432, "nanoGPT's network for a GPU, for bytes"),
    # Radford et al. 2019, table 2; parameters of the published weights
    "gpt2": (GPT2, 124_439_808, "GPT-2, 50,257 tokens"),
    "gpt2-medium": (replace(GPT2, dim=1024, blocks=24, heads=16), 354_823_168, "GPT-2, 50,257 tokens"),
    "gpt2-large": (replace(GPT2, dim=1280, blocks=36, heads=20), 774_030_080, "GPT-2, 50,257 tokens"),
    "gpt2-xl": (replace(GPT2, dim=1600, blocks=48, heads=25), 1_557_611_200, "GPT-2, 50,257 tokens"),
    # the config of Llama 3.2, whose frequencies are scaled for 131,072 tokens
    "llama3.2-1b": (
        replace(LLAMA, theta=5e5, rotary_scaling=parse_rotary_scaling("llama3(32.0, 1.0, 4.0, 8192)"), context=131072),
        1_235_814_400,
        "Llama 3.2, 128,256 tokens",
    ),
    # model cards of SmolLM2 (a Llama) and Qwen3
    "smollm2-135m": (
        replace(LLAMA, dim=576, blocks=30, heads=9, groups=3, hidden=1536, theta=1e5, vocab=49152),
        134_515_008,
        "Llama's architecture, 49,152 tokens",
    ),
    "smollm2-360m": (
        replace(LLAMA, dim=960, blocks=32, heads=15, groups=5, hidden=2560, theta=1e5, vocab=49152),
        361_821_120,
        "Llama's architecture, 49,152 tokens",
    ),
    "qwen3-0.6b": (
        replace(QWEN3, dim=1024, blocks=28, heads=16, groups=8, head_dim=128, hidden=3072),
        596_049_920,
        "Qwen3, 151,936 tokens",
    ),
    "qwen3-1.7b": (
        replace(QWEN3, dim=2048, blocks=28, heads=16, groups=8, head_dim=128, hidden=6144),
        1_720_574_976,
        "Qwen3, 151,936 tokens",
    ),
}


def gpt_config(depth: int, base: GPTConfig = SIZES["gpt-small"][0]) -> GPTConfig:
    """`base` with another number of blocks.

    >>> gpt_config(48).branches
    96
    """
    if depth < 1:
        raise SkipwayError(f"depth={depth}: a GPT has at least one block; every depth from 1 on is possible")
    return replace(base, blocks=depth)


def gpt_name(config: GPTConfig) -> str:
    """A name for `build` that gives this config with its own vocab, context and scheme.

    >>> gpt_name(SIZES["gpt2"][0]), gpt_name(GPTConfig(dim=384, blocks=2, heads=6, bias="none", act="relu"))
    ('gpt2', "gpt-small(blocks=2, act='relu')")
    """
    free = {"vocab": config.vocab, "context": config.context, "scheme": config.scheme}
    for name, (published, _, _) in SIZES.items():
        if replace(published, **free) == config:
            return name
    base = replace(gpt_config(6), **free)  # a name with a number, "gpt-2", may be a published one
    pairs = ((each.name, getattr(config, each.name)) for each in fields(config))
    others = {name: value for name, value in pairs if value != getattr(base, name)}
    return join_options("gpt-small", others)


FAMILIES.add(
    "gpt",
    Family(
        name="gpt",
        description="Radford et al. 2019: causal attention and MLP branches over tokens; depth counts blocks",
        module=GPT,
        at_depth=gpt_config,
        pattern=r"gpt-(?P<depth>\d+)",
        variants=tuple(
            Variant(
                name=name,
                family="gpt",
                config=config,
                at_depth=partial(gpt_config, base=config),
                parameters=parameters,
                description=description,
            )
            for name, (config, parameters, description) in SIZES.items()
        ),
    ),
)
