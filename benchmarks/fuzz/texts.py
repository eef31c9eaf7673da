"""Random texts: encodings, compression, tables, folders, damage and choices of any kind.

The oracles: nothing but `SkipwayError` is raised; every file that is no table is a document or left out with a note; a
packed pass and every evaluation score each target once, with ids of the tokenizer; the cache gives the same tokens; and
remarks are single lines without codes for the terminal.
"""

from __future__ import annotations

import gzip
import json
import lzma
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from torch import Tensor

from skipway.data.text import IGNORED, TextChoices, TokenSplit, load_text
from skipway.data.text.charset import Notes
from skipway.data.text.corpus import read_corpus
from skipway.data.text.rows import ROW_READERS
from skipway.data.text.sources import text_source
from skipway.errors import SkipwayError

__all__ = ["CASES", "Case", "outcome"]

FOLDERS = ("", "", "", "train", "val", "test", "deep/er", ".hidden")
SUFFIXES = (*[".txt"] * 9, ".md", "", ".py", ".gz", ".xz", *ROW_READERS)
ENCODINGS = ("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252", "koi8-r")


@dataclass(frozen=True)
class File:
    """A file: its folder and suffix, what is in it, and a byte of it that is changed."""

    folder: str
    suffix: str
    text: str
    encoding: str
    pack: str
    damage: int | None

    @property
    def content(self) -> bytes:
        """The bytes of the file."""
        content = self.text.encode(self.encoding, "replace")
        content = {"gzip": gzip.compress, "xz": lzma.compress}.get(self.pack, bytes)(content)
        if self.damage is not None and content:
            changed = bytearray(content)
            changed[self.damage % len(content)] ^= 0x85
            content = bytes(changed)
        return content


@dataclass(frozen=True)
class Case:
    """Files, whether the folder or its first file is the source, and choices."""

    files: tuple[File, ...]
    single: bool
    choices: dict[str, Any]


PROSE = st.lists(
    st.sampled_from(["abc", "naïve", "—", "🙂", "\r\n", "\n", "\0", "\t", "{", '"', ",", " "]), max_size=200
)
ROWS = st.lists(st.one_of(st.text(max_size=30), st.none(), st.fixed_dictionaries({"text": st.text(max_size=30)})))
TEXTS = st.one_of(
    PROSE.map("".join),
    st.text(max_size=100),
    ROWS.map(lambda rows: "\n".join(map(json.dumps, rows))),
    st.lists(st.text("ab,\n", max_size=9), max_size=9).map(lambda cells: "text,b\n" + ",".join(cells)),
)
FILES = st.builds(
    File,
    folder=st.sampled_from(FOLDERS),
    suffix=st.sampled_from(SUFFIXES),
    text=TEXTS,
    encoding=st.sampled_from(ENCODINGS),
    pack=st.sampled_from(["", "", "", "", "gzip", "xz"]),
    damage=st.sampled_from([*[None] * 9, 0, 7, 50]),
)
CHOICES = st.fixed_dictionaries(
    {
        "tokenizer": st.sampled_from(["bytes", "chars"]),
        "context": st.sampled_from([1, 2, 3, 16]),
        "holdout": st.sampled_from([0, 0.1, 0.5]),
        "validation": st.sampled_from([0, 0.1, 0.5]),
        "split_by": st.sampled_from(["auto", "auto", "auto", "documents", "parts"]),
        "divider": st.sampled_from([None, None, None, "\n"]),
        "encoding": st.sampled_from([*[None] * 9, "utf-8", "latin-1", "utf-16"]),
        "column": st.sampled_from([*[None] * 9, "text"]),
    }
)
CASES = st.builds(
    Case, files=st.lists(FILES, min_size=1, max_size=12).map(tuple), single=st.booleans(), choices=CHOICES
)


def outcome(case: Case, folder: Path) -> str:
    """Write a case, read it, and assert the oracles."""
    texts, cache = folder / "texts", folder / "cache"
    for number, file in enumerate(case.files):
        path = texts / file.folder / f"{number}{file.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.content)
    first = case.files[0]
    source = texts / first.folder / f"0{first.suffix}" if case.single else texts
    refusal = ""
    try:
        data = load_text(source, cache=False, **case.choices)
    except SkipwayError as error:
        refusal = str(error)
    if refusal:
        assert refusal.isprintable(), refusal
        return "refused"
    for remark in data.remarks:
        assert remark.isprintable(), remark
    if not case.single:
        check_counts(case, TextChoices(source=source, **case.choices))
    batches = [data.train_batch(0, step, 4) for step in range(data.steps(4))]
    assert scored(batches) == targets_of(data.train)
    for split in ("train", "validation", "test"):
        part: TokenSplit = getattr(data, split)
        for stride in (None, 1):
            assert scored(data.evaluation_batches(split, 2, stride=stride)) == targets_of(part)
        assert part.documents[-1] == len(part.tokens)
        assert 0 <= part.scored_bytes <= part.bytes
        for again in (load_text(source, cache=cache, **case.choices) for _ in range(2)):
            assert np.array_equal(getattr(again, split).tokens, part.tokens)
    return "read with remarks" if data.remarks else "read"


def check_counts(case: Case, choices: TextChoices) -> None:
    """Assert that every file is a document, or left out with a note, where each is one document."""
    if choices.divider is not None or any(file.suffix in ROW_READERS for file in case.files):
        return
    notes = Notes()
    corpus = read_corpus(text_source(choices), notes)
    left_out = sum(count for what, count in notes.counts.items() if what.startswith("left out"))
    elsewhere = sum(file.folder == ".hidden" for file in case.files)
    if any(remark.count("beside the folders of the splits") for remark in corpus.source.remarks):
        elsewhere += sum(file.folder not in ("train", "val", "test", ".hidden") for file in case.files)
    assert len(corpus.infos) + left_out + elsewhere == len(case.files), (corpus.infos, notes)


def scored(batches: Iterable[tuple[Tensor, Tensor]]) -> Counter[tuple[int, int]]:
    """How often each pair of input and target is scored."""
    found: Counter[tuple[int, int]] = Counter()
    for ids, targets in batches:
        on = targets != IGNORED
        found.update(zip(ids[on].tolist(), targets[on].tolist(), strict=True))
    return found


def targets_of(part: TokenSplit) -> Counter[tuple[int, int]]:
    """The pairs of neighbours of a split whose second one is known."""
    return Counter(pair for pair in pairwise(part.tokens.tolist()) if pair[1] != part.unknown)
