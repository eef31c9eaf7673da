"""Which text is in which split: whole documents, or the parts of each, as functions of seed and content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Literal, NamedTuple

from skipway.data.randomness import draw_key
from skipway.data.sources.splits import SPLITS, Split
from skipway.errors import DataError, counted, spell

__all__ = ["DocumentInfo", "Partition", "SplitBy", "partition"]

HELD_OUT: tuple[Split, ...] = ("test", "validation")
SplitBy = Literal["auto", "documents", "parts"]

# documents are split whole if every split then has these shares of the text that it should have
LEAST_SHARE, MOST_SHARE = 0.5, 1.5


class DocumentInfo(NamedTuple):
    """What is known of a document after it was read once: digest of its text, bytes in UTF-8, its own split, and the
    digest that stands for it and its near copies.
    """

    name: str
    digest: str
    bytes: int
    split: Split | None
    group: str


class Partition(NamedTuple):
    """The split of each document, or the shares by which each document that has none is cut.

    Args:
        splits: of the documents; None: it is cut.
        holdout: share of such a document that is test text, at its end.
        validation: share of the rest that is validation text, before that.
    """

    splits: tuple[Split | None, ...]
    holdout: float
    validation: float

    @property
    def cuts(self) -> bool:
        """Whether any document is cut."""
        return None in self.splits

    def parts(self, number: int, text: str) -> list[tuple[Split, str]]:
        """The splits that document `number` goes to, with the text for each; a cut falls between two characters.

        >>> Partition((None,), 0.2, 0.25).parts(0, "abcdefghij")
        [('train', 'abcdef'), ('validation', 'gh'), ('test', 'ij')]
        """
        split = self.splits[number]
        if split is not None:
            return [(split, text)]
        end = int(len(text) * (1 - self.holdout))
        middle = int(end * (1 - self.validation))
        parts = zip(SPLITS, (text[:middle], text[middle:end], text[end:]), strict=True)
        return [(split, part) for split, part in parts if part]


def partition(
    documents: Sequence[DocumentInfo], *, holdout: float, validation: float, seed: int, by: SplitBy = "auto"
) -> Partition:
    """Split documents that their source has not split.

    By "documents": in an order that depends on the seed and the content of each alone, documents go to the test split
    until it has its share of the text, then, of those that remain, to the validation split. Copies of a document go
    together. By "parts": of each document, the end is test text and what precedes it validation text. "auto" takes
    documents whole, unless a split would then have less than half of the text that it should have, as with few
    documents or one that is most of the text.

    Args:
        documents: with the splits that their source has put them in.
        holdout: share of the text to be test text where the source has none; 0: none.
        validation: share of the rest to be validation text where the source has none; 0: none.
        seed: chooses the documents.
        by: see above.

    Raises:
        DataError: whole documents are asked for and do not give such shares.
    """
    own = {each.split for each in documents}
    shares = {
        "test": 0.0 if "test" in own else holdout,
        "validation": 0.0 if "validation" in own else validation,
    }
    if not any(shares.values()):
        return Partition(tuple(each.split or "train" for each in documents), 0.0, 0.0)
    # what the source calls training text is split further where other splits are missing
    free = [each for each in documents if each.split in (None, "train")]
    if by != "parts":
        # near copies part only where they are too many to stay together
        for unit in (attrgetter("group"), attrgetter("digest")):
            chosen, short = choose_documents(free, unit, shares, seed)
            if not short:
                splits = (
                    chosen.get(unit(each), "train") if each.split in (None, "train") else each.split
                    for each in documents
                )
                return Partition(tuple(splits), 0.0, 0.0)
        if by == "documents":
            raise DataError(
                f"{spell('split_by', by)}: {counted(len(free), 'document')} of such sizes cannot give a {short} split "
                f"of {100 * shares[short]:.3g} % of the text; add documents, or cut each with "
                f"{spell('split_by', 'parts')}"
            )
    splits = tuple(None if each.split in (None, "train") else each.split for each in documents)
    return Partition(splits, shares["test"], shares["validation"])


def choose_documents(
    documents: Sequence[DocumentInfo], unit: Callable[[DocumentInfo], str], shares: Mapping[str, float], seed: int
) -> tuple[dict[str, Split], str]:
    """The splits that units of documents are held out for, and a split that gets less than it should, or ""."""
    chosen: dict[str, Split] = {}
    short = ""
    for split in HELD_OUT:
        size = Counter[str]()
        for each in documents:
            if unit(each) not in chosen:
                size[unit(each)] += each.bytes
        wanted, held, left = shares[split] * sum(size.values()), 0, len(size)
        for name in sorted(size, key=lambda name: (draw_key(seed, f"{split} text", name), name)):
            if left > 1 and held < wanted and held + size[name] <= MOST_SHARE * wanted:
                chosen[name] = split
                held += size[name]
                left -= 1
        if held < LEAST_SHARE * wanted:
            short = short or split
    return chosen, short
