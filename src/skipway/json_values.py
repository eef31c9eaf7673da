"""Values for JSON, which knows no number that is not finite: `json.dumps` writes NaN, which other readers refuse."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["finite"]


def finite(value: Any) -> Any:
    """The value with None in place of numbers that are not finite.

    >>> finite({"loss": float("nan"), "interval": (0.5, float("inf"))})
    {'loss': None, 'interval': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
