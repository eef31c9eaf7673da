"""Attention within windows of a map, shifted from block to block: Swin and Swin V2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.nn.kit import Kit
from skipway.nn.placement import Placement
from skipway.nn.positions import resample
from skipway.nn.role import Role
from skipway.nn.tokens import Attention
from skipway.nn.window_partition import MASK, shift_mask, window_partition, window_reverse

__all__ = [
    "ContinuousPosition",
    "CosineWindowAttention",
    "PositionTable",
    "QueryValueBias",
    "SharpQuery",
    "UnitKey",
    "Window",
    "WindowAttention",
]

SHARPEST = 100.0
"""The largest factor on a cosine: Swin V2's temperature is not below 0.01 (Liu et al. 2022, sec. 3.2)."""


@dataclass(frozen=True)
class Window:
    """Square windows of T = side² tokens over a map, the grid of windows moved by `shift` tokens.

    A map is padded with zeros below and on the right to whole windows. The shift is cyclic: windows that reach over
    the edge hold tokens of both edges, which must not meet (`shift_mask`). An axis that a single window covers is not
    shifted. Liu et al. 2021, "Swin Transformer", sec. 3.2 and fig. 4; padding before the shift as in torchvision.

    Args:
        side: of a window, in tokens, ≥ 1.
        shift: 0 ≤ shift < side; half the side in every other block.

    Raises:
        SkipwayError: a side or a shift out of range.

    >>> window = Window(4, shift=2)
    >>> window.split(torch.zeros(1, 8, 6, 3)).shape
    torch.Size([1, 4, 16, 3])
    >>> window.join(window.split(torch.ones(1, 8, 6, 3)), 8, 6).shape
    torch.Size([1, 8, 6, 3])
    """

    side: int
    shift: int = 0

    def __post_init__(self) -> None:
        if self.side < 1:
            raise SkipwayError(f"side={self.side}: a window is at least one token wide")
        if not 0 <= self.shift < self.side:
            raise SkipwayError(f"shift={self.shift}, side={self.side}: the rule is 0 <= shift < side")

    def shifts(self, height: int, width: int) -> tuple[int, int]:
        """By how much a map is shifted along its two axes."""
        return (self.shift if height > self.side else 0, self.shift if width > self.side else 0)

    def padded(self, x: Tensor) -> Tensor:
        """A map with zeros below and on the right up to whole windows."""
        below, right = -x.shape[1] % self.side, -x.shape[2] % self.side
        return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x

    def split(self, x: Tensor) -> Tensor:
        """The tokens of each window, row by row: (N, H, W, C) → (N, windows, T, C)."""
        height, width = x.shape[1:3]
        x = self.padded(x)
        down, across = self.shifts(height, width)
        if down or across:
            x = x.roll((-down, -across), dims=(1, 2))
        return window_partition(x, self.side)

    def join(self, windows: Tensor, height: int, width: int) -> Tensor:
        """Back to the map, without the padding: (N, windows, T, C) → (N, height, width, C)."""
        x = window_reverse(windows, -(-height // self.side), self.side)
        down, across = self.shifts(height, width)
        if down or across:
            x = x.roll((down, across), dims=(1, 2))
        return x[:, :height, :width]

    def apart(self, height: int, width: int, device: torch.device) -> Tensor | None:
        """Mask (windows, T, T) of the token pairs that come from opposite edges of the map; None if there are none."""
        down, across = self.shifts(height, width)
        if not (down or across):
            return None
        rows, columns = height + -height % self.side, width + -width % self.side
        return shift_mask(rows, columns, self.side, down, across, device)


class PositionTable(nn.Module):
    """One learned number per head and offset of two tokens: B_ij = table[y_i − y_j, x_i − x_j] (Swin, eq. 4).

    Row (dy + side − 1)(2 side − 1) + dx + side − 1 of the table belongs to the offset (dy, dx).

    Shapes: () → (heads, T, T), T = side².

    Args:
        heads: attention heads.
        side: of the window.

    >>> PositionTable(heads=3, side=2)().shape
    torch.Size([3, 4, 4])
    """

    def __init__(self, heads: int, side: int) -> None:
        super().__init__()
        self.role = Role("embedding")
        self.side = side
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))

    def reset_parameters(self) -> None:
        """From N(0, 0.02²), the authors' code."""
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self) -> Tensor:
        return by_offset(self.table, self.side)

    def resampled(self, name: str, tensor: Tensor) -> Tensor | None:
        """A table that was learned at another side, for this one: bicubic as in the authors' code, smoothed where it
        shrinks; None for what is none."""
        old, new = math.isqrt(len(tensor)), 2 * self.side - 1
        if name != "table" or tensor.ndim != 2 or old**2 != len(tensor) or old % 2 == 0:
            return None
        return resample(tensor, (old, old), (new, new))

    def extra_repr(self) -> str:
        return f"heads={self.table.shape[1]}, side={self.side}"


