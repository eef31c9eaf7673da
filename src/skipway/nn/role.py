"""The role of a parameter decides how an optimizer treats it; it follows from the owning module, never from a name."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Role"]


@dataclass(frozen=True)
class Role:
    """The role of a parameter.

    Args:
        name: "weight", "bias", "norm", "gain" or "embedding"; the name of its optimizer group.
        decay: whether weight decay applies.
        rate: factor on the learning rate, > 0.
    """

    name: str
    decay: bool = False
    rate: float = 1.0
