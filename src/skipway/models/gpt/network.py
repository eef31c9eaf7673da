"""The decoder: tokens to vectors, a chain of causal attention and MLP branches, a head."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.models.gpt.config import GPTConfig
from skipway.models.transformer import NORM_PLACEMENTS, TOKEN_KIT, transformer_block
from skipway.nn import (
    CausalAttention,
    Classifier,
    DecodingState,
    GatedMlp,
    Linear,
    Mlp,
    Role,
    RotaryPositions,
    TruncatedNormal,
    sequence,
)
from skipway.nn.kit import Kit
from skipway.nn.placement import Placement
from skipway.nn.site import Site

__all__ = ["GPT", "TextStem"]

ACTS = {"gelu": nn.GELU, "tanhgelu": partial(nn.GELU, approximate="tanh"), "silu": nn.SiLU, "relu": nn.ReLU}
START = TruncatedNormal(0.02)


class GPT(nn.Module):
    """A decoder (Radford et al. 2019): logits = head(blocks(stem(ids))), those at t computed from ids up to t.

    A tied head multiplies by the stem's table; there is no second parameter, so nothing can come apart.

    Shapes: (N, T) whole numbers in [0, vocab), T ≤ context → (N, T, vocab). Within `decoding(model, capacity)` a call
    continues the tokens of earlier ones.

    Args:
        config: what to build.

    Raises:
        SkipwayError: a token out of the vocabulary, or more tokens than the context.

    >>> model = GPT(GPTConfig(dim=16, blocks=2, heads=2, vocab=9, context=8))
    >>> model(torch.zeros(2, 8, dtype=torch.long)).shape
    torch.Size([2, 8, 9])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        scheme, placement = config.scheme, NORM_PLACEMENTS[config.norm]
        family = gpt_kit(config)
        kit, outside = scheme.kit(None, family), scheme.place(None, placement)
        self.stem = TextStem(config, kit, outside)
        self.blocks = nn.Sequential(
            *(
                transformer_block(
                    partial(gpt_attention, config),
                    Site(dim=config.dim, index=index, depth=config.branches, since=index, spatial=0),
                    config.mlp_width,
                    kit=family,
                    placement=placement,
                    scheme=scheme,
                    mlp=GatedMlp if config.gated else Mlp,
                )
                for index in range(0, config.branches, 2)
            )
        )
        self.head = gpt_head(config, kit, outside)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.head(self.blocks(self.stem(ids)))
        return F.linear(h, self.stem.token) if self.config.tied else h

    def classifier_weight(self) -> nn.Parameter | None:
        """The matrix that makes the logits where no `Classifier` does: a tied head has that of the stem."""
        return self.stem.token if self.config.tied else None


def gpt_kit(config: GPTConfig) -> Kit:
    """What the family is built from, undressed."""
    bias = config.bias == "all"
    norm = (
        partial(nn.RMSNorm, eps=config.epsilon) if config.rms else partial(nn.LayerNorm, eps=config.epsilon, bias=bias)
    )
    return replace(TOKEN_KIT, linear=partial(Linear, bias=bias, initial=START), norm=norm, act=ACTS[config.act])


def gpt_attention(config: GPTConfig, *, kit: Kit, placement: Placement) -> CausalAttention:
    """The attention branch; the norm of queries and keys is the family's, whatever the scheme does to the stream's."""
    if config.bias == "attention":
        kit = replace(kit, linear=partial(kit.linear, bias=True))
    rotary = partial(RotaryPositions, theta=config.theta, scaling=config.rotary_scaling)
    return CausalAttention(
        config.dim,
        config.heads,
        kit=kit,
        placement=placement,
        groups=config.groups,
        head_dim=config.head_dim,
        head_norm=gpt_kit(config).norm if config.head_norm else None,
        rotary=rotary if config.position == "rotary" else None,
        bias=config.bias != "none",
    )


class TextStem(nn.Module):
    """Tokens to vectors: a row of a table for each token, and one for its position where positions are learned.

    Shapes: (N, T) → (N, T, dim).

    Raises:
        SkipwayError: a token out of the vocabulary, or more tokens than the context.
    """

    role = Role("embedding")

    def __init__(self, config: GPTConfig, kit: Kit, placement: Placement) -> None:
        super().__init__()
        self.context = config.context
        self.token = nn.Parameter(torch.zeros(config.vocab, config.dim))
        self.position = nn.Parameter(torch.zeros(config.context, config.dim)) if config.position == "learned" else None
        self.post = sequence(**kit.parts(placement.post, config.dim), open=config.scheme.open())
        self.decoding_state: DecodingState | None = None

    def reset_parameters(self) -> None:
        """Both tables from N(0, 0.02²), as GPT-2 in transformers."""
        for table in (self.token, self.position):
            if table is not None:
                nn.init.normal_(table, std=0.02)

    def resampled(self, name: str, table: Tensor) -> Tensor | None:
        """A longer table of positions cut to this context, whose rows mean the same; None for a shorter one."""
        return table[: self.context] if name == "position" and len(table) > self.context else None

    def forward(self, ids: Tensor) -> Tensor:
        start = 0 if self.decoding_state is None else self.decoding_state.length
        end = start + self.checked(ids).shape[1]
        if end > self.context:
            raise SkipwayError(
                f"{end} tokens: this network is made for context={self.context}; call it with the last of them, "
                f"ids[:, -{self.context}:], or build it with context={end}"
            )
        try:
            x = F.embedding(ids, self.token)
        except IndexError:
            wrong, vocab = int(ids.min()) if ids.min() < 0 else int(ids.max()), len(self.token)
            raise SkipwayError(
                f"token {wrong}: this network has vocab={vocab}, so the rule is 0 <= token < {vocab}; is it the "
                "tokenizer that the network was trained with?"
            ) from None
        return self.post(x if self.position is None else x + self.position[start:end])

    def checked(self, ids: Tensor) -> Tensor:
        """The tokens, if they are that."""
        if ids.ndim != 2 or ids.dtype not in (torch.long, torch.int32):
            raise SkipwayError(
                f"tokens of shape {tuple(ids.shape)} and {ids.dtype}: the rule is (N, T) of torch.long, a batch of rows"
            )
        return ids


def gpt_head(config: GPTConfig, kit: Kit, placement: Placement) -> nn.Module:
    """Norm and classifier; post-norm streams need no norm, and a tied classifier is no module."""
    norm = None if kit.norm is None or "norm" in placement.post else kit.norm(config.dim)
    classifier = None if config.tied else Classifier(config.dim, config.vocab, bias=False, initial=START)
    return sequence(
        close=config.scheme.close(config.dim, 0, kit),
        norm=norm,
        before=None if kit.before is None else kit.before(),
        classifier=classifier,
    )
