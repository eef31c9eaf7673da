"""Paths of modules: those around a module, and many in a few words, so that a message about 200 layers fits on one
line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

__all__ = ["condense_paths", "parents"]

SHOWN = 3
"""Paths, or patterns of them, that are written out."""


def parents(name: str) -> Iterator[str]:
    """The modules that a module is in, innermost first, without the model itself.

    >>> list(parents("stages.0.3"))
    ['stages.0', 'stages']
    """
    while name := name.rpartition(".")[0]:
        yield name


def condense_paths(paths: Sequence[str]) -> str:
    """Write many paths briefly: up to three as they are, more of them as patterns over their numbers, else by example.

    >>> condense_paths(["layer1.0", "layer2.0"])
    'layer1.0, layer2.0'
    >>> condense_paths([f"layers.{i}.fc{j}" for i in range(100) for j in (1, 2)])
    'layers.{0..99}.fc{1,2} (200)'
    >>> condense_paths([f"blocks.{i}.{part}" for i in range(12) for part in ("attn.proj", "mlp.fc2")])
    'blocks.{0..11}.attn.proj, blocks.{0..11}.mlp.fc2 (24)'
    >>> condense_paths(["stem", "a.0", "b.1", "b.2", "head"])
    'stem, a.0, … head (5)'
    """
    named = [path or "the model" for path in paths]
    if len(named) <= SHOWN:
        return ", ".join(named)
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for path in named:
        words = re.split(r"(?<!\d)(0|[1-9]\d*)(?!\d)", path)
        groups.setdefault(tuple(words[::2]), []).append(tuple(map(int, words[1::2])))
    patterns = [pattern for words, numbers in groups.items() for pattern in patterns_of(words, numbers)]
    if len(patterns) > SHOWN:
        patterns = [f"{named[0]}, {named[1]}, … {named[-1]}"]
    return f"{', '.join(patterns)} ({len(named)})"


def patterns_of(words: tuple[str, ...], numbers: Sequence[tuple[int, ...]]) -> list[str]:
    """One pattern if `numbers` are all combinations of some numbers for each gap between the words, else one for each
    first number.
    """
    axes = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    combinations = 1
    for axis in axes:
        combinations *= len(axis)
    if combinations == len(set(numbers)):
        braces = [brace(axis) for axis in axes]
        return ["".join(part for pair in zip(words, [*braces, ""], strict=True) for part in pair)]
    found = []
    for first in axes[0]:
        rest = [row[1:] for row in numbers if row[0] == first]
        found += patterns_of((f"{words[0]}{first}{words[1]}", *words[2:]), rest)
        if len(found) > SHOWN:
            break
    return found


def brace(numbers: Sequence[int]) -> str:
    """Sorted numbers as a shell's braces write them.

    >>> brace([3]), brace([1, 2]), brace([0, 1, 2, 3]), brace([0, 2, 4])
    ('3', '{1,2}', '{0..3}', '{0,2,4}')
    """
    if len(numbers) == 1:
        return str(numbers[0])
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    shown = (
        [*map(str, numbers)] if len(numbers) <= 2 * SHOWN else [str(numbers[0]), str(numbers[1]), "…", str(numbers[-1])]
    )
    return f"{{{','.join(shown)}}}"
