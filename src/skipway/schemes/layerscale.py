from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from skipway.nn import Gain
from skipway.nn.role import Role
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_finite

__all__ = ["LayerScale"]


@dataclass(frozen=True)
class LayerScale(Scheme):
    """One learned number per channel of every branch, tiny at the start: y = x + γ ⊙ F(x).

    The branch is scaled, not the skip, and the family's normalisation stays: it is no replacement for one.

    Args:
        init: γ₀, the same for all channels and branches; `"depth"` is the paper's rule (see `init_for_depth`).
        rate: factor on the learning rate of γ.

    Depth: the rule is about the whole network, never about a branch's own place: 0.1 up to 18 transformer blocks,
    1e-5 up to 24, 1e-6 beyond. A block is two branches, so the limits are L ≤ 36, L ≤ 48, without the
    class-attention blocks of CaiT, as in the paper. Released models differ: CaiT XXS-36 1e-5, DeiT III 1e-4, ConvNeXt
    1e-6 at all sizes.

    Decay and learning rate: γ is not decayed (ConvNeXt's and timm's optimizer groups); full rate. The tiny start
    belongs to AdamW, whose steps do not depend on the gradient's size; with SGD it needs a larger rate.

    Theory at the start (pre-norm): Var(x_l) = Var(x_0) + γ² l.

    Source: Touvron et al. 2021, "Going Deeper with Image Transformers" (CaiT), eq. 4 and sec. 2.

    >>> import skipway as sw
    >>> sw.build("resnet20", scheme="layerscale(init=1e-5)").stages[1][0].scale
    Gain((32,), init=1e-05)
    """

    init: float | Literal["depth"] = 1e-4
    rate: float = 1.0

    equation: ClassVar[str] = "y = x + γ ⊙ F(x)"
    when: ClassVar[str] = "deep transformers and ConvNeXt, with AdamW"
    source: ClassVar[str] = "Touvron et al. 2021, eq. 4"

    def __post_init__(self) -> None:
        check_finite("init", self.init, also="depth")

    @classmethod
    def by_depth(cls) -> LayerScale:
        """γ₀ by the paper's rule of the network's depth.

        >>> [float(LayerScale.by_depth().scale(Site(dim=4, depth=2 * blocks)).init) for blocks in (18, 24, 36)]
        [0.1, 1e-05, 1e-06]
        """
        return cls(init="depth")

    @property
    def silent(self) -> bool:
        return self.init == 0.0

    def scale(self, site: Site) -> Gain:
        init = init_for_depth(site.counted_depth) if self.init == "depth" else self.init
        return Gain(site.dim, init=init, spatial=site.spatial, role=Role("gain", rate=self.rate))


def init_for_depth(branches: int) -> float:
    """The paper's γ₀ for a network of so many branches, two to a transformer block."""
    if branches <= 36:
        return 0.1
    return 1e-5 if branches <= 48 else 1e-6
