"""Key maps: tables of templates that say what another library calls each of our parameters, readable both ways."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["KeyMap", "Rule", "rule"]

FIELD = re.compile(r"\{(\w+?)(?:\+(\d+))?\}")


@dataclass(frozen=True)
class Rule:
    """One row of a key map: a template of ours and what the other library calls it.

    `{i}` stands for a number, `{leaf}` for the rest of the name, `{i+1}` for the number plus one on that side.

    >>> row = Rule("stages.{i}.{j}.branch.conv{k}.{leaf}", "layer{i+1}.{j}.conv{k}.{leaf}")
    >>> row.to_theirs("stages.0.2.branch.conv1.weight")
    'layer1.2.conv1.weight'
    >>> row.to_ours("layer1.2.conv1.weight")
    'stages.0.2.branch.conv1.weight'
    >>> row.to_ours("fc.weight") is None
    True
    """

    ours: str
    theirs: str

    def to_theirs(self, key: str) -> str | None:
        """Their name for our key, None where the row does not speak of it."""
        return translate(self.ours, self.theirs, key)

    def to_ours(self, key: str) -> str | None:
        """Our name for their key, None where the row does not speak of it."""
        return translate(self.theirs, self.ours, key)


@dataclass(frozen=True)
class KeyMap:
    """A table of rules; the first that speaks of a key decides.

    Args:
        library: whose names these are.
        rules: the rows.
    """

    library: str
    rules: tuple[Rule, ...]

    def to_theirs(self, key: str) -> str | None:
        """Their name for our key; None where no row speaks of it."""
        return first(self.rules, lambda row: row.to_theirs(key))

    def to_ours(self, key: str) -> str | None:
        """Our name for their key; None where no row speaks of it."""
        return first(self.rules, lambda row: row.to_ours(key))


def rule(ours: str, theirs: str) -> Rule:
    """A row about a module: both names are followed by the parameter's own."""
    return Rule(ours + ".{leaf}", theirs + ".{leaf}")


def first(rules: tuple[Rule, ...], ask: Callable[[Rule], str | None]) -> str | None:
    """The first answer that is not None."""
    return next((answer for answer in map(ask, rules) if answer is not None), None)


def translate(source: str, target: str, key: str) -> str | None:
    """Read `key` by the template `source`, write it by the template `target`."""
    match = re.fullmatch(pattern(source), key)
    if match is None:
        return None
    offsets = {name: int(offset or 0) for name, offset in FIELD.findall(source)}
    fields = {name: text if name == "leaf" else int(text) - offsets[name] for name, text in match.groupdict().items()}
    if any(isinstance(value, int) and value < 0 for value in fields.values()):
        return None
    return FIELD.sub(lambda m: str(int(fields[m[1]]) + int(m[2]) if m[2] else fields[m[1]]), target)


def pattern(template: str) -> str:
    """The regular expression of a template."""
    out, end = "", 0
    for match in FIELD.finditer(template):
        out += re.escape(template[end : match.start()])
        out += f"(?P<{match[1]}>{r'.+' if match[1] == 'leaf' else r'[0-9]+'})"
        end = match.end()
    return out + re.escape(template[end:])
