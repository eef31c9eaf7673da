"""What was found out about the documents of a source, in the cache folder: large ones are not read at every start."""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from skipway.data.cache.store import replace_file
from skipway.data.text.charset import Notes
from skipway.data.text.corpus import Corpus
from skipway.data.text.documents import TextSource
from skipway.data.text.overlap import SentenceSample
from skipway.data.text.partition import DocumentInfo

__all__ = ["SurveyFile"]

FORMAT = 1


@dataclass(frozen=True)
class SurveyFile:
    """A file with the digests, sizes, splits and sentences of documents, and what was noted while they were read.

    It counts while no file of the source has another size or modification time; whoever reads a document again compares
    its digest. NumPy's format, without pickle, with its SHA-256 in front.

    Args:
        cache: the folder of the cache.
        name: of the source.
        stamp: of its files and of how they are read.
    """

    cache: Path
    name: str
    stamp: str

    @property
    def path(self) -> Path:
        """The file."""
        return self.cache / f"survey-{self.name}-{self.stamp}.npz"

    def load(self, source: TextSource) -> tuple[Corpus, Notes] | None:
        """What is known of a source; None if the file is missing or damaged."""
        try:
            content = self.path.read_bytes()
            if hashlib.sha256(content[32:]).digest() != content[:32]:
                return None
            with np.load(io.BytesIO(content[32:]), allow_pickle=False) as stored:
                about = json.loads(stored["about"].tobytes())
                lengths, numbers = stored["lengths"], stored["numbers"]
            if about["format"] != FORMAT:
                return None
            documents = np.split(numbers, np.cumsum(lengths)[:-1])
            sentences = SentenceSample(about["rate"], documents)
            infos = [DocumentInfo(*each) for each in about["infos"]]
            return Corpus(source, infos, [], sentences), Notes(about["first"], about["counts"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def remove(self) -> None:
        """Forget what is known."""
        with suppress(OSError):
            self.path.unlink()

    def save(self, corpus: Corpus, notes: Notes) -> None:
        """Keep what is known; what was known of the source before is removed.

        Raises:
            OSError: the cache cannot be written to.
        """
        about = {
            "format": FORMAT,
            "rate": corpus.sentences.rate,
            "infos": corpus.infos,
            "first": notes.first,
            "counts": notes.counts,
        }
        documents = corpus.sentences.documents
        file = io.BytesIO()
        np.savez(
            file,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            lengths=np.array([len(each) for each in documents], np.int64),
            numbers=np.concatenate(documents),
        )
        content = file.getvalue()
        replace_file(self.path, [hashlib.sha256(content).digest(), content])
        for other in self.cache.glob(f"survey-{self.name}-*.npz"):
            if other != self.path:
                with suppress(OSError):
                    other.unlink()
