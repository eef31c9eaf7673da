"""What a parameter is for, and so how an optimiser treats it: by the module that owns it, never by shape or name."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Role"]


@dataclass(frozen=True)
class Role:
    """What a parameter is for.

    Args:
        name: "weight", "bias", "norm", "gain" or "embedding"; the name of its optimiser group.
        decay: whether weight decay applies.
        rate: factor on the learning rate, > 0.
    """

    name: str
    decay: bool = False
    rate: float = 1.0
