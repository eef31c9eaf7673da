"""Branches over tokens: multi-head attention and the two-layer perceptron."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.nn.branch import Branch
from skipway.nn.kit import Kit
from skipway.nn.maps import LinearMap
from skipway.nn.placement import Placement
from skipway.nn.sequence import sequence

__all__ = ["Attention", "Mlp"]


class Attention(Branch):
    """Multi-head self-attention: F(h) = W_o concat_i(softmax(q_i k_iᵀ / √d) v_i), [q, k, v] = W_qkv h.

    Shapes: (N, T, dim) → (N, T, dim), d = dim / heads.

    Args:
        dim: channels.
        heads: number of heads, a divisor of `dim`.
        kit: what to build from.
        placement: its `inside` and `end` parts follow `qkv` and `proj`.
        head_norm: makes a norm for queries and keys from the head's width (q-k norm), or None; `kit.head_norm` goes
            before it and makes one for values, too.
        bias: whether `qkv` has a bias.

    Raises:
        SkipwayError: heads do not divide dim.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kit: Kit,
        placement: Placement,
        head_norm: Callable[[int], nn.Module] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise SkipwayError(f"dim={dim}, heads={heads}: the rule is that heads divides dim")
        self.heads, self.dim = heads, dim
        self.qkv = kit.linear(dim, 3 * dim, bias=bias)
        self.inside = sequence(**kit.parts(placement.inside, 3 * dim))
        norms = (kit.head_norm or head_norm, kit.head_norm or head_norm, kit.head_norm)
        self.norm_q, self.norm_k, self.norm_v = (
            nn.Identity() if norm is None else norm(dim // heads) for norm in norms
        )
        self.before = nn.Identity() if kit.before is None else kit.before()
        self.proj = kit.linear(dim, dim)
        self.end = sequence(**kit.parts(placement.end, dim))

    def path(self) -> list[LinearMap]:
        """The value rows of `qkv`, then `proj`: queries and keys only weigh."""
        return [LinearMap(self.qkv, slice(2 * self.dim, 3 * self.dim)), LinearMap(self.proj)]

    def closing_norm(self) -> nn.Module | None:
        return getattr(self.end, "norm", None)

    def closing(self) -> Sequence[nn.Module]:
        return [self.end]

    def forward(self, h: Tensor, mixed: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """F(h); `mixed` is what becomes of the values, (N, heads, T, d), in a `ValueResidual`."""
        q, k, v = self.inside(self.qkv(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        v = v if mixed is None else mixed(v)
        out = self.weigh(self.norm_q(q), self.norm_k(k), self.norm_v(v))
        return self.end(self.proj(self.before(out.transpose(1, 2).flatten(2))))

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q kᵀ / √d) v of each head."""
        return F.scaled_dot_product_attention(q, k, v)


class Mlp(Branch):
    """The two-layer perceptron, token by token: F(h) = W₂ act(W₁ h).

    Shapes: (…, dim) → (…, dim).

    Args:
        dim: channels.
        hidden: channels between the maps.
        kit: what to build from.
        placement: its `inside` and `end` parts follow the first and the second map.
    """

    def __init__(self, dim: int, hidden: int, *, kit: Kit, placement: Placement) -> None:
        super().__init__()
        self.fc1 = kit.linear(dim, hidden)
        self.inside = sequence(**kit.parts(placement.inside, hidden))
        self.act = kit.act()
        self.before = nn.Identity() if kit.before is None else kit.before()
        self.fc2 = kit.linear(hidden, dim)
        self.end = sequence(**kit.parts(placement.end, dim))

    def path(self) -> list[LinearMap]:
        return [LinearMap(self.fc1), LinearMap(self.fc2)]

    def closing_norm(self) -> nn.Module | None:
        return getattr(self.end, "norm", None)

    def closing(self) -> Sequence[nn.Module]:
        return [self.end]

    def forward(self, h: Tensor) -> Tensor:
        return self.end(self.fc2(self.before(self.act(self.inside(self.fc1(h))))))
