from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipway.nn import Multiply
from skipway.nn.placement import Placement
from skipway.nn.site import Kind, Site
from skipway.schemes.scheme import Scheme

__all__ = ["LayerNormScaling"]


@dataclass(frozen=True)
class LayerNormScaling(Scheme):
    """What enters a branch falls with the number of its block: y = x + F(norm(x) / √b), b = 1, 2, …, pre-norm.

    Convolutional branches are refused: the norms inside them undo the factor, so that nothing would change. A start
    that scales the branches by depth as well (`depthscaled(how="init")`, `zeroinit`) takes the effect away (the README
    of the authors).

    Depth: the number b counts transformer blocks; attention and MLP of a block have the same. In a network that exists
    already `rescheme` counts the blocks of each stream, whichever branches they have.

    Decay and learning rate: no parameters of its own.

    Theory at the start: with positively homogeneous branches of variance v on unit input,
    Var(x_l) = Var(x_0) + v Σ 1/b, which grows with the logarithm of the depth where pre-norm grows linearly.

    Source: Sun et al. 2025, "The Curse of Depth in Large Language Models" (NeurIPS), and the authors'
    `modeling_llama.py`.

    >>> [LayerNormScaling().enter(Site(dim=8, index=index, depth=8, kind="mlp")).factor for index in (0, 1, 6, 7)]
    [1.0, 1.0, 0.5, 0.5]
    """

    equation: ClassVar[str] = "y = x + F(norm(x) / √b)"
    norm_note: ClassVar[str] = "before the branch, scaled"
    when: ClassVar[str] = "pre-norm transformers of up to some 70 blocks whose last blocks do little"
    source: ClassVar[str] = "Sun et al. 2025"
    numbers_blocks: ClassVar[bool] = True
    kinds: ClassVar[tuple[Kind, ...]] = ("attention", "mlp")
    refusal: ClassVar[str] = (
        "the norms inside a convolutional branch undo the factor; take a transformer, or scheme='depthscaled', which "
        "scales what leaves the branch"
    )

    def place(self, site: Site | None, placement: Placement) -> Placement:
        return placement.to("pre")

    def enter(self, site: Site) -> Multiply:
        return Multiply(site.block_number**-0.5)
