"""Tar shards as the webdataset library writes them: `key.jpg` beside `key.cls` or `key.json`, read in place.

webdataset reads shards sequentially; here members are read at random, so only its naming rules are used
(`tests/data/test_sources.py` compares them): the key of a member is its path up to the first dot of its name. A member
without a label beside it has its folder's name for a label, so a tar file of class folders works as it is.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from skipway.data.content import HEAD_BYTES, content_fault
from skipway.data.decode import MAX_BYTES
from skipway.data.sources.index import (
    FilesByClass,
    SourceIndex,
    check_classes,
    check_known_classes,
    files_of_classes,
    name_list,
    sorted_classes,
)
from skipway.data.sources.readers import ShardMember, ShardStore, check_member_name
from skipway.data.sources.scan import SUFFIXES, LeftOut
from skipway.data.sources.splits import SPLITS, Split, looks_like_split, split_in
from skipway.errors import DataError, printable

__all__ = ["expand_braces", "index_shards", "key_and_suffix", "shard_paths"]

MAX_MEMBERS = 20_000_000
MAX_SHARDS = 100_000
MAX_LABEL_BYTES = 1024**2
# larger members of unknown suffixes are judged by their first bytes
MAX_SNIFFED_BYTES = 16 * 1024**2


def expand_braces(pattern: str) -> list[str]:
    """Expand a brace pattern as a shell does: ranges of numbers, which keep leading zeros, and lists.

    >>> expand_braces("train-{08..10}.tar"), expand_braces("{train,val}.tar")
    (['train-08.tar', 'train-09.tar', 'train-10.tar'], ['train.tar', 'val.tar'])
    """
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    options: list[list[str]] = []
    total = 1
    for number, piece in enumerate(pieces):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", piece) if number % 2 else None
        if span is not None:
            first, last = span.groups()
            width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
            total *= abs(int(last) - int(first)) + 1
            if total > MAX_SHARDS:
                break
            step = 1 if int(first) <= int(last) else -1
            options.append([str(n).zfill(width) for n in range(int(first), int(last) + step, step)])
        else:
            options.append(piece.split(",") if number % 2 else [piece])
            total *= len(options[-1])
    if total > MAX_SHARDS:
        raise DataError(
            f"{pattern!r} means more than {MAX_SHARDS:,} shards, the most; give a folder of fewer, larger ones"
        )
    return ["".join(choice) for choice in product(*options)]


def key_and_suffix(name: str) -> tuple[str, str]:
    """The key of a member, and the suffix after the first dot of its name in lower case.

    >>> key_and_suffix("a.b/c.seg.PNG")
    ('a.b/c', 'seg.png')
    """
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def shard_paths(source: Path) -> list[Path]:
    """The tar files of a file, a folder or a brace pattern."""
    if source.is_dir():
        return sorted(path for path in source.rglob("*.tar") if path.is_file())
    return [Path(name) for name in expand_braces(str(source))]


def index_shards(source: Path, *, allow_empty: bool = False, fewest: int = 2) -> SourceIndex:
    """Index the images of tar shards.

    A shard belongs to the split that is one of the words of its name or its folder's name; to train if none
    is. A shard whose name sounds like another split, such as `extra-000.tar`, is left alone.

    Raises:
        DataError: a shard is missing, compressed, damaged, holds a link or a name that leads out of it, or too many
            members; an image has no label.
    """
    paths = shard_paths(source)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"shard {printable(missing[0])} does not exist ({len(missing)} of {len(paths)} do not); copy what is "
            "missing, or name those that are there"
        )
    root = source if source.is_dir() else Path(*common_folder(paths))
    members: dict[str, ShardMember] = {}
    splits: dict[Split, FilesByClass] = {split: {} for split in SPLITS}
    left_out = LeftOut()
    unused = []
    for path in paths:
        shard = path.relative_to(root).as_posix()
        split = split_in(shard)
        if split is None and looks_like_split(path.stem):
            unused.append(shard)
            continue
        for member, label, place in scan_shard(path, left_out):
            name = f"{shard}/{member}"
            members[name] = ShardMember(shard, *place)
            splits[split or "train"].setdefault(label, []).append(name)
        if len(members) > MAX_MEMBERS:
            raise DataError(f"{printable(source)} holds more than {MAX_MEMBERS:,} images, the most: train on a part")
    where, files = printable(source), files_of_classes(splits, fewest)
    classes = sorted_classes(files)
    if unused and not files:
        raise DataError(f"{where} holds {name_list(unused)} but no training shard: name it train-000.tar")
    check_classes(files, where, allow_empty=allow_empty, left_out=left_out, fewest=fewest)
    for other in SPLITS[1:]:
        if splits[other]:
            check_known_classes(splits[other], classes, where, other)
    return SourceIndex(
        store=ShardStore(root, members),
        name=paths[0].stem if len(paths) == 1 else root.resolve().name,
        classes=classes,
        train={name: splits["train"].get(name, []) for name in classes},
        validation=splits["validation"] or None,
        test=splits["test"] or None,
        left_out=left_out,
        unused=tuple(f"{printable(shard)!r}: its name is none of train, val, test" for shard in unused),
    )


def common_folder(paths: Sequence[Path]) -> tuple[str, ...]:
    """The folder that all paths share, as its parts."""
    shared = []
    for names in zip(*(path.parent.parts for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return tuple(shared)


def scan_shard(path: Path, left_out: LeftOut) -> list[tuple[str, str, tuple[int, int]]]:
    """(name, label, (offset, size)) of every image of a shard; only labels are read."""
    images: list[tuple[str, str, tuple[int, int]]] = []
    others: list[tuple[str, str, tuple[int, int]]] = []
    labels: dict[str, tuple[str, tuple[int, int]]] = {}
    size, count = path.stat().st_size, 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                # tarfile would keep every member that it has seen
                tar.members = []  # pyrefly: ignore[missing-attribute]
                count += 1
                check_member(path, member, size, count)
                if not member.isreg():
                    continue
                if Path(member.name).name.startswith("."):
                    left_out.add("hidden", f"{path.name}/{member.name}")
                    continue
                key, suffix = key_and_suffix(member.name)
                place = (member.offset_data, member.size)
                if "." + suffix.rpartition(".")[2] in SUFFIXES:
                    images.append((member.name, key, place))
                elif suffix in ("cls", "json"):
                    labels[key] = (suffix, place)
                else:
                    others.append((member.name, key, place))
    except DataError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{printable(path)}: not a tar file that can be read in place: {error}{compression_advice(path)}"
        ) from error
    with path.open("rb") as file:
        for other in others:
            what = describe_member(file, *other)
            if what:
                left_out.add(what, f"{path.name}/{other[0]}")
            else:
                images.append(other)
        images.sort(key=lambda image: image[2])
        return [(name, label_of(path, file, name, labels.get(key)), place) for name, key, place in images]


def describe_member(file: Any, name: str, key: str, place: tuple[int, int]) -> str:
    """ "" for a member that is an image by its content, else what it is."""
    offset, size = place
    file.seek(offset)
    content = file.read(size if size <= MAX_SNIFFED_BYTES else HEAD_BYTES)
    return content_fault(io.BytesIO(content), Path(name).suffix)


def check_member(path: Path, member: tarfile.TarInfo, size: int, count: int) -> None:
    """Check that a member is a plain file inside its shard.

    Raises:
        DataError: a link, a device, a name that leads out of the shard, a cut-off file, or too many members.
    """
    check_member_name(member.name, path)
    what = f"{printable(path)}: member {printable(member.name)!r}"
    if member.issym() or member.islnk():
        raise DataError(f"{what} is a link; shards hold files only: pack what it leads to (tar --dereference)")
    if member.isdev() or member.issparse():
        raise DataError(f"{what} is a device, a pipe or a sparse file; shards hold plain files only: leave it out")
    if member.offset_data + member.size > size:
        raise DataError(f"{what} ends after the end of the file: the shard is cut off: copy or pack it again")
    if count > MAX_MEMBERS:
        raise DataError(f"{printable(path)} holds more than {MAX_MEMBERS:,} members, the most: divide it")


def compression_advice(path: Path) -> str:
    """Advice about a compressed shard, for a message."""
    with path.open("rb") as file:
        head = file.read(6)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "; it is compressed: images gain nothing by that, unpack it to a plain tar"
    return ""


def label_of(path: Path, file: Any, name: str, beside: tuple[str, tuple[int, int]] | None) -> str:
    """The label of an image, from the .cls or .json with its key, or its folder."""
    what = f"{printable(path)}: the label of {printable(name)!r}"
    if beside is None:
        folder = name.strip("/").rpartition("/")[0].rpartition("/")[2]
        if folder in ("", "."):
            raise DataError(
                f"{what} is missing: there is no .cls or .json beside it and it lies in no folder; name the image "
                "CLASS/IMAGE in the shard, or add KEY.cls"
            )
        return folder
    suffix, (offset, size) = beside
    if size > min(MAX_LABEL_BYTES, MAX_BYTES):
        raise DataError(f"{what} takes {size:,} bytes; the rule is at most {MAX_LABEL_BYTES:,}")
    file.seek(offset)
    content = file.read(size)
    try:
        value: Any = content.decode().strip() if suffix == "cls" else json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} cannot be read: {error}") from error
    if isinstance(value, dict):
        value = next((value[key] for key in ("label", "cls", "class") if key in value), None)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{what} is {value!r:.50}; the rule is a number or a name, in JSON under label, cls or class")
    return str(value)
