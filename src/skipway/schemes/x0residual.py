from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipway.nn import LastExit, StemResidual
from skipway.nn.kit import Kit
from skipway.nn.site import Site
from skipway.schemes.denseformer import earlier_blocks
from skipway.schemes.scheme import Scheme
from skipway.validation import check_finite

__all__ = ["X0Residual"]


@dataclass(frozen=True)
class X0Residual(Scheme):
    """The first stream is read again before every block: x = r x + m x₀, r and m learned numbers of each block.

    Args:
        resid: r at the start.
        x0: m at the start.

    Depth: a block is two branches of a transformer or one of a convolutional network. x₀ is the stem's output, and
    behind a change of shape what the stage began with.

    Decay and learning rate: none is decayed; r multiplies once a block and so compounds with depth: it learns at a
    hundredth of the rate, m at the full one (nanochat's log of 2026-01-11).

    Theory at the start: with r = 1, m = 0 the network of the family. In a block before which b others stand the stem
    weighs rᵇ + m (1 + r + … + rᵇ⁻¹) and r times that, plus m, in what it reads.

    Source: nanochat, `gpt.py` ("resid_lambdas", "x0_lambdas") and `dev/LOG.md`, 2026-01, after modded-nanogpt; there r
    falls from 1.15 to 1.05 and m from 0.2 to 0.05 over the blocks. The theory is ours.

    >>> X0Residual().streams(Site(dim=8, depth=4, kind="attention")).stem
    Gain((), init=0)
    """

    resid: float = 1.0
    x0: float = 0.0

    equation: ClassVar[str] = "y = x + F(x), x = r x + m x₀ before each block"
    when: ClassVar[str] = "language models, whose late blocks ask for the token itself"
    source: ClassVar[str] = "nanochat 2026, gpt.py"

    def __post_init__(self) -> None:
        check_finite("resid", self.resid)
        check_finite("x0", self.x0)

    def streams(self, site: Site, kit: Kit | None = None) -> StemResidual:
        earlier_blocks(site)  # refuses branches that make no blocks, before which nothing would be mixed
        return StemResidual(self.resid, self.x0, mixes=site.kind != "mlp", spatial=site.spatial)

    def restart(self, dim: int, spatial: int) -> LastExit:
        return LastExit()

    def close(self, dim: int, spatial: int, kit: Kit | None = None) -> LastExit:
        return LastExit()
