"""Random folders of images: splits and classes of any name, good and broken images, links, system files, nesting.

The oracles: nothing but `SkipwayError` is raised; every file is read or left out with a reason, so that the counts of
the inventory add up to the files that are there, before and after the images are read; what is read is an image; what
is left out is said in the remarks with the same counts; and `predict` finds the same files.
"""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from skipway.data import load
from skipway.data.sources.detect import index_source
from skipway.data.sources.scan import MAX_LINKS
from skipway.errors import DataError, SkipwayError, printable
from skipway.inference.predict import image_files

__all__ = ["CASES", "Case", "outcome"]

SPLITS = {
    "train": (
        "train",
        "Train",
        "TRAINING",
        "training_set",
        "trn",
        "train2017",
        "train/train",
        "seg_train",
        "seg_train/seg_train",
    ),
    "validation": ("", "", "val", "Valid", "validation", "dev", "VAL", "val/val"),
    "test": (
        "",
        "",
        "test",
        "Testing",
        "TEST",
        "eval",
        "holdout",
        "test_images",
        "test/test",
        "seg_test",
        "seg_test/seg_test",
    ),
}
CLASSES = (
    "cat",
    "dog",
    "Cat",
    "cat ",
    "café",
    "cafe\u0301",
    "日本",
    "0",
    "10",
    "x/y",
    "train",
    "-",
    "a\nb",
    "caf\udce9",
)
TOPS = ("", "", "", "data/", "archive/My Data/")
FOLDERS = (
    *(
        "cat",
        "dog",
        "emu",
        "__MACOSX",
        "@eaDir",
        ".git",
        ".ipynb_checkpoints",
        "extra",
        "unknown",
        "unlabeled",
        "images",
    ),
    *("test", "val", "labels", "deep/er", "lost+found", "\U0001f600", "test/unknown", "holdout/cat"),
)
NAMES = (
    "a.png",
    "a.JPG",
    "b.jfif",
    "c",
    "d.txt",
    ".e.png",
    "._f.jpg",
    "Thumbs.db",
    "g.tar.gz",
    "h.dat",
    "i.tga",
    "j.webp",
)
FORMS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "AVIF")
TARGETS = (
    "",
    ".",
    "..",
    "../..",
    "cat",
    "../cat",
    "../../outside",
    "../../outside/emu",
    "../dog/000.png",
    "nowhere",
    "/etc/hosts",
)


