"""What a machine allows was taken from its hardware: its cores, memory and folders, whatever a container has of them.

| trial | input | right value |
|---|---|---|
| F1 | 64 cores by affinity, a quota of control groups of version 2, 1 or both, at any depth | the least, rounded up |
| F1 | no quota, an unlimited or damaged one | the affinity |
| – | cores that share a physical one, all or some allowed | the physical ones; half where none is known |
| F1 | a quota, at the command line | torch starts no more threads, unless the environment says so |
| – | a memory limit below the decoded images | decoded in every epoch, and said |
| – | a `/dev/shm` too small for batches of worker processes, or none | threads, and said, before a bus error |
| – | a home that is unknown, a cache that is read-only, a file, full or relative | a remark, and no cache |
| – | a disk that fills up while weights or a report are written | our error, the older file stays |
| – | run folders with spaces, letters of any script, newlines, quotes, a name too long | trained, or our error |
| – | any umask | files for whom the umask lets |
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.trials.test_checkpoint_containers import TRAIN
from tests.trials.test_export_preprocessing import RECORDS, save_weights

import skipway as sw
from skipway.checkpoint import files as storage
from skipway.cli import main
from skipway.data import load, pool
from skipway.hardware import available_memory, cpu_count, limits
from skipway.inference.publish import write_hub_folder

CORES = 64


@pytest.fixture
def machine(monkeypatch):
    """Files of a machine with 64 cores; nothing else of its control groups is there."""
    files: dict[str, str] = {}
    real = builtins.open

    def opened(path, *args, **options):
        if str(path).startswith(("/sys/fs/cgroup", "/proc/self/cgroup", "/proc/meminfo", "/sys/devices")):
            if str(path) not in files:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
            return io.StringIO(files[str(path)])
        return real(path, *args, **options)

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(CORES)), raising=False)
    return files


GROUPS = "/sys/fs/cgroup"
V1 = "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/docker/abc\n"
QUOTAS = {
    "one core": ({f"{GROUPS}/cpu.max": "100000 100000\n"}, 1),
    "half a core": ({f"{GROUPS}/cpu.max": "50000 100000"}, 1),
    "one and a half": ({f"{GROUPS}/cpu.max": "150000 100000"}, 2),
    "more than there are": ({f"{GROUPS}/cpu.max": "9900000 100000"}, CORES),
    "none": ({f"{GROUPS}/cpu.max": "max 100000"}, CORES),
    "damaged": ({f"{GROUPS}/cpu.max": "\x00", "/proc/self/cgroup": "nonsense\n::::\n\n"}, CORES),
    "no period": ({f"{GROUPS}/cpu.max": "100000 0"}, CORES),
    "nothing": ({}, CORES),
    "own group": ({"/proc/self/cgroup": "0::/user/run", f"{GROUPS}/user/run/cpu.max": "300000 100000"}, 3),
    "its parent": (
        {
            "/proc/self/cgroup": "0::/pod/job",
            f"{GROUPS}/pod/job/cpu.max": "max 100000",
            f"{GROUPS}/pod/cpu.max": "200000 100000",
        },
        2,
    ),
    "version 1": ({f"{GROUPS}/cpu/cpu.cfs_quota_us": "400000", f"{GROUPS}/cpu/cpu.cfs_period_us": "100000"}, 4),
    "version 1, joined": (
        {
            "/proc/self/cgroup": V1,
            f"{GROUPS}/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "500000",
            f"{GROUPS}/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
        },
        5,
    ),
    "version 1, unlimited": ({f"{GROUPS}/cpu/cpu.cfs_quota_us": "-1", f"{GROUPS}/cpu/cpu.cfs_period_us": "100000"}, 64),
    "both": (
        {
            f"{GROUPS}/cpu/cpu.cfs_quota_us": "400000",
            f"{GROUPS}/cpu/cpu.cfs_period_us": "100000",
            f"{GROUPS}/unified/cpu.max": "200000 100000",
            "/proc/self/cgroup": "0::/",
        },
        2,
    ),
}


@pytest.mark.parametrize("kind", QUOTAS)
def test_the_least_of_affinity_and_quotas_counts(machine, kind):
    files, cores = QUOTAS[kind]
    machine.update(files)
    assert cpu_count() == cores
    assert pool.default_workers(5000) == min(cores, pool.MAX_WORKERS)


PAIRS = {limits.SIBLINGS.format(number): f"{number % 32},{number % 32 + 32}" for number in range(CORES)}
ALONE = {limits.SIBLINGS.format(number): f"{number}" for number in range(CORES)}


@pytest.mark.parametrize(
    ("files", "allowed", "cores"),
    [
        (PAIRS, range(CORES), 32),
        (PAIRS, (0, 32, 5), 2),
        (PAIRS, range(8), 8),
        (ALONE, range(CORES), CORES),
        ({}, range(CORES), 32),
        ({**PAIRS, f"{GROUPS}/cpu.max": "300000 100000"}, range(CORES), 3),
    ],
    ids=["pairs", "one pair and a half", "one of each pair", "no pairs", "not known", "a quota"],
)
def test_cores_that_share_a_physical_one_count_once(machine, monkeypatch, files, allowed, cores):
    machine.update(files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(allowed), raising=False)
    assert limits.physical_cores() == cores


@pytest.mark.parametrize(
    ("quota", "given", "threads"), [("200000", None, "2"), ("200000", "5", "5"), ("max", None, None)]
)
def test_threads_of_torch_follow_a_quota(machine, monkeypatch, quota, given, threads):
    machine[f"{GROUPS}/cpu.max"] = f"{quota} 100000"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert main(["schemes", "--json"]) == 0
    assert os.environ.get("OMP_NUM_THREADS") == threads


MEMORY = {
    "machine": ({"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n"}, 5_120_000),
    "version 2": (
        {
            "/proc/meminfo": "MemAvailable: 5000 kB",
            f"{GROUPS}/memory.max": "3000000",
            f"{GROUPS}/memory.current": "2000000",
            f"{GROUPS}/memory.stat": "anon 5\ninactive_file 500000\n",
        },
        1_500_000,
    ),
    "version 2, unlimited": ({f"{GROUPS}/memory.max": "max", f"{GROUPS}/memory.current": "2000000"}, None),
    "version 1": (
        {
            "/proc/self/cgroup": V1,
            f"{GROUPS}/memory/docker/abc/memory.limit_in_bytes": "3000000",
            f"{GROUPS}/memory/docker/abc/memory.usage_in_bytes": "2500000",
            "/proc/meminfo": "MemAvailable: 5000 kB",
        },
        500_000,
    ),
    "used up": ({f"{GROUPS}/memory.max": "3000", f"{GROUPS}/memory.current": "4000"}, 0),
    "nothing": ({}, None),
}


@pytest.mark.parametrize("kind", MEMORY)
def test_the_memory_that_is_left(machine, kind):
    files, left = MEMORY[kind]
    machine.update(files)
    assert available_memory() == left


@pytest.fixture
def images(tmp_path):
    for label, level in (("cat", 60), ("dog", 190)):
        (tmp_path / "d" / label).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(np.full((16, 16, 3), level + number, np.uint8)).save(
                tmp_path / "d" / label / f"{number}.png"
            )
    return tmp_path / "d"


def test_images_that_do_not_fit_into_memory_are_decoded_in_every_epoch(machine, images):
    plenty = load(images, cache=False)
    machine["/proc/meminfo"] = "MemAvailable: 10 kB"
    scarce = load(images, cache=False)
    assert any("of memory are left: they are decoded in every epoch" in remark for remark in scarce.remarks)
    assert not any("memory" in remark for remark in plenty.remarks)
    assert type(plenty.train) is not type(scarce.train)
    assert torch.equal(plenty.train.labels, scarce.train.labels)


class Square:
    """A task that any process can do."""

    shape = (4,)

    def __call__(self, index, row):
        row[:] = index
        return index * index


@pytest.mark.parametrize("room", [100, None])
@pytest.mark.parametrize("fails", [False, True])
def test_threads_where_processes_cannot_share_memory(monkeypatch, room, fails):
    """Without a limit that is known, torch's own error is the same case."""
    remarks: list[str] = []
    monkeypatch.setattr(pool, "shared_memory", lambda: room)
    if fails:
        monkeypatch.setattr(torch.Tensor, "share_memory_", lambda tensor: (_ for _ in ()).throw(RuntimeError("no shm")))
    workers = pool.WorkerPool(1, "processes", remarks.append)
    found = [
        (buffer[:, 0].tolist(), results)
        for buffer, results in workers.batches(Square(), [list(range(10)), list(range(10, 20))])
    ]
    assert found == [(list(part), [n * n for n in part]) for part in (range(10), range(10, 20))]
    expected = "threads decode instead of worker processes" if room is not None or fails else None
    assert (remarks == []) if expected is None else expected in remarks[0]


