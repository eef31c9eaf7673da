"""The tokens of a text in the cache folder, with checksums, or in memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from filelock import FileLock

from skipway.checkpoint.files import fault_point, fsync_path
from skipway.data.cache.store import SPARE_BYTES
from skipway.data.sources.splits import SPLITS, Split
from skipway.data.text.corpus import Corpus
from skipway.data.text.partition import Partition
from skipway.data.text.token_split import TokenSplit
from skipway.data.text.tokenizer import Tokenizer
from skipway.data.text.tokenizer_choice import tokenizer_remarks

__all__ = ["EncodedText", "TokenFolder", "encode_in_memory"]

FORMAT = 1
INDEX = "index.json"
CHUNK = 1 << 22
# letters of documents that are encoded together, on all cores where the tokenizer can
LETTERS_AT_ONCE = 1 << 22


@dataclass
class PartBuilder:
    """A split as it grows: its tokens in a file or in memory, and what is counted of them."""

    tokenizer: Tokenizer
    separates: bool
    file: IO[bytes] | None = None
    pieces: list[np.ndarray] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    length: int = 0
    bytes: int = 0
    unknown_tokens: int = 0
    lost_bytes: int = 0

    def add(self, text: str, ids: np.ndarray) -> None:
        """Append a document with its ids."""
        tokenizer = self.tokenizer
        ids = ids.astype(tokenizer.dtype, copy=False)
        if self.separates and tokenizer.separator is not None:
            ids = np.concatenate([np.array([tokenizer.separator], ids.dtype), ids])
        if tokenizer.unknown is not None and (lost := int((ids == tokenizer.unknown).sum())):
            self.unknown_tokens += lost
            self.lost_bytes += tokenizer.unknown_bytes(text)
        if not self.length and len(ids) and ids[0] not in (tokenizer.separator, tokenizer.unknown):
            self.lost_bytes += tokenizer.first_bytes(ids)
        self.starts.append(self.length)
        self.bytes += len(text.encode())
        self.length += len(ids)
        if self.file is None:
            self.pieces.append(ids)
        else:
            self.file.write(ids.tobytes())

    @property
    def counts(self) -> dict[str, int]:
        """The fields of a `TokenSplit` that are numbers."""
        return {
            "bytes": self.bytes,
            "unknown_tokens": self.unknown_tokens,
            "scored_bytes": max(0, self.bytes - self.lost_bytes),
        }

    @property
    def documents(self) -> np.ndarray:
        """Where each document begins, and where the last one ends."""
        return np.array([*self.starts, self.length], np.int64)


def encode_corpus(corpus: Corpus, plan: Partition, builders: dict[Split, PartBuilder]) -> tuple[str, ...]:
    """Encode all documents; returns remarks about them."""
    tokenizer = builders["train"].tokenizer
    waiting: list[tuple[Split, str]] = []
    letters = 0

    def encode_waiting() -> None:
        for (split, text), ids in zip(waiting, tokenizer.encode_all([text for _, text in waiting]), strict=True):
            builders[split].add(text, ids)
        waiting.clear()

    for _, split, text in corpus.parts(plan):
        waiting.append((split, text))
        letters += len(text)
        if letters >= LETTERS_AT_ONCE:
            encode_waiting()
            letters = 0
    encode_waiting()
    return (*corpus.remarks(plan), *tokenizer_remarks(tokenizer, corpus))


class EncodedText(NamedTuple):
    """The tokens of each split, and remarks about documents and tokens, which are kept with them."""

    parts: dict[Split, TokenSplit]
    remarks: tuple[str, ...]


def encode_in_memory(corpus: Corpus, plan: Partition, tokenizer: Tokenizer) -> EncodedText:
    """Encode all documents in memory."""
    builders = {split: PartBuilder(tokenizer, corpus.separates) for split in SPLITS}
    remarks = encode_corpus(corpus, plan, builders)
    parts: dict[Split, TokenSplit] = {}
    for split, builder in builders.items():
        tokens = np.concatenate([np.empty(0, tokenizer.dtype), *builder.pieces])
        parts[split] = TokenSplit(
            tokens=tokens, documents=builder.documents, unknown=tokenizer.unknown, **builder.counts
        )
    return EncodedText(parts, remarks)


@dataclass(frozen=True)
class TokenFolder:
    """A folder of the cache with the tokens of one text: two files for each split, and an index with their SHA-256.

    It is written aside and renamed when it is complete, so a killed process leaves none. A folder whose files do not
    have their checksums is written again. Other texts of the same source, in the same tokenizer, are removed.

    Args:
        cache: the folder of the cache.
        name: of the source and the tokenizer.
        key: of the text, its splits and the tokenizer.
    """

    cache: Path
    name: str
    key: str

    @property
    def path(self) -> Path:
        """The folder."""
        return self.cache / f"tokens-{self.name}-{self.key}"

    def encode(self, corpus: Corpus, plan: Partition, tokenizer: Tokenizer) -> EncodedText:
        """The tokens from the cache; where it has none, they are encoded into it.

        Raises:
            OSError: the cache cannot be written to.
        """
        found = self.open(tokenizer)
        if found is not None:
            return found
        self.cache.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            found = self.open(tokenizer)  # again: another process may have written since
            if found is None:
                self.write(corpus, plan, tokenizer)
                found = self.open(tokenizer)
        if found is None:
            raise OSError("what was written does not have its checksum")
        return found

    def open(self, tokenizer: Tokenizer) -> EncodedText | None:
        """Map the tokens; None if they are missing or damaged."""
        try:
            stored = json.loads((self.path / INDEX).read_bytes())
            index = stored["index"]
            if index["format"] != FORMAT or stored["sha256"] != digest_of(index):
                return None
            parts: dict[Split, TokenSplit] = {}
            for split in SPLITS:
                entry = index["splits"][split]
                for kind in ("tokens", "documents"):
                    if checksum(self.path / f"{split}.{kind}") != entry[kind]:
                        return None
                parts[split] = TokenSplit(
                    tokens=mapped(self.path / f"{split}.tokens", tokenizer.dtype),
                    documents=np.fromfile(self.path / f"{split}.documents", np.int64),
                    unknown=tokenizer.unknown,
                    **entry["counts"],
                )
            return EncodedText(parts, tuple(index["remarks"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write(self, corpus: Corpus, plan: Partition, tokenizer: Tokenizer) -> None:
        """Encode all documents into the folder.

        Raises:
            OSError: the disk is full, or the cache cannot be written to; nothing is left behind.
        """
        needed, free = corpus.bytes * np.dtype(tokenizer.dtype).itemsize, shutil.disk_usage(self.cache).free
        if needed + SPARE_BYTES > free:
            raise OSError(f"they may need {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free")
        for other in self.cache.glob(f".tokens-{self.name}-{self.key}.*"):  # of a killed process: this one has the lock
            shutil.rmtree(other, ignore_errors=True)
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        aside.mkdir()
        try:
            self.fill(aside, corpus, plan, tokenizer)
            fault_point("tokens written")
            shutil.rmtree(self.path, ignore_errors=True)
            os.replace(aside, self.path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        for other in self.cache.glob(f"tokens-{self.name}-*"):
            if other != self.path and other.is_dir():
                shutil.rmtree(other, ignore_errors=True)

    def fill(self, folder: Path, corpus: Corpus, plan: Partition, tokenizer: Tokenizer) -> None:
        """Write all files of a folder, the index last."""
        files = {split: open(folder / f"{split}.tokens", "wb") for split in SPLITS}  # noqa: SIM115 - closed below
        try:
            builders = {split: PartBuilder(tokenizer, corpus.separates, file) for split, file in files.items()}
            remarks = encode_corpus(corpus, plan, builders)
        finally:
            for file in files.values():
                file.close()
        entries: dict[str, Any] = {}
        for split, builder in builders.items():
            builder.documents.tofile(folder / f"{split}.documents")
            sums = {kind: checksum(folder / f"{split}.{kind}") for kind in ("tokens", "documents")}
            entries[split] = {**sums, "counts": builder.counts}
            for kind in sums:
                fsync_path(folder / f"{split}.{kind}")
        index = {"format": FORMAT, "splits": entries, "remarks": remarks}
        (folder / INDEX).write_text(json.dumps({"index": index, "sha256": digest_of(index)}))
        fsync_path(folder / INDEX)


def mapped(path: Path, dtype: type[np.generic]) -> np.ndarray:
    """The numbers in a file, mapped into memory; an empty file cannot be mapped."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def digest_of(values: Any) -> str:
    """The SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
