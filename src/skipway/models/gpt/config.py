"""The config of the GPT family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from skipway.errors import SkipwayError
from skipway.models.transformer import Norm
from skipway.nn import RotaryScaling, parse_rotary_scaling
from skipway.schemes import Identity, Scheme
from skipway.validation import check_choice, check_positive_int

__all__ = ["GPTConfig"]

Act = Literal["gelu", "tanhgelu", "silu", "relu"]
Bias = Literal["all", "attention", "qkv", "none"]
Position = Literal["learned", "rotary", "none"]


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """A decoder: a language model that sees no later token.

    Args:
        dim: channels of the tokens.
        blocks: transformer blocks, two residual branches each.
        heads: query heads.
        groups: heads of keys and values, a divisor of `heads`; None: `heads`.
        head_dim: channels of a head; None: dim / heads.
        hidden: channels inside the MLP; None: 4 · dim, gated 8/3 · dim up to a multiple of 64 (Touvron et al. 2023).
        norm: "pre" (GPT-2), "post" (GPT-1), "respost" (OLMo 2), "sandwich" (Gemma 2).
        rms: root mean square norm (Zhang & Sennrich 2019) in place of LayerNorm.
        head_norm: normalise queries and keys per head (Qwen3).
        position: "learned" table (GPT-2), "rotary" (Su et al. 2021) or "none".
        theta: base of rotary positions.
        rotary_scaling: of their frequencies, for longer contexts, "llama3(factor=32, low=1, high=4, original=8192)" for
            example, or "linear(factor=4)".
        act: activation of the MLP; "tanhgelu" is GELU's approximation by a tanh (GPT-2).
        gated: gated MLP (SwiGLU with "silu").
        bias: "all" maps and norms have one, the maps of "attention", those of queries, keys and values ("qkv", Qwen2),
            or "none".
        tied: the classifier is the table of tokens.
        epsilon: of the norms.
        vocab: tokens that are told apart.
        context: tokens that the network is made for; more are refused.
        scheme: how the connections are dressed.

    >>> GPTConfig(dim=384, blocks=6, heads=6).branches
    12
    """

    dim: int
    blocks: int
    heads: int
    groups: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    norm: Norm = "pre"
    rms: bool = False
    head_norm: bool = False
    position: Position = "learned"
    theta: float = 10000.0
    rotary_scaling: RotaryScaling | str | None = None
    act: Act = "tanhgelu"
    gated: bool = False
    bias: Bias = "all"
    tied: bool = True
    epsilon: float = 1e-5
    vocab: int = 256
    context: int = 256
    scheme: Scheme = Identity()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        for name in ("dim", "blocks", "heads", "vocab", "context"):
            check_positive_int(name, getattr(self, name))
        for name in ("groups", "head_dim", "hidden"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        if self.head_dim is None and self.dim % self.heads:
            raise SkipwayError(
                f"dim={self.dim}, heads={self.heads}: the rule is that heads divides dim, or give head_dim"
            )
        if self.groups is not None and self.heads % self.groups:
            raise SkipwayError(f"heads={self.heads}, groups={self.groups}: the rule is that groups divides heads")
        width = self.dim // self.heads if self.head_dim is None else self.head_dim
        if self.position == "rotary" and width % 2:
            raise SkipwayError(f"head_dim={width}, position='rotary': the rule is an even number of channels in a head")
        if not self.theta > 0:
            raise SkipwayError(f"theta={self.theta}: the rule is theta > 0")
        object.__setattr__(self, "rotary_scaling", parse_rotary_scaling(self.rotary_scaling))
        if self.rotary_scaling is not None and self.position != "rotary":
            text = f"rotary_scaling='{self.rotary_scaling}', position={self.position!r}"
            raise SkipwayError(f"{text}: the rule is position='rotary'")
        for name, kind in (("norm", Norm), ("act", Act), ("bias", Bias), ("position", Position)):
            check_choice(name, getattr(self, name), get_args(kind))

    @property
    def mlp_width(self) -> int:
        """Channels inside the MLP."""
        if self.hidden is not None:
            return self.hidden
        return -(-8 * self.dim // 192) * 64 if self.gated else 4 * self.dim

    @property
    def branches(self) -> int:
        """L, the number of residual branches: attention and MLP of every block."""
        return 2 * self.blocks

    @property
    def depth(self) -> int:
        """Transformer blocks, the papers' depth."""
        return self.blocks
