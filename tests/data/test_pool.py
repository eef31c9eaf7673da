"""Workers of any kind and number give the same; workers that die cost nothing; what is kept is never wrong."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.test_load import damage, pictures, tree_hash

from skipway.data import Data, UnreadableImage, load
from skipway.data.cache.store import PixelFile, cache_folder, is_held, let_go, load_image_infos
from skipway.data.image_dataset import FileDataset, MemoryDataset
from skipway.data.pool import WorkerPool

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SKIPWAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Counting:
    """Fills a row with its index; one worker process dies, hangs or not, at an index, as often as `times` says."""

    def __init__(self, fault: str = "", at: int = 30, times: int = 99, notes: Path | None = None) -> None:
        self.fault = fault
        self.at = at
        self.times = times
        self.notes = notes
        self.main = os.getpid()
        self.shape: tuple[int, ...] | None = (2, 2, 1)

    def __call__(self, index: int, row: np.ndarray | None) -> int:
        helping = os.getpid() != self.main and self.notes is not None
        if index == self.at and helping and len(list(self.notes.iterdir())) < self.times:
            (self.notes / str(os.getpid())).touch()
            self.fail()
        if row is not None:
            row[:] = index
        return index * 2

    def fail(self) -> None:
        faulthandler.disable()
        if self.fault == "hang":
            time.sleep(60)
        elif self.fault == "exit":
            os._exit(1)
        else:
            os.kill(os.getpid(), getattr(signal, self.fault))


BATCHES = [list(range(start, start + 13)) for start in range(0, 91, 13)]


def results(pool: WorkerPool, work: Counting) -> list[tuple[list[int], list[int]]]:
    return [(images[:, 0, 0, 0].tolist(), given) for images, given in pool.batches(work, BATCHES)]


EXPECTED = [(batch, [2 * index for index in batch]) for batch in BATCHES]


@pytest.mark.parametrize("helpers", ["threads", "processes"])
@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_any_number_of_workers_gives_the_same(helpers, workers):
    assert results(WorkerPool(workers, helpers), Counting()) == EXPECTED


@pytest.mark.parametrize(("quick", "threads"), [(float("inf"), 1), (0.0, 3)])
def test_quick_images_are_left_to_one_thread(monkeypatch, quick, threads):
    """Several would wait for each other: little of their work is outside Python."""
    monkeypatch.setattr("skipway.data.pool.QUICK_SECONDS", quick)
    started = []

    def executor(workers: int, **options: str) -> ThreadPoolExecutor:
        started.append(workers)
        return ThreadPoolExecutor(workers, **options)

    monkeypatch.setattr("skipway.data.pool.ThreadPoolExecutor", executor)
    assert results(WorkerPool(3), Counting()) == EXPECTED
    assert started == [threads]


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSEGV", "SIGABRT", "exit", "hang"])
@pytest.mark.parametrize("times", [1, 99])
def test_workers_that_die_cost_nothing(tmp_path, fault, times):
    notes = tmp_path / "notes"
    notes.mkdir()
    said: list[str] = []
    pool = WorkerPool(2, "processes", said.append, stall=1.0)
    assert results(pool, Counting(fault, times=times, notes=notes)) == EXPECTED
    assert len(said) == (1 if times == 1 else 3)
    what = "gave no result for 1 s" if fault == "hang" else "died"
    assert said[0].startswith(f"a worker process {what} at batch ")
    assert ("goes on without workers" in said[-1]) == (times == 99)


@pytest.mark.parametrize("helpers", ["threads", "processes"])
def test_workers_end_when_batches_are_no_longer_wanted(helpers):
    import threading

    batches: Iterator = WorkerPool(2, helpers).batches(Counting(), BATCHES)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("skipway-decode")]


def epoch(data: Data, **options) -> torch.Tensor:
    return torch.cat([b.inputs for b in data.train_batches(seed=1, epoch=2, batch_size=4, device=CPU, **options)])


def test_an_epoch_survives_a_killed_worker(tmp_path):
    photos = pictures(tmp_path / "photos", shape=(20, 20, 3), each=20)
    said: list[str] = []
    data = load(photos, size=24, crop="resized", workers=2, helpers="processes", remark=said.append)
    whole = epoch(data)
    batches, seen = data.train_batches(seed=1, epoch=2, batch_size=4, device=CPU), []
    for number, batch in enumerate(batches):
        seen.append(batch.inputs)
        if number == 1:
            children = Path(f"/proc/self/task/{os.getpid()}/children")
            if not children.exists():
                pytest.skip("this system does not tell a process its children")
            os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
            time.sleep(0.2)
    assert torch.equal(torch.cat(seen), whole)


@pytest.mark.parametrize("crop", ["none", "resized"])
def test_what_is_kept_gives_the_same_data(tmp_path, own_cache, crop):
    photos = pictures(tmp_path / "photos", shape=(20, 30, 3))
    damage(photos, "class0/2.png")
    options = {"size": 16, "crop": crop, "most_unreadable": 0.2}
    before = tree_hash(photos)
    fresh = load(photos, cache=False, **options)
    assert not own_cache.exists()
    assert not any(str(own_cache) in remark for remark in fresh.remarks)
    first, second = (load(photos, cache=True, **options) for _ in range(2))
    (said,) = (remark for remark in first.remarks if str(own_cache) in remark)
    assert said.endswith("cache=False keeps nothing, and SKIPWAY_CACHE names another folder")
    assert {path.name.split("-")[0] for path in own_cache.iterdir()} == {"index", "pixels"}
    for data in (first, second):
        assert data.unreadable == fresh.unreadable
        assert data.train.names == fresh.train.names
        assert data.mean == fresh.mean
        assert type(data.train) is (FileDataset if crop == "resized" else MemoryDataset)
    assert torch.equal(epoch(first), epoch(second))
    # parts are cut out of images that were made smaller before
    tolerance = 0.0 if crop == "none" else 1.0
    assert (epoch(fresh) - epoch(second)).abs().mean() <= tolerance
    assert tree_hash(photos) == before


def test_the_second_start_opens_no_image(tmp_path, monkeypatch):
    photos = pictures(tmp_path / "photos", each=50)
    load(photos, cache=True)
    monkeypatch.setattr("skipway.data.inspection.decode", None)
    assert len(load(photos, cache=True).splits.samples) == 100


def test_a_change_is_noticed(tmp_path):
    photos = pictures(tmp_path / "photos", each=5)
    load(photos, cache=True)
    pixels = (photos / "class0/0.png").read_bytes()
    damage(photos, "class1/1.png")
    (photos / "class0/9.png").write_bytes(pixels)
    changed = load(photos, cache=True, most_unreadable=0.2)
    assert changed.unreadable == (("class1/1.png", "not an image but HTML"),)
    assert changed.duplicates == (("class0/0.png", "class0/9.png"),)
    assert torch.equal(epoch(changed), epoch(load(photos, cache=False, most_unreadable=0.2)))


def test_a_damaged_cache_is_made_anew(tmp_path, own_cache):
    photos = pictures(tmp_path / "photos", each=5)
    expected = epoch(load(photos, cache=True))
    random = np.random.default_rng(0)
    files = list(own_cache.iterdir())
    assert files
    for path in files:
        whole = path.read_bytes()
        front = min(len(whole), 300)
        faults = [whole[:50], b"", whole[:-1], b"[]", b'{"format":1,"files":{"a":1}}']
        for place in random.integers(0, front, 12):
            faults.append(whole[:place] + bytes([whole[place] ^ 1 << int(random.integers(8))]) + whole[place + 1 :])
        for fault in faults:
            path.write_bytes(fault)
            assert torch.equal(epoch(load(photos, cache=True)), expected)


def test_a_full_disk_or_a_closed_folder_is_no_obstacle(tmp_path, own_cache, monkeypatch):
    import collections

    photos = pictures(tmp_path / "photos", each=5)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("skipway.data.cache.store.shutil.disk_usage", lambda path: usage(10**9, 10**9, 1000))
    data = load(photos, cache=True)
    assert any("GB free: they are decoded in every epoch" in remark for remark in data.remarks)
    monkeypatch.undo()
    (tmp_path / "taken").write_text("a file")
    data = load(photos, cache=tmp_path / "taken" / "x")
    assert any(remark.startswith("nothing is cached in") for remark in data.remarks)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_where_things_are_kept(monkeypatch, tmp_path):
    assert cache_folder(None) == tmp_path / "cache"
    monkeypatch.delenv("SKIPWAY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder(True) == tmp_path / "xdg" / "skipway"


def test_a_few_files_leave_nothing_behind(tmp_path, own_cache):
    load(pictures(tmp_path / "photos"))
    assert not own_cache.exists()


def test_pixels_of_another_source_are_not_taken(tmp_path):
    file = PixelFile(tmp_path / "pixels.bin", "one")
    assert (
        file.write(np.array([[2, 3], [1, 1]]), 1, [np.ones((2, 3, 1), np.uint8), np.zeros((1, 1, 1), np.uint8)]) == ""
    )
    opened = file.open(2, 1)
    assert opened is not None
    (start, height, width), content = opened[0][0], opened[1]
    assert content[start : start + height * width].tolist() == [1] * 6
    for other in (PixelFile(tmp_path / "pixels.bin", "two"), PixelFile(tmp_path / "none.bin", "one")):
        assert other.open(2, 1) is None
    assert file.open(3, 1) is None
    assert file.open(2, 3) is None
    assert load_image_infos(tmp_path, load(pictures(tmp_path / "p")).splits.images, ["class0/0.png"], []) == {}


def test_duplicates_stay_on_one_side(tmp_path):
    photos = pictures(tmp_path / "photos", each=20)
    for n in range(6):
        content = (photos / f"class0/{n}.png").read_bytes()
        for copy in range(2):
            (photos / f"class0/copy{n}_{copy}.png").write_bytes(content)
    (photos / "class1/foreign.png").write_bytes((photos / "class0/0.png").read_bytes())
    for seed in range(4):
        data = load(photos, seed=seed)
        assert data.leaked == ()
        assert len(data.duplicates) == 6
        sides = {name: side for side, files in data.listed.items() for name in files}
        assert all(len({sides[file] for file in group}) == 1 for group in data.duplicates)
        assert 6 <= len(data.test) <= 13
    assert "13 duplicates, kept: " in " ".join(data.remarks)
    assert "1 image occurs in more than one class, the first: 'class0/0.png' as 'class0'" in " ".join(data.remarks)
    assert load(photos, duplicates=False).duplicates == ()


def test_a_leak_between_parts_is_named(tmp_path):
    pictures(tmp_path / "train", seed=1)
    pictures(tmp_path / "test", seed=2)
    (tmp_path / "test/class0/0.png").write_bytes((tmp_path / "train/class0/5.png").read_bytes())
    data = load(tmp_path)
    assert data.leaked == (("train/class0/5.png", "test/class0/0.png"),)
    assert any(remark.startswith("1 test image is also trained on") for remark in data.remarks)
    pictures(tmp_path / "val", seed=3)
    for copy in ("val/class0/1.png", "val/class0/2.png", "test/class1/3.png"):
        (tmp_path / copy).write_bytes((tmp_path / "train/class1/4.png").read_bytes())
    (tmp_path / "test/class0/4.png").write_bytes((tmp_path / "val/class0/5.png").read_bytes())
    data = load(tmp_path)
    assert set(data.leaked) == {
        ("train/class1/4.png", "val/class0/1.png"),
        ("train/class1/4.png", "val/class0/2.png"),
        ("train/class0/5.png", "test/class0/0.png"),
        ("train/class1/4.png", "test/class1/3.png"),
        ("val/class0/5.png", "test/class0/4.png"),
    }
    said = " ".join(data.remarks)
    assert "2 validation images are also trained on, so the validation accuracy is too optimistic; the first: " in said
    assert "3 test images are in other splits as well, so the accuracy is too optimistic; the first: " in said


def test_pixels_in_use_outlive_a_change_of_their_source(tmp_path, own_cache):
    """A second run after an image was added decodes anew; the first one goes on, and its pixels go with it."""

    def files() -> int:
        return len(list(own_cache.glob("pixels-*.bin")))

    photos = pictures(tmp_path / "photos", shape=(20, 30, 3))
    first = load(photos, cache=True, size=16, crop="resized")
    before = epoch(first)
    (photos / "class0/9.png").write_bytes((photos / "class1/0.png").read_bytes())
    second = load(photos, cache=True, size=16, crop="resized")
    assert len(second.splits.samples) == len(first.splits.samples) + 1
    assert torch.equal(epoch(first), before)
    assert files() == 2
    del first
    gc.collect()
    assert len(list(own_cache.glob("*.lock"))) == 1
    (photos / "class0/9.png").unlink()
    del second
    gc.collect()
    written = {path: path.stat().st_mtime_ns for path in own_cache.glob("pixels-*.bin")}
    third = load(photos, cache=True, size=16, crop="resized")
    assert torch.equal(epoch(third), before)
    (kept,) = own_cache.glob("pixels-*.bin")
    assert kept.stat().st_mtime_ns == written[kept], "not decoded again"
    dead = kept.with_name(f"{kept.stem[:-1]}x.bin")
    dead.touch()
    dead.with_suffix(".0.lock").touch()  # of a process that was killed
    (photos / "class0/8.png").write_bytes((photos / "class1/1.png").read_bytes())
    load(photos, cache=True, size=16, crop="resized")
    assert files() == 2, "that of the third run and the newest"
    assert not dead.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_fork_leaves_the_lock_of_its_parent(tmp_path):
    pixels = PixelFile(tmp_path / "pixels-a.bin", "a")
    pixels.hold()
    let_go(pixels.lock, os.getpid() + 1)
    assert is_held(pixels.path)
    let_go(pixels.lock, os.getpid())
    assert not is_held(pixels.path)


def test_a_lost_cache_is_named_and_not_an_image(tmp_path, own_cache):
    data = load(pictures(tmp_path / "photos", shape=(20, 30, 3)), cache=True, size=16, crop="resized")
    for path in own_cache.glob("pixels-*.bin"):
        path.unlink()
    with pytest.raises(UnreadableImage, match=r"pixels-.*\.bin: the decoded images in the cache are missing"):
        epoch(data)