def test_a_folder_for_shared_memory_may_be_missing(monkeypatch):
    monkeypatch.setattr(limits, "SHARED_MEMORY", "/nowhere")
    assert limits.shared_memory() is None
    monkeypatch.undo()
    assert limits.shared_memory() is None or limits.shared_memory() >= 0


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("kind", ["no home", "a file", "below a file", "full", "read-only"])
@pytest.mark.parametrize("asked", [True, None])
def test_caches_that_cannot_be_written(images, tmp_path, monkeypatch, kind, asked):
    monkeypatch.setattr("skipway.data.source_reader.FEW_FILES", 1)
    monkeypatch.delenv("SKIPWAY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if kind == "no home":
        monkeypatch.setattr(Path, "home", no_home)
    else:
        (tmp_path / "file").write_text("x")
        monkeypatch.setenv("SKIPWAY_CACHE", str(tmp_path / {"a file": "file", "below a file": "file/a"}.get(kind, "c")))
    if kind in ("full", "read-only"):
        code = errno.ENOSPC if kind == "full" else errno.EROFS

        def refuse(*args):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("skipway.data.cache.store.os.replace", refuse)
    data = load(images, cache=asked)
    assert sum("nothing is cached" in remark for remark in data.remarks) == 1
    assert len(data.train) + len(data.validation) + len(data.test) == 20
    assert not (tmp_path / "c").exists() or list((tmp_path / "c").iterdir()) == []


def test_a_home_without_a_name_is_no_error_where_nothing_is_cached(images, monkeypatch):
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert not any("cached" in remark for remark in load(images, cache=False).remarks)
    assert not any("cached" in remark for remark in load(images).remarks)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_file_that_cannot_be_replaced_stays(tmp_path, monkeypatch, code):
    storage.write_tensors(tmp_path / "w", {"a": torch.ones(2)}, {})

    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(storage, "fsync_path", refuse)
    with pytest.raises(sw.CheckpointError, match="the previous file is kept: the (disk|file system)"):
        storage.write_tensors(tmp_path / "w", {"a": torch.zeros(2)}, {})
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["w"]
    assert storage.read_tensors(tmp_path / "w")[0]["a"].tolist() == [1, 1]


@pytest.mark.parametrize("ending", [".html", ".json", ".svg"])
def test_a_report_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch, ending):
    model = sw.build("resnet", depth=8, width=4, classes=3)
    found = sw.diagnose(model, torch.randn(8, 3, 8, 8), targets=torch.arange(8) % 3)
    sw.report.save(found, tmp_path / f"r{ending}")
    before = (tmp_path / f"r{ending}").read_bytes()

    def refuse(path, text, **options):
        path.write_bytes(text[:10].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(sw.SkipwayError, match=f"r{ending} cannot be written: the disk is full"):
        sw.report.save(found, tmp_path / f"r{ending}")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [(f"r{ending}", before)]


def test_a_hub_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    weights = save_weights(tmp_path, RECORDS["grey"])

    def refuse(path, text, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(sw.SkipwayError, match="the disk is full"):
        write_hub_folder(weights, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
    monkeypatch.undo()
    write_hub_folder(weights, tmp_path / "hub")
    assert {entry.name for entry in (tmp_path / "hub").iterdir()} == {"model.safetensors", "config.json", "README.md"}


@pytest.mark.parametrize("name", ["a b/c'd\"", "модель-モデル", "line\nbreak", "a" * 200, "-o", "con", "%20&<b>"])
def test_run_folders_of_any_name(tmp_path, monkeypatch, capsys, name):
    """Trained, used and exported by that name."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TRAIN, "--health", "0", "--out", f"./{name}", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["evaluate", f"./{name}"]) == 0
    assert main(["export", f"./{name}", "--hub", f"./{name}/hub"]) == 0
    assert sw.from_pretrained(f"./{name}/hub").preprocessing.size == 8
    assert "\x1b" not in capsys.readouterr().out


def test_a_name_too_long_is_our_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TRAIN, "--out", "a" * 300]) == 1  # a failure of the system
    assert "File name too long" in capsys.readouterr().err


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_rights_that_the_umask_lets(tmp_path, mask):
    before = os.umask(mask)
    try:
        storage.write_tensors(tmp_path / "w", {"a": torch.ones(2)}, {})
        storage.write_json(tmp_path / "j", {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.iterdir()} == {0o666 & ~mask}
