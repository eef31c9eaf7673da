"""`Placement`: where normalisation and activation stand around a connection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

__all__ = [
    "INSIDE_NORM",
    "ORIGINAL",
    "POST",
    "POST_NORM",
    "PRE_ACTIVATION",
    "PRE_NORM",
    "RES_POST_NORM",
    "SANDWICH_NORM",
    "Part",
    "Placement",
]

Part = Literal["norm", "act"]


@dataclass(frozen=True)
class Placement:
    """The positions of normalisation and activation around a connection: y = post(x + end(F(pre(x)))).

    `inside` follows the first map of the branch, as in ConvNeXt.

    | placement | pre | inside | end | post | source |
    |---|---|---|---|---|---|
    | `ORIGINAL` | | | norm | act | He 2015: conv-norm-act-conv-norm, add, act |
    | `PRE_ACTIVATION` | norm, act | | | | He 2016: norm-act-conv-norm-act-conv, add |
    | `POST` | | | | norm, act | "BN after addition" (He 2016, fig. 4b) |
    | `PRE_NORM` | norm | | | | transformers since GPT-2, ViT (Xiong et al. 2020) |
    | `POST_NORM` | | | | norm | Vaswani et al. 2017 |
    | `RES_POST_NORM` | | | norm | | Swin V2 (Liu et al. 2022, fig. 1) |
    | `SANDWICH_NORM` | norm | | norm | | CogView (Ding et al. 2021, sec. 2.4) |
    | `INSIDE_NORM` | | norm | | | ConvNeXt (Liu et al. 2022, fig. 4) |

    >>> ORIGINAL.to("pre") == PRE_ACTIVATION
    True
    """

    pre: tuple[Part, ...] = ()
    inside: tuple[Part, ...] = ()
    end: tuple[Part, ...] = ()
    post: tuple[Part, ...] = ()

    def to(self, where: Literal["pre", "inside", "end", "post"]) -> Placement:
        """All parts of this placement gathered in one place, norm before act."""
        present = {*self.pre, *self.inside, *self.end, *self.post}
        parts: tuple[Part, ...] = tuple(part for part in ("norm", "act") if part in present)
        return replace(Placement(), **{where: parts})

    @property
    def after(self) -> tuple[Part, ...]:
        """The parts that the stream passes last in a connection; a stem has to end with the same."""
        return self.end + self.post


ORIGINAL = Placement(end=("norm",), post=("act",))
PRE_ACTIVATION = Placement(pre=("norm", "act"))
POST = Placement(post=("norm", "act"))
PRE_NORM = Placement(pre=("norm",))
POST_NORM = Placement(post=("norm",))
RES_POST_NORM = Placement(end=("norm",))
SANDWICH_NORM = Placement(pre=("norm",), end=("norm",))
INSIDE_NORM = Placement(inside=("norm",))
