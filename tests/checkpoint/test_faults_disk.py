"""Saves cut short at every named point: killed, a full or lost disk, lacking rights. The last good checkpoint stays."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from skipway.checkpoint import files as storage
from skipway.checkpoint.store import Checkpoints, Snapshot
from skipway.errors import CheckpointError

POINTS = (
    *("begin", "staged", "folder made", "file opened", "file half written", "file written", "file synced"),
    *("files complete", "manifest written", "folder synced", "verified", "renamed", "rename synced"),
    *("prune begins", "prune renamed", "pruned", "end"),
)


class Killed(BaseException):
    """Stands for the death of the process: nothing that catches errors sees it."""


def snapshot(step: int) -> Snapshot:
    weights = torch.arange(64.0) + step
    return Snapshot(step, {"model": {"w": weights}, "optimizer": {"w/momentum_buffer": -weights}}, {"step": step})


def is_whole(found: Snapshot) -> bool:
    expected = snapshot(found.step)
    return found.state == expected.state and all(
        torch.equal(found.tensors[stem][name], tensor)
        for stem, tensors in expected.tensors.items()
        for name, tensor in tensors.items()
    )


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


def failure_of(checkpoints: Checkpoints, given: Snapshot) -> str | None:
    """What a save says went wrong."""
    try:
        checkpoints.save(given)
    except CheckpointError as error:
        return str(error)
    return None


def at(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> list[str]:
    """Let `act` happen when the next saves reach their point `number`, from 0; the points reached, as they come."""
    seen: list[str] = []

    def reached(point: str) -> None:
        seen.append(point)
        if len(seen) == number + 1:
            act()

    monkeypatch.setattr(storage, "fault_point", reached)
    return seen


def points(folder: Path, steps: tuple[int, ...]) -> list[str]:
    """The points that the last of these saves goes through."""
    with pytest.MonkeyPatch.context() as patch:
        checkpoints = Checkpoints(folder)
        for step in steps[:-1]:
            checkpoints.save(snapshot(step))
        seen = at(patch, -1, lambda: None)
        checkpoints.save(snapshot(steps[-1]))
    return seen


@pytest.mark.parametrize("steps", [(10,), (10, 20, 30), (10, 20, 20), (10, 20, 15)], ids=str)
def test_a_crash_at_any_point_leaves_a_good_checkpoint(tmp_path, monkeypatch, steps):
    seen = points(tmp_path / "all", steps)
    assert set(seen) <= set(POINTS)
    assert len(steps) == 1 or set(seen) == set(POINTS)
    for number, point in enumerate(seen):
        folder = tmp_path / str(number)
        checkpoints = Checkpoints(folder)
        for step in steps[:-1]:
            checkpoints.save(snapshot(step))
        with monkeypatch.context() as patch:
            at(patch, number, lambda: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                checkpoints.save(snapshot(steps[-1]))
        # a new process
        checkpoints = Checkpoints(folder)
        renamed = "renamed" in seen[: number + 1]
        if len(steps) == 1 and not renamed:
            with pytest.raises(CheckpointError, match="holds no checkpoint"):
                checkpoints.newest()
        else:
            found, damaged = checkpoints.newest()
            assert is_whole(found), point
            assert damaged == [], point
            assert found.step in ({steps[-1], max(steps)} if renamed else {max(steps[:-1])}), point
        checkpoints.sweep()
        checkpoints.save(snapshot(40))
        assert is_whole(checkpoints.newest()[0]), point
        assert leftovers(folder) == [], point
        assert len(checkpoints.steps()) <= 2, point


KILLER = """
import itertools, os, sys
from pathlib import Path
from tests.checkpoint.test_faults_disk import points, snapshot
from skipway.checkpoint import files as storage
from skipway.checkpoint.store import Checkpoints

