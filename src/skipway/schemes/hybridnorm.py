from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from skipway.nn.kit import Kit
from skipway.nn.placement import Placement
from skipway.nn.site import Kind, Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_choice

__all__ = ["HybridNorm"]


@dataclass(frozen=True)
class HybridNorm(Scheme):
    """Norms of queries, keys and values in the attention, and one before the MLP that the skip passes, too.

        y = x + W_o A(norm(q), norm(k), norm(v)),  z = norm(y),  x' = z + F(z)

    The norm of queries, keys and values is one for each head, before rotary positions. The norm z = norm(y) ends the
    attention's connection, which is the same network. Swin V2's cosine attention, whose queries and keys have length
    1 already, gets the norm of values. In CaiT the norm after class attention is that of all tokens.

    Args:
        first: "hybrid", or "pre" for a first block with the pre-norms of both branches beside the norms of queries,
            keys and values: HybridNorm*.

    Depth: none enters but the number of the first block, two branches.

    Decay and learning rate: those of any norm, no decay and the full rate (the authors decay norms and biases, too).

    Theory at the start: what enters the MLP has variance 1 at every depth, and what leaves it 1 + v. The attention's
    output does not depend on the size of W_q, W_k and W_v, nor on that of the stream, up to ε of the norms, and so
    their gradients are orthogonal to them in each head.

    Source: Zhuo et al. 2025, "HybridNorm: Towards Stable and Efficient Transformer Training via Hybrid Normalization"
    (arXiv:2503.04598), and BryceZhuo/HybridNorm, `olmo/model.py` (for HybridNorm* its README).

    >>> from skipway.nn.placement import PRE_NORM
    >>> HybridNorm().place(Site(dim=8, kind="attention"), PRE_NORM)
    Placement(pre=(), inside=(), end=(), post=('norm',))
    """

    first: Literal["hybrid", "pre"] = "hybrid"

    equation: ClassVar[str] = "y = x + A(norm(q), norm(k), norm(v)), x' = norm(y) + F(norm(y))"
    norm_note: ClassVar[str] = "on queries, keys and values, and after the attention's addition"
    when: ClassVar[str] = "transformers that gain from post-norm but diverge with it"
    source: ClassVar[str] = "Zhuo et al. 2025"
    kinds: ClassVar[tuple[Kind, ...]] = ("attention", "mlp")
    refusal: ClassVar[str] = (
        "a convolutional branch has no queries, keys and values; take a transformer, or scheme='perinorm', which "
        "places norms around any branch"
    )

    def __post_init__(self) -> None:
        check_choice("first", self.first, ("hybrid", "pre"))

    def kit(self, site: Site | None, kit: Kit) -> Kit:
        return kit if site is None or site.kind != "attention" else replace(kit, head_norm=kit.norm)

    def place(self, site: Site | None, placement: Placement) -> Placement:
        if site is None or (self.first == "pre" and site.index < 2):
            return placement.to("pre")
        return placement.to("post") if site.kind == "attention" else Placement()
