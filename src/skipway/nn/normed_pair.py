"""Two streams that share their branches: one that is normalised at every connection, and one that never is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.nn.gain import Bias
from skipway.nn.kit import Kit
from skipway.nn.streams import StreamExit, Streams, unfold

__all__ = ["NormedPair", "NormedPairExit", "pair_norm"]

MakeNorm = Callable[[int], nn.Module]

PLAIN: MakeNorm = partial(nn.LayerNorm, eps=1e-6)


def pair_norm(name: str, kit: Kit | None) -> MakeNorm | None:
    """The norm of a dressed kit for the two streams of a scheme; None without a kit.

    Raises:
        SkipwayError: another scheme has removed it, or put a bias in its place.
    """
    if kit is None:
        return None
    if kit.norm is None or isinstance(kit.norm(1), Bias):
        raise SkipwayError(
            f"scheme={name!r}: its two streams are told apart by norms, and another scheme of the stack removes them; "
            "the rule is one that keeps the norm (norm='keep', where it has that choice)"
        )
    return kit.norm


class NormedPair(Streams):
    """X' = norm(X) + c F(x), Y' = Y + F(x): X is post-norm's stream, Y pre-norm's.

    The norm of X stands where X is read, that is behind the addition before.

    Args:
        dim: channels, the last axis.
        normalised: whether X is normalised; False for a first connection that reads X as it is.
        fused: x = norm(X) + norm(Y) (SiameseNorm), else x = norm(X) (ResiDual).
        factor: c.
        norm: makes the norms from `dim`; None: LayerNorm.

    Shapes: (2·N, …, dim) → x (N, …, dim).

    Decay and learning rate: that of norms, no decay and the full rate.

    >>> pair = NormedPair(2, fused=False)
    >>> x, carried, write = pair(torch.tensor([[1.0, 3.0], [1.0, 3.0]]))
    >>> x.round(), carried.round()
    (tensor([[-1.,  1.]], grad_fn=...), tensor([[-1.,  1.],
            [ 1.,  3.]], grad_fn=...))
    """

    refusal = "norms between the connections, where those of an existing network are written in its forward"

    def __init__(
        self, dim: int, *, normalised: bool = True, fused: bool, factor: float = 1.0, norm: MakeNorm | None = None
    ) -> None:
        super().__init__(2, 0)
        make = PLAIN if norm is None else norm
        self.factor = factor
        self.post = make(dim) if normalised else nn.Identity()
        self.pre = make(dim) if fused else None

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = unfold(s, 2)
        x = self.post(x)
        write = torch.cat((s.new_full((1,), self.factor), s.new_ones(1)))
        return x if self.pre is None else x + self.pre(y), torch.cat((x, y)), write.view(-1, *(1,) * s.ndim)

    def extra_repr(self) -> str:
        return f"factor={self.factor:g}"


class NormedPairExit(StreamExit):
    """Close the two streams of `NormedPair`: norm(X) + norm(Y). Shapes: (2·N, …, dim) → (N, …, dim)."""

    def __init__(self, dim: int, *, norm: MakeNorm | None = None) -> None:
        super().__init__(2)
        make = PLAIN if norm is None else norm
        self.post, self.pre = make(dim), make(dim)

    def forward(self, x: Tensor) -> Tensor:
        normalised, plain = unfold(x, 2)
        return self.post(normalised) + self.pre(plain)
