"""Key maps: tables of templates that translate parameter names between Skipway and another library, both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["Convert", "KeyMap", "KeyRule", "module_rule", "with_base_names"]

FIELD = re.compile(r"\{(\w+?)(?:\+(\d+))?\}")


class Convert(Protocol):
    """Conversion between their tensor and ours, for tensors that differ by more than name and shape."""

    def to_ours(self, tensor: Tensor) -> Tensor: ...

    def to_theirs(self, tensor: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class KeyRule:
    """One row of a key map: a template of our keys and the other library's template.

    `{i}` stands for a number, `{leaf}` for the rest of the name, `{i+1}` for the number plus one on that side. Several
    of their tensors can make one of ours, concatenated along the first axis (queries, keys and values, for example).

    Args:
        ours: template of our key.
        theirs: their template, or several.
        convert: what else has to be done to the tensor.
        shares: of a model, how many parts of ours each of several of theirs takes (4 queries : 1 key : 1 value); equal
            ones by default.

    >>> row = KeyRule("stages.{i}.{j}.branch.conv{k}.{leaf}", "layer{i+1}.{j}.conv{k}.{leaf}")
    >>> row.to_theirs("stages.0.2.branch.conv1.weight")
    ('layer1.2.conv1.weight',)
    >>> row.to_ours("layer1.2.conv1.weight")
    'stages.0.2.branch.conv1.weight'
    >>> row.to_ours("fc.weight") is None
    True
    """

    ours: str
    theirs: str | tuple[str, ...]
    convert: Convert | None = None
    shares: Callable[[Any], tuple[int, ...]] | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """Their templates."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    def to_theirs(self, key: str) -> tuple[str, ...] | None:
        """Their names for our key, or None if the row does not match it."""
        names = [translate_key(self.ours, theirs, key) for theirs in self.sources]
        return None if any(name is None for name in names) else tuple(name for name in names if name is not None)

    def to_ours(self, key: str) -> str | None:
        """Our name for their key, or None if the row does not match it."""
        return next((name for t in self.sources if (name := translate_key(t, self.ours, key)) is not None), None)

    def divide(self, tensor: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
        """Our tensor as theirs."""
        tensor = tensor if self.convert is None else self.convert.to_theirs(tensor)
        shares = (1,) * len(self.sources) if self.shares is None else self.shares(model)
        return tensor.split([len(tensor) * share // sum(shares) for share in shares]) if len(shares) > 1 else (tensor,)


@dataclass(frozen=True)
class KeyMap:
    """A table of rules. Among the rules that match a key, the first whose names are in the file applies, so a library
    that has renamed its parameters gets one row for each name.

    Args:
        library: whose names these are.
        rules: the rows.
        ignored: regular expressions of their keys that need not be loaded (tables computed at construction).
        unused: regular expressions of their keys for which ours has no use; they are left out and named (a pooler).
        copies: their key that stands for the same parameter as another of theirs → that one, such as a tied head's. It
            may be absent, stand alone, or stand there with equal values.
        differences: of a model and a file, what a table that need not be loaded shows of another network, in words.
    """

    library: str
    rules: tuple[KeyRule, ...]
    ignored: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    differences: Callable[[Any, Mapping[str, Tensor]], list[str]] = lambda model, state: []

    def find(self, key: str, present: Container[str] = ()) -> tuple[KeyRule, tuple[str, ...]] | None:
        """The row that matches our key, and their names for it: those that are present, else those of the first row."""
        found = [(row, names) for row in self.rules if (names := row.to_theirs(key)) is not None]
        here = (each for each in found if all(name in present for name in each[1]))
        return next(here, found[0] if found else None)

    def names(self, key: str) -> Iterator[str]:
        """All their names for our key, of every row that matches it."""
        for row in self.rules:
            for name in row.to_theirs(key) or ():
                yield name
                yield from (copy for copy, first in self.copies.items() if first == name)

    def without_copies(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict whose copies are left out where they equal the first, and take its name where it is absent."""
        state = dict(state)
        for copy, first in self.copies.items():
            if copy in state and (first not in state or equal_tensors(state[copy], state[first])):
                state[first] = state.pop(copy)
        return state

    def to_ours(self, key: str) -> str | None:
        """Our name for their key, or None if no row matches it."""
        return next((name for row in self.rules if (name := row.to_ours(key)) is not None), None)

    def ignores(self, key: str) -> bool:
        """True if their key need not be loaded."""
        return any(re.fullmatch(expression, key) for expression in self.ignored)

    def leaves_out(self, key: str) -> bool:
        """True if our model has no use for their key."""
        return any(re.fullmatch(expression, key) for expression in self.unused)

    def known(self, keys: Iterable[str]) -> float:
        """Fraction of their keys that the table matches."""
        keys = list(keys)
        return sum(self.ignores(key) or self.to_ours(key) is not None for key in keys) / max(len(keys), 1)

    def busy(self, keys: Iterable[str]) -> float:
        """Fraction of the rows that match one of their keys."""
        keys = list(keys)
        return sum(any(row.to_ours(key) is not None for key in keys) for row in self.rules) / len(self.rules)


def equal_tensors(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values, NaN in the same places, or are without values (meta)."""
    if one.shape != other.shape:
        return False
    return one.is_meta or other.is_meta or bool(((one == other) | (one.isnan() & other.isnan())).all())


def module_rule(
    ours: str,
    *theirs: str,
    convert: Convert | None = None,
    shares: Callable[[Any], tuple[int, ...]] | None = None,
) -> KeyRule:
    """A row for all parameters of a module.

    >>> module_rule("head.classifier", "fc").to_theirs("head.classifier.bias")
    ('fc.bias',)
    """
    names = tuple(f"{name}.{{leaf}}" for name in theirs)
    return KeyRule(f"{ours}.{{leaf}}", names[0] if len(names) == 1 else names, convert, shares)


def with_base_names(root: str, rules: tuple[KeyRule, ...]) -> tuple[KeyRule, ...]:
    """The rows of a model class of Hugging Face, and of its base model, published alone: without root and classifier.

    >>> [row.theirs for row in with_base_names("vit", (KeyRule("head.norm", "vit.layernorm"),))]
    ['vit.layernorm', 'layernorm']
    """
    inside = [row for row in rules if all(name.startswith(f"{root}.") for name in row.sources)]
    bare = (replace(row, theirs=tuple(name.removeprefix(f"{root}.") for name in row.sources)) for row in inside)
    base = (replace(row, theirs=row.sources[0]) if len(row.sources) == 1 else row for row in bare)
    return (*rules, *base)


def translate_key(source: str, target: str, key: str) -> str | None:
    """Read `key` by the template `source`, write it by the template `target`."""
    match = re.fullmatch(template_pattern(source), key)
    if match is None:
        return None
    offsets = {name: int(offset or 0) for name, offset in FIELD.findall(source)}
    fields = {name: text if name == "leaf" else int(text) - offsets[name] for name, text in match.groupdict().items()}
    if any(isinstance(value, int) and value < 0 for value in fields.values()):
        return None
    return FIELD.sub(lambda m: str(int(fields[m[1]]) + int(m[2]) if m[2] else fields[m[1]]), target)


def template_pattern(template: str) -> str:
    """The regular expression of a template."""
    out, end = "", 0
    for match in FIELD.finditer(template):
        out += re.escape(template[end : match.start()])
        out += f"(?P<{match[1]}>{r'.+' if match[1] == 'leaf' else r'[0-9]+'})"
        end = match.end()
    return out + re.escape(template[end:])
