"""Names of splits: which folders, list entries, shards and Hugging Face splits are train, validation or test."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, get_args

__all__ = ["SPLITS", "SPLIT_NAMES", "Split", "known_names", "looks_like_split", "split_in", "split_of"]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training", "trn", "trainval"),
    "validation": ("val", "valid", "validation", "dev", "devel", "development"),
    # "eval" as Hugging Face's datasets reads it; held-out images are test images
    "test": ("test", "testing", "tst", "eval", "evaluation", "holdout", "heldout"),
}
# words that may follow the name of a split: train_set, test-images, ValidationData
FILLERS = ("set", "data", "dataset", "images", "imgs", "split", "part", "folder")
# names of parts that say neither train, nor validation, nor test
UNCLEAR = (
    *("extra", "unlabeled", "unlabelled", "unsupervised"),
    *("additional", "minival", "testdev", "traintest", "challenge"),
)

SPLIT_OF_WORD: dict[str, Split] = {word: split for split, words in SPLIT_NAMES.items() for word in words}


def words_of(name: str) -> list[str]:
    """The words of a name in lower case: split at punctuation, digits and capitals, without a trailing filler."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = [word for word in re.split(r"[\W\d_]+", spaced.lower()) if word]
    while len(words) > 1 and words[-1] in FILLERS:
        words.pop()
    if len(words) == 1:
        stem = next((words[0].removesuffix(end) for end in FILLERS if words[0].endswith(end)), words[0])
        words = [stem if stem in SPLIT_OF_WORD else words[0]]
    return words


def split_of(name: str) -> Split | None:
    """The split that a folder, an entry of a split column or a Hugging Face split is named after; None: no split.

    Case, digits, punctuation and a trailing "set", "data", "images", "split", "part" or "folder" do not matter.

    >>> [split_of(name) for name in ("Training_Set", "val2017", "dev", "Testing", "trainset", "hold-out", "valley")]
    ['train', 'validation', 'validation', 'test', 'train', 'test', None]
    """
    words = words_of(name)
    if len(words) > 1 and any(word in SPLIT_OF_WORD for word in words):
        return None
    return SPLIT_OF_WORD.get("".join(words))


def looks_like_split(name: str) -> bool:
    """Whether a name sounds like a split that `split_of` does not know.

    >>> [looks_like_split(name) for name in ("un-labeled", "extra", "test_a", "train_val", "train station", "test")]
    [True, True, True, True, False, False]
    """
    if split_of(name) is not None:
        return False
    words = words_of(name)
    if not words or "".join(words) in UNCLEAR:
        return bool(words)
    return all(word in UNCLEAR or word in SPLIT_OF_WORD or len(word) == 1 for word in words) and len(words[0]) > 1


def split_in(path: str) -> Split | None:
    """The split that a path names in any of its words, the last one that does; None: no word is one.

    >>> split_in("val/000.tar"), split_in("imagenet-train-000.tar"), split_in("valley-000.tar")
    ('validation', 'train', None)
    """
    found = [SPLIT_OF_WORD[word] for word in re.split(r"[\W\d_]+", path.lower()) if word in SPLIT_OF_WORD]
    return found[-1] if found else None


def known_names(splits: Iterable[Split] = SPLITS) -> str:
    """The vocabulary for a message.

    >>> known_names(["test"])
    'test (test, testing, tst, eval, evaluation, holdout, heldout)'
    """
    return "; ".join(f"{split} ({', '.join(SPLIT_NAMES[split])})" for split in splits)
