from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipway.nn import DynamicDenseResidual, LastExit
from skipway.nn.kit import Kit
from skipway.nn.site import Site
from skipway.schemes.denseformer import mixed_outputs
from skipway.schemes.scheme import Scheme

__all__ = ["MUDD"]


@dataclass(frozen=True)
class MUDD(Scheme):
    """After a block, a mixture of all earlier ones with weights for each token or pixel: y = Σⱼ Aⱼ Xⱼ,
    A = gelu(rms(X_l) W₁) W₂ + a.

    Of the paper's four mixtures (for queries, keys, values and the stream) this is the one for the stream.

    Depth: a block is two branches of a transformer or one of a convolutional network, as in `DenseFormer`; mixtures end
    with a stage. W₁ and W₂ are as wide as the number of outputs mixed.

    Decay and learning rate: W₁ and W₂ are decayed, a is not.

    Theory at the start: W₂ = 0 and a = (0, …, 0, 1) (the authors' JAX code): the network of the family, W₁ from
    N(0, 1 / C). The gradient reaches W₂ and a at once, and W₁ with the second step. The authors' PyTorch release draws
    a from N(0, 1), which is no start for training.

    Source: Xiao et al. 2025, "MUDDFormer: Breaking Residual Bottlenecks in Transformers via Multiway Dynamic Dense
    Connections" (ICML), eq. 5 and 6.

    >>> MUDD().streams(Site(dim=8, index=3, since=3, depth=4, kind="mlp")).hidden
    Linear(in_features=8, out_features=3, bias=False)
    """

    equation: ClassVar[str] = "y = Σⱼ Aⱼ Xⱼ after each block, A = gelu(rms(X) W₁) W₂ + a"
    when: ClassVar[str] = "deep transformers, where a fixed mixture of earlier blocks gains nothing"
    source: ClassVar[str] = "Xiao et al. 2025, eq. 5 and 6"

    def streams(self, site: Site, kit: Kit | None = None) -> DynamicDenseResidual:
        reads = mixed_outputs(site, 1, 1)
        return DynamicDenseResidual(reads, dim=site.dim, ends=site.kind != "attention", spatial=site.spatial)

    def restart(self, dim: int, spatial: int) -> LastExit:
        return LastExit()

    def close(self, dim: int, spatial: int, kit: Kit | None = None) -> LastExit:
        return LastExit()
