"""`Corpus`: the documents of a source after it was read once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import numpy as np

from skipway.data.sources.index import name_list
from skipway.data.sources.splits import SPLITS, Split
from skipway.data.text.charset import Notes
from skipway.data.text.documents import Document, TextSource
from skipway.data.text.overlap import SentenceSample, near_copies, overlap_remarks
from skipway.data.text.partition import DocumentInfo, Partition
from skipway.errors import DataError, counted, printable

__all__ = ["ChangedText", "Corpus", "read_corpus"]

# bytes of text that are held in memory; of more, the source is read again
MEMORY_BYTES = 512 * 1024**2
# share of the text from which one document is said to be nearly all of it
MOST_OF_IT = 0.9


class ChangedText(DataError):
    """The documents of a source are not those that were read before."""


@dataclass(frozen=True)
class Corpus:
    """Documents: what is known of each, and their texts where memory holds them.

    Args:
        source: of the documents.
        infos: about each of them.
        texts: of the first ones; the others are read again.
        sentences: a sample of those of each.
    """

    source: TextSource
    infos: list[DocumentInfo]
    texts: list[str] = field(repr=False)
    sentences: SentenceSample = field(repr=False)

    @property
    def separates(self) -> bool:
        """Whether there are several documents, between which separators stand."""
        return len(self.infos) > 1

    @cached_property
    def bytes(self) -> int:
        """Bytes of all texts in UTF-8."""
        return sum(each.bytes for each in self.infos)

    def documents(self) -> Iterator[str]:
        """The texts of all documents, in order.

        Raises:
            ChangedText: the source has changed since it was read.
        """
        if len(self.texts) == len(self.infos):
            yield from self.texts
            return
        count = 0
        for count, document in enumerate(self.source.documents(Notes()), 1):
            if count > len(self.infos) or info_of(document).digest != self.infos[count - 1].digest:
                count = -1
                break
            yield document.text
        if count != len(self.infos):
            raise ChangedText(f"{printable(self.source.name)} has changed while it was read: start again")

    def parts(self, plan: Partition) -> Iterator[tuple[int, Split, str]]:
        """The pieces of all documents: number of the document, split and text."""
        for number, text in enumerate(self.documents()):
            for split, part in plan.parts(number, text):
                yield number, split, part

    def sample(self, count: int) -> list[str]:
        """Some texts, evenly spread over those in memory, else the first ones."""
        texts = self.texts or list(islice(self.documents(), count))
        return texts[:: max(1, len(texts) // count)][:count]

    def remarks(self, plan: Partition) -> Iterator[str]:
        """Remarks about copies, about one document that is nearly all of the text, and about documents that are cut."""
        copies = Counter(each.digest for each in self.infos)
        if extra := sum(copies.values()) - len(copies):
            first = next(each for each in self.infos if copies[each.digest] > 1)
            same = name_list([each.name for each in self.infos if each.digest == first.digest], 3)
            yield f"{counted(extra, 'document')} more than once: {same}"
        train = {info.digest for info, split in zip(self.infos, plan.splits, strict=True) if split in (None, "train")}
        for held in SPLITS[1:]:
            pairs = zip(self.infos, plan.splits, strict=True)
            leaked = [info.name for info, split in pairs if split == held and info.digest in train]
            if leaked:
                count = counted(len(leaked), "document")
                yield f"{count} of the {held} text are training text, too: {name_list(leaked, 3)}"
        largest = max(self.infos, key=lambda each: each.bytes)
        if self.separates and largest.bytes > MOST_OF_IT * self.bytes:
            yield f"{printable(largest.name)!r} is {100 * largest.bytes / self.bytes:.1f} % of the text"
        if plan.cuts:
            what = "each document" if self.separates else "the document"
            shares = {"validation": (1 - plan.holdout) * plan.validation, "test": plan.holdout}
            held = " and ".join(f"{100 * share:.3g} % {split} text" for split, share in shares.items() if share)
            yield f"{what} is cut: at its end are {held}"
        yield from overlap_remarks(list(self.sentence_parts(plan)))

    def sentence_parts(self, plan: Partition) -> Iterator[tuple[str, Split, np.ndarray]]:
        """Name of the document, split and sentences of each piece of text."""
        if plan.cuts:
            for number, split, text in self.parts(plan):
                yield self.infos[number].name, split, self.sentences.numbers(text)
            return
        for info, split, sentences in zip(self.infos, plan.splits, self.sentences.documents, strict=True):
            if split is not None:
                yield info.name, split, sentences


def info_of(document: Document) -> DocumentInfo:
    """What is known of a document."""
    content = document.text.encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(content).hexdigest()[:32]
    return DocumentInfo(document.name, digest, len(content), document.split, digest)


def read_corpus(source: TextSource, notes: Notes) -> Corpus:
    """Read a source once.

    Raises:
        DataError: it holds no text.
    """
    infos: list[DocumentInfo] = []
    texts: list[str] = []
    sentences = SentenceSample()
    size = 0
    for document in source.documents(notes):
        infos.append(info_of(document))
        size += infos[-1].bytes
        sentences.add(document.text)
        if size <= MEMORY_BYTES:
            texts.append(document.text)
    if not infos:
        raise DataError(
            "; ".join([f"there is no text in {printable(source.name)}", *notes.sentences(), "give another"])
        )
    groups = near_copies(sentences.documents)
    infos = [info._replace(group=infos[group].digest) for info, group in zip(infos, groups, strict=True)]
    return Corpus(source, infos, texts, sentences)
