"""`TextCache`: what is kept of a text in the cache folder, by choice or because it is large."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from skipway.checkpoint.files import describe_os_error
from skipway.data.cache.store import cache_folder, cache_remark
from skipway.data.text.charset import Notes
from skipway.data.text.choices import TextChoices
from skipway.data.text.corpus import Corpus, read_corpus
from skipway.data.text.documents import TextSource
from skipway.data.text.partition import Partition
from skipway.data.text.survey_file import SurveyFile
from skipway.data.text.token_store import EncodedText, TokenFolder, encode_in_memory
from skipway.data.text.tokenizer import Tokenizer
from skipway.data.text.tokenizer_file import FileTokenizer

__all__ = ["TextCache"]

# text from which tokens are cached by default: they would take much memory, or long to make
CACHED_BYTES, SLOW_BYTES = 64 * 1024**2, 2 * 1024**2


@dataclass
class TextCache:
    """What is kept of a text in the cache folder: what was found out about its documents, and their tokens.

    Args:
        choice: of the user.
        folder: of the cache; None: nothing is kept.
        place: of the source, for names.
        stamp: of the source; None: it has to be read to be known.
        remarks: receives why something is not kept.
    """

    choice: bool | Path | None
    folder: Path | None
    place: str
    stamp: str | None
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, source: TextSource, choices: TextChoices) -> TextCache:
        """The cache of a source, as was chosen."""
        place = "" if choices.source is None else os.path.abspath(choices.source)
        cache = cls(choices.cache, None, place, source.stamp())
        if choices.cache is not False:
            try:
                cache.folder = cache_folder(choices.cache)
            except OSError as error:
                cache.refuse(error)
        return cache

    def refuse(self, error: OSError) -> None:
        """Keep nothing from now on, and say why."""
        self.folder = None
        self.remarks.append(f"tokens are not cached: {describe_os_error(error)}")

    def keeps(self, size: int, least: int = CACHED_BYTES) -> bool:
        """Whether anything is kept of a text of a size in bytes: on request, and by default from some size on."""
        return self.folder is not None and (size >= least or self.choice is not None)

    def announce(self) -> None:
        """Say once that something is kept outside the run, unless the user named the folder."""
        if self.folder is not None and not isinstance(self.choice, Path):
            remark = cache_remark("the text's tokens, and what is known of its documents, are", self.folder)
            self.remarks += [] if remark in self.remarks else [remark]

    def name(self, kind: str) -> str:
        """A name for entries of this source: newer ones replace older ones."""
        return hashlib.sha256(ascii((self.place, kind)).encode()).hexdigest()[:16]

    @property
    def survey(self) -> SurveyFile | None:
        """The file with what is known of the source."""
        if self.folder is None or self.stamp is None:
            return None
        return SurveyFile(self.folder, self.name(""), self.stamp)

    def forget(self) -> None:
        """Forget what is known of the source."""
        if self.survey is not None:
            self.survey.remove()

    def read(self, source: TextSource) -> tuple[Corpus, Notes]:
        """The documents of a source, which is not read if it is known.

        Raises:
            DataError: it holds no text.
        """
        file = self.survey
        if file is not None and (known := file.load(source)):
            return known
        notes = Notes()
        corpus = read_corpus(source, notes)
        if file is not None and self.keeps(corpus.bytes):
            try:
                file.save(corpus, notes)
                self.announce()
            except OSError as error:
                self.refuse(error)
        return corpus, notes

    def encode(self, corpus: Corpus, plan: Partition, tokenizer: Tokenizer, key: str) -> EncodedText:
        """The tokens of documents; by default they are kept where that takes long or much memory."""
        least = SLOW_BYTES if isinstance(tokenizer, FileTokenizer) else CACHED_BYTES
        if self.folder is not None and self.keeps(corpus.bytes, least):
            try:
                encoded = TokenFolder(self.folder, self.name(tokenizer.kind), key).encode(corpus, plan, tokenizer)
                self.announce()
                return encoded
            except OSError as error:
                self.refuse(error)
        return encode_in_memory(corpus, plan, tokenizer)
