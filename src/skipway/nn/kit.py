"""`Kit`: what branches, stems and heads are built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from skipway.nn.placement import Part

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Kit"]


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What branches, stems and heads are built from: one object in place of `norm_layer=, act_layer=, conv_layer=`.

    Every entry is a factory; `None` means that the part is absent.

    Args:
        conv: `(in_channels, out_channels, kernel_size, stride=1, groups=1, bias=…, padding=…) -> Module`, same-padded
            unless `padding` is given.
        linear: `(in_features, out_features, bias=...) -> Module`.
        norm: `(channels) -> Module`, or None.
        act: `() -> Module`.
        gate: `(channels) -> Module`, the last part of a branch (squeeze-and-excitation, for example), or None.
        before: `() -> Module`, placed right before every linear map of a branch except the first (Fixup's scalar
            bias, for example), or None. `Scheme.enter` precedes the first map.
        head_norm: `(width of a head) -> Module`, the norm of queries, keys and values in each head of an attention, or
            None.
    """

    conv: Callable[..., nn.Module]
    linear: Callable[..., nn.Module]
    norm: Callable[[int], nn.Module] | None
    act: Callable[[], nn.Module]
    gate: Callable[[int], nn.Module] | None = None
    before: Callable[[], nn.Module] | None = None
    head_norm: Callable[[int], nn.Module] | None = None

    def without_norm(self) -> Kit:
        """The same kit without normalisation; convolutions get the bias that a norm would have brought."""
        return replace(self, norm=None, head_norm=None, conv=partial(self.conv, bias=True))

    def parts(self, names: tuple[Part, ...], dim: int, *, fresh: bool = False) -> dict[str, nn.Module | None]:
        """The named parts at a place with `dim` channels; a part the kit lacks is None.

        Behind a norm, or where what comes in is `fresh` (a map's output, a sum: nobody else's), an activation that can
        works in place; on the stream itself it must not, since the shortcut reads that too.
        """
        made: dict[str, nn.Module | None] = {}
        for name in names:
            made[name] = self.act() if name == "act" else None if self.norm is None else self.norm(dim)
        act = made.get("act")
        if (fresh or made.get("norm") is not None) and hasattr(act, "inplace"):
            act.inplace = True  # type: ignore[union-attr]
        return made
