"""What `skipway diagnose` calls a network with: batches of a folder of images or of a text, or random samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipway.cli.option_names import option_spelling
from skipway.errors import DataError, SkipwayError, counted, printable, spelling

if TYPE_CHECKING:
    from torch import Tensor

    from skipway.data.sources.index import SourceIndex
    from skipway.data.split import ImageSample
    from skipway.zoo import LoadedModel

__all__ = ["FolderBatches", "TextBatches", "class_names", "example_for", "image_side", "inputs_and_targets"]

# tokens of all windows: 32 of GPT-2's 1,024 took minutes before anything was said
MOST_TOKENS, SHORTEST = 4096, 16


def example_for(
    loaded: LoadedModel,
    *,
    folder: Path | None,
    samples: int,
    seed: int,
    outside: bool = False,
    columns: str | None = None,
    tokenizer: Path | None = None,
) -> tuple[Any, Any, str]:
    """Example, targets, and what they are in words: batches of a text or a folder of images, the batch of the model's
    file, or random samples.

    Raises:
        SkipwayError: the model does not take what the folder or file holds.
        DataError: that cannot be read.
    """
    if folder is not None and folder.is_file() and loaded.vocabulary is not None:
        text = TextBatches(loaded, folder, samples, seed, tokenizer, columns)
        return text, None, text.remark
    if folder is not None:
        kind = DigitBatches if means_digits(folder) else FolderBatches
        images = kind(loaded, folder, samples, seed, outside, columns)
        if images.count < 2:
            return *images.batch(0, 0), images.remark
        return images, None, images.remark
    if loaded.batch is not None:
        return *inputs_and_targets(loaded.model, loaded.batch), "given by the model's file"
    size = "x".join(map(str, loaded.shape))
    tokens = loaded.vocabulary is not None
    what = "random token sequences" if tokens else "random normal samples"
    others = ", ".join(map(str, loaded.others)) or ("no labels" if tokens else "random labels")
    labels, real = "the tokens as labels" if loaded.labels else others, "FILE" if tokens else "FOLDER"
    remark = f"{samples} {what} of {size} with {labels}; use --batch {real} for real ones"
    return loaded.random(samples), None, remark


def inputs_and_targets(model: Any, batch: Any) -> tuple[Any, Any]:
    """What a file gives beside a model: inputs, or (inputs, targets); two are inputs if forward needs both."""
    import inspect

    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return batch, None
    needed = [each for each in inspect.signature(model.forward).parameters.values() if each.default is each.empty]
    positional = [each for each in needed if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return (tuple(batch), None) if len(positional) == 2 and not isinstance(batch[0], tuple) else tuple(batch)


def image_side(shape: tuple[int, ...]) -> int:
    """The side length of images of a shape, which have to be square."""
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2]:
        raise SkipwayError(
            f"--batch: the rule is square images, grey or colour, and the model takes {','.join(map(str, shape))}; "
            "set --input 3,224,224, or leave --batch out"
        )
    return shape[1]


def means_digits(folder: Path) -> bool:
    """Whether the name of a folder that does not exist stands for the bundled digits."""
    return folder == Path("digits") and not folder.exists()


def class_names(source: Path, outside: bool, columns: str | None) -> tuple[str, ...]:
    """The class names of a source of images, or of the bundled digits."""
    return tuple("0123456789") if means_digits(source) else index_images(source, outside, columns).classes


def index_images(source: Path, outside: bool, columns: str | None) -> SourceIndex:
    """The images of a source, see `skipway.data.sources.detect.index_source`.

    Raises:
        DataError: it holds no images of two classes.
    """
    from skipway.data.sources.columns import parse_columns
    from skipway.data.sources.detect import index_source

    return index_source(source, outside=outside, columns=parse_columns(columns))


@dataclass
class FolderBatches:
    """Batches of the training images of a source with their labels, in an order that the seed and the pass decide,
    normalised by mean and deviation of the first batch. Images that cannot be read are left out.

    Args:
        loaded: the model, which says the shape and how it is called.
        folder: of images by class, or another source of images, as for `skipway train`.
        samples: in a batch; the incomplete last one of a pass is left out.
        seed: of the order.
        outside: follow links out of the folder.
        columns: names of the columns of a list, with commas; None: by content.

    Raises:
        DataError: the source holds no images of two classes, or none of the first batch can be read.
    """

    loaded: LoadedModel
    folder: Path
    samples: int
    seed: int
    outside: bool = False
    columns: str | None = None
    damaged: dict[str, str] = field(default_factory=dict, init=False)
    notes: tuple[str, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        import torch

        from skipway.data.loader import statistics

        self.side = image_side(self.loaded.shape)
        self.files = self.listed()
        self.count = len(self.files) // self.samples
        self.first = self.decoded(0, 0)
        if not len(self.first):
            file, reason = next(iter(self.damaged.items()))
            raise DataError(
                f"--batch {self.folder}: none of the {len(self.damaged)} drawn images can be read; the first: "
                f"{file}: {reason}; repair them, or leave --batch out for random samples"
            )
        self.mean, self.std = (torch.tensor(values) for values in statistics(self.first.images))

    @property
    def source(self) -> str:
        """Where the images are from, in words."""
        return str(self.folder)

    def listed(self) -> Sequence[ImageSample]:
        """The images to draw from."""
        from skipway.data.split import samples_of

        found = index_images(self.folder, self.outside, self.columns)
        self.store, self.notes = found.store, found.remarks
        return samples_of(found.train, {name: number for number, name in enumerate(found.classes)})

    def __iter__(self) -> Iterator[Any]:
        for number in itertools.count():
            yield self.batch(*divmod(number, self.count))

    def batch(self, turn: int, number: int) -> tuple[Any, Tensor]:
        """One batch of a pass over the images: what the model is called with, and the labels."""
        part = self.first if turn == number == 0 else self.decoded(turn, number)
        images = ((part.images / 255 - self.mean) / self.std).permute(0, 3, 1, 2).contiguous()
        return self.loaded.call_with(images), part.labels

    def drawn(self, turn: int, number: int) -> list[ImageSample]:
        """Which images a batch holds."""
        from skipway.data.randomness import permutation

        order = permutation(len(self.files), self.seed, turn)[number * self.samples : (number + 1) * self.samples]
        return [self.files[place] for place in order.tolist()]

    def decoded(self, turn: int, number: int) -> Any:
        """The images of a batch as they are in the files, with labels."""
        from skipway.data.image_dataset import decode_files

        chosen = self.drawn(turn, number)
        part, bad = decode_files(self.store, chosen, channels=self.loaded.shape[0], size=self.side, workers=0)
        self.damaged |= dict(bad)
        return part

    @property
    def remark(self) -> str:
        """The batches in words, with what a user may not expect of the source and the damaged images met so far."""
        bad = "".join(f"; {file} cannot be read, {reason}" for file, reason in list(self.damaged.items())[:1])
        bad += f", and {len(self.damaged) - 1} more" * (len(self.damaged) > 1)
        what = f"{len(self.first)} images of {self.source} with their labels"
        fresh = f", fresh ones of {len(self.files):,} at every trial step" * (self.count > 1)
        return printable(f"{what}{fresh}{appended(self.notes)}{bad}")


class DigitBatches(FolderBatches):
    """Batches of scikit-learn's 1,797 digits, 8 × 8 grey, scaled to the images that the model takes.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """

    def listed(self) -> Sequence[ImageSample]:
        from skipway.data.digits import digits
        from skipway.data.loader import resize_digits
        from skipway.data.split import ImageSample

        if self.columns is not None:
            raise SkipwayError(f"--columns {self.columns} has no effect on the bundled digits; leave it out")
        images, names = digits()
        self.images = resize_digits(images, self.side, self.loaded.shape[0])
        return [ImageSample(name, int(name[0])) for name in names]

    @property
    def source(self) -> str:
        return "the bundled digits"

    def decoded(self, turn: int, number: int) -> Any:
        import torch

        from skipway.data.image_dataset import MemoryDataset

        chosen = self.drawn(turn, number)
        rows = torch.tensor([int(sample.file[2:]) for sample in chosen])
        return MemoryDataset(self.images[rows], torch.tensor([s.label for s in chosen]), [s.file for s in chosen])


