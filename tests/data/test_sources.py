"""Lists, tar shards and data sets: the same images from every source; and every hostile or broken one refused."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from skipway.data import UnreadableImage, load
from skipway.data.sources.detect import index_source
from skipway.data.sources.readers import TableStore
from skipway.data.sources.shards import expand_braces, key_and_suffix
from skipway.data.sources.splits import split_of
from skipway.data.sources.tables import read_text_table
from skipway.errors import DataError, MissingExtraError

CPU = torch.device("cpu")
LABELS = ("cat", "dog")


def picture(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def folder(root: Path, each: int = 5) -> Path:
    for number in range(2 * each):
        path = root / LABELS[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return root


def rows(each: int = 5) -> list[tuple[str, str, str]]:
    return [(f"{LABELS[n % 2]}/{n}.png", LABELS[n % 2], "val" if n < 4 else "train") for n in range(2 * each)]


def write_list(path: Path, entries, header=("image", "label", "split"), delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *entries])
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def shard(path: Path, numbers, label: Callable[[int], tuple[str, bytes]]) -> Path:
    members = []
    for n in numbers:
        suffix, content = label(n)
        members += [(f"{n:06d}.png", picture(n)), (f"{n:06d}.{suffix}", content)]
    return write_tar(path, members)


def by_class(data) -> dict[str, set[bytes]]:
    """The pixels of both parts by class name."""
    found: dict[str, set[bytes]] = {name: set() for name in data.classes}
    for part in (data.train, data.validation, data.test):
        if not len(part):
            continue
        (images,) = part.fetch([torch.arange(len(part))], CPU, None)
        for image, label in zip(images, part.labels.tolist(), strict=True):
            found[data.classes[label]].add(image.numpy().tobytes())
    return found


def as_folder(root: Path) -> Path:
    return folder(root)


def as_csv(root: Path) -> Path:
    return write_list(folder(root) / "list.csv", rows())


def as_tsv(root: Path) -> Path:
    return write_list(folder(root) / "list.tsv", [row[:2] for row in rows()], ("image", "label"), "\t")


def as_parquet(root: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images, labels, splits = zip(*rows(), strict=True)
    table = pyarrow.table({"image": images, "label": labels, "split": splits})
    parquet.write_table(table, folder(root) / "list.parquet")
    return root / "list.parquet"


def as_shards_with_classes(root: Path) -> str:
    root.mkdir()
    for part in range(2):
        shard(root / f"{part:02d}.tar", range(part * 5, part * 5 + 5), lambda n: ("cls", LABELS[n % 2].encode()))
    return str(root / "{00..01}.tar")


def as_shards_with_json(root: Path) -> Path:
    root.mkdir()
    label = lambda n: ("json", json.dumps({"label": LABELS[n % 2]}).encode())  # noqa: E731
    shard(root / "train-0.tar", range(4, 10), label)
    shard(root / "val-0.tar", range(4), label)
    return root


def as_tar_of_folders(root: Path) -> Path:
    folder(root)
    with tarfile.open(root.with_suffix(".tar"), "w") as tar:
        tar.add(root, arcname="photos")
    return root.with_suffix(".tar")


def as_data_set(root: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=list(LABELS))})
    values = {"photo": [{"bytes": picture(n), "path": None} for n in range(10)], "kind": [n % 2 for n in range(10)]}
    datasets.Dataset.from_dict(values, features=features).save_to_disk(str(root))
    return root


SOURCES = [as_folder, as_csv, as_tsv, as_parquet, as_shards_with_classes, as_shards_with_json, as_tar_of_folders]


@pytest.mark.parametrize("make", [*SOURCES, as_data_set])
def test_every_source_gives_the_same_images(tmp_path, make):
    data = load(make(tmp_path / "source"), crop="none")
    assert by_class(data) == by_class(load(folder(tmp_path / "plain"), crop="none"))
    if make in (as_csv, as_parquet, as_shards_with_json):
        assert data.splits.split_off == {"test": 0.2}
        assert len(data.validation) == 4
    else:
        assert data.splits.split_off == {"test": 0.2, "validation": 0.1}


@pytest.mark.parametrize("make", [as_shards_with_classes, as_data_set])
@pytest.mark.parametrize("helpers", ["threads", "processes"])
def test_workers_read_every_source(tmp_path, make, helpers):
    source = make(tmp_path / "source")
    alone, helped = (load(source, size=16, crop="resized", workers=n, helpers=helpers) for n in (0, 2))
    batches = [[b.inputs for b in d.train_batches(seed=0, epoch=0, batch_size=3, device=CPU)] for d in (alone, helped)]
    assert torch.equal(torch.cat(batches[0]), torch.cat(batches[1]))


def test_numbers_are_classes_in_numeric_order(tmp_path):
    entries = [(f"{LABELS[n % 2]}/{n}.png", str(9 + n % 2)) for n in range(10)]
    data = load(write_list(folder(tmp_path) / "list.csv", entries, ("file", "class")), columns=("file", "class", "-"))
    assert data.classes == ("9", "10")


def test_names_are_keyed_as_webdataset_does():
    tariterators = pytest.importorskip("webdataset.tariterators")
    for name in ("a/b/c.jpg", "c.seg.png", "x.y/z.JPG", "./1.cls", "a b.json"):
        key, suffix = tariterators.base_plus_ext(name)
        assert key_and_suffix(name) == (key, suffix.lower())


def test_patterns_mean_what_braceexpand_says():
    braceexpand = pytest.importorskip("braceexpand").braceexpand
    for pattern in ("a-{000..012}.tar", "{1..11}.tar", "{train,val}/{0..1}.tar", "plain.tar", "{3..1}"):
        assert expand_braces(pattern) == list(braceexpand(pattern))
    with pytest.raises(DataError, match="more than 100,000 shards"):
        expand_braces("{0..999}{0..999}.tar")


def test_splits_have_known_names():
    names = ("train", "Validation", "testing ", "Valid_Set", "dev", "my test")
    assert [split_of(name) for name in names] == ["train", "validation", "test", "validation", "validation", None]


def member(name: str, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


HOSTILE_MEMBERS = {
    "up": (member("../../marker.png"), "leads out of the archive"),
    "up in the middle": (member("cat/../../marker.png"), "leads out of the archive"),
    "absolute": (member("/tmp/marker.png"), "leads out of the archive"),
    "backslashes": (member("..\\marker.png"), "leads out of the archive"),
    "drive": (member("C:marker.png"), "leads out of the archive"),
    "link": (member("cat/9.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link"),
    "hard link": (member("cat/9.png", type=tarfile.LNKTYPE, linkname="../x"), "is a link"),
    "device": (member("cat/9.png", type=tarfile.CHRTYPE), "is a device"),
    "pipe": (member("cat/9.png", type=tarfile.FIFOTYPE), "is a device"),
    "cut off": (member("cat/9.png", size=2**40), "cut off|not a tar file"),
    "negative": (member("cat/9.png", size=-(2**40)), "cut off|not a tar file"),
    "long label": (member("cat/0.cls", size=2 * 1024**2), "the rule is at most"),
}


@pytest.mark.parametrize("kind", HOSTILE_MEMBERS)
def test_hostile_members_are_refused(tmp_path, kind):
    info, reason = HOSTILE_MEMBERS[kind]
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for n in range(4):
            content = picture(n)
            tar.addfile(member(f"{LABELS[n % 2]}/{n}.png", size=len(content)), io.BytesIO(content))
        if 0 < info.size < 2**30:
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        else:
            tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
            tar.offset += 512
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(DataError, match=reason):
        load(path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before, "nothing was unpacked"


BAD_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "compressed": (lambda p: tarfile.open(p, "w:gz").close(), "it is compressed"),
    "no tar": (lambda p: p.write_bytes(b"hello" * 400), "not a tar file"),
    "empty": (lambda p: tarfile.open(p, "w").close(), "no images"),
    "no label": (lambda p: write_tar(p, [("1.png", picture(1))]), "label of '1.png' is missing"),
    "label is a list": (
        lambda p: write_tar(p, [("1.png", picture(1)), ("1.json", b"[1]")]),
        r"label of '1.png' is \[1\]",
    ),
    "label is not JSON": (lambda p: write_tar(p, [("1.png", picture(1)), ("1.json", b"{")]), "cannot be read"),
    "label is deep": (lambda p: write_tar(p, [("1.png", b""), ("1.json", b"[" * 100_000)]), "cannot be read"),
    "label is not text": (lambda p: write_tar(p, [("1.png", picture(1)), ("1.cls", b"\xff\xfe")]), "cannot be read"),
    "one class": (lambda p: write_tar(p, [("a/1.png", picture(1)), ("a/2.png", picture(2))]), "only one class"),
}


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_shards_that_cannot_be_read_are_refused(tmp_path, kind):
    make, reason = BAD_SHARDS[kind]
    make(tmp_path / "x.tar")
    with pytest.raises(DataError, match=reason):
        load(tmp_path / "x.tar")


def test_a_bomb_in_a_shard_is_left_out(tmp_path):
    from tests.data.test_decode import png_of

    members = [(f"{LABELS[n % 2]}/{n}.png", picture(n)) for n in range(8)]
    data = load(write_tar(tmp_path / "x.tar", [*members, ("cat/bomb.png", png_of(50_000, 50_000))]))
    assert [reason for _, reason in data.unreadable] == [
        "50000x50000: more than 64 megapixels; max_megapixels=2500 allows it"
    ]


BAD_LISTS = {
    "up": ([("../secret.png", "cat")], "'../secret.png' leads out of"),
    "absolute": ([("/etc/hostname", "cat")], "leads out of"),
    "by a link": ([("away/1.png", "cat")], "leads out of"),
    "no label": (
        [("cat/0.png", "")],
        "lists training images of 0 classes; .*; 1 row left out, without a label: 'cat/0.png'",
    ),
    "two labels": (
        [("cat/0.png", "cat"), ("cat/0.png", "dog")],
        "row 3: 'cat/0.png' is 'dog' in train, and above 'cat'",
    ),
    "one class": ([("cat/0.png", "cat"), ("cat/2.png", "cat")], "of 1 class;"),
    "nothing": ([], "of 0 classes"),
}


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_lists_that_cannot_be_used_are_refused(tmp_path, kind):
    entries, reason = BAD_LISTS[kind]
    folder(tmp_path / "data")
    (tmp_path / "away").mkdir()
    (tmp_path / "data/away").symlink_to(tmp_path / "away", target_is_directory=True)
    with pytest.raises(DataError, match=reason):
        load(write_list(tmp_path / "data/list.csv", entries, ("image", "label")))


def test_lists_with_other_faults(tmp_path):
    folder(tmp_path)
    with pytest.raises(DataError, match=r"no column 'x', 'y'; it has 'a', 'b', 'c'. .* with columns=\('a', 'b'\)"):
        load(write_list(tmp_path / "a.csv", rows(), ("a", "b", "c")), columns=("x", "y"))
    with pytest.raises(DataError, match="split 'extra' is not known; known are train"):
        load(write_list(tmp_path / "b.csv", [(*row[:2], "extra") for row in rows()]))
    (tmp_path / "c.csv").write_text('image,label\n"cat/0.png,cat\n')
    with pytest.raises(DataError, match="not a list that can be read"):
        load(tmp_path / "c.csv")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(DataError, match=r"not a list that can be read|pip install 'skipway\[parquet\]'"):
        load(tmp_path / "d.parquet")
    listed_twice = load(
        write_list(tmp_path / "e.csv", [*rows(), rows()[5], ("cat/no\x00.png", "cat", "train")]), most_unreadable=0.1
    )
    assert "1 row left out, listed more than once: 'dog/5.png'" in listed_twice.remarks
    assert listed_twice.unreadable[0][1].startswith("embedded null")
    outside = write_list(
        tmp_path / "cat/f.csv", [(f"../{name}", label) for name, label, _ in rows()], ("image", "label")
    )
    data = load(outside, outside=True)
    assert len(data.splits.samples) == 10


@pytest.mark.parametrize("library", ["pyarrow", "datasets"])
def test_what_is_missing_has_a_line_to_type(tmp_path, monkeypatch, library):
    import sys

    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "list.parquet").touch()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_dict.json").write_text("{}")
    source = tmp_path / ("list.parquet" if library == "pyarrow" else "saved")
    extra = {"pyarrow": "parquet", "datasets": "datasets"}[library]
    with pytest.raises(MissingExtraError, match=rf"pip install 'skipway\[{extra}\]'"):
        load(source)


def test_a_data_set_that_points_elsewhere_is_not_followed(tmp_path):
    (tmp_path / "set").mkdir()
    for path in (tmp_path / "secret.png", tmp_path / "set/own.png"):
        path.write_bytes(picture(0))
    cells = [{"bytes": None, "path": str(path)} for path in (tmp_path / "secret.png", tmp_path / "set/own.png")]
    cells += [{"bytes": picture(1), "path": None}, {"bytes": None, "path": None}, 5]
    store = TableStore(tmp_path / "set", "image", {"train": [{"image": cell} for cell in cells]})
    assert (store.read("train/1"), store.read("train/2")) == (picture(0), picture(1))
    for row, reason in [(0, "leads out of the data set"), (3, "an empty cell"), (4, "holds int"), (9, "out of range")]:
        with pytest.raises(UnreadableImage, match=reason):
            store.read(f"train/{row}")


def test_a_data_set_that_is_damaged(tmp_path):
    as_data_set(tmp_path / "set")
    (tmp_path / "set/state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a data set"):
        load(tmp_path / "set")


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_out_of_a_folder_are_not_followed(tmp_path):
    folder(tmp_path / "elsewhere")
    photos = folder(tmp_path / "photos", each=6)
    (photos / "cat/secret.png").symlink_to(tmp_path / "elsewhere/cat/0.png")
    (photos / "cat/own.png").symlink_to(photos / "cat/2.png")
    (photos / "cat/loop").symlink_to(photos, target_is_directory=True)
    (photos / "emu").symlink_to(tmp_path / "elsewhere/dog", target_is_directory=True)
    data = load(photos)
    assert data.classes == LABELS
    assert len(data.splits.samples) == 13
    assert "2 files left out, a link out of the folder, which outside=True follows: 'emu', …" in data.remarks
    assert "1 file left out, a link to a folder that contains it: 'cat/loop'" in data.remarks
    followed = load(photos, outside=True)
    assert followed.classes == ("cat", "dog", "emu")
    (photos / "cat/circle.png").symlink_to(photos / "cat/circle.png")
    circled = load(photos, most_unreadable=0.2)
    assert [file for file, _ in circled.unreadable] == ["cat/circle.png"]


@pytest.mark.parametrize("name", ["test-0.tar", "val-0.tar"])
def test_shards_to_evaluate_need_no_training_split(tmp_path, name):
    shard(tmp_path / name, range(3), lambda n: ("cls", b"dog"))
    found = index_source(tmp_path, fewest=1)
    assert (found.classes, found.train) == (("dog",), {"dog": []})
    assert len(found.files) == 3
    with pytest.raises(DataError, match="no images in"):
        index_source(tmp_path)
    shard(tmp_path / "extra-0.tar", range(3), lambda n: ("cls", b"dog"))
    assert len(index_source(tmp_path, fewest=1).unused) == 1
    with pytest.raises(DataError, match="but no training shard"):
        index_source(tmp_path)


def test_a_data_set_to_evaluate_needs_no_training_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(LABELS))})
    values = {"image": [{"bytes": picture(0), "path": None}], "label": [1]}
    table = datasets.Dataset.from_dict(values, features=features)
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "set"))
    found = index_source(tmp_path / "set", fewest=1)
    assert (found.classes, found.test) == (("dog",), {"dog": ["test/0"]})
    with pytest.raises(DataError, match="no split called train; it has 'test'"):
        index_source(tmp_path / "set")


def test_rows_that_begin_like_comments_are_named(tmp_path):
    entries = [(f"cat/{n}.png", LABELS[n % 2]) for n in range(3)]
    path = write_list(tmp_path / "a.csv", [*entries, ("#1.png", "cat"), ("#2.png", "dog")], ("image", "label"))
    (said,) = read_text_table(path).remarks
    assert said == (
        "2 lines with as many cells as the rows left out as comments, since they begin with #: '#1.png,cat'; quotation "
        "marks around the first cell make such a line a row"
    )
    path.write_text('image,label\na.png,"cat, black"\n#made by hand, 2020\n#7.png,"cat, black"\n')
    (said,) = read_text_table(path).remarks
    assert said.startswith("1 line with as many cells as the rows left out as comments, since they begin with #: '#7.p")
    path.write_text('# image,label\na.png,"cat, black"\n')
    assert read_text_table(path).rows[0][1] == ["image", "label"]
    path.write_text('# made by hand\nimage,label\n"#1.png",cat\n')
    table = read_text_table(path)
    assert table.remarks == ()
    assert table.rows[-1][1] == ["#1.png", "cat"]


def tree(*places: str, each: int = 3) -> list[str]:
    return [f"{place}/{number}.png" for place in places for number in range(each)]


TREES = {
    "splits": tree("train/cat", "train/dog", "val/cat", "val/dog", "test/cat", "test/dog"),
    "splits beside a folder of another name": tree("train/cat", "train/dog", "Testing/cat", "test/cat", "extra/cat"),
    "a test folder beside class folders": tree("cat", "dog", "test/cat"),
    "a test folder without classes": tree("cat", "dog", "test"),
    "nested": tree("cat/indoor", "cat/outdoor", "dog/indoor"),
    "the same subfolders": tree("cat/indoor", "dog/indoor"),
    "trains are a class": tree("bus", "car", "train"),
    "system files": [*tree("cat", "dog"), *tree("__MACOSX/cat", ".git", each=1), "cat/.0.png", "@eaDir/0.png"],
    "names of two forms": tree("cafe\u0301", "caf\u00e9", "dog"),
}


def by_split(index, prefix: str = "") -> dict[str, dict[str, list[str]]]:
    parts = {"train": index.train, "validation": index.validation, "test": index.test}
    return {
        split: {name: sorted(file.removeprefix(prefix) for file in files) for name, files in part.items()}
        for split, part in parts.items()
        if part is not None
    }


@pytest.mark.parametrize("subfolders", ["merge", "classes"])
@pytest.mark.parametrize("kind", TREES)
def test_a_tar_of_folders_is_read_as_the_folder(tmp_path, kind, subfolders):
    for number, file in enumerate(TREES[kind]):
        path = tmp_path / "d/photos" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(tmp_path / "d/photos", arcname="photos")
    folder, packed = (index_source(tmp_path / name, subfolders=subfolders) for name in ("d", "photos.tar"))
    assert by_split(packed, "photos.tar/") == by_split(folder)
    assert (packed.classes, packed.unused, packed.remarks) == (folder.classes, folder.unused, folder.remarks)
    assert packed.inventory.left_out == folder.inventory.left_out
    assert packed.inventory.total == len(TREES[kind])
    with tarfile.open(tmp_path / "bare.tar", "w") as tar:  # tar -C photos
        tar.add(tmp_path / "d/photos", arcname=".")
    bare = index_source(tmp_path / "bare.tar", subfolders=subfolders)
    assert by_split(bare, "bare.tar/./") == by_split(index_source(tmp_path / "d/photos", subfolders=subfolders))


def test_what_is_refused_as_a_folder_is_refused_in_a_tar(tmp_path):
    def tar(name: str, *files: str) -> Path:
        images = [(file, b"notes" if file.endswith(".txt") else picture(n)) for n, file in enumerate(files)]
        return write_tar(tmp_path / name, images)

    with pytest.raises(DataError, match=r"'extra' in .*a.tar sounds like a split, not like a class"):
        index_source(tar("a.tar", *tree("cat", "dog", "extra")))
    with pytest.raises(DataError, match=r"class 'cow' in .*b.tar is not in the training split"):
        index_source(tar("b.tar", *tree("train/cat", "train/dog", "test/cow")))
    with tarfile.open(tar("c.tar", *tree("cat", "dog")), "a") as file:
        file.addfile(member("emu", type=tarfile.DIRTYPE))
    with pytest.raises(DataError, match=r"class folder 'emu' in .*c.tar holds no image; .*allow_empty=True"):
        index_source(tmp_path / "c.tar")
    assert index_source(tmp_path / "c.tar", allow_empty=True).classes == ("cat", "dog", "emu")
    wrapped = index_source(tar("d.tar", *tree("photos/dog")), fewest=1)  # one class to evaluate
    assert wrapped.classes == ("dog",)


def test_classes_and_images_of_a_tar_keep_their_order(tmp_path):
    """Stored runs depend on it: classes in numeric order, images as they are packed."""
    files = ["10/b.png", "2/a.png", "10/a.png", "2/c.png", "2/b.png"]
    found = index_source(write_tar(tmp_path / "x.tar", [(file, picture(n)) for n, file in enumerate(files)]))
    assert found.classes == ("2", "10")
    assert found.files == [f"x.tar/{file}" for file in ("2/a.png", "2/c.png", "2/b.png", "10/b.png", "10/a.png")]


def test_shards_named_by_splits_hold_class_folders(tmp_path):
    def tar(name: str, *files: str) -> None:
        write_tar(tmp_path / name, [(file, picture(number)) for number, file in enumerate(files)])

    tar("000.tar", *tree("cat", "dog"))
    tar("train-1.tar", *tree("cat/indoor", "dog"))
    tar("val-0.tar", *tree("photos/val/cat"))
    tar("test-0.tar", *tree("test/cat", "test/dog"))
    found = index_source(tmp_path)
    assert {split: {name: len(files) for name, files in part.items()} for split, part in by_split(found).items()} == {
        "train": {"cat": 6, "dog": 6},
        "validation": {"cat": 3},
        "test": {"cat": 3, "dog": 3},
    }
    assert any("subfolders are merged in 1 class, the first 'cat'" in remark for remark in found.remarks)
    tar("train-1.tar", *tree("train/cat", "train/dog", "test/cat"))
    with pytest.raises(DataError, match="the names of the shards say their splits, and so do the folders 'train/t"):
        index_source(tmp_path)


WHOLE = {
    "each names its split": (("train-000", "train-001", "val-000"), {"train": 2, "validation": 1}),
    "numbered": (("part-000", "part-001"), {"train": 2}),
    "numbered, in splits": (
        ("my-train-000", "my-train-001", "my-val-000", "my-val-001"),
        {"train": 2, "validation": 2},
    ),
    "the folders name the split": (("a/train-000", "b/train-001"), {"train": 2}),
}
"""Names of shards, each of a folder of that name, or of the one behind the slash, and shards of each split."""


@pytest.mark.parametrize("kind", WHOLE)
def test_a_folder_around_a_whole_shard_is_no_class(tmp_path, kind):
    """As `tar cf train-000.tar train-000` makes it."""
    names, splits = WHOLE[kind]
    (tmp_path / "shards").mkdir()
    for number, name in enumerate(names):
        stem, top = name.partition("/")[0], name.rpartition("/")[2]
        folder(tmp_path / str(number), each=3)
        with tarfile.open(tmp_path / "shards" / f"{stem}.tar", "w") as tar:
            tar.add(tmp_path / str(number), arcname=top)
    found = index_source(tmp_path / "shards")
    assert found.classes == LABELS
    counts = {split: [len(files) for files in part.values()] for split, part in by_split(found).items()}
    assert counts == {split: [3 * shards] * 2 for split, shards in splits.items()}
    assert not found.unused
    said = any("each numbered shard is one folder of its name" in remark for remark in found.remarks)
    assert said == kind.startswith("numbered")


@pytest.mark.parametrize(
    ("places", "classes"),
    [("cat/indoor dog/indoor dog/out", "cat dog"), ("0 1", "0 1"), ("n01/images n02/images", "n01 n02")],
)
def test_a_shard_may_be_a_class(tmp_path, places, classes):
    for name in classes.split():
        files = tree(*(place for place in places.split() if place.startswith(name)))
        write_tar(tmp_path / f"{name}.tar", [(file, picture(number)) for number, file in enumerate(files)])
    assert index_source(tmp_path).classes == tuple(classes.split())


def test_shards_by_split_may_hold_a_class_that_is_named_like_one(tmp_path):
    for name in ("train", "test"):
        files = tree("valid", "invalid")
        write_tar(tmp_path / f"{name}.tar", [(file, picture(number)) for number, file in enumerate(files)])
    found = index_source(tmp_path)
    assert found.classes == ("invalid", "valid")
    assert {name: len(files) for name, files in (found.test or {}).items()} == {"invalid": 3, "valid": 3}


def test_folders_of_other_files_in_a_tar_are_no_classes(tmp_path):
    for number, (places, other) in enumerate(
        [(("images/cat", "images/dog"), "annotations/0.xml"), (("cat", "dog"), "docs/en/readme.txt")]
    ):
        root = tmp_path / str(number)
        for file in tree(*places):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(picture(len(file)))
        (root / other).parent.mkdir(parents=True)
        (root / other).write_text("<notes/>")
        with tarfile.open(root.with_suffix(".tar"), "w") as tar:
            tar.add(root, arcname=".")
        found = index_source(root.with_suffix(".tar"))
        assert found.classes == LABELS
        assert found.inventory.total == 7
        named = f"'{number}.tar/{Path(other).parent.as_posix()}'"
        assert found.remarks[-1] == f"nothing was read of {named}, which are no classes"


def test_held_parts_alone_are_evaluated(tmp_path):
    files = tree("val/cat", "test/cat", "test/dog")
    for number, file in enumerate(files):
        (tmp_path / "held" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "held" / file).write_bytes(picture(number))
    write_tar(tmp_path / "held.tar", [(file, picture(number)) for number, file in enumerate(files)])
    for name in ("held", "held.tar"):
        found = index_source(tmp_path / name, fewest=1)
        assert (found.classes, found.train) == (LABELS, {"cat": [], "dog": []})
        assert {label: len(images) for label, images in (found.test or {}).items()} == {"cat": 3, "dog": 3}
        with pytest.raises(DataError, match="but no training folder"):
            index_source(tmp_path / name)


def test_labels_beside_images_do_not_hide_folders_of_splits(tmp_path):
    """`train/0.png` and `test/1.png`, each with a .cls, in one shard: test images are not trained on unnoticed."""

    def tar(name: str, *folders: str) -> Path:
        members = []
        for number, (folder, label) in enumerate((f, label) for f in folders for label in LABELS):
            members += [(f"{folder}/{number}.png", picture(number)), (f"{folder}/{number}.cls", label.encode())]
        return write_tar(tmp_path / name, members)

    with pytest.raises(DataError, match="the folders 'test', 'train' of images with labels beside them name splits"):
        index_source(tar("a.tar", "train", "test"))
    with pytest.raises(DataError, match="the folders 'x/val' of images"):
        index_source(tar("b.tar", "x/y", "x/val"))
    for folders in (("home/dev/a", "home/dev/b"), ("train", "bus")):
        assert index_source(tar("c.tar", *folders)).classes == LABELS


@pytest.mark.parametrize("metadata", [{"width": 10}, {"label": "a name"}])
@pytest.mark.parametrize("order", [("cls", "json"), ("json", "cls")])
def test_of_two_labels_the_class_file_counts(tmp_path, metadata, order):
    contents = {"json": json.dumps(metadata).encode()}
    members = []
    for number in range(4):
        contents["cls"] = str(number % 2).encode()
        members += [(f"{number}.png", picture(number)), *((f"{number}.{end}", contents[end]) for end in order)]
    assert index_source(write_tar(tmp_path / "x.tar", members)).classes == ("0", "1")


def test_two_names_of_columns_leave_the_splits_to_the_content(tmp_path):
    entries = [(image, label, "pug", split) for image, label, split in rows()]
    path = write_list(folder(tmp_path) / "l.csv", entries, ("photo", "kind", "breed", "split"))
    held = {file for file, _, split in rows() if split == "val"}
    for columns in (("photo", "kind"), ["photo", "kind"], ("photo", "kind", "split")):
        index = index_source(path, columns=columns)
        assert {file for files in (index.validation or {}).values() for file in files} == held, columns
        assert index.remarks == (
            "the list gives images from column 'photo', labels from 'kind', splits from 'split'; not used: 'breed'",
        )
    whole = index_source(path, columns=("photo", "kind", "-"))
    assert whole.validation is None
    (said,) = whole.remarks
    assert said == "the list gives images from column 'photo', labels from 'kind'; not used: 'breed', 'split'"
    assert len(load(path, columns=["photo", "kind"]).validation) == 4
    marked = [(image, label, int(split == "val")) for image, label, split in rows()]
    path = write_list(tmp_path / "m.csv", marked, ("photo", "kind", "is_valid"))
    assert index_source(path, columns=("photo", "kind", "split")).validation is not None
    path = write_list(tmp_path / "n.csv", [(*row[:2], "extra") for row in rows()], ("photo", "kind", "set"))
    assert index_source(path, columns=("photo", "kind")).validation is None, "no names of splits"
    path = write_list(tmp_path / "o.csv", [(*row[:2], ("train", "extra")[row[2] == "val"]) for row in rows()])
    with pytest.raises(DataError, match=r"split 'extra' is not known; .*; columns=\('image', 'label', '-'\) does not"):
        index_source(path)


def test_marks_of_validation_and_test_images_are_read_together(tmp_path):
    def marked(name: str, header: tuple[str, ...], *marks: tuple[object, ...]) -> Path:
        entries = [(*row[:2], *marks[number % len(marks)]) for number, row in enumerate(rows(6))]
        return write_list(tmp_path / name, entries, ("photo", "kind", *header))

    folder(tmp_path, each=6)
    both = ("is_test", "is_valid")
    found = index_source(marked("a.csv", both, (0, 0), (0, 0), (1, 0), (1, 0), (0, 1), (0, 1)))
    assert {split: sum(map(len, part.values())) for split, part in by_split(found).items()} == dict.fromkeys(
        ("train", "validation", "test"), 4
    )
    assert "splits from 'is_valid', 'is_test'" in found.remarks[0]
    with pytest.raises(DataError, match="is 'validation and test' by 'is_valid', 'is_test': the rule is 0 or 1"):
        index_source(marked("b.csv", both, (0, 0), (0, 0), (1, 1)))
    sparse = index_source(marked("c.csv", both, ("", 0), ("", 0), (1, 0), ("", 1)))
    assert {split: sum(map(len, part.values())) for split, part in by_split(sparse).items()} == {
        "train": 6,
        "validation": 3,
        "test": 3,
    }
    assert not sparse.left_out
    empty = index_source(marked("e.csv", both, (0, 0), (0, ""), ("", "")))
    assert dict(empty.left_out.counts) == {"with an empty 'is_valid', 'is_test'": 4}
    path = marked("d.csv", ("is_test", "split"), (1, "train"), (0, "train"), (0, "val"), (0, "val"))
    named = index_source(path, columns=("photo", "kind"))
    assert "the column 'is_test' holds splits, too, and is not used: 'split' is" in named.remarks


def test_columns_of_a_data_set_are_not_guessed_where_they_are_named(tmp_path):
    source = as_data_set(tmp_path / "set")
    assert index_source(source).remarks == ("the data set gives images from column 'photo', labels from 'kind'",)
    assert index_source(source, columns=("Photo", "kind", "-")).classes == LABELS
    for columns in (("photo", "knd"), ("image", "kind"), ("photo", "knd", "split")):
        with pytest.raises(DataError, match=r"has no column '(knd|image)'; it has 'photo', 'kind'"):
            index_source(source, columns=columns)
    with pytest.raises(DataError, match="the rule is two or three names"):
        index_source(source, columns=("photo",), fewest=1)
    remarks = index_source(source, columns=("photo", "kind", "fold")).remarks
    assert "the column 'fold' is not used: the splits are those of the data set" in remarks


@pytest.mark.parametrize("make", [as_csv, as_data_set, as_shards_with_json])
def test_choices_about_class_folders_are_not_ignored_in_silence(tmp_path, make):
    source = make(tmp_path / "source")
    said = index_source(source, allow_empty=True, subfolders="classes").remarks
    for choice in ("allow_empty=True", "subfolders='classes'"):
        assert any(f"{choice} has no effect: " in remark and "has no class folders" in remark for remark in said)
    idle = {"allow_empty": True, "subfolders": "classes", "fewest": 1}
    assert index_source(source, **idle).remarks == index_source(source).remarks


def test_links_are_not_followed_in_a_tar(tmp_path):
    (remark,) = index_source(as_tar_of_folders(tmp_path / "source"), outside=True).remarks[1:]
    assert remark == "outside=True has no effect: source is read from tar files, in which links are refused"
