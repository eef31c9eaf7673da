from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from skipway.nn import ManifoldHyperConnection, StreamEntry, StreamExit
from skipway.nn.kit import Kit
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_choice, check_finite, check_positive_int, check_rule

__all__ = ["MHC"]


@dataclass(frozen=True)
class MHC(Scheme):
    """Hyper-connections whose mixing neither amplifies nor damps the streams: s' = H s + 2σ(·) F(σ(·) s), H doubly
    stochastic. All weights depend on the token or pixel.

    Args:
        n: streams.
        form: "sinkhorn" scales exp(logits) in turn (DeepSeek-V4); "birkhoff" mixes the n! permutations (mHC-lite).
        iterations: of Sinkhorn, in float32.
        hold: start of the logits that keep a stream, over the others; 0 merges all streams at once.

    Depth: none enters.

    Decay and learning rate: the map from the streams to the weights is decayed, factors and biases are not.

    Theory at the start: factors 0.01 (the paper's appendix), the map from N(0, 0.02²) (DeepSeek-V4); biases are ours,
    since the paper has none: each stream is read with 1/n and written with 1. Where the map is 0 the network is
    the family's plain one; as drawn it differs by about a hundredth, which makes the streams differ. What two
    streams differ by shrinks by λ = (e^hold - 1) / (e^hold + n - 1) a connection: 0.93 for hold = 4, n = 4. Off the
    diagonal of -8, as ports have it, nothing learns. With Sinkhorn what a stream gets sums to 1 exactly, and what it
    gives only nearly so.

    Source: Xie et al. 2025, "mHC: Manifold-Constrained Hyper-Connections", eq. 3 and 7-9; transformers' `deepseek_v4`,
    to which ours is equal; "mHC-lite" 2026, arXiv:2601.05732, for "birkhoff". The head takes the mean of the streams,
    where DeepSeek-V4 learns another read. The theory is ours.

    >>> MHC(n=2).streams(Site(dim=8, depth=4)).map
    Linear(in_features=16, out_features=8, bias=False)
    """

    n: int = 4
    form: Literal["sinkhorn", "birkhoff"] = "sinkhorn"
    iterations: int = 20
    hold: float = 4.0

    equation: ClassVar[str] = "s' = H s + 2σ(·) F(σ(·) s), H doubly stochastic, n streams s"
    when: ClassVar[str] = "deep transformers with several streams whose size has to stay"
    source: ClassVar[str] = "Xie et al. 2025, eq. 3 and 7-9"

    def __post_init__(self) -> None:
        check_positive_int("n", self.n)
        check_choice("form", self.form, ("sinkhorn", "birkhoff"))
        check_positive_int("iterations", self.iterations)
        check_finite("hold", self.hold)
        check_rule("n", self.n, self.n > 1, "at least 2 streams; one has nothing to mix")
        check_rule("n", self.n, self.form == "sinkhorn" or self.n <= 5, 'n ≤ 5 with form="birkhoff", n! permutations')

    def streams(self, site: Site, kit: Kit | None = None) -> ManifoldHyperConnection:
        return ManifoldHyperConnection(
            self.n,
            dim=site.entry,
            spatial=site.spatial,
            iterations=self.iterations,
            hold=self.hold,
            form=self.form,
        )

    def open(self) -> nn.Module:
        return StreamEntry(self.n)

    def close(self, dim: int, spatial: int, kit: Kit | None = None) -> nn.Module:
        return StreamExit(self.n)
