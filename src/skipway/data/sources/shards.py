"""Tar shards as the webdataset library writes them: `key.jpg` beside `key.cls` or `key.json`, read in place.

webdataset reads shards sequentially; here members are read at random, so only its naming rules are used
(`tests/data/test_sources.py` compares them): the key of a member is its path up to the first dot of its name. Of a
.cls and a .json with one key, the .cls is the label. Members without a label beside them are read as the unpacked
folder is, so a tar file of class folders works as it is, with `train`, `val` and `test` in it or without.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from skipway.data.content import HEAD_BYTES, content_fault
from skipway.data.decode import MAX_BYTES
from skipway.data.sources.folders import Layout, Subfolders, innermost, layout_of, read_layout
from skipway.data.sources.index import (
    FilesByClass,
    SourceIndex,
    check_classes,
    check_known_classes,
    files_of_classes,
    idle_remarks,
    name_list,
    sorted_classes,
)
from skipway.data.sources.readers import ShardMember, ShardStore, check_member_name
from skipway.data.sources.scan import SUFFIXES, LeftOut, SourceFolder, name_fault
from skipway.data.sources.splits import SPLITS, Split, looks_like_split, split_in, split_of
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


def index_shards(
    source: Path, *, allow_empty: bool = False, subfolders: Subfolders = "merge", fewest: int = 2
) -> SourceIndex:
    """Index the images of tar shards.

    A shard belongs to the split that is one of the words of its name or its folder's name; to train if none
    is. A shard whose name sounds like another split, such as `extra-000.tar`, is left alone. Images without a label
    beside them are read as from the unpacked folders of all shards together, see `index_folders`. Of several shards, a
    folder around all of one that names its split, or is named as the shard like those in the other, numbered ones, is
    no class.

    Raises:
        DataError: a shard is missing, compressed, damaged, holds a link or a name that leads out of it, or too many
            members; an image has no label; folders in a shard name splits that its name or the labels do not; or what
            `index_folders` refuses.
    """
    paths = shard_paths(source)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"shard {printable(missing[0])} does not exist ({len(missing)} of {len(paths)} do not); copy what is "
            "missing, or name those that are there"
        )
    root = source if source.is_dir() else Path(*common_folder(paths))
    shards = {path: path.relative_to(root).as_posix() for path in paths}
    used = {path: split_in(shard) for path, shard in shards.items()}
    unused = [shards[path] for path, split in used.items() if split is None and looks_like_split(path.stem)]
    where, name = printable(source), paths[0].stem if len(paths) == 1 else root.resolve().name
    left_out = LeftOut()
    contents = read_contents(shards, unused, where, left_out)
    for apart in contents.labelled.values():
        check_labelled(apart, where)
    left_alone = tuple(f"{printable(shard)!r}: its name is none of train, val, test" for shard in unused)
    splits = contents.splits
    if contents.unlabelled:
        found, remarks, aside = lay_out(contents, where, subfolders, fewest, left_out)
        left_alone += aside
        add_in_order(splits, found, contents.members)
    else:
        idle = {"allow_empty": allow_empty, "subfolders": subfolders} if fewest > 1 else {}
        remarks = idle_remarks(name, "has no class folders", **idle)
    files = files_of_classes(splits, fewest)
    classes = sorted_classes(files)
    if unused and not files:
        raise DataError(f"{where} holds {name_list(unused)} but no training shard: name it train-000.tar")
    check_classes(files, where, allow_empty=allow_empty, left_out=left_out, fewest=fewest)
    for other in SPLITS[1:]:
        if other in splits:
            check_known_classes(splits[other], classes, where, other)
    return SourceIndex(
        store=ShardStore(root, contents.members),
        name=name,
        classes=classes,
        train={name: splits.get("train", {}).get(name, []) for name in classes},
        validation=splits.get("validation"),
        test=splits.get("test"),
        left_out=left_out,
        unused=left_alone,
        remarks=tuple(remarks),
    )


@dataclass
class ShardContents:
    """What shards hold.

    Args:
        by_shard: whether the names of the shards say the splits, which are then the folders around those in them.
        members: where each image lies, by the path of its shard and its own.
        splits: the images with a label beside them, by split and class.
        labelled: the folders of these, by split.
        unlabelled: the images without a label, by folder.
        folders: those with nothing in them.
        alone: the folders that are named as their shard and hold all of it in folders.
        silent: the folders of which no image is read, with their shard.
    """

    by_shard: bool
    members: dict[str, ShardMember] = field(default_factory=dict)
    splits: dict[Split, FilesByClass] = field(default_factory=dict)
    labelled: dict[Split, set[str]] = field(default_factory=lambda: {split: set() for split in SPLITS})
    unlabelled: dict[str, list[str]] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    alone: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)


def read_contents(shards: Mapping[Path, str], unused: Collection[str], where: str, left_out: LeftOut) -> ShardContents:
    """The contents of shards, given with their paths below the source, without those that are left alone.

    Raises:
        DataError: they hold too many images, or what `scan_shard` refuses.
    """
    splits = {path: split_in(shard) for path, shard in shards.items() if shard not in unused}
    contents = ShardContents(by_shard=any(split not in ("train", None) for split in splits.values()))
    for path, said in splits.items():
        shard, split = shards[path], said or "train"
        start = f"{split}/" if contents.by_shard else ""
        images, empty, unread = scan_shard(path, left_out)
        read = {folder_of(member) for member, _, _ in images}
        contents.silent |= {f"{shard}/{folder}" for folder in unread - {"", *read}}
        inside = {folder_of(member) for member, label, _ in images if label is None} | empty
        top, around = top_folder(inside) if len(shards) > 1 else "", ""
        if top and split_of(top) == split:
            start, around = f"{split}/", top
        elif top == path.stem and top not in inside:
            contents.alone.add(start + top)

        def below(folder: str, start: str = start, around: str = around) -> str:
            return start + folder.removeprefix(around).removeprefix("/")

        contents.folders |= {below(folder) for folder in empty}
        for member, label, place in images:
            file, folder = f"{shard}/{member}", folder_of(member)
            contents.members[file] = ShardMember(shard, *place)
            if label is None:
                contents.unlabelled.setdefault(below(folder), []).append(file)
            else:
                contents.splits.setdefault(split, {}).setdefault(label, []).append(file)
                contents.labelled[split].add(folder)
        if len(contents.members) > MAX_MEMBERS:
            raise DataError(f"{where} holds more than {MAX_MEMBERS:,} images, the most: train on a part")
    return contents


def lay_out(
    contents: ShardContents, where: str, subfolders: Subfolders, fewest: int, left_out: LeftOut
) -> tuple[dict[Split, FilesByClass], list[str], tuple[str, ...]]:
    """The images without a label by split and class, as `index_folders` reads the unpacked folders, with remarks and
    what is left alone.

    Raises:
        DataError: folders in a shard name splits that its name or the labels do not; or what `index_folders` refuses.
    """
    tree = SourceFolder("")
    # empty folders are classes, too, where folders say the classes
    empty = set() if any(contents.labelled.values()) else contents.folders
    for folder in sorted(contents.unlabelled.keys() | empty, key=lambda folder: folder.split("/")):
        tree.enter(folder).files += contents.unlabelled.get(folder, [])
    merged = merge_parts(tree.folders.values() if contents.by_shard else [tree], contents.alone)
    base = tree if contents.by_shard else unwrapped(tree)
    layout = layout_by_shards(tree, where) if contents.by_shard else layout_of(base, where, fewest)
    found, remarks = read_layout(tree, base, layout, subfolders, left_out)
    silent = name_list(sorted(contents.silent)) if contents.silent else ""
    remarks = [*remarks, *merged, *([f"nothing was read of {silent}, which are no classes"] if silent else [])]
    return found, remarks, layout.left_alone


def add_in_order(splits: dict[Split, FilesByClass], found: dict[Split, FilesByClass], order: Iterable[str]) -> None:
    """Add the images that were found in class folders to those of their split and class, in the order of all images."""
    place = {file: number for number, file in enumerate(order)}
    for split, files in found.items():
        known = splits.setdefault(split, {})
        for name, images in files.items():
            known[name] = sorted([*known.get(name, []), *images], key=place.__getitem__)


def unwrapped(folder: SourceFolder) -> SourceFolder:
    """The folder below those that hold nothing but one folder, as a tar file has them around its class folders."""
    while not folder.files and len(folder.folders) == 1:
        (inner,) = folder.folders.values()
        if inner.files or not inner.folders:  # a class
            break
        folder = inner
    return folder


def folder_of(member: str) -> str:
    """The folder of a member as names between slashes, without `.`; "": none.

    >>> folder_of("./a/b.png"), folder_of("b.png")
    ('a', '')
    """
    return "/".join(name for name in member.split("/")[:-1] if name not in ("", "."))


def top_folder(folders: Collection[str]) -> str:
    """The folder that all these are or lie in, at least one of them in it; "": there is none.

    >>> top_folder(["a/b", "a/c/d"]), top_folder(["a", "b/c"]), top_folder(["a"])
    ('a', '', '')
    """
    tops = {folder.partition("/")[0] for folder in folders}
    return tops.pop() if len(tops) == 1 and any("/" in folder for folder in folders) else ""


def merge_parts(tops: Iterable[SourceFolder], alone: Collection[str]) -> list[str]:
    """Merge folders that are named as their shards, where those are numbered parts and no classes; a remark if any are.

    Args:
        tops: the folders around those of the shards of each split.
        alone: the paths of folders that are named as their shard and hold all of it in folders.
    """
    numbered: list[tuple[SourceFolder, list[SourceFolder]]] = []
    for top in tops:
        parts = list(top.folders.values())
        alike = len({re.sub(r"\d+", "", part.name) for part in parts}) == 1
        if len(parts) > 1 and alike and all(part.path in alone for part in parts):
            numbered.append((top, parts))
    # one folder of the same name in each: the shards are classes, as in n01440764/images
    if len({name for _, parts in numbered for part in parts for name in part.folders}) < 2:
        return []
    for top, parts in numbered:
        top.folders = {}
        for part in parts:
            for folder in part.walk():
                top.enter(folder.path.removeprefix(part.path)).files += folder.files
    example = printable(numbered[0][1][0].name)
    return [f"each numbered shard is one folder of its name, such as {example!r}: the folders in it are the classes"]


def layout_by_shards(tree: SourceFolder, where: str) -> Layout:
    """The layout of the folders in shards, by split, whose names say the splits.

    Raises:
        DataError: folders in them name splits, too.
    """
    parts = {split: innermost(unwrapped(tree.folders[split]), split) for split in SPLITS if split in tree.folders}
    again = [
        folder.path
        for part in parts.values()
        for folder in part.folders.values()
        if split_of(folder.name) and folder.folders
    ]
    if again:
        raise DataError(
            f"{where}: the names of the shards say their splits, and so do the folders {name_list(again)} in them: "
            "pack each split into shards of its own, train-000.tar and test-000.tar for example"
        )
    held: dict[Split, list[SourceFolder]] = {split: [parts[split]] for split in SPLITS[1:] if split in parts}
    return Layout(train=parts.get("train", SourceFolder("train")), held=held)


def check_labelled(folders: Collection[str], where: str) -> None:
    """Check that the folders of images with labels beside them, in the shards of one split, do not divide them again.

    Raises:
        DataError: some of them name a validation or test split, and others do not.
    """
    splits = {next(filter(None, map(split_of, folder.split("/"))), None) for folder in folders}
    if len(splits) > 1 and not splits <= {"train", None}:
        named = sorted(folder for folder in folders if any(map(split_of, folder.split("/"))))
        raise DataError(
            f"{where}: the folders {name_list(named)} of images with labels beside them name splits, and the names of"
            " the shards do not: pack each split into shards of its own, train-000.tar and test-000.tar for example"
        )


def common_folder(paths: Sequence[Path]) -> tuple[str, ...]:
    """The folder that all paths share, as its parts."""
    shared = []
    for names in zip(*(path.parent.parts for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return tuple(shared)


def scan_shard(
    path: Path, left_out: LeftOut
) -> tuple[list[tuple[str, str | None, tuple[int, int]]], set[str], set[str]]:
    """(name, label, (offset, size)) of every image of a shard, with None for one without a label beside it, the folders
    with nothing in them, and those of files that are left out; only labels are read.
    """
    images: list[tuple[str, str, tuple[int, int]]] = []
    others: list[tuple[str, str, tuple[int, int]]] = []
    labels: dict[str, tuple[str, tuple[int, int]]] = {}
    folders: set[str] = set()
    full: set[str] = set()
    size, count = path.stat().st_size, 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                # tarfile would keep every member that it has seen
                tar.members = []  # pyrefly: ignore[missing-attribute]
                count += 1
                check_member(path, member, size, count)
                if fault := name_fault(f"{member.name}/-" if member.isdir() else member.name):
                    if member.isreg():
                        left_out.add(fault, f"{path.name}/{member.name}")
                    continue
                above = folder_of(member.name)
                while above not in full:
                    full.add(above)
                    above = above.rpartition("/")[0]
                if member.isdir():
                    folders.add(folder_of(f"{member.name}/-"))
                if not member.isreg():
                    continue
                key, suffix = key_and_suffix(member.name)
                place = (member.offset_data, member.size)
                if "." + suffix.rpartition(".")[2] in SUFFIXES:
                    images.append((member.name, key, place))
                elif suffix in ("cls", "json"):
                    if suffix == "cls" or key not in labels or labels[key][0] == "json":
                        labels[key] = (suffix, place)
                else:
                    others.append((member.name, key, place))
    except DataError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{printable(path)}: not a tar file that can be read in place: {error}{compression_advice(path)}"
        ) from error
    unread: set[str] = set()
    with path.open("rb") as file:
        for other in others:
            what = describe_member(file, *other)
            if what:
                left_out.add(what, f"{path.name}/{other[0]}")
                unread.add(folder_of(other[0]))
            else:
                images.append(other)
        images.sort(key=lambda image: image[2])
        found = [(name, label_of(path, file, name, labels.get(key)), place) for name, key, place in images]
        return found, folders - full, unread


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


def label_of(path: Path, file: Any, name: str, beside: tuple[str, tuple[int, int]] | None) -> str | None:
    """The label of an image from the .cls or .json with its key; None: there is none, and it lies in a folder."""
    what = f"{printable(path)}: the label of {printable(name)!r}"
    if beside is None:
        folder = name.strip("/").rpartition("/")[0].rpartition("/")[2]
        if folder in ("", "."):
            raise DataError(
                f"{what} is missing: there is no .cls or .json beside it and it lies in no folder; name the image "
                "CLASS/IMAGE in the shard, or add KEY.cls"
            )
        return None
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
