"""What a diagnosis says: findings with evidence, why they matter, and remedies that are objects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["LEVELS", "Finding", "Level", "number"]

Level = Literal["fatal", "serious", "note"]
LEVELS: tuple[Level, ...] = ("fatal", "serious", "note")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was found.

    Args:
        rule: short name of the rule that found it, "vanishing-stream" say; lint rules cite their number, "P13".
        level: "fatal" (it will not train), "serious" (it trains only if something is done), "note".
        what: one sentence.
        evidence: the numbers that it rests on, by name.
        why: why it matters, one or two sentences.
        source: where the rule comes from: paper, equation, link; or the measurement.
        where: names of the connections, modules or parameters that are at fault, in order; empty: the whole.
        remedies: objects that mend it, the one to be tried first in front; see `skipway.diagnosis.remedies`.
    """

    rule: str
    level: Level
    what: str
    why: str
    source: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    where: tuple[str, ...] = ()
    remedies: tuple[Any, ...] = ()

    @property
    def place(self) -> str:
        """Where, in a few words: "stages.2.8", or "stages.0.0 … stages.2.8 (27)"."""
        if not self.where:
            return "the network"
        if len(self.where) == 1:
            return self.where[0] or "the model"
        return f"{self.where[0]} … {self.where[-1]} ({len(self.where)})"

    def __str__(self) -> str:
        return f"{self.level} · {self.rule} · {self.place}: {self.what}"

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {
            "rule": self.rule,
            "level": self.level,
            "what": self.what,
            "why": self.why,
            "source": self.source,
            "evidence": {name: value if math.isfinite(value) else str(value) for name, value in self.evidence.items()},
            "where": list(self.where),
            "remedies": [str(remedy) for remedy in self.remedies],
        }


def number(value: float) -> str:
    """A number as people write it, three digits.

    >>> number(0.0123456), number(123456.0), number(float("inf")), number(2.0)
    ('0.0123', '1.23e+05', 'inf', '2')
    """
    return f"{value:.3g}"
