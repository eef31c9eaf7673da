"""Findings of a diagnosis or of lint: what is wrong, the numbers it rests on, why it matters, what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from skipway.tracing.paths import condense_paths

__all__ = ["LEVELS", "Finding", "Level", "Verdict", "format_number", "format_share"]

Level = Literal["fatal", "serious", "note"]
LEVELS: tuple[Level, ...] = ("fatal", "serious", "note")
Verdict = Literal["trains", "will not train", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One problem that a rule has found.

    Args:
        rule: short name of the rule, "vanishing-gradient"; lint rules have a number, "P13".
        level: "fatal" (a cause for which the network will not train), "serious" (to be mended all the same) or "note".
        what: the problem in one sentence, with its numbers.
        evidence: the numbers that the finding rests on, by name.
        why: the mechanism, in one or two sentences.
        source: paper and equation, link, or measurement on which the rule rests.
        where: names of the connections, modules or parameters at fault, in order; empty: the whole network.
        remedies: objects that mend it, the one to try first in front; see `skipway.diagnosis.remedies`.
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
        """`where` in a few words: "stages.2.8", or "stages.{0..2}.{0..8} (27)"."""
        return condense_paths(self.where) if self.where else "the network"

    def __repr__(self) -> str:
        return f"Finding({self})"

    def __str__(self) -> str:
        return f"{self.level} · {self.rule} · {self.place}: {self.what}"

    def to_json(self) -> dict[str, Any]:
        """The finding as values that JSON can hold; numbers that are not finite as strings."""
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


def format_number(value: float) -> str:
    """A number with three significant digits.

    >>> format_number(0.0123456), format_number(123456.0), format_number(float("inf")), format_number(2.0)
    ('0.0123', '1.23e+05', 'inf', '2')
    """
    return f"{value:.3g}"


def format_share(share: float) -> str:
    """A share in per cent; 0 and 100 stand for nothing else.

    >>> format_share(0.974), format_share(0.002), format_share(0.9999), format_share(0.0)
    ('97 %', 'below 1 %', 'above 99 %', '0 %')
    """
    if 0 < share < 0.01:
        return "below 1 %"
    return "above 99 %" if 0.99 < share < 1 else f"{100 * share:.0f} %"
