"""Class folders: `train/<class>/*`, with `val/<class>/*` and `test/<class>/*` where they exist, or `<class>/*`.

`skipway.data.sources.splits` has the names of the splits. Of several folders that name the same split, the first that
holds class folders is taken. A folder whose name is not among them, beside `train`, is named and left alone; so are
validation and test folders whose images are not sorted into classes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from skipway.data.sources.index import (
    OUTSIDE_CLASSES,
    FilesByClass,
    SourceIndex,
    check_classes,
    check_known_classes,
    class_name,
    files_of_classes,
    name_list,
)
from skipway.data.sources.readers import FileStore
from skipway.data.sources.scan import LeftOut, SourceFolder, scan_folder
from skipway.data.sources.splits import SPLIT_NAMES, SPLITS, Split, looks_like_split, split_of
from skipway.errors import DataError, counted, printable

__all__ = ["UNSORTED", "Layout", "Subfolders", "index_folders", "innermost", "layout_of", "read_layout"]

Subfolders = Literal["merge", "classes"]

# folders whose name says that their images have no class, and those that stand for all of a validation or test split
UNSORTED = frozenset({"unlabeled", "unlabelled", "unclassified", "unsorted", "uncategorized", "uncategorised"})
PLACEHOLDERS = UNSORTED | {"unknown", "images", "image", "imgs", "img", "all"}


@dataclass(kw_only=True)
class Layout:
    """Which folders of a source hold which split.

    Args:
        train: the folder of the training split; the source itself where it has no training folder.
        held: the folders that name each other split, by preference.
        unused: path of each folder that is left alone → the reason.
        splits: names of the folders in `train` that are splits and therefore no classes.
    """

    train: SourceFolder
    held: dict[Split, list[SourceFolder]] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    splits: frozenset[str] = frozenset()

    @property
    def left_alone(self) -> tuple[str, ...]:
        """Each folder that is left alone, with the reason."""
        return tuple(f"{printable(path)!r}: {reason}" for path, reason in self.unused.items())


def layout_of(top: SourceFolder, where: str, fewest: int = 2) -> Layout:
    """The layout of a folder of images, by the names of its subfolders.

    A folder `train` that holds images but no folders is a class beside other classes: trains are vehicles.

    Args:
        top: the folder.
        where: its name, for messages.
        fewest: see `index_folders`.

    Raises:
        DataError: there are split folders but no training images, where more than one class is needed, or class
            folders beside one whose name sounds like a split that is not known.
    """
    by_split: dict[Split | None, list[SourceFolder]] = {}
    for folder in top.folders.values():
        by_split.setdefault(split_of(folder.name), []).append(folder)
    for split in SPLITS:
        by_split.get(split, []).sort(key=lambda folder: rank_of(split, folder.name))
    others = by_split.get(None, [])
    train = [folder for folder in by_split.get("train", []) if not others or folder.folders]
    layout = Layout(train=top, held={split: by_split.get(split, []) for split in SPLITS[1:]})
    for folder in train[1:]:
        layout.unused[folder.path] = f"{printable(train[0].name)!r} is the train split"
    if train:
        layout.train = innermost(train[0], "train")
        layout.unused.update({folder.path: "its name is none of train, val, test" for folder in others})
        return layout
    unclear = [folder.name for folder in others if looks_like_split(folder.name)]
    if unclear:
        raise DataError(
            f"{name_list(unclear)} in {where} sounds like a split, not like a class: name it train, val or test, or, "
            "if it is a class, move all class folders into a folder named train"
        )
    turned = [folder.name for folder in others if {"train", "test"} <= set(map(split_of, folder.folders))]
    if turned and len(turned) == sum(bool(folder.below()) for folder in others):
        raise DataError(
            f"the folders {name_list(turned)} in {where} each hold a train and a test folder: put the splits outside, "
            "train/<class>/<image>, or name those folders otherwise if they are one class"
        )
    layout.splits = frozenset(folder.name for folders in layout.held.values() for folder in folders)
    if fewest > 1 and layout.splits and len(top.folders) == len(layout.splits):
        raise DataError(
            f"{where} has {name_list(sorted(layout.splits))} but no training folder: add one named train, "
            "or give one of them"
        )
    return layout


def rank_of(split: Split, name: str) -> tuple[int, str]:
    """The order in which folders that name the same split are preferred: by the vocabulary, then by name."""
    known = SPLIT_NAMES[split]
    return known.index(name.lower()) if name.lower() in known else len(known), name


def innermost(folder: SourceFolder, split: Split | None = None) -> SourceFolder:
    """The folder itself, or, where folders that hold nothing but one folder lead to it, the last that has the name of
    the same split, as archives unpack to `train/train`, or that holds several folders.
    """
    here = folder
    while not here.files and len(here.folders) == 1:
        (here,) = here.folders.values()
        named = split is not None and split_of(here.name) == split
        if named or (len(here.folders) > 1 and not here.files):
            folder = here
    return folder


def classes_in(folder: SourceFolder, skip: Collection[str], subfolders: Subfolders) -> FilesByClass:
    """The images of each class in the folder of a split, but for the subfolders in `skip`."""
    found: FilesByClass = {}
    start = f"{folder.path}/" if folder.path else ""
    for child in folder.folders.values():
        if child.name in skip:
            continue
        nested = [each for each in child.walk() if each.files] if subfolders == "classes" else []
        for each in sorted(nested, key=lambda each: each.path) or [child]:
            files = each.files if nested else child.below()
            found.setdefault(class_name(each.path.removeprefix(start)), []).extend(files)
    return {name: sorted(files) for name, files in found.items()}


def index_folders(
    root: Path,
    *,
    allow_empty: bool = False,
    outside: bool = False,
    subfolders: Subfolders = "merge",
    fewest: int = 2,
) -> SourceIndex:
    """Index the images of class folders.

    Args:
        root: the folder.
        allow_empty: keep a class whose folder holds no image.
        outside: follow links out of the root.
        subfolders: "merge": subfolders of a class folder belong to the class; "classes": each folder that directly
            holds images is a class, named by its path.
        fewest: number of classes with images that are needed; 1 for images that are not trained on, in any split.

    Raises:
        DataError: the folder is empty, has fewer classes, an empty class, or a class in its validation or
            test split that the training split lacks; or a name is neither clearly a split nor clearly a class.
        OSError: the folder cannot be opened.
    """
    top, left_out = scan_folder(root, outside=outside)
    start = innermost(top)
    layout = layout_of(start, printable(root), fewest)
    splits, remarks = read_layout(top, start, layout, subfolders, left_out)
    where = printable(root / layout.train.path)
    files = files_of_classes(splits, fewest)
    classes = check_classes(files, where, allow_empty=allow_empty, left_out=left_out, fewest=fewest)
    for split, folders in layout.held.items():
        if split in splits:
            check_known_classes(splits[split], classes, printable(root / folders[0].path), split)
    return SourceIndex(
        store=FileStore(root),
        name=root.resolve().name,
        classes=classes,
        train={name: splits["train"].get(name, []) for name in classes},
        validation=splits.get("validation"),
        test=splits.get("test"),
        left_out=left_out,
        unused=layout.left_alone,
        remarks=tuple(remarks),
    )


def read_layout(
    top: SourceFolder, start: SourceFolder, layout: Layout, subfolders: Subfolders, left_out: LeftOut
) -> tuple[dict[Split, FilesByClass], list[str]]:
    """The images of each split by class, and remarks about where they were found.

    Args:
        top: all folders of the source.
        start: the folder in it that the layout is of.
        layout: completed by the folders that are left alone.
        subfolders: see `index_folders`.
        left_out: completed by the images that are in no class of no split.
    """
    splits: dict[Split, FilesByClass] = {"train": classes_in(layout.train, layout.splits, subfolders)}
    remarks = []
    for split, folders in layout.held.items():
        files, remark = choose_held(split, folders, layout, splits["train"], subfolders)
        remarks += [remark] if remark else []
        if files is not None:
            splits[split] = files
    count_unread(top, splits.values(), layout.unused, left_out)
    if start is not top:
        remarks.append(f"the class folders are taken from {printable(start.path)!r}, the only folder in the source")
    return splits, remarks + folder_remarks(layout, subfolders)


def choose_held(
    split: Split, folders: list[SourceFolder], layout: Layout, train: FilesByClass, subfolders: Subfolders
) -> tuple[FilesByClass | None, str]:
    """The images of a validation or test split by class, from the first of its folders that has class folders, and a
    remark; None: it has none. The chosen folder comes first in `folders`, the others are added to `layout.unused`.
    """
    if not folders:
        return None, ""
    sorted_out = [(unlabelled_images(innermost(folder, split), train, subfolders), folder) for folder in folders]
    # those with class folders, then those with other images, then empty ones
    sorted_out.sort(key=lambda pair: (pair[0] > 0) + 2 * (not any(each.files for each in pair[1].walk())))
    folders[:] = [folder for _, folder in sorted_out]
    for unlabelled, folder in sorted_out[1:]:
        taken = f"{printable(folders[0].name)!r} is the {split} split"
        layout.unused[folder.path] = (
            f"its {counted(unlabelled, 'image')} are not in class folders" if unlabelled else taken
        )
    unlabelled, chosen = sorted_out[0]
    if not unlabelled:
        return classes_in(innermost(chosen, split), (), subfolders), ""
    return None, (
        f"{printable(chosen.name)!r} holds {counted(unlabelled, 'image')} that are not in class folders: it is left "
        f"alone, and {split} images are split off the training split"
    )


def unlabelled_images(folder: SourceFolder, classes: Collection[str], subfolders: Subfolders) -> int:
    """The number of images in the folder of a split if none of them is in a class folder; else 0."""
    full = {name for name, files in classes_in(folder, (), subfolders).items() if files}
    labelled = {name for name in full if name in classes or name.lower() not in PLACEHOLDERS}
    return 0 if labelled else len(folder.below())


def count_unread(top: SourceFolder, parts: Iterable[FilesByClass], unused: Collection[str], left_out: LeftOut) -> None:
    """Add every image that is in no class of no split to the files that are left out."""
    read = {file for part in parts for files in part.values() for file in files}
    for image, place in sorted((image, folder.path) for folder in top.walk() for image in folder.files):
        if image not in read:
            in_unused = any(f"{place}/".startswith(f"{path}/") for path in unused)
            left_out.add("in a folder that is not used" if in_unused else OUTSIDE_CLASSES, image)


def folder_remarks(layout: Layout, subfolders: Subfolders) -> list[str]:
    """Remarks about folders that are merged into one class."""
    classes = {name: folder for name, folder in layout.train.folders.items() if name not in layout.splits}
    remarks = merge_remarks(classes) if subfolders == "merge" else []
    twice = {class_name(name) for name in classes if class_name(name) != name} & classes.keys()
    if twice:
        remarks.append(f"folders whose names are equal but for their Unicode form are one class: {name_list(twice)}")
    return remarks


def merge_remarks(classes: dict[str, SourceFolder]) -> list[str]:
    """Remarks about classes whose images are in several folders, with counts."""
    merged: dict[str, dict[str, int]] = {}
    for name, folder in classes.items():
        counts = {each.path.removeprefix(folder.path): len(each.files) for each in folder.walk() if each.files}
        if len(counts) > 1:
            merged[name] = dict(sorted(counts.items()))
    if not merged:
        return []
    name, counts = next(iter(merged.items()))
    shown = ", ".join(f"{printable(name + inner)!r} {count:,}" for inner, count in list(counts.items())[:4])
    rest = f" and {len(counts) - 4} more" if len(counts) > 4 else ""
    remarks = [
        f"subfolders are merged in {counted(len(merged), 'class', 'classes')}, the first {printable(name)!r}: "
        f"{shown}{rest}; subfolders='classes' makes each of them a class"
    ]
    if len(merged) == len(classes) > 1 and len({tuple(counts) for counts in merged.values()}) == 1:
        remarks.append(
            "every class has the same subfolders: if they are the classes, as in fold1/<class>/<image>, move the "
            "images to <class>/<image>"
        )
    return remarks
