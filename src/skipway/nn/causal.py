"""Branches of decoders: causal attention with rotary positions and grouped queries, and the gated perceptron."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skipway.errors import SkipwayError
from skipway.nn.branch import Branch
from skipway.nn.kit import Kit
from skipway.nn.maps import LinearMap
from skipway.nn.placement import Placement
from skipway.nn.rope import RotaryScaling, parse_rotary_scaling
from skipway.nn.sequence import sequence

__all__ = ["CausalAttention", "DecodingState", "GatedMlp", "RotaryPositions", "decoding"]


class DecodingState:
    """What a decoder remembers of the tokens before those that it is called with: keys and values of each attention.

    Args:
        capacity: tokens for which there is room.

    Attributes:
        length: tokens that are remembered; `advance` counts those of a finished call.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.stored: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def extend(self, attention: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values (N, heads, T, d) of a call, and return those of all tokens so far."""
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise SkipwayError(f"{end} tokens in a cache for {self.capacity}: give decoding(model, {end}) or more")
        if attention not in self.stored:
            self.stored[attention] = (
                k.new_empty(*k.shape[:2], self.capacity, k.shape[3]),
                v.new_empty(*v.shape[:2], self.capacity, v.shape[3]),
            )
        keys, values = self.stored[attention]
        if len(keys) != len(k):
            raise SkipwayError(f"a batch of {len(k)} after one of {len(keys)}: begin another decoding(model, …)")
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count the tokens of a call that is over."""
        self.length += tokens


@contextmanager
def decoding(model: nn.Module, capacity: int) -> Iterator[DecodingState]:
    """Within the context `model` continues the tokens of earlier calls; the model is as before afterwards.

    Each call takes the tokens that are new, (N, T), and is followed by `state.advance(T)`; keys and values of the
    earlier ones are read from the state. Positions count on from there.

    Args:
        model: a network with `CausalAttention`.
        capacity: tokens for which there is to be room, prompt included.

    Raises:
        SkipwayError: there is no causal attention, or the network is decoding already (one text, or one batch of texts
            of one length, at a time; a second thread needs a copy).

    >>> import skipway as sw
    >>> model, ids = sw.build("gpt", depth=2, dim=16, heads=2, vocab=9, context=8).eval(), torch.tensor([[1, 2, 3]])
    >>> with torch.no_grad(), decoding(model, 8) as state:
    ...     first = model(ids[:, :2])
    ...     state.advance(2)
    ...     last = model(ids[:, 2:])
    >>> torch.allclose(last, model(ids)[:, 2:], atol=1e-5)
    True
    """
    readers = [module for module in model.modules() if hasattr(module, "decoding_state")]
    if not readers:
        raise SkipwayError(
            f"{type(model).__name__} has no causal attention of Skipway, so it has no cache to decode with; a "
            "language model of another library is called with all tokens: generate(…, cache=False)"
        )
    if any(module.decoding_state is not None for module in readers):
        raise SkipwayError("this network is decoding already; end that first, or decode a copy: copy.deepcopy(model)")
    state = DecodingState(capacity)
    for module in readers:
        module.decoding_state = state  # type: ignore[assignment]
    try:
        yield state
    finally:
        for module in readers:
            module.decoding_state = None  # type: ignore[assignment]


class RotaryPositions(nn.Module):
    """Turn pairs of channels by an angle that grows with the position: x_{t,i} → R(t θ^(-2i/d)) x_{t,i}.

    Channel i is paired with channel i + d/2, the convention of GPT-NeoX and transformers (the paper pairs neighbours,
    which is the same network with its channels in another order). Angles are computed in float32.

    Args:
        dim: d, channels of a head, even.
        theta: θ.
        scaling: makes other frequencies of θ^(-2i/d), for longer contexts.

    Shapes: (N, heads, T, d) → (N, heads, T, d).

    Source: Su et al. 2021, "RoFormer", eq. 34.

    >>> x = torch.randn(1, 2, 5, 8)
    >>> y = RotaryPositions(8)(x)
    >>> torch.allclose(y[:, :, 0], x[:, :, 0]), torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    (True, True)
    """

    def __init__(self, dim: int, theta: float = 10000.0, scaling: RotaryScaling | str | None = None) -> None:
        super().__init__()
        if dim % 2:
            raise SkipwayError(f"rotary positions of {dim} channels: the rule is an even number of channels in a head")
        self.dim, self.theta, self.scaling = dim, theta, parse_rotary_scaling(scaling)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """The tokens of x turned as those at positions start, start + 1, …."""
        half = torch.arange(0, self.dim, 2, device=x.device, dtype=torch.float32)
        position = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float32)
        frequency = 1.0 / self.theta ** (half / self.dim)  # in this order the bits of transformers
        angles = position[:, None] * (frequency if self.scaling is None else self.scaling(frequency))
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def extra_repr(self) -> str:
        return f"{self.dim}, theta={self.theta:g}" + ("" if self.scaling is None else f", scaling={self.scaling}")


