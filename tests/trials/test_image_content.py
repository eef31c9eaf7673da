"""Kind: what is an image is decided by its bytes, not by its suffix; what is none is named with what it is.

| trial | input | right value |
|---|---|---|
| B3 | .jfif, .JFIF, no suffix, .tga | read |
| | AVIF, MPO, JPEG 2000, WebP, PNM, BMP under foreign or no suffixes | read |
| | TGA under another suffix, known by its footer | read |
| | text, HTML, SVG, XML, PDF, PostScript, archives, LFS pointers, video, zeros named .jpg | damaged, each by name |
| | the same without an image suffix | left out, each by name |
| | HEIC without pillow-heif; with it | named with the extra; its opener is registered |
| | formats that Pillow knows and that are not read | named with the way out |
| | raw photographs (a TIFF that begins with a thumbnail), also named .tif | named, not trained on as thumbnails |
| | text that begins like a format ("BM", "P2", "II") | text |
| B9 | folders of which nothing can be read | the reason is in the message |
| | `predict` on a folder of files without suffixes | reads them, names the others |
"""

from __future__ import annotations

import io
import os
import sys
import types

import pytest
from PIL import Image, TiffImagePlugin
from tests.trials.pictures import encoded, write_images

from skipway.data import load
from skipway.data.content import describe_content, image_format, readable_formats
from skipway.data.sources.folders import index_folders
from skipway.errors import DataError
from skipway.inference.predict import image_files

NAMES = [
    *(("JPEG", ".jfif"), ("JPEG", ".JFIF"), ("JPEG", ".jif"), ("JPEG", ""), ("JPEG", ".jpg_large"), ("JPEG", ".png")),
    *(
        ("PNG", ""),
        ("PNG", ".jpg"),
        ("PNG", ".x"),
        ("GIF", ""),
        ("WEBP", ""),
        ("BMP", ".dib"),
        ("PPM", ""),
        ("TIFF", ""),
    ),
    *(
        ("TGA", ".tga"),
        ("TGA", ".TGA"),
        ("MPO", ".mpo"),
        ("MPO", ""),
        ("AVIF", ""),
        ("AVIF", ".AVIF"),
        ("JPEG2000", ""),
    ),
    *(("JPEG2000", ".j2k"), ("WEBP", ".jpeg"), ("PNG", ".123"), ("JPEG", ".jpg;extra=1")),
]


@pytest.mark.parametrize(("form", "suffix"), NAMES, ids=str)
def test_images_are_known_by_their_bytes(tmp_path, form, suffix):
    if form not in ("MPO", *readable_formats()):
        pytest.skip(f"this build of Pillow does not read {form}")
    folder = write_images(tmp_path, {"cat": 4, "dog": 4}, suffix=suffix, form=form, side=(16, 16))
    data = load(folder)
    assert (data.classes, len(data.splits.samples), data.unreadable) == (("cat", "dog"), 8, ())
    assert not data.splits.left_out


def test_tga_has_a_footer_where_pillow_writes_one_and_is_known_by_it(tmp_path):
    footer = b"\0" * 8 + b"TRUEVISION-XFILE.\0"
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(3):
            content = encoded(number + 10 * len(name) * (name == "cat"), "TGA", side=(16, 16)) + footer
            (tmp_path / name / f"{number}.dat").write_bytes(content)
    assert len(load(tmp_path).splits.samples) == 6


