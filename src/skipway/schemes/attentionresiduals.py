from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from skipway.nn import AttentionExit, AttentionRead, AttentionResidual
from skipway.nn.kit import Kit
from skipway.nn.placement import Placement
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_flag, check_positive_int

__all__ = ["AttentionResiduals"]


@dataclass(frozen=True)
class AttentionResiduals(Scheme):
    """No running sum: each branch attends to all earlier outputs, h = Σᵢ aᵢ vᵢ, a = softmaxᵢ(wᵀ vᵢ / rms(vᵢ)).

    v₀ is the stem's output and vᵢ that of branch i. Each branch, and the head, has a learned query w; with image maps a
    weighs pixel by pixel. A norm or activation that follows the addition moves before the branch, as in
    `PreActivation`. Where a stage ends, the read is taken on, and the history begins again.

    Args:
        blocks: N, blocks of branches whose outputs are summed up and read as one (eq. 5 and 6); None reads all.
        rescale: multiply by the number of sources, so that the start is the plain network; False is the paper's
            equation, from which a branch that begins with a norm of each token differs by nothing but ε.

    Depth: L counts branches, the paper's sublayers; a block has ⌈L / N⌉ of them, the paper's N = 8.

    Decay and learning rate: w is not decayed (ours; the paper has no rule).

    Theory at the start: w = 0 (sec. 5), so all sources weigh the same: with `rescale` their sum, and so the pre-norm
    network itself, in outputs and gradients; without it their mean, which is no larger than the largest of them. The
    gain of the paper's norm of the keys is a factor on w, and left out.

    Source: Kimi Team 2026, "Attention Residuals", arXiv:2603.15031, eq. 1-6.

    >>> AttentionResiduals(blocks=2).streams(Site(dim=8, index=1, since=1, depth=4)).opens
    False
    """

    blocks: int | None = 8
    rescale: bool = True

    equation: ClassVar[str] = "v_l = F(Σᵢ aᵢ vᵢ), a = softmaxᵢ(wᵀ vᵢ / rms(vᵢ))"
    norm_note: ClassVar[str] = "before the branch"
    when: ClassVar[str] = "deep pre-norm networks whose late branches have to outgrow the stream"
    source: ClassVar[str] = "Kimi Team 2026, eq. 1-6"

    def __post_init__(self) -> None:
        if self.blocks is not None:
            check_positive_int("blocks", self.blocks)
        check_flag("rescale", self.rescale)

    def place(self, site: Site | None, placement: Placement) -> Placement:
        return placement.to("pre") if placement.post else placement

    def streams(self, site: Site, kit: Kit | None = None) -> AttentionResidual:
        size = 1 if self.blocks is None else math.ceil(site.depth / self.blocks)
        read = AttentionRead(site.entry, spatial=site.spatial, rescale=self.rescale) if site.outputs else None
        return AttentionResidual(read, opens=site.outputs % size == 0, spatial=site.spatial)

    def restart(self, dim: int, spatial: int) -> AttentionExit:
        return AttentionExit(dim, spatial=spatial, rescale=self.rescale)

    def close(self, dim: int, spatial: int, kit: Kit | None = None) -> AttentionExit:
        return AttentionExit(dim, spatial=spatial, rescale=self.rescale)
