from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from skipway.nn import DynamicErf, DynamicTanh, LayerNorm2d
from skipway.nn.kit import Kit
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_choice, check_positive

__all__ = ["DyT"]

MAPS = {"tanh": DynamicTanh, "erf": DynamicErf}


@dataclass(frozen=True)
class DyT(Scheme):
    """A bounded map of each number in place of every norm: y = x + F(γ ⊙ tanh(α x) + β), no statistics.

    Norms of queries and keys stay. It is for networks with LayerNorm or RMSNorm: in place of BatchNorm the authors
    report a loss.

    Args:
        map: "tanh" (DyT) or "erf", γ ⊙ erf(α x + s) + β with a learned s (Derf), which its authors find better.
        init: α at the start.

    Depth: none enters. Decay and learning rate: α, s, γ and β are not decayed; full rate.

    Theory at the start (pre-norm): a small stream passes with gain α, so with a positively homogeneous branch of gain g
    it grows by the factor 1 + α² g with every branch; once α |x| is above 1, a branch adds at most g.

    Source: Zhu et al. 2025, "Transformers without Normalization" (CVPR), algorithm 1; ViT-B 82.3 → 82.5 %; Chen
    et al. 2025, "Stronger Normalization-Free Transformers" (CVPR 2026); ViT-B 82.8 %.

    >>> import skipway as sw
    >>> sw.build("vit-tiny-16", scheme="dyt(map='erf')").blocks[0].mlp.pre
    Sequential(
      (norm): DynamicErf(192, init=0.5)
    )
    """

    map: Literal["tanh", "erf"] = "tanh"
    init: float = 0.5

    equation: ClassVar[str] = "y = x + F(γ ⊙ tanh(α x) + β)"
    norm_note: ClassVar[str] = "replaces it"
    when: ClassVar[str] = "ViT and ConvNeXt where statistics are unwanted: streaming, small batches, quantisation"
    source: ClassVar[str] = "Zhu et al. 2025"

    def __post_init__(self) -> None:
        check_choice("map", self.map, tuple(MAPS))
        check_positive("init", self.init)

    def kit(self, site: Site | None, kit: Kit) -> Kit:
        if kit.norm is None:
            return kit
        return replace(kit, norm=partial(bounded_map, kit.norm, MAPS[self.map], self.init))


def bounded_map(norm: Callable[[int], nn.Module], kind: type[DynamicTanh], init: float, channels: int) -> nn.Module:
    """A bounded map with the axes of the norm that it replaces."""
    replaced = norm(channels)
    of_maps = isinstance(replaced, LayerNorm2d | nn.GroupNorm | _NormBase)
    return kind(channels, init=init, spatial=2 if of_maps else 0)
