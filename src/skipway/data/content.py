"""What a file is, by its first bytes: an image in a format that is read, or something else, described in a phrase."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import BinaryIO

from PIL import Image

__all__ = ["HEAD_BYTES", "MARKUP", "OTHERS", "content_fault", "describe_content", "image_format", "readable_formats"]

# tar has its signature at byte 257, DICOM at 128
HEAD_BYTES = 512

HEIF_BRANDS = rb"....ftyp(?:heic|heix|heim|heis|hevc|hevx|hevm|hevs|mif1|msf1)"
# Pillow's name of each format that is read → signature. Others run programs (EPS runs Ghostscript), or nobody trains on
# them. MPO begins as JPEG does.
SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM.{12}[\x0c-\x7c]\0\0\0",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "PPM": rb"P[1-6](?:\s+|#[^\n]*\n)+\d",
    "AVIF": rb"....ftyp(?:avif|avis)|....ftyp(?:mif1|msf1)....(?:....)*?(?:avif|avis)",
    "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "HEIF": HEIF_BRANDS,
    # no signature: type of the colour map, type of the image, bits of a pixel
    "TGA": rb".[\0\x01][\x01-\x03\x09-\x0b].{13}[\x01\x08\x10\x18\x20]",
}
TGA_SUFFIXES = (".tga", ".targa", ".icb", ".vda", ".vst")
TGA_FOOTER = b"TRUEVISION-XFILE.\0"
# files that are no images, and images that are not read, by signature
OTHERS = (
    (HEIF_BRANDS, "a HEIC image, which is read after pip install 'skipway[heif]'"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL image: convert it with djxl"),
    (rb"\0\x05\x16\x07", "not an image but a resource fork of macOS"),
    (rb"\0\0\0\x01Bud1", "not an image but a folder view of macOS"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "not an image but an Office document or a thumbnail database of Windows"),
    (rb"version https://git-lfs", "not an image but a pointer of Git LFS: git lfs pull fetches the image"),
    (rb"%PDF", "not an image but a PDF document"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "not an image but a PostScript document"),
    (rb"PK\x03\x04|PK\x05\x06|\x1f\x8b|BZh\d|7z\xbc\xaf|Rar!|\xfd7zXZ|\x28\xb5\x2f\xfd|.{257}ustar",
     "not an image but an archive"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI |FLV\x01|\0\0\x01\xba", "not an image but a video"),
    (rb"L\0\0\0\x01\x14\x02\0|book\0\0\0\0mark", "a shortcut of Windows or macOS, not followed: copy the image"),
    (rb"\x89HDF|\x93NUMPY|SQLite format 3|PAR1|.{128}DICM|SIMPLE  =", "not an image but a data file"),
)  # fmt: skip
MARKUP = (
    (rb"<!doctype html|<html|<head|<body", "HTML"),
    (rb"(?:<\?xml.*?)?<svg", "an SVG drawing"),
    (rb"<\?xml", "XML"),
)


@cache
def readable_formats() -> tuple[str, ...]:
    """The formats of `SIGNATURES` that this build of Pillow reads; HEIF where pillow-heif is installed."""
    Image.init()
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in SIGNATURES if name in Image.OPEN)


def image_format(content: bytes, suffix: str = "") -> str:
    """The format of an image by its first bytes, by Pillow's name; "": none that is read.

    TGA has no signature at its beginning: it is known by the suffix, or by its footer where `content` is a whole file.

    >>> image_format(b"GIF89a..."), image_format(b"GIFT")
    ('GIF', '')
    """
    for name in readable_formats():
        if name == "TGA" and suffix.lower() not in TGA_SUFFIXES and not content.endswith(TGA_FOOTER):
            continue
        if re.match(SIGNATURES[name], content[:HEAD_BYTES], re.DOTALL):
            return name
    return ""


def content_fault(file: BinaryIO, suffix: str) -> str:
    """Read the first bytes of a file; return "" for an image that is read, else what the file is.

    A photograph in a raw format is a TIFF file whose first picture is a thumbnail.
    """
    head = file.read(HEAD_BYTES)
    form = image_format(head, suffix)
    if not form:
        file.seek(-min(len(TGA_FOOTER), file.seek(0, 2)), 2)
        form = image_format(head + file.read(), suffix)
    if form == "TIFF":
        try:
            with Image.open(file, formats=("TIFF",)) as image:
                return describe_raw(image)
        except Exception:  # whatever Pillow's parser raises
            return "a damaged TIFF image"
    return "" if form else describe_content(head)


def describe_raw(image: Image.Image) -> str:
    """What a TIFF file is if its first picture is a thumbnail of a raw photograph; "": an image."""
    tags = getattr(image, "tag_v2", {})
    # NewSubfileType: a reduced copy; DNGVersion; a mosaic of colour filters
    raw = tags.get(254, 0) == 1 or 50706 in tags or tags.get(262) == 32803
    return "a raw photograph, whose readable part is a thumbnail: develop it" if raw else ""


def describe_content(content: bytes) -> str:
    """Describe a file that is no image in a format that is read."""
    head = content[:HEAD_BYTES]
    if not head.strip():
        return "an empty file"
    if not head.strip(b"\0"):
        return "not an image but zeros, as a download that was cut off leaves them"
    for pattern, what in OTHERS:
        if re.match(pattern, head, re.DOTALL):
            return what
    return describe_text(head) or describe_other(head)


def describe_text(head: bytes) -> str:
    """Describe text or markup; "": the bytes are neither."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "not an image but text in UTF-16"
    text = head.removeprefix(b"\xef\xbb\xbf").strip()
    markup = next((what for pattern, what in MARKUP if re.match(pattern, text, re.DOTALL | re.IGNORECASE)), None)
    if markup:
        return f"not an image but {markup}"
    # the last character may be cut off
    decoded = text.decode("utf-8", "replace").rstrip("\ufffd")
    plain = all(letter.isprintable() or letter in "\t\r\n\f" for letter in decoded) and "\ufffd" not in decoded
    return "not an image but text" if plain and decoded else ""


def describe_other(head: bytes) -> str:
    """Describe a file that matches no signature here: by Pillow's other formats, else by its first bytes."""
    Image.init()
    prefix = head[:16].ljust(16, b"\0")
    for name, (_, accept) in Image.OPEN.items():
        if name not in SIGNATURES and accept is not None and accept(prefix) is True:
            return f"an image in the format {name}, which is not read: convert it to PNG"
    return f"not an image in a format that is read; it begins with the bytes {head[:4].hex(' ')}"
