"""The table of features in the cache: whatever happens to its files, its rows are right or computed again."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest

from skipway.data.cache.features import FeatureTable

ROWS = np.arange(60, dtype=np.float32).reshape(20, 3)


@pytest.fixture
def notes():
    return []


@pytest.fixture
def opened(tmp_path, notes):
    def make(key="a", count=20, folder=tmp_path):
        return FeatureTable(folder, "x", key, count, 3, notes.append)

    return make


def fill(table) -> int:
    """Append what is missing, four rows at a time; the number of rows that were there."""
    there = table.done
    for start in range(there, 20, 4):
        table.append(ROWS[start : start + 4])
    assert np.array_equal(table.read(), ROWS)
    return there


def truncate(path):
    os.truncate(path, 100)  # two parts of 48 bytes and a piece


def zero(path):
    with open(path, "r+b") as file:
        file.seek(120)
        file.write(bytes(24))


def forge(path):
    path.with_suffix(".jsonl").write_text(json.dumps({"rows": -5, "sha256": ""}))


def tear(path):
    sums = path.with_suffix(".jsonl")
    sums.write_text(sums.read_text()[:-30])


def lengthen(path):
    with open(path, "ab") as file:
        file.write(b"part of a row that was being written")
    sums = path.with_suffix(".jsonl")
    sums.write_text("".join(line + "\n" for line in sums.read_text().splitlines()[:3]))


@pytest.mark.parametrize(
    ("fault", "there", "said"),
    [
        (lambda path: None, 20, 0),
        (truncate, 8, 1),
        (zero, 8, 1),
        (forge, 0, 1),
        (tear, 16, 1),
        (lengthen, 12, 0),
        (lambda path: path.with_suffix(".jsonl").unlink(), 0, 0),
        (lambda path: path.unlink(), 0, 1),
        (lambda path: path.with_suffix(".jsonl").write_bytes(b"\xff\x00"), 0, 0),
        (lambda path: path.with_suffix(".jsonl").write_text("[" * 100_000), 0, 1),
    ],
    ids=["none", "truncated", "zeroed", "forged", "torn", "killed", "no-sums", "no-rows", "binary", "deep"],
)
def test_only_rows_that_fit_their_checksums_are_taken(opened, notes, fault, there, said):
    with opened() as table:
        fill(table)
    fault(table.path)
    with opened() as table:
        assert fill(table) == there
    assert len(notes) == said
    with opened() as table:
        assert fill(table) == 20


def test_a_full_disk_costs_the_cache_and_nothing_else(opened, notes):
    """By a limit on the size of files, amid a part that is smaller than the buffer."""
    resource = pytest.importorskip("resource")
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened() as table:
        table.append(ROWS[:4])
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (70, kept[1]))
            table.append(ROWS[4:8])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        assert fill(table) == 8
    assert notes == ["features are not cached: the file exceeds the size limit (ulimit -f)"]
    with opened() as table:
        assert fill(table) == 4


def test_too_little_space_is_seen_before(opened, notes, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**9}))
    with opened() as table:
        fill(table)
    assert notes == ["features are not cached: they need 0.0 GB and the disk has 1.0 GB free"]


def test_two_processes_at_once(opened, notes):
    with opened() as first:
        first.append(ROWS[:8])
        with opened() as second:
            assert fill(second) == 8
        assert fill(first) == 8
    assert notes == ["features are not cached: another process computes the same features"]
    with opened() as table:
        assert table.done == 20


def test_a_folder_that_cannot_be_written(opened, notes, tmp_path):
    (tmp_path / "file").write_text("")
    with opened(folder=tmp_path / "file") as table:
        fill(table)
    assert len(notes) == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_complete_table_is_read_where_it_cannot_be_written(opened, notes, tmp_path):
    with opened() as table:
        fill(table)
    tmp_path.chmod(0o500)
    with opened() as table:
        assert fill(table) == 20
    tmp_path.chmod(0o700)
    assert not notes


def test_other_weights_replace_and_fewer_rows_are_a_part(opened, tmp_path):
    with opened() as table:
        fill(table)
        rows = table.read()
    with opened(count=5) as table:
        assert np.array_equal(table.read(), ROWS[:5])
    with opened("b") as table:
        assert fill(table) == 0
    assert np.array_equal(rows, ROWS)  # still mapped
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features-x-b.bin", "features-x-b.jsonl"]


def test_a_table_that_is_replaced_while_it_is_written(opened, notes, tmp_path):
    with opened() as first:
        first.append(ROWS[:4])
        with opened("b") as second:
            fill(second)
        assert fill(first) == 4
    with opened() as again:
        assert fill(again) == 0
    assert not notes


def test_cleared_rows_are_gone(opened, notes, monkeypatch):
    with opened() as table:
        fill(table)
        table.clear()
        assert fill(table) == 0
    with opened() as table:
        monkeypatch.setattr(
            "pathlib.Path.unlink", lambda path, missing_ok=False: (_ for _ in ()).throw(PermissionError(13, "no"))
        )
        table.clear()
        assert fill(table) == 0
    assert [note[:23] for note in notes] == ["features are not cached"]


class Refusing(io.RawIOBase):
    """A file on a full disk."""

    def writable(self):
        return True

    def write(self, content):
        raise OSError(122, "Disk quota exceeded")


@pytest.mark.parametrize("part", ["file", "sums"])
def test_what_a_full_disk_refuses_at_once_and_when_closing_is_kept_in_memory(opened, notes, monkeypatch, part):
    with opened() as table:
        table.append(ROWS[:4])
        lock = table.lock
        full = io.BufferedWriter(Refusing())
        getattr(table, part).close()
        setattr(table, part, full if part == "file" else io.TextIOWrapper(full))
        monkeypatch.setattr(FeatureTable, "mapped", lambda own, count: ROWS[:count])
        fill(table)
        assert (table.file, table.sums, table.lock) == (None, None, None)
        assert not lock.is_locked
    assert len(notes) == 1