class CausalAttention(Branch):
    """Multi-head attention that sees no later token: F(h)_t = W_o concat_i Σ_{s≤t} softmax_s(q_it k_isᵀ/√d) v_is.

    Shapes: (N, T, dim) → (N, T, dim). `qkv` puts out heads · d queries, then groups · d keys and as many values.

    Args:
        dim: channels.
        heads: query heads.
        kit: what to build from.
        placement: its `inside` and `end` parts follow `qkv` and `proj`.
        groups: heads of keys and values, a divisor of `heads` (Ainslie et al. 2023, grouped queries); None: `heads`.
        head_dim: d; None: dim / heads.
        head_norm: makes a norm for queries and keys from d (q-k norm), before positions, or None.
        rotary: makes the positions from d, or None.
        bias: whether `qkv` has a bias.

    Raises:
        SkipwayError: groups do not divide heads, or heads do not divide dim where `head_dim` is None.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kit: Kit,
        placement: Placement,
        groups: int | None = None,
        head_dim: int | None = None,
        head_norm: Callable[[int], nn.Module] | None = None,
        rotary: Callable[[int], nn.Module] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if head_dim is None and dim % heads:
            raise SkipwayError(f"dim={dim}, heads={heads}: the rule is that heads divides dim, or give head_dim")
        self.heads, self.groups = heads, heads if groups is None else groups
        if heads % self.groups:
            raise SkipwayError(f"heads={heads}, groups={groups}: the rule is that groups divides heads")
        self.width = dim // heads if head_dim is None else head_dim
        rows = (heads + 2 * self.groups) * self.width
        self.qkv = kit.linear(dim, rows, bias=bias)
        self.inside = sequence(**kit.parts(placement.inside, rows))
        norms = (kit.head_norm or head_norm, kit.head_norm or head_norm, kit.head_norm)
        self.norm_q, self.norm_k, self.norm_v = (nn.Identity() if norm is None else norm(self.width) for norm in norms)
        self.rotary = None if rotary is None else rotary(self.width)
        self.before = nn.Identity() if kit.before is None else kit.before()
        self.proj = kit.linear(heads * self.width, dim)
        self.end = sequence(**kit.parts(placement.end, dim))
        self.decoding_state: DecodingState | None = None

    def path(self) -> list[LinearMap]:
        """The value rows of `qkv`, then `proj`: queries and keys only weigh."""
        keys = (self.heads + self.groups) * self.width
        return [LinearMap(self.qkv, slice(keys, keys + self.groups * self.width)), LinearMap(self.proj)]

    def closing_norm(self) -> nn.Module | None:
        return getattr(self.end, "norm", None)

    def closing(self) -> Sequence[nn.Module]:
        return [self.end]

    def forward(self, h: Tensor, mixed: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """F(h); `mixed` is what becomes of the values, (N, groups, T, d), in a `ValueResidual`."""
        rows = self.inside(self.qkv(h)).unflatten(-1, (-1, self.width)).transpose(1, 2)
        q, k, v = rows.split((self.heads, self.groups, self.groups), dim=1)
        v = v if mixed is None else mixed(v)
        q, k, v = self.norm_q(q), self.norm_k(k), self.norm_v(v)
        state = self.decoding_state
        if self.rotary is not None:
            start = 0 if state is None else state.length
            q, k = self.rotary(q, start), self.rotary(k, start)
        if state is not None:
            k, v = state.extend(self, k, v)
        out = self.weigh(q, k, v).transpose(1, 2).flatten(2)
        return self.end(self.proj(self.before(out)))

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q kᵀ / √d) v of each head over the tokens up to its own; the last of k belongs to the last of q."""
        if self.groups < self.heads:
            k, v = (each.repeat_interleave(self.heads // self.groups, dim=1) for each in (k, v))
        new, seen = q.shape[2], k.shape[2]
        if new == seen:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new) if new > 1 else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class GatedMlp(Branch):
    """The gated perceptron, token by token: F(h) = W₂ (act(W_g h) ⊙ W_u h) (Shazeer 2020, eq. 6).

    Shapes: (…, dim) → (…, dim). `fc1` puts out the gate's rows, then those of W_u.

    Args:
        dim: channels.
        hidden: channels between the maps.
        kit: what to build from; its `act` is the gate's (SiLU: SwiGLU, GELU: GeGLU).
        placement: its `inside` and `end` parts follow the first and the second map.
    """

    def __init__(self, dim: int, hidden: int, *, kit: Kit, placement: Placement) -> None:
        super().__init__()
        self.hidden = hidden
        self.fc1 = kit.linear(dim, 2 * hidden)
        self.inside = sequence(**kit.parts(placement.inside, 2 * hidden))
        self.act = kit.act()
        self.before = nn.Identity() if kit.before is None else kit.before()
        self.fc2 = kit.linear(hidden, dim)
        self.end = sequence(**kit.parts(placement.end, dim))

    def path(self) -> list[LinearMap]:
        """W_u, then W₂: the gate only weighs."""
        return [LinearMap(self.fc1, slice(self.hidden, 2 * self.hidden)), LinearMap(self.fc2)]

    def closing_norm(self) -> nn.Module | None:
        return getattr(self.end, "norm", None)

    def closing(self) -> Sequence[nn.Module]:
        return [self.end]

    def forward(self, h: Tensor) -> Tensor:
        gate, up = self.inside(self.fc1(h)).chunk(2, dim=-1)
        return self.end(self.fc2(self.before(self.act(gate) * up)))
