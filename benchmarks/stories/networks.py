"""Networks of the stories that no other benchmark has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["CompressingDecoder", "DigitRegressor"]


class DigitRegressor(nn.Module):
    """Images (N, 1, 8, 8) → one number for each, squeezed to (N,) as text regressors of that time had it."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).squeeze(-1)


class CompressingDecoder(nn.Module):
    """A decoder of bytes in the shape of a U-Net: blocks, every two positions averaged to one, blocks, every position
    given back twice and added to what was there before.

    Args:
        shifted: give back one position later, so that no position is given a token that stands after it.
    """

    def __init__(self, *, shifted: bool, dim: int = 32, context: int = 32, vocab: int = 256) -> None:
        super().__init__()
        self.shifted = shifted
        self.tokens, self.positions = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.before, self.inside, self.after = (causal_block(dim) for _ in range(3))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, vocab))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        x = run(self.before, x)
        small = run(self.inside, (x[:, 0::2] + x[:, 1::2]) / 2)
        back = small.repeat_interleave(2, dim=1)
        if self.shifted:
            back = torch.cat([torch.zeros_like(back[:, :1]), back[:, :-1]], dim=1)
        return self.head(run(self.after, x + back))


def causal_block(dim: int) -> nn.Module:
    """A pre-norm layer of attention and MLP."""
    return nn.TransformerEncoderLayer(dim, 2, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)


def run(block: nn.Module, x: Tensor) -> Tensor:
    """The layer with a causal mask."""
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
    return block(x, src_mask=mask, is_causal=True)