class ContinuousPosition(nn.Module):
    """A function of the offset of two tokens, for windows of any side: B_ij = 16 σ(W₂ relu(W₁ Δ̂_ij + b)).

    Δ̂ = sign(Δ) log₂(1 + 8 |Δ| / (w − 1)) / log₂ 8 on both axes: offsets up to w, the side that the function was learned
    at, lie between −1.06 and 1.06, and larger ones grow slowly. Liu et al. 2022, "Swin Transformer V2", eq. 3-4; the
    factors 16, 8 and log₂ 8 and the hidden width are the authors' code.

    Shapes: () → (heads, T, T), T = side².

    Args:
        heads: attention heads.
        side: of the window.
        learned_at: w; by default `side`.
        hidden: rows of W₁.

    >>> ContinuousPosition(heads=3, side=2)().shape
    torch.Size([3, 4, 4])
    """

    def __init__(self, heads: int, side: int, *, learned_at: int | None = None, hidden: int = 512) -> None:
        super().__init__()
        self.role = Role("embedding")
        self.side, self.learned_at = side, side if learned_at is None else learned_at
        self.inner = nn.Parameter(torch.zeros(hidden, 2))
        self.inner_bias = nn.Parameter(torch.zeros(hidden))
        self.outer = nn.Parameter(torch.zeros(heads, hidden))

    def reset_parameters(self) -> None:
        """W₁ and W₂ from N(0, 0.02²), b = 0."""
        nn.init.trunc_normal_(self.inner, std=0.02)
        nn.init.zeros_(self.inner_bias)
        nn.init.trunc_normal_(self.outer, std=0.02)

    def offsets(self) -> Tensor:
        """Δ̂ of all offsets, in the order of `PositionTable`: ((2 side − 1)², 2)."""
        line = torch.arange(1 - self.side, self.side, device=self.inner.device, dtype=torch.float32)
        line = line * 8 / max(self.learned_at - 1, 1)  # a window of one token has the offset 0 only
        line = line.sign() * torch.log2(1 + line.abs()) / math.log2(8)
        return torch.cartesian_prod(line, line).to(self.inner.dtype)

    def forward(self) -> Tensor:
        hidden = F.relu(F.linear(self.offsets(), self.inner, self.inner_bias))
        return by_offset(16 * torch.sigmoid(F.linear(hidden, self.outer)), self.side)

    def extra_repr(self) -> str:
        return f"heads={self.outer.shape[0]}, side={self.side}, learned_at={self.learned_at}"


def by_offset(values: Tensor, side: int) -> Tensor:
    """Values of all offsets as values of all pairs: ((2 side − 1)², heads) → (heads, T, T).

    The offsets of token (y, x) to all tokens are a side × side patch of the table, read backwards from
    (y + side − 1, x + side − 1): sliding patches in place of an index.
    """
    table = values.unflatten(0, (2 * side - 1, 2 * side - 1)).permute(2, 0, 1)
    patches = table.unfold(1, side, 1).unfold(2, side, 1).flip(-2, -1)
    return patches.flatten(3, 4).flatten(1, 2)


class QueryValueBias(nn.Module):
    """[q, k, v] + [b_q, 0, b_v], the biases starting at 0 (Swin V2, the authors' code; BEiT before it).

    Shapes: (…, 3 · dim) → (…, 3 · dim).

    >>> QueryValueBias(2)(torch.zeros(1, 6)).shape
    torch.Size([1, 6])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.role = Role("bias")
        self.bias = nn.Parameter(torch.zeros(2 * dim))

    def reset_parameters(self) -> None:
        """Back to zero."""
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        query, value = self.bias.chunk(2)
        return x + torch.cat((query, torch.zeros_like(query), value))


class SharpQuery(nn.Module):
    """q ↦ √d e^min(s, ln 100) q / |q|, one learned s per head: with `UnitKey` the logits are cosines times e^s.

    √d undoes the 1/√d of the attention. s starts at ln 10. Liu et al. 2022, eq. 2 (τ = e⁻ˢ), and the authors' code.

    Shapes: (N, heads, T, d) → (N, heads, T, d).
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.role = Role("gain")
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))

    def reset_parameters(self) -> None:
        """Back to ln 10."""
        nn.init.constant_(self.log_scale, math.log(10))

    def forward(self, q: Tensor) -> Tensor:
        scale = self.log_scale.clamp(max=math.log(SHARPEST)).exp()
        return F.normalize(q, dim=-1) * (scale * q.shape[-1] ** 0.5)


