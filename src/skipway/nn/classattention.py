"""CaiT's branches: attention with talking heads, and class attention, which only the class token asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.nn.branch import Branch
from skipway.nn.kit import Kit
from skipway.nn.maps import LinearMap
from skipway.nn.placement import Placement
from skipway.nn.sequence import sequence
from skipway.nn.tokens import Attention

__all__ = ["ClassAttention", "FirstToken", "TalkingHeads"]


class TalkingHeads(Attention):
    """Attention whose heads exchange before and after the softmax: A = W_w softmax(W_l (q kᵀ / √d)).

    W_l and W_w mix the heads (Shazeer et al. 2020; CaiT: Touvron et al. 2021, sec. 4). Their biases start at 0.

    Shapes: (N, T, dim) → (N, T, dim).
    """

    def __init__(self, dim: int, heads: int, *, kit: Kit, placement: Placement) -> None:
        super().__init__(dim, heads, kit=kit, placement=placement)
        self.mix_logits = kit.linear(heads, heads)
        self.mix_weights = kit.linear(heads, heads)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = self.mix_logits(logits.movedim(1, -1)).softmax(dim=-2)
        return self.mix_weights(weights).movedim(-1, 1) @ v


class ClassAttention(Branch):
    """The class token attends to all tokens: F(h) = W_o softmax(q kᵀ / √d) v, q of the first token only, 0 elsewhere.

    CaiT: Touvron et al. 2021, eq. 5-7. The patches' part of the stream is left alone.

    Shapes: (N, T, dim) → (N, T, dim), zero but for the first token.

    Raises:
        SkipwayError: heads do not divide dim.
    """

    fills: ClassVar[bool] = False

    def __init__(self, dim: int, heads: int, *, kit: Kit, placement: Placement) -> None:
        super().__init__()
        if dim % heads:
            raise SkipwayError(f"dim={dim}, heads={heads}: the rule is that heads divides dim")
        self.heads = heads
        self.q, self.k, self.v = (kit.linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k, self.norm_v = (
            nn.Identity() if kit.head_norm is None else kit.head_norm(dim // heads) for _ in range(3)
        )
        self.before = nn.Identity() if kit.before is None else kit.before()
        self.proj = kit.linear(dim, dim)
        self.end = sequence(**kit.parts(placement.end, dim))

    def path(self) -> list[LinearMap]:
        return [LinearMap(self.v), LinearMap(self.proj)]

    def closing_norm(self) -> nn.Module | None:
        return getattr(self.end, "norm", None)

    def closing(self) -> Sequence[nn.Module]:
        return [self.end]

    def forward(self, h: Tensor, mixed: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q(h[:, :1]), self.k(h), self.v(h))
        )
        v = self.norm_v(v if mixed is None else mixed(v))
        out = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v).transpose(1, 2).flatten(2)
        return alone(self.end(self.proj(self.before(out))), h.shape[1])


class FirstToken(Branch):
    """A branch for the first token only: F(h) = [inner(h₁), 0, …, 0].

    Shapes: (N, T, dim) → (N, T, dim).
    """

    fills: ClassVar[bool] = False

    def __init__(self, inner: Branch) -> None:
        super().__init__()
        self.inner = inner

    def path(self) -> list[LinearMap]:
        return self.inner.path()

    def closing_norm(self) -> nn.Module | None:
        return self.inner.closing_norm()

    def closing(self) -> Sequence[nn.Module] | None:
        return self.inner.closing()

    def forward(self, h: Tensor) -> Tensor:
        return alone(self.inner(h[:, :1]), h.shape[1])


def alone(first: Tensor, length: int) -> Tensor:
    """(N, 1, dim) → (N, length, dim), zeros after the first token."""
    return F.pad(first, (0, 0, 0, length - 1))