place = Path(sys.argv[1])
count = len(points(place / "all", (10, 20, 30)))
for background, number in itertools.product((False, True), range(count)):
    folder = place / f"{background}-{number}"
    checkpoints = Checkpoints(folder)
    for step in (10, 20):
        checkpoints.save(snapshot(step))
    if os.fork() == 0:
        left = [number]
        def reached(point):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), 9)
        storage.fault_point = reached
        checkpoints = Checkpoints(folder, background=background)
        checkpoints.save(snapshot(30))
        checkpoints.finish()
        os._exit(0)
    _, status = os.wait()
    assert os.WTERMSIG(status) == 9, (folder, status)
    print(folder)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_at_any_point_leaves_a_good_checkpoint(tmp_path):
    """Also while it writes in the background."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", KILLER, str(tmp_path)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr
    folders = [Path(line) for line in child.stdout.splitlines()]
    assert len(folders) >= 2 * len(POINTS)
    for folder in folders:
        checkpoints = Checkpoints(folder)
        found, damaged = checkpoints.newest()
        assert found.step in (20, 30)
        assert is_whole(found)
        assert damaged == []
        checkpoints.sweep()
        assert leftovers(folder) == []


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get
)
def test_an_error_of_the_disk_at_any_point_is_ours_and_leaves_nothing(tmp_path, monkeypatch, code):
    seen = points(tmp_path / "all", (10, 20, 30))
    for number, point in enumerate(seen):
        if point in ("begin", "staged", "end"):  # nothing is written there
            continue
        folder = tmp_path / str(number)
        checkpoints = Checkpoints(folder)
        for step in (10, 20):
            checkpoints.save(snapshot(step))

        def fail() -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            at(patch, number, fail)
            with pytest.raises(CheckpointError, match="step 30") as caught:
                checkpoints.save(snapshot(30))
        assert str(folder) in str(caught.value), point
        found, damaged = checkpoints.newest()
        assert is_whole(found)
        assert damaged == []
        assert found.step == (30 if "renamed" in seen[: number + 1] else 20), point
        assert point.startswith("prune") or leftovers(folder) == [], point
        checkpoints.save(snapshot(40))
        assert checkpoints.newest()[0].step == 40


def test_a_folder_that_goes_during_a_save_comes_back_with_the_next(tmp_path, monkeypatch):
    for number, point in enumerate(points(tmp_path / "all", (10, 20, 30))):
        checkpoints = Checkpoints(tmp_path / "run" / str(number))
        checkpoints.save(snapshot(10))
        with monkeypatch.context() as patch:
            at(patch, number, lambda: shutil.rmtree(tmp_path / "run", ignore_errors=True))
            failure = failure_of(checkpoints, snapshot(20))
            assert failure is None or "step 20" in failure, point
        checkpoints.save(snapshot(30))
        assert is_whole(checkpoints.newest()[0])
        assert leftovers(checkpoints.folder) == []


def test_what_is_read_back_wrong_gets_no_name(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(snapshot(10))

    def flip() -> None:
        path = next(tmp_path.glob(".tmp-*/model.safetensors"))
        content = bytearray(path.read_bytes())
        content[-3] ^= 4
        path.write_bytes(content)

    with monkeypatch.context() as patch:
        at(patch, points(tmp_path / "all", (10,)).index("folder synced"), flip)
        with pytest.raises(CheckpointError, match=r"model.safetensors has changed"):
            checkpoints.save(snapshot(20))
    assert checkpoints.newest()[0].step == 10
    assert leftovers(tmp_path) == []


def mounted(place: Path, size: str) -> bool:
    """Whether a small file system could be mounted there."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB of its own."""
    place = tmp_path / "disk"
    if not mounted(place, "4m"):
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def large(step: int) -> Snapshot:
    """1.2 MB, so that a third one next to two others does not fit into 3 MB."""
    values = torch.full((150_000,), float(step))
    return Snapshot(step, {"model": {"w": values}, "optimizer": {"w/momentum_buffer": -values}}, {"step": step})


def test_a_disk_that_is_full_is_found_out_before(disk):
    checkpoints = Checkpoints(disk / "run")
    for step in (1, 2):
        checkpoints.save(large(step))
    (disk / "filler").write_bytes(bytes(1 << 20))
    with pytest.raises(CheckpointError, match=r"needs 1,2\d\d,\d\d\d bytes and .* are available"):
        checkpoints.save(large(3))
    assert checkpoints.newest()[0].step == 2
    assert leftovers(disk / "run") == []
    (disk / "filler").unlink()
    checkpoints.save(large(3))
    assert checkpoints.steps() == [2, 3]


def test_a_disk_that_fills_up_in_the_middle_of_any_file(disk, monkeypatch):
    # as if something else took the room after it was looked at: at each distance from the end of the save
    monkeypatch.setattr("skipway.checkpoint.store.check_space", lambda folder, needed: None)
    checkpoints = Checkpoints(disk / "run", keep=1)
    checkpoints.save(large(1))
    failed = 0
    for room in range(0, 1300, 65):
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(max(0, free - room * 1024)))
        failure = failure_of(checkpoints, large(2))
        if failure is not None:
            assert "the disk is full: free some space" in failure
            failed += 1
            assert checkpoints.newest()[0].step == 1
        assert leftovers(disk / "run") == []
        (disk / "filler").unlink()
        if checkpoints.newest()[0].step == 2:
            break
    assert failed >= 18
    checkpoints.save(large(3))
    found = checkpoints.newest()[0]
    assert torch.equal(found.tensors["model"]["w"], large(3).tensors["model"]["w"])


def test_a_disk_that_turns_read_only(disk):
    checkpoints = Checkpoints(disk / "run")
    checkpoints.save(snapshot(1))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        with pytest.raises(CheckpointError, match="is read-only"):
            checkpoints.save(snapshot(2))
        assert checkpoints.newest()[0].step == 1
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    checkpoints.save(snapshot(2))
    assert checkpoints.newest()[0].step == 2
    assert leftovers(disk / "run") == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_files_that_may_not_grow(tmp_path):
    """The limit of a process on the size of files, as a full disk where none can be mounted."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(snapshot(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="exceeds the size limit"):
            checkpoints.save(large(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.newest()[0].step == 1
    assert leftovers(tmp_path) == []


RIGHTS = """
import os, sys
from pathlib import Path
from tests.checkpoint.test_faults_disk import snapshot
from skipway.errors import CheckpointError, SkipwayError
from skipway.checkpoint.store import Checkpoints
from skipway.training.run_folder import RunFolder

if os.getuid() == 0:
    os.setuid(65534)
folder = Path(sys.argv[1])
try:
    Checkpoints(folder).save(snapshot(2))
except CheckpointError as error:
    assert "permission denied" in str(error), error
else:
    raise AssertionError("written")
assert Checkpoints(folder).newest()[0].step == 1
try:
    with RunFolder(folder).lock():
        raise AssertionError("locked")
except SkipwayError as error:
    assert "permission denied" in str(error), error
print("refused")
"""


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs users")
def test_a_folder_without_the_right_to_write():
    import tempfile

    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    # not tmp_path: another user cannot enter it
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(place) / "run"
        Checkpoints(folder).save(snapshot(1))
        os.chmod(folder, 0o555)
        command = [sys.executable, "-c", RIGHTS, str(folder)]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        os.chmod(folder, 0o755)
    assert child.stdout == "refused\n", child.stderr