@cache
def encoded(number: int, form: str) -> bytes:
    """A small image."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


BROKEN = (
    *(
        b"",
        b"text",
        b"<html>",
        b"%PDF-1.4",
        b"PK\3\4",
        bytes(20),
        b"\0\5\x16\7",
        b"\0\0\0\x18ftypheic",
        b"\xff\xd8\xff\xe0",
    ),
    *(encoded(1, "PNG")[:40], encoded(2, "JPEG")[:300], encoded(3, "TIFF")[:30], b"8BPS\0\1", b"\x82\x83\x84"),
)


@dataclass(frozen=True)
class Extra:
    """A file, link or empty folder besides the sound images: where it lies, its name, and its content.

    Args:
        folder: number of a folder that is there, modulo their count.
        into: subfolders to make below it.
        name: of the file.
        content: bytes, the number of a good image with its format, a link's target, or None for an empty folder.
    """

    folder: int
    into: str
    name: str
    content: bytes | tuple[int, str] | str | None


@dataclass(frozen=True)
class Case:
    """A folder of images, and how it is read.

    Args:
        top: folders above the splits.
        parts: name of the folder of each split; "" for none.
        classes: the class folders of the training split, with the number of their images.
        extras: what else is there.
        options: of `load`.
    """

    top: str
    parts: tuple[str, str, str]
    classes: tuple[tuple[str, int], ...]
    extras: tuple[Extra, ...]
    options: tuple[tuple[str, object], ...]


contents = st.one_of(
    st.sampled_from(BROKEN),
    st.tuples(st.integers(100, 10**6), st.sampled_from(FORMS)),
    st.sampled_from(TARGETS).map(str),
    st.none(),
    st.binary(max_size=40),
)
names = st.one_of(
    st.sampled_from(NAMES), st.text("ab .-_é日\n\t'\"\\$", min_size=1, max_size=6).filter(lambda s: s.strip("."))
)
extras = st.builds(
    Extra,
    folder=st.integers(0, 30),
    into=st.one_of(st.just(""), st.sampled_from(FOLDERS)),
    name=names,
    content=contents,
)
options = st.fixed_dictionaries(
    {},
    optional={
        "allow_empty": st.booleans(),
        "outside": st.booleans(),
        "subfolders": st.sampled_from(["merge", "classes"]),
        "fit": st.sampled_from(["crop", "pad", "squeeze"]),
    },
).map(lambda chosen: tuple(sorted(chosen.items())))
CASES = st.builds(
    Case,
    top=st.sampled_from(TOPS),
    parts=st.tuples(
        st.one_of(st.just(""), st.sampled_from(SPLITS["train"])),
        st.sampled_from(SPLITS["validation"]),
        st.sampled_from(SPLITS["test"]),
    ),
    classes=st.lists(
        st.tuples(st.sampled_from(CLASSES), st.sampled_from((3, 4, 5, 6, 2, 1, 0))),
        min_size=2,
        max_size=5,
        unique_by=lambda pair: pair[0],
    ).map(tuple),
    extras=st.lists(extras, max_size=8).map(tuple),
    options=options,
)


def write_case(case: Case, folder: Path) -> Path:
    """Write the folder of images, with a folder outside of it that links may lead to."""
    root = folder / "d"
    for number in range(2):
        (folder / "outside/emu").mkdir(parents=True, exist_ok=True)
        (folder / f"outside/emu/{number}.png").write_bytes(encoded(50 + number, "PNG"))
    root.mkdir()
    count = 0
    for place, part in enumerate(case.parts):
        if place and not part:
            continue
        for name, images in case.classes:
            into = root / case.top / part / name
            into.mkdir(parents=True, exist_ok=True)
            for number in range(images if place == 0 else min(images, 2)):
                count += 1
                (into / f"{number:03d}.png").write_bytes(encoded(count, "PNG"))
    for extra in case.extras:
        write_extra(root, extra)
    return root


def write_extra(root: Path, extra: Extra) -> None:
    """Write one extra, unless something of that name is there."""
    places = sorted(path for path in (root, *root.rglob("*")) if path.is_dir() and not path.is_symlink())
    into = places[extra.folder % len(places)] / extra.into
    path = into / extra.name
    try:
        into.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            return
        if extra.content is None:
            path.mkdir()
        elif isinstance(extra.content, str):
            path.symlink_to(extra.content or path.name)
        else:
            path.write_bytes(extra.content if isinstance(extra.content, bytes) else encoded(*extra.content))
    except (FileExistsError, NotADirectoryError, OSError):
        return


def count_entries(folder: str, home: str, outside: bool, passed: tuple[str, ...] = (), hidden: bool = False) -> int:
    """How many files and links are below a folder, with those that followed links lead to; a second implementation."""
    count = 0
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if not os.path.isdir(path):
            count += 1
            continue
        skipped = hidden or name.startswith(".") or name in ("__MACOSX", "@eaDir", "lost+found")
        if not os.path.islink(path):
            count += count_entries(path, home, outside, passed, skipped)
            continue
        target, here = Path(os.path.realpath(path)), os.path.realpath(folder)
        leads_out = not outside and not target.is_relative_to(home)
        circle = any(Path(place).is_relative_to(target) for place in (*passed, here))
        stays = hidden or name.startswith(".") or leads_out or circle or len(passed) >= MAX_LINKS
        count += 1 if stays else count_entries(path, home, outside, (*passed, here), False)
    return count


def outcome(case: Case, folder: Path) -> str:
    """Write a case, read it, and assert the oracles."""
    root, options = write_case(case, folder), dict(case.options)
    outside = bool(options.get("outside"))
    total = count_entries(str(root), os.path.realpath(root), outside)
    check_prediction(root, outside, total)
    scanning = {name: value for name, value in options.items() if name in ("allow_empty", "outside", "subfolders")}
    try:
        index = index_source(root, **scanning)  # type: ignore[arg-type]
        assert index.inventory.total == total, (index.inventory, total)
        data = load(root, workers=0, cache=False, most_unreadable=1.0, **options)
    except SkipwayError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert printable(refused) == refused, "a message with codes for the terminal"
        return f"refused: {reason_of(refused)}"
    inventory = data.inventory
    assert inventory.total == total, (inventory, total)
    assert len(data.splits.samples) == len(set(data.splits.samples)) == sum(inventory.read.values())
    for sample in data.splits.samples:
        with Image.open(root / sample.file) as image:
            image.load()
    said = sum(
        int(found[1].replace(",", ""))
        for remark in data.remarks
        if (found := re.match(r"([\d,]+) (?:more )?files? left", remark))
    )
    assert said == sum(inventory.left_out.values()) - len(data.unreadable), (data.remarks, inventory)
    assert all(reason for _, reason in data.unreadable)
    return "read with remarks" if data.remarks or data.unreadable else "read"


def check_prediction(root: Path, outside: bool, total: int) -> None:
    """Assert that `predict` accounts for the same files."""
    try:
        files, left_out = image_files([root], outside=outside)
    except DataError:
        return
    assert len(files) + left_out.counts.total() == total, (files, left_out, total)


def reason_of(message: str) -> str:
    """The kind of a refusal, for the table."""
    kinds = {
        "no images in": "no images",
        "holds no image": "an empty class",
        "only one class": "one class",
        "is not in the training split": "an unknown class in a held-out split",
        "no training folder": "no training folder",
        "sounds like a split": "a name between split and class",
        "a single image": "a class of one image",
        "can be read": "nothing can be read",
        "no readable": "a class or split of which nothing can be read",
        "train and a test folder": "splits within classes",
    }
    return next((kind for words, kind in kinds.items() if words in message), message[:60])
