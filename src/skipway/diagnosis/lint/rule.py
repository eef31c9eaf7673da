"""A lint rule: a check with its level, its reason and its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from skipway.diagnosis.findings import Finding, Level
from skipway.diagnosis.lint.survey import Survey
from skipway.diagnosis.remedies import Remedy

__all__ = ["Check", "Hit", "LintRule", "lint_rule"]


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A case that a check has found; the rule adds why it matters and the source.

    Args:
        what: the problem in one sentence, with its numbers.
        where: names of the modules or parameters at fault.
        evidence: the numbers, by name.
        remedies: objects that mend it.
        level: where it differs from the rule's.
    """

    what: str
    where: tuple[str, ...] = field(default=(), repr=False)
    evidence: Mapping[str, float] = field(default_factory=dict)
    remedies: tuple[Remedy, ...] = ()
    level: Level | None = None


Check: TypeAlias = Callable[[Survey], Iterator[Hit]]


@dataclass(frozen=True)
class LintRule:
    """A rule that finds one known mistake.

    Args:
        number: "P13", a row of docs/lint.md; stable, and shared by rules about one mistake.
        title: the mistake in a few words.
        level: of its findings, unless a hit has another.
        why: the mechanism.
        source: paper or thread.
        check: yields the hits.
    """

    number: str
    title: str
    level: Level
    why: str
    source: str
    check: Check = field(repr=False)

    def findings(self, survey: Survey) -> list[Finding]:
        """The findings in a surveyed model."""
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


def lint_rule(number: str, title: str, level: Level, *, why: str, source: str) -> Callable[[Check], LintRule]:
    """Decorate a check to make it a rule."""
    return lambda check: LintRule(number, title, level, why, source, check)
