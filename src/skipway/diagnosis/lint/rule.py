"""What a rule is: a check with its level, why it matters and where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from skipway.diagnosis.findings import Finding, Level
from skipway.diagnosis.lint.survey import Survey
from skipway.diagnosis.remedies import Remedy

__all__ = ["Check", "Hit", "Rule", "rule"]


@dataclass(frozen=True, kw_only=True)
class Hit:
    """What a rule found, before the rule's own words are put to it.

    Args:
        what: one sentence with the numbers.
        where: names at fault.
        evidence: the numbers.
        remedies: objects that mend it.
        level: where it differs from the rule's.
    """

    what: str
    where: tuple[str, ...] = ()
    evidence: Mapping[str, float] = field(default_factory=dict)
    remedies: tuple[Remedy, ...] = ()
    level: Level | None = None


Check: TypeAlias = Callable[[Survey], Iterator[Hit]]


@dataclass(frozen=True)
class Rule:
    """One known mistake.

    Args:
        number: "P13"; stable, several rules may be about one mistake.
        title: what it looks for, in a few words.
        level: of what it finds, unless a hit says otherwise.
        why: why it matters.
        source: paper or thread.
        check: finds it.
    """

    number: str
    title: str
    level: Level
    why: str
    source: str
    check: Check = field(repr=False)

    def findings(self, survey: Survey) -> list[Finding]:
        """What it finds."""
        return [
            Finding(
                rule=self.number,
                level=hit.level or self.level,
                what=hit.what,
                why=self.why,
                source=self.source,
                evidence=hit.evidence,
                where=hit.where,
                remedies=hit.remedies,
            )
            for hit in self.check(survey)
        ]


def rule(number: str, title: str, level: Level, *, why: str, source: str) -> Callable[[Check], Rule]:
    """Make a rule of a check."""
    return lambda check: Rule(number, title, level, why, source, check)
