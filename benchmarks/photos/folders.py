"""The folders of images that are raced on."""

from __future__ import annotations

import io
import random
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from PIL import Image

__all__ = ["PHOTOS", "PHOTO_SIZE", "write_photos", "write_subset", "write_subsets"]

PHOTOS, PHOTO_SIZE = 3781, (400, 533)
"""How many photos, and their width and height."""


def read_archive(archive: Path, part: str) -> dict[str, list[tuple[str, bytes]]]:
    """Name and content of the images of a part, by class, in the order of their names."""
    found = defaultdict(list)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if member.isfile() and path.parts[-3:-2] == (part,):
                file = tar.extractfile(member)
                assert file is not None
                found[path.parent.name].append((path.name, file.read()))
    return {label: sorted(found[label]) for label in sorted(found)}


def draw_images(images: dict[str, list[tuple[str, bytes]]], count: int, seed: int) -> Iterator[tuple[str, str, bytes]]:
    """Class, name and content of so many images, as many of each class as of any other, or one more."""
    for number, (label, all_images) in enumerate(images.items()):
        own = count // len(images) + (number < count % len(images))
        for name, content in random.Random(f"{seed} {label}").sample(all_images, own):
            yield label, name, content


def write_subset(folder: Path, images: Iterable[tuple[str, str, bytes]]) -> None:
    """Write images into folders of their classes."""
    for label, name, content in images:
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / name).write_bytes(content)


def write_subsets(archive: Path, out: Path, sizes: Iterable[int], test: int, seed: int) -> None:
    """Write `out/N/train` with N training images for each size, and the same test images into each `out/N/test`."""
    train_images, test_images = read_archive(archive, "train"), read_archive(archive, "test")
    for size in sizes:
        write_subset(out / str(size) / "train", draw_images(train_images, size, seed))
        write_subset(out / str(size) / "test", draw_images(test_images, test, seed))


def write_photos(archive: Path, out: Path, count: int = PHOTOS, seed: int = 0) -> None:
    """Write training images enlarged to the size of photos, with a texture that JPEG has to code, into one folder.

    What they show is no sharper than before: they are for the time that reading, decoding and scaling photos takes.
    """
    rng = random.Random(seed)
    grain = Image.frombytes("L", PHOTO_SIZE, rng.randbytes(PHOTO_SIZE[0] * PHOTO_SIZE[1])).convert("RGB")

    def enlarge(content: bytes) -> bytes:
        with Image.open(io.BytesIO(content)) as image:
            large = image.convert("RGB").resize(PHOTO_SIZE, Image.Resampling.BICUBIC)
        file = io.BytesIO()
        Image.blend(large, grain, 0.1).save(file, "JPEG", quality=85)
        return file.getvalue()

    images = draw_images(read_archive(archive, "train"), count, seed)
    write_subset(out, ((label, name, enlarge(content)) for label, name, content in images))