class UnitKey(nn.Module):
    """k ↦ k / |k|, per head."""

    def forward(self, k: Tensor) -> Tensor:
        return F.normalize(k, dim=-1)


class WindowAttention(Attention):
    """Multi-head self-attention within windows: F(h) = W_o concat_i(softmax(q_i k_iᵀ / √d + B_i + M) v_i).

    B is the bias of the relative position, M = −100 for tokens of a shifted window that come from opposite edges of
    the map, else 0. Padding tokens are keys like others, as in all published code. Liu et al. 2021, eq. 4 and sec. 3.2.

    Shapes: (N, H, W, dim) → (N, H, W, dim) for any H, W ≥ 1, d = dim / heads.

    Args:
        dim: channels.
        heads: number of heads, a divisor of `dim`.
        window: side and shift.
        kit: what to build from.
        placement: its `inside` and `end` parts follow `qkv` and `proj`.
        bias: whether `qkv` has a bias.

    Raises:
        SkipwayError: heads do not divide dim.

    >>> from skipway.models.transformer import TOKEN_KIT
    >>> from skipway.nn.placement import PRE_NORM
    >>> branch = WindowAttention(8, 2, Window(4, shift=2), kit=TOKEN_KIT, placement=PRE_NORM)
    >>> branch(torch.zeros(1, 6, 9, 8)).shape
    torch.Size([1, 6, 9, 8])
    """

    def __init__(
        self, dim: int, heads: int, window: Window, *, kit: Kit, placement: Placement, bias: bool = True
    ) -> None:
        super().__init__(dim, heads, kit=kit, placement=placement, bias=bias)
        self.window = window
        self.bias: nn.Module = nn.Identity()
        self.position: nn.Module = PositionTable(heads, window.side)

    def forward(self, h: Tensor) -> Tensor:  # type: ignore[override] - windows hold other tokens in every block
        return self.end(self.proj(self.before(self.mixed(h))))

    def mixed(self, h: Tensor) -> Tensor:
        """The heads' outputs, concatenated, at the positions of the tokens on the map."""
        batch, height, width, _ = h.shape
        tokens = self.window.split(h).flatten(0, 1)
        qkv = self.inside(self.bias(self.qkv(tokens)))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        out = self.weighed(self.norm_q(q), self.norm_k(k), self.norm_v(v), self.added(height, width), batch)
        return self.window.join(out.transpose(1, 2).flatten(2).unflatten(0, (batch, -1)), height, width)

    def weighed(self, q: Tensor, k: Tensor, v: Tensor, added: Tensor, images: int) -> Tensor:
        """softmax(q kᵀ / √d + B + M) v for the windows of several images."""
        added = added if len(added) == 1 else added.repeat(images, 1, 1, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added)

    def added(self, height: int, width: int) -> Tensor:
        """B + M: (1, heads, T, T) where no window is shifted, else (windows, heads, T, T)."""
        position = self.position().unsqueeze(0)
        apart = self.window.apart(height, width, position.device)
        return position if apart is None else position + MASK * apart.unsqueeze(1)


class CosineWindowAttention(WindowAttention):
    """Swin V2's attention: F(h) = W_o concat_i(softmax(e^{s_i} cos(q_i, k_i) + B_i + M) v_i).

    Logits are cosines times a learned factor of at most 100, B is a function of the log-spaced offset, keys have no
    bias (Liu et al. 2022, sec. 3.2-3.3).

    Shapes: (N, H, W, dim) → (N, H, W, dim) for any H, W ≥ 1.

    Args:
        dim: channels.
        heads: number of heads, a divisor of `dim`.
        window: side and shift.
        kit: what to build from.
        placement: its `inside` and `end` parts follow `qkv` and `proj`.
        learned_at: side of the windows that the position function was learned at; by default the window's.

    Raises:
        SkipwayError: heads do not divide dim.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: Window,
        *,
        kit: Kit,
        placement: Placement,
        learned_at: int | None = None,
    ) -> None:
        super().__init__(dim, heads, window, kit=kit, placement=placement, bias=False)
        self.bias = QueryValueBias(dim)
        self.norm_q: nn.Module = SharpQuery(heads)
        self.norm_k: nn.Module = UnitKey()
        self.position = ContinuousPosition(heads, window.side, learned_at=learned_at)
