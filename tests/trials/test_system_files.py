"""Kind: files and folders that systems and tools put beside images are left out and said; every file is accounted for.

| trial | input | right value |
|---|---|---|
| | .DS_Store, Thumbs.db, desktop.ini, ._x.jpg, checksums in a class folder | left out, by content or hidden |
| | the same beside the class folders | the same |
| | __MACOSX, @eaDir, .ipynb_checkpoints, #recycle, $RECYCLE.BIN, .git, .cat with images | no class, counted |
| | ._x.jpg without its dot (an AppleDouble file by content) | damaged, by name |
| | a class folder that holds only such files | refused with what is in it |
| | what `load` and the command line say | counts by reason, and the sum |
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.trials.pictures import encoded, write_images

from skipway.cli import main
from skipway.data import load
from skipway.data.sources.folders import index_folders
from skipway.errors import DataError

APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(60)
FILES = {
    ".DS_Store": (b"\0\0\0\1Bud1" + bytes(90), "hidden"),
    "DS_Store": (b"\0\0\0\1Bud1" + bytes(90), "not an image but a folder view of macOS"),
    "Thumbs.db": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(90), "a thumbnail database of Windows"),
    "desktop.ini": (b"[.ShellClassInfo]\r\nIconResource=x\r\n", "not an image but text"),
    "._000.jpg": (APPLE_DOUBLE, "hidden"),
    "._": (APPLE_DOUBLE, "hidden"),
    "Icon\r": (b"", "an empty file"),
    "SHA256SUMS": (b"0123abcd  000.png\n", "not an image but text"),
    "000.png.crdownload": (encoded(3)[:5], "not an image in a format that is read"),
    "000.xmp": (b"<?xml version='1.0'?><x/>", "not an image but XML"),
    "movie.mp4": (b"\0\0\0\x20ftypmp42" + bytes(40), "not an image but a video"),
}
FOLDERS = {
    "__MACOSX": "in folders that a system made",
    "@eaDir": "in folders that a system made",
    "#recycle": "in folders that a system made",
    "$RECYCLE.BIN": "in folders that a system made",
    "System Volume Information": "in folders that a system made",
    "lost+found": "in folders that a system made",
    ".ipynb_checkpoints": "in hidden folders",
    ".git": "in hidden folders",
    ".Trash-1000": "in hidden folders",
    ".cat": "in hidden folders",
}


def files_below(root: Path) -> int:
    return sum(path.is_file() or path.is_symlink() for path in root.rglob("*"))


@pytest.mark.parametrize("place", ["cat", "", "cat/deep"])
@pytest.mark.parametrize("name", FILES)
def test_files_of_systems(tmp_path, name, place):
    folder = write_images(tmp_path, {"cat": 3, "dog": 3})
    content, reason = FILES[name]
    (folder / place).mkdir(exist_ok=True)
    (folder / place / name).write_bytes(content)
    index = index_folders(folder)
    assert index.classes == ("cat", "dog")
    ((found, count),) = index.left_out.counts.items()
    assert reason in found
    assert count == 1
    assert index.inventory.total == files_below(folder) == 7


@pytest.mark.parametrize("place", ["", "cat", "train", "train/cat", "test"])
@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_systems(tmp_path, name, place):
    parts = {"": ("",), "cat": ("",)}.get(place, ("train/", "test/"))
    folder = write_images(tmp_path, {f"{part}{label}": 3 for part in parts for label in ("cat", "dog")})
    write_images(folder / place, {f"{name}/cat": 2, name: 1})
    index = index_folders(folder)
    assert index.classes == ("cat", "dog")
    assert index.left_out.counts == {FOLDERS[name]: 3}
    assert index.inventory.total == files_below(folder) == 6 * len(parts) + 3


def test_an_image_by_name_that_is_a_resource_fork_is_named(tmp_path):
    folder = write_images(tmp_path, {"cat": 3, "dog": 3})
    (folder / "cat/_000.jpg").write_bytes(APPLE_DOUBLE)
    data = load(folder, most_unreadable=0.5)
    assert data.unreadable == (("cat/_000.jpg", "not an image but a resource fork of macOS"),)


def test_a_class_of_such_files_alone_is_refused_with_what_is_there(tmp_path):
    folder = write_images(tmp_path, {"cat": 3, "dog": 3})
    (folder / "emu").mkdir()
    (folder / "emu/Thumbs.db").write_bytes(FILES["Thumbs.db"][0])
    with pytest.raises(
        DataError, match=r"'emu' .* holds no image; .*allow_empty=True; 1 file left out, not an image but"
    ):
        index_folders(folder)


def test_everything_is_said(tmp_path, capsys):
    folder = write_images(tmp_path / "d", {"cat": 4, "dog": 4, ".git": 2, "@eaDir/cat": 3})
    for name, (content, _) in FILES.items():
        (folder / "dog" / name).write_bytes(content)
    (folder / "cat/bad.png").write_bytes(b"<html>")
    data = load(folder, most_unreadable=0.5)
    inventory = data.inventory
    assert inventory.total == files_below(folder) == 8 + 5 + len(FILES) + 1
    assert sum(inventory.read.values()) == 8
    assert inventory.left_out["not an image but HTML"] == 1
    small = ("--epochs", "1", "--model", "resnet8", "--width", "4", "--workers", "0", "--most-unreadable", "0.5")
    assert main(["train", str(folder), "--out", str(tmp_path / "run"), "--device", "cpu", *small]) == 0
    said = capsys.readouterr().out
    assert f"files     {inventory.total} in all: 8 read, {inventory.total - 8} left out" in said
    assert "3 files left out, in folders that a system made: '@eaDir/cat" in said or "for other reasons" in said
    assert "not an image but HTML" in said