@dataclass
class TextBatches:
    """Batches of windows of a text, as a language model takes them.

    Args:
        loaded: a model that takes tokens.
        file: of text.
        samples: windows in a batch.
        seed: chooses them.
        tokenizer: a `tokenizer.json`; None: bytes are tokens.
        columns: the name of the column of a table that holds the text; None: by content.

    Raises:
        SkipwayError: the model takes fewer tokens than the text has.
        DataError: the text cannot be read, or is too short.
    """

    loaded: LoadedModel
    file: Path
    samples: int
    seed: int
    tokenizer: Path | None = None
    columns: str | None = None

    def __post_init__(self) -> None:
        from skipway.data.sources.columns import parse_column
        from skipway.data.text import load_text

        assert self.loaded.vocabulary is not None
        if self.tokenizer is None and self.loaded.vocabulary < 256:
            raise SkipwayError(
                f"--batch {self.file}: the rule is a vocabulary of at least 256, for bytes, and the model has "
                f"{self.loaded.vocabulary}; leave --batch out for random tokens"
            )
        chosen: Any = "bytes" if self.tokenizer is None else self.tokenizer
        length = min(self.loaded.shape[0], max(SHORTEST, MOST_TOKENS // self.samples))
        split = {"holdout": 0.0, "validation": 0.0, "seed": self.seed}
        with spelling(column="columns"):
            column = parse_column(self.columns)
            self.data = load_text(self.file, tokenizer=chosen, context=length, column=column, **split)
        if self.data.tokenizer.size > self.loaded.vocabulary:
            raise SkipwayError(
                f"--batch {self.file}: {self.tokenizer} knows {self.data.tokenizer.size:,} tokens, and the model "
                f"{self.loaded.vocabulary:,}; leave --batch out for random tokens"
            )

    def __iter__(self) -> Iterator[Any]:
        steps = self.data.steps(self.samples)
        for number in itertools.count():
            ids, _ = self.data.train_batch(*divmod(number, steps), batch_size=self.samples)
            yield self.loaded.call_with(ids)

    @property
    def remark(self) -> str:
        """The batches in words."""
        kind = "bytes" if self.tokenizer is None else f"tokens of {self.tokenizer.name}"
        windows = counted(self.samples, "window")
        what = f"{windows} of {self.data.context} {kind} of {self.file}, fresh ones at every trial step"
        return printable(f"{what}{appended(self.data.remarks)}")


def appended(remarks: Sequence[str]) -> str:
    """Remarks behind a sentence, with the options as they are typed."""
    return "".join(f"; {option_spelling(remark)}" for remark in remarks)