OTHERS = {
    "text": (b"hello there", "not an image but text"),
    "German text": ("für später".encode(), "not an image but text"),
    "UTF-16": ("hello".encode("utf-16"), "not an image but text in UTF-16"),
    "BM": (b"BMW and Bentley are cars", "not an image but text"),
    "P2": (b"P2 is a class name", "not an image but text"),
    "II": (b"II. Introduction", "not an image but text"),
    "JSON": (b'{"label": 1}', "not an image but text"),
    "HTML": (b"\n<!DOCTYPE html><html>404", "not an image but HTML"),
    "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image but an SVG drawing"),
    "XML": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "not an image but XML"),
    "PDF": (b"%PDF-1.7\n", "not an image but a PDF document"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0", "not an image but a PostScript document"),
    "zip": (b"PK\x03\x04\x14\0\0\0", "not an image but an archive"),
    "gzip": (b"\x1f\x8b\x08\0\0", "not an image but an archive"),
    "tar": (bytes(257) + b"ustar\x0000", "not an image but an archive"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "a pointer of Git LFS: git lfs pull"),
    "video": (b"\0\0\0\x20ftypisom\0\0\2\0", "not an image but a video"),
    "NumPy": (b"\x93NUMPY\x01\0v\0", "not an image but a data file"),
    "DICOM": (bytes(128) + b"DICM" + bytes(40), "not an image but a data file"),
    "zeros": (bytes(5000), "not an image but zeros"),
    "nothing": (b"", "an empty file"),
    "AppleDouble": (b"\0\5\x16\7\0\2\0\0Mac OS X", "a resource fork of macOS"),
    "Thumbs.db": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "a thumbnail database of Windows"),
    "a shortcut": (
        b"L\0\0\0\x01\x14\x02\0" + bytes(60),
        "a shortcut of Windows or macOS, not followed: copy the image",
    ),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image, which is read after pip install 'skipway[heif]'"),
    "HEIF of mif1": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "a HEIC image, which is read after"),
    "JPEG XL": (b"\xff\x0a\x10\x10", "a JPEG XL image: convert it"),
    "PSD": (b"8BPS\0\1" + bytes(30), "an image in the format PSD, which is not read: convert it to PNG"),
    "ICO": (encoded(0, "ICO", side=(16, 16)), "an image in the format ICO, which is not read: convert it to PNG"),
    "unknown": (bytes(range(130, 200)), "not an image in a format that is read; it begins with the bytes 82 83 84 85"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_image_is_named_with_what_it_is(tmp_path, kind):
    content, what = OTHERS[kind]
    folder = write_images(tmp_path, {"cat": 4, "dog": 4})
    (folder / "cat/bad.jpg").write_bytes(content)
    (folder / "cat/other.dat").write_bytes(content)
    data = load(folder, most_unreadable=0.2)
    ((file, reason),) = data.unreadable
    assert file == "cat/bad.jpg"
    assert what in reason
    ((left_out, count),) = data.splits.left_out.counts.items()
    assert what in left_out
    assert count == 1
    assert any(what in remark and "cat/other.dat" in remark for remark in data.remarks)
    assert data.inventory.total == 10


def test_heic_is_read_where_its_library_is_installed(monkeypatch):
    opened = []
    library = types.ModuleType("pillow_heif")
    library.register_heif_opener = lambda: opened.append(Image.register_open("HEIF", lambda fp, name: None))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", library)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    readable_formats.cache_clear()
    try:
        assert image_format(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic") == "HEIF"
        assert image_format(b"\0\0\0\x18ftypavif\0\0\0\0mif1miaf") == "AVIF"
        assert opened
    finally:
        readable_formats.cache_clear()


def raw_photograph() -> bytes:
    """A TIFF file whose first picture is a reduced copy (NewSubfileType 1), as DNG, NEF and ARW begin."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[254] = 1
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (99, 9, 9)).save(file, "TIFF", tiffinfo=tags)
    return file.getvalue()


def test_raw_photographs_are_not_trained_on_as_thumbnails(tmp_path):
    folder = write_images(tmp_path, {"cat": 4, "dog": 4})
    for name in ("a.dng", "b.NEF", "c.tif", "d"):
        (folder / "cat" / name).write_bytes(raw_photograph())
    data = load(folder, most_unreadable=0.2)
    what = "a raw photograph, whose readable part is a thumbnail: develop it"
    assert dict(data.unreadable) == {"cat/c.tif": what}
    assert data.splits.left_out.counts == {what: 3}


@pytest.mark.parametrize("content", [b"<html>", b"", b"\xff\xd8\xff\xe0cut", b"%PDF-1.4"])
def test_where_nothing_can_be_read_the_reason_is_said(tmp_path, content):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"none of 2 images in .* can be read; the first: .*cat/0\.jpg: \w"):
        load(tmp_path)


def test_prediction_finds_the_same_images(tmp_path):
    folder = write_images(tmp_path, {"a": 2}, suffix="")
    (folder / "notes.txt").write_text("notes")
    (folder / "photo.heic").write_bytes(OTHERS["HEIC"][0])
    files, left_out = image_files([folder])
    assert [file.name for file in files] == ["000", "001"]
    assert left_out.counts.total() == 2
    (tmp_path / "only").mkdir()
    (tmp_path / "only/photo.heic").write_bytes(OTHERS["HEIC"][0])
    with pytest.raises(DataError, match=r"contains no images; 1 file left out, a HEIC image.*skipway\[heif\]"):
        image_files([tmp_path / "only"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_without_an_image_suffix_are_left_out_and_do_not_block(tmp_path):
    folder = write_images(tmp_path, {"cat": 2, "dog": 2})
    os.mkfifo(folder / "cat/pipe")
    assert index_folders(folder).left_out.counts == {"not a regular file": 1}


def test_random_bytes_are_described_in_a_printable_phrase():
    import random

    draw = random.Random(0)
    for _ in range(500):
        content = draw.randbytes(draw.randint(0, 300))
        if not image_format(content):
            assert describe_content(content).isprintable()
