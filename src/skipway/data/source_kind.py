"""`source_kind`: whether a source holds images or text, by the content of its files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from skipway.data.content import image_format
from skipway.data.sources.lists import LIST_SUFFIXES
from skipway.data.sources.scan import SUFFIXES
from skipway.data.text.charset import Notes, NotText, decode_text_file
from skipway.data.text.compression import decompress, plain_name
from skipway.errors import MissingExtraError

__all__ = ["SourceKind", "source_kind"]

SourceKind = Literal["image", "text", "mixed"]

# bytes that are looked at, files of a folder and of all folders, lines of a file that may be a list of images
HEAD, EACH_FOLDER, MOST_FILES, LINES = 1 << 14, 20, 400, 50


def source_kind(source: Path | str) -> SourceKind | None:
    """What a source holds; None where its files do not tell: tables, archives, names of a hub, no such file.

    A folder with as many images as texts, or more, holds images: labels and licences lie beside them. "mixed" is one
    with more texts than images.
    """
    path = Path(source)
    if path.is_file():
        return file_kind(path)
    if not path.is_dir():
        return None
    kinds: list[SourceKind | None] = []
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        shown = sorted(name for name in files if not name.startswith("."))[:EACH_FOLDER]
        kinds += [file_kind(Path(folder, name)) for name in shown]
        if len(kinds) >= MOST_FILES:
            break
    images, texts = kinds.count("image"), kinds.count("text")
    if not texts or images >= texts:
        return "image" if images else None
    return "mixed" if images or None in kinds else "text"


def file_kind(path: Path) -> SourceKind | None:
    """What a file holds, by its suffix or its beginning. A list of image files counts as images."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return "image"
    if Path(plain_name(path.name)).suffix.lower() in (*LIST_SUFFIXES, ".tar", ".arrow", ".json", ".jsonl", ".ndjson"):
        return None
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
        if image_format(head, suffix):
            return "image"
        if plain_name(path.name) != path.name:
            head = decompress(path.read_bytes())[:HEAD]
        if len(head) == HEAD:  # cut within a character, perhaps
            head = head[: head.rfind(b"\n") + 1] or head
        text = decode_text_file(head, path.name, Notes())
    except (NotText, OSError, MissingExtraError):
        return None
    return "image" if is_image_list(text) else "text"


def is_image_list(text: str) -> bool:
    """Whether most lines of a text begin with the name of an image file.

    >>> is_image_list("a/1.png 0\\nb/2.png 1"), is_image_list("The file 1.png\\nshows a cat.")
    (True, False)
    """
    lines = [line for line in text.splitlines() if line.strip()][:LINES]
    names = (re.split(r"[\s,;]", line.strip())[0].strip("'\"") for line in lines)
    return 2 * sum(os.path.splitext(name)[1].lower() in SUFFIXES for name in names) > len(lines)
