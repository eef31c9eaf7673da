"""Bad images and bad folders: more than 40 kinds in 3 variants each, and what is documented to happen to each.

Every kind is put beside sound images. Its outcome is one of: it is used; it is left out, with a reason; it is ignored,
because it is no image by its name; the folder is refused, with the way out. Nothing else may be raised, and the
folder stays as it is, byte for byte and with its times.
"""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from zlib import compress, crc32

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.test_load import tree_hash

from skipway.data import load
from skipway.errors import DataError, printable

VARIANTS = 3


def noise(variant: int, *shape: int) -> np.ndarray:
    shape = shape or (20 + 7 * variant, 18 + 5 * variant, 3)
    return np.random.default_rng(variant).integers(0, 256, shape, dtype=np.uint8)


def encoded(variant: int, form: str, mode: str = "RGB", pixels: np.ndarray | None = None, **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(noise(variant) if pixels is None else pixels)
    (image if image.mode == mode or pixels is not None else image.convert(mode)).save(file, form, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def gif_header(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHxxx", width, height) + b"," + struct.pack("<HHHHx", 0, 0, width, height) + b"\2"


def bomb(variant: int) -> bytes:
    """A small file that is a large image: 81 megapixels and more of one bit each."""
    file = io.BytesIO()
    Image.new("1", (9000 + 500 * variant, 9000)).save(file, "PNG")
    return file.getvalue()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


def frames(variant: int) -> list[Image.Image]:
    return [Image.fromarray(noise(variant + n)).resize((24, 24)) for n in range(3)]


def moving(variant: int, form: str) -> bytes:
    file, (first, *others) = io.BytesIO(), frames(variant)
    first.save(file, form, save_all=True, append_images=others)
    return file.getvalue()


def palette(variant: int, **options) -> bytes:
    image = Image.fromarray(noise(variant)).quantize(8)
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def turned(variant: int) -> bytes:
    exif = Image.Exif()
    exif[274] = (3, 6, 8)[variant]
    return encoded(variant, "JPEG", exif=exif)


def damaged_exif(variant: int) -> bytes:
    whole, block = encoded(variant, "JPEG"), b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(range(variant, 40))
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + whole[2:]


def cut(variant: int, form: str) -> bytes:
    whole = encoded(variant, form, pixels=noise(variant, 90, 90, 3))
    return whole[: len(whole) * (2 + variant) // 6]


class Kind(NamedTuple):
    """A file's content by variant, its suffix, and its outcome: "used", or why it is left out."""

    content: Callable[[int], bytes]
    suffix: str
    outcome: str


DEEP = [(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160 + v) for v in range(VARIANTS)]
FILES = {
    "JPEG cut off": Kind(lambda v: cut(v, "JPEG"), "jpg", "truncated"),
    "JPEG without its end": Kind(lambda v: encoded(v, "JPEG")[:-2], "jpg", "truncated"),
    "PNG cut off": Kind(lambda v: cut(v, "PNG"), "png", "truncated|broken|cut"),
    "PNG with a flipped bit": Kind(lambda v: flipped(encoded(v, "PNG"), 200 + v), "png", ""),
    "WebP cut off": Kind(lambda v: cut(v, "WEBP"), "webp", ""),
    "TIFF cut off": Kind(lambda v: cut(v, "TIFF"), "tif", ""),
    "nothing": Kind(lambda v: b" " * v, "png", "an empty file"),
    "HTML": Kind(lambda v: (b"<html>", b"<!DOCTYPE html>", b"  <HTML lang=en>")[v] + b"404", "jpg", "HTML"),
    "text": Kind(lambda v: b"hello" * (v + 1), "jpg", "not an image"),
    "an archive": Kind(lambda v: (b"PK\x03\x04", b"\x1f\x8b", b"Rar!")[v] + bytes(50), "jpg", "an archive"),
    "SVG": Kind(lambda v: b"<svg>" + b"<g/>" * v, "png", "not an image"),
    "PostScript": Kind(lambda v: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "jpg", "document"),
    "random bytes": Kind(lambda v: noise(v, 400).tobytes(), "bmp", "not an image"),
    "HEIC by another name": Kind(
        lambda v: b"\0\0\0\x18ftypheic" + bytes(40 + v), "jpg", r"a HEIC image.*skipway\[heif\]"
    ),
    "a large PNG header": Kind(lambda v: png_header(50_000 + v, 50_000) + b"\0\0\0\x09IDAT", "png", "megapixels"),
    "a PNG bomb": Kind(bomb, "png", "more than 64 megapixels"),
    "a GIF bomb": Kind(lambda v: gif_header(65_535 - v, 60_000), "gif", "megapixels"),
    "a BMP bomb": Kind(
        lambda v: b"BM" + struct.pack("<IIIIiiHH", 99, 0, 54, 40, 30_000 + v, 30_000, 1, 24) + bytes(24),
        "bmp",
        "megapixels",
    ),
    "a text bomb": Kind(
        lambda v: png_header(20, 20) + chunk(b"zTXt", b"x\0\0" + compress(bytes(10**7))),
        "png",
        "",
    ),
    "one pixel": Kind(lambda v: encoded(v, "PNG", pixels=noise(v, 1, 1 + v, 3)), "png", "smaller than 8 pixels"),
    "a sliver": Kind(lambda v: encoded(v, "PNG", pixels=noise(v, 7 - v, 300, 3)), "png", "smaller than 8 pixels"),
    "a long strip": Kind(lambda v: encoded(v, "PNG", pixels=noise(v, 10 + v, 300, 3)), "png", "used"),
    "16-bit PNG": Kind(lambda v: encoded(v, "PNG", pixels=DEEP[v]), "png", "used"),
    "16-bit TIFF": Kind(lambda v: encoded(v, "TIFF", pixels=DEEP[v]), "tif", "used"),
    "float TIFF": Kind(lambda v: encoded(v, "TIFF", pixels=np.full((20, 20), v, np.float32)), "tif", "32-bit float"),
    "32-bit TIFF": Kind(
        lambda v: encoded(v, "TIFF", pixels=np.full((20, 20), 10**6 + v, np.int32)), "tif", "32-bit integers"
    ),
    "CMYK JPEG": Kind(lambda v: encoded(v, "JPEG", "CMYK"), "jpg", "used"),
    "CMYK TIFF": Kind(lambda v: encoded(v, "TIFF", "CMYK"), "tif", "used"),
    "LAB TIFF": Kind(lambda v: encoded(v, "TIFF", "LAB"), "tif", "used"),
    "YCbCr TIFF": Kind(lambda v: encoded(v, "TIFF", "YCbCr"), "tif", "used"),
    "palette": Kind(palette, "png", "used"),
    "transparent palette": Kind(lambda v: palette(v, transparency=v), "png", "used"),
    "transparent by bytes": Kind(lambda v: palette(v, transparency=bytes([0, 128, 255])), "png", "used"),
    "RGBA": Kind(lambda v: encoded(v, "PNG", pixels=noise(v, 20, 20, 4)), "png", "used"),
    "grey with alpha": Kind(lambda v: encoded(v, "PNG", "LA"), "png", "used"),
    "one bit": Kind(lambda v: encoded(v, "PNG", "1"), "png", "used"),
    "animated GIF": Kind(lambda v: moving(v, "GIF"), "gif", "used"),
    "animated WebP": Kind(lambda v: moving(v, "WEBP"), "webp", "used"),
    "many pages": Kind(lambda v: moving(v, "TIFF"), "tif", "used"),
    "turned by EXIF": Kind(turned, "jpg", "used"),
    "damaged EXIF": Kind(damaged_exif, "jpg", "used"),
    "progressive": Kind(lambda v: encoded(v, "JPEG", progressive=True), "jpg", "used"),
    "JPEG with a tail": Kind(lambda v: encoded(v, "JPEG") + b"tail" * 99, "jpg", "used"),
    "PNG called JPEG": Kind(lambda v: encoded(v, "PNG"), "jpg", "used"),
    "HEIC": Kind(lambda v: b"\0\0\0\x18ftypheic" + bytes(v), ("heic", "HEIF", "jxl")[0], "ignored"),
    "raw": Kind(lambda v: b"II*\0" + bytes(v), "dng", "ignored"),
    "notes": Kind(lambda v: b"notes" * v, "txt", "ignored"),
}


def sound(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 5, seed: int = 0) -> Path:
    random = np.random.default_rng(seed + 1000)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(each):
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / name / f"{number}.png")
    return root


def loaded(root: Path, **options):
    return load(root, **{"size": 16, "most_unreadable": 0.2, "cache": False, **options})


@pytest.mark.parametrize("variant", range(VARIANTS))
@pytest.mark.parametrize("kind", FILES)
def test_files(tmp_path, kind, variant):
    content, suffix, outcome = FILES[kind]
    path = sound(tmp_path / "photos") / "cat" / f"odd.{suffix}"
    path.write_bytes(content(variant))
    before = tree_hash(tmp_path)
    data = loaded(tmp_path / "photos", crop=("none", "resized", "pad")[variant])
    names = [*data.train.names, *data.validation.names, *data.test.names]
    if outcome in ("used", "ignored"):
        assert data.unreadable == ()
        assert ("cat/odd." + suffix in names) == (outcome == "used")
        said = " ".join(remark for remark in data.remarks if "left out" in remark)
        assert (f"cat/odd.{suffix}" in said) == (outcome == "ignored")
    else:
        ((file, reason),) = data.unreadable
        assert file == "cat/odd." + suffix
        assert re.search(outcome, reason), reason
        assert reason.isprintable()
        assert len(names) == 10
    (batch,) = data.train_batches(seed=0, epoch=0, batch_size=len(data.train), device=torch.device("cpu"))
    assert bool(batch.inputs.isfinite().all())
    assert tree_hash(tmp_path) == before


def link(root: Path, target: str) -> None:
    (root / "cat/odd.png").symlink_to(target)


def sparse(root: Path) -> None:
    with (root / "cat/odd.png").open("wb") as file:
        file.truncate(257 * 1024**2)


def hidden(root: Path) -> None:
    for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini", ".hidden.png"):
        (root / "cat" / name).write_bytes(b"x")
    (root / "__MACOSX/cat").mkdir(parents=True)


def bytes_name(root: Path, name: bytes) -> None:
    content = encoded(7, "PNG")
    try:
        with open(os.fsencode(root / "cat") + b"/" + name, "wb") as file:
            file.write(content)
    except OSError:
        pytest.skip("this file system takes other names")


def elsewhere(root: Path) -> None:
    (root.parent / "elsewhere.png").write_bytes(encoded(5, "PNG"))
    link(root, str(root.parent / "elsewhere.png"))


# what is done to a folder of 2 classes x 5 images, how many are used then, and (reason left out | None)
PLACES: dict[str, tuple[Callable[[Path, int], object], int, str | None]] = {
    "a folder called like an image": (lambda r, v: (r / f"cat/odd{v}.png").mkdir(), 10, None),
    "a pipe": (lambda r, v: os.mkfifo(r / f"cat/odd{v}.png"), 10, "not a regular file"),
    "a broken link": (lambda r, v: link(r, f"missing{v}.png"), 10, "no such file"),
    "a link to itself": (lambda r, v: link(r, "odd.png"), 10, "symbolic links"),
    "a link to an image": (lambda r, v: link(r, f"{v}.png"), 11, None),
    "a link out": (lambda r, v: elsewhere(r), 10, None),
    "a loop of folders": (lambda r, v: (r / f"cat/loop{v}").symlink_to(r, target_is_directory=True), 10, None),
    "257 MB of nothing": (lambda r, v: sparse(r), 10, "a file of more than 256 MB"),
    "hidden files": (lambda r, v: hidden(r), 10, None),
    "terminal codes": (lambda r, v: bytes_name(r, b"\x1b[31mred\x07%d.png" % v), 11, None),
    "a new line": (lambda r, v: bytes_name(r, b"two\nlines%d.png" % v), 11, None),
    "HTML in a name": (lambda r, v: bytes_name(r, b"<img src=x onerror=alert(%d)>.png" % v), 11, None),
    "not Unicode": (lambda r, v: bytes_name(r, b"caf\xe9%d.png" % v), 11, None),
    "a copy": (lambda r, v: (r / f"dog/copy{v}.png").write_bytes((r / "dog/1.png").read_bytes()), 11, None),
    "deep folders": (lambda r, v: sound(r / "cat/a/b/c", ("d",), 1, v), 11, None),
}


@pytest.mark.parametrize("variant", range(VARIANTS))
@pytest.mark.parametrize("kind", PLACES)
def test_places(tmp_path, kind, variant):
    if os.name == "nt":
        pytest.skip("names and links are others there")
    change, used, reason = PLACES[kind]
    root = sound(tmp_path / "photos")
    change(root, variant)
    before = [(path, os.lstat(path).st_mtime_ns, os.lstat(path).st_size) for path in sorted(root.rglob("*"))]
    data = loaded(root, seed=variant)
    assert len(data.splits.samples) == used
    assert [reason in given for _, given in data.unreadable] == [True] * (reason is not None)
    assert all(printable(remark) == remark for remark in data.remarks)
    assert [(path, os.lstat(path).st_mtime_ns, os.lstat(path).st_size) for path in sorted(root.rglob("*"))] == before


def zipped(root: Path, variant: int) -> Path:
    path = root.parent / ("photos.zip", "photos.rar", "photos.7z")[variant]
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../marker.png", b"x")
    return path


def spoil(root: Path, *files: str) -> None:
    for file in files:
        (root / file).write_bytes(b"<html>")


REFUSED: dict[str, tuple[Callable[[Path, int], object], str]] = {
    "an archive": (zipped, "is a file; unpack it"),
    "nothing there": (lambda r, v: r / ("x", "x.csv", "x.tar")[v], "does not exist"),
    "an empty class": (lambda r, v: (r / f"emu{v}").mkdir(), "class folder 'emu.' .* holds no image; .*allow_empty"),
    "a class of one": (
        lambda r, v: sound(r / "more", (f"emu{v}",), 1) and (r / "more").rename(r / f"emu{v}"),
        "class 'emu.' has a single image",
    ),
    "a class of copies": (
        lambda r, v: [
            (sound(r, ("emu",), 1) / f"emu/c{n}.png").write_bytes((r / "emu/0.png").read_bytes()) for n in range(1)
        ],
        "class 'emu' has 2 copies of a single image",
    ),
    "one class": (
        lambda r, v: [path.unlink() for path in (r / "dog").iterdir()] and (r / "dog").rmdir(),
        "only one class",
    ),
    "no image": (
        lambda r, v: [p.rename(p.with_suffix(".txt")).write_bytes(b"text") for p in r.rglob("*.png")],
        "no images in .* 10 files left out, not an image but text: 'cat/0.txt'",
    ),
    "many bad ones": (lambda r, v: spoil(r, "cat/1.png", "cat/2.png", "dog/0.png"), "3 of 10 images cannot be read"),
    "a class that is all bad": (
        lambda r, v: spoil(r, *(f"dog/{n}.png" for n in range(5))),
        "class 'dog' has no readable training image",
    ),
    "all bad": (lambda r, v: spoil(r, *(f"{c}/{n}.png" for c in ("cat", "dog") for n in range(5))), "none of 10"),
    "an unknown test class": (
        lambda r, v: (sound(r / "train"), sound(r / ("test", "val", "valid")[v], ("cow",))),
        "class 'cow' .* is not in the training split",
    ),
}


@pytest.mark.parametrize("variant", range(VARIANTS))
@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path, kind, variant):
    change, message = REFUSED[kind]
    root = sound(tmp_path / "photos", seed=variant)
    other = change(root, variant)
    before = tree_hash(tmp_path)
    with pytest.raises(DataError, match=message):
        loaded(other if isinstance(other, Path) and not other.is_dir() else root)
    assert tree_hash(tmp_path) == before
    assert not list(tmp_path.rglob("marker*"))


def test_the_catalogue_is_as_large_as_promised():
    assert len(FILES) + len(PLACES) + len(REFUSED) >= 40


def test_bombs_take_little_memory(tmp_path):
    """Of a process of its own, so that its peak is that of the bombs; most of it is torch."""
    root = sound(tmp_path / "photos")
    for kind in ("a large PNG header", "a PNG bomb", "a GIF bomb", "a BMP bomb", "a text bomb"):
        (root / "cat" / f"{kind}.{FILES[kind].suffix}").write_bytes(FILES[kind].content(0))
    sparse(root)
    code = (
        "import re, resource, sys; from pathlib import Path; from skipway.data import load; "
        "data = load(Path(sys.argv[1]), most_unreadable=1.0, cache=False); "
        # Linux hands the peak of the parent on to getrusage
        "own = Path('/proc/self/status'); "
        "high = re.search(r'VmHWM:\\s*(\\d+)', own.read_text()) if own.exists() else None; "
        "print(len(data.unreadable), high[1] if high else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True).stdout
    bad, peak = map(int, out.split())
    assert bad == 6
    assert peak * (1 if sys.platform == "darwin" else 1024) < 1e9


def test_an_empty_class_can_be_kept(tmp_path):
    root = sound(tmp_path / "photos")
    (root / "emu").mkdir()
    data = loaded(root, allow_empty=True)
    assert data.classes == ("cat", "dog", "emu")
    assert "no training image of class 'emu'" in data.remarks


def test_a_folder_of_unsorted_images_is_a_class_and_said(tmp_path):
    root = sound(tmp_path / "photos", each=4)
    assert "its images have none" not in " ".join(loaded(root).remarks)
    (root / "dog").rename(root / "Unsorted")
    assert "'Unsorted' is a class like the others, though its name says that its images have none: leave the 4" in (
        " ".join(loaded(root).remarks)
    )


def test_what_may_give_a_class_away_is_said(tmp_path):
    root = sound(tmp_path / "photos", each=4)
    for number in range(40):
        (root / "dog" / f"clear{number}.png").write_bytes(encoded(0, "PNG", pixels=noise(number, 16, 16, 4)))
    said = " ".join(loaded(root).remarks)
    assert "classes differ in size: 'dog' has 44 images, 'cat' 4" in said
    assert "transparent images: 91 % of 'dog', 0 % of 'cat'" in said
