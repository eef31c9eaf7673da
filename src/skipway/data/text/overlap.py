"""Sentences that documents have in common: near copies, and how much of the text held out is in the training text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from zlib import crc32

import numpy as np

from skipway.data.sources.index import name_list
from skipway.data.sources.splits import SPLITS, Split
from skipway.errors import counted

__all__ = ["SentenceSample", "near_copies", "overlap_remarks"]

# letters from which a sentence or a line is not common by chance
LEAST_LETTERS = 40
# sentences that are kept of a text; of more, every second, fourth, … by their hashes
MOST_SENTENCES = 500_000
# of a document's sentences, from which it is a near copy, and how many it takes to say so
NEAR_COPY, FEWEST = 0.5, 3
NOBODY: frozenset[int] = frozenset()
# groups that are kept in mind for a sentence
MOST_HOLDERS = 8
# of all sentences of a split, from which it is remarked
REMARKED = 0.1
SENTENCE_ENDS = re.compile(r"[\n.!?。！？]+")


class SentenceSample:
    """Numbers that stand for the sentences of documents, int64 (n,) for each; equal sentences have equal numbers.

    Args:
        rate: one of so many sentences is in the sample, whatever text it is in.
        documents: the numbers of each document.
    """

    def __init__(self, rate: int = 1, documents: Iterable[np.ndarray] = ()) -> None:
        self.rate = rate
        self.documents = list(documents)
        self.count = sum(map(len, self.documents))

    def add(self, text: str) -> None:
        """Add a document."""
        found = self.numbers(text)
        self.documents.append(found)
        self.count += len(found)
        while self.count > MOST_SENTENCES:
            self.rate *= 2
            self.documents = [each[(each >> 32) % self.rate == 0] for each in self.documents]
            self.count = sum(map(len, self.documents))

    def numbers(self, text: str) -> np.ndarray:
        """The numbers of the sentences of a text that are in the sample, each once."""
        found = set()
        for piece in SENTENCE_ENDS.split(text):
            if len(piece) >= LEAST_LETTERS:
                sentence = " ".join(piece.split()).encode("utf-8", "surrogatepass")
                upper = crc32(sentence) >> 1
                if upper % self.rate == 0:
                    found.add(upper << 32 | int.from_bytes(blake2b(sentence, digest_size=4).digest(), "big"))
        return np.fromiter(found, np.int64, len(found))


def near_copies(documents: Sequence[np.ndarray]) -> list[int]:
    """For each document the number of the one that stands for its group of near copies.

    Longer documents come first; each joins every group before it that holds half of its sentences, and three.

    >>> near_copies([np.arange(3), np.arange(10), np.arange(20, 30), np.arange(5, 12)])
    [0, 0, 2, 0]
    """
    parent = list(range(len(documents)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    holders: dict[int, list[int]] = {}
    for number in sorted(parent, key=lambda number: (-len(documents[number]), number)):
        sentences = documents[number].tolist()
        known = [{root(holder) for holder in holders[each]} if each in holders else NOBODY for each in sentences]
        counts = Counter(group for groups in known for group in groups)
        for group, count in sorted(counts.items()):
            if count >= max(FEWEST, NEAR_COPY * len(sentences)):
                one, two = sorted((root(group), root(number)))
                parent[two] = one
        own = root(number)
        for each, groups in zip(sentences, known, strict=True):
            if own not in groups and len(groups) < MOST_HOLDERS:
                holders.setdefault(each, []).append(number)
    return [root(number) for number in parent]


def overlap_remarks(parts: Sequence[tuple[str, Split, np.ndarray]]) -> Iterator[str]:
    """Remarks about near copies between splits, and about splits that share much with the training text.

    Args:
        parts: name of the document, split and sentences of each piece of text.
    """
    train = np.unique(np.concatenate([np.empty(0, np.int64), *(own for _, split, own in parts if split == "train")]))
    for held in SPLITS[1:]:
        pieces = [(name, len(own), count_known(own, train)) for name, split, own in parts if split == held]
        near = [name for name, size, both in pieces if both >= max(FEWEST, NEAR_COPY * size)]
        share = sum(both for *_, both in pieces) / max(1, sum(size for _, size, _ in pieces))
        if near and len(pieces) > 1:
            yield (
                f"{counted(len(near), 'near copy', 'near copies')} of training text in the {held} text, with half of "
                f"the sentences in common: {name_list(near, 3)}"
            )
        if share >= REMARKED:
            yield f"{100 * share:.0f} % of the sentences of the {held} text occur in the training text"


def count_known(numbers: np.ndarray, known: np.ndarray) -> int:
    """How many numbers are among known ones, which are sorted."""
    places = np.searchsorted(known, numbers).clip(max=max(0, len(known) - 1))
    return int((known[places] == numbers).sum()) if len(known) else 0
