"""What this process may use of the machine: cores and memory, also within containers. Importable without torch.

Linux limits the processes of a container by control groups: folders of files, each group within its parent, whose
limits all hold. Version 2 has one tree, version 1 one for each resource; both may be there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import PurePosixPath

__all__ = ["available_memory", "cpu_count", "limit_threads", "physical_cores", "resident_memory", "shared_memory"]

GROUPS = "/sys/fs/cgroup"
OWN_GROUPS = "/proc/self/cgroup"
SHARED_MEMORY = "/dev/shm"
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def cpu_count() -> int:
    """The number of CPU cores that this process may use: its affinity, or the quota of its control groups, rounded up.

    >>> cpu_count() >= 1
    True
    """
    return max(1, min([allowed_cores(), *(math.ceil(quota) for quota in cpu_quotas())]))


def physical_cores() -> int:
    """The number of physical cores that this process may use, of which each may count twice in `cpu_count`; where the
    system does not say which do, all are taken to.

    >>> 1 <= physical_cores() <= cpu_count()
    True
    """
    shared = [read_text(SIBLINGS.format(number)) for number in allowed_numbers()]
    return min(cpu_count(), len(set(shared)) if shared and all(shared) else math.ceil(allowed_cores() / 2))


def allowed_cores() -> int:
    """The number of cores that the scheduler may run this process on."""
    return len(allowed_numbers()) or os.cpu_count() or 1


def allowed_numbers() -> list[int]:
    """The numbers of the cores that the scheduler may run this process on; empty where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def cpu_quotas() -> Iterator[float]:
    """The CPU seconds per second that each control group of this process allows."""
    for folder in group_folders("cpu"):
        quota, _, period = read_text(f"{folder}/cpu.max").partition(" ")
        pairs = ((quota, period), (read_text(f"{folder}/cpu.cfs_quota_us"), read_text(f"{folder}/cpu.cfs_period_us")))
        for quota, period in pairs:
            if quota.isdecimal() and period.isdecimal() and int(period):
                yield int(quota) / int(period)


def limit_threads() -> None:
    """Let torch start no more threads than the quota of a container has cores; an environment that sets their number
    wins. To be called before torch is imported.
    """
    cores = cpu_count()
    if cores < allowed_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def available_memory() -> int | None:
    """The bytes that this process can still allocate: of the machine, or of its control groups; None if unknown."""
    found = []
    for line in read_text("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            found.append(int(rest.split()[0]) * 1024)
    for folder in group_folders("memory"):
        for limit, usage, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, used = read_text(f"{folder}/{limit}"), read_text(f"{folder}/{usage}")
            if most.isdecimal() and used.isdecimal():
                pairs = (line.split() for line in read_text(f"{folder}/memory.stat").splitlines())
                files = next((int(pair[1]) for pair in pairs if pair[0] == cached), 0)
                found.append(max(int(most) - int(used) + files, 0))
    return min(found, default=None)


def resident_memory() -> int:
    """The bytes of memory that this process holds; 0 if unknown.

    >>> resident_memory() >= 0
    True
    """
    pages = read_text("/proc/self/statm").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else 0


def shared_memory() -> int | None:
    """The free bytes for memory that processes share; None where no folder limits it.

    Docker gives 64 MB by default, and a write beyond them kills the process (SIGBUS).
    """
    try:
        room = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):
        return None
    return room.f_bavail * room.f_frsize


def group_folders(resource: str) -> list[str]:
    """The folders of the control groups of this process for a resource, with all that they are within."""
    folders = {GROUPS: None, f"{GROUPS}/{resource}": None}  # what a container sees of its own
    for line in read_text(OWN_GROUPS).splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and resource not in names.split(","):
            continue
        for root in (f"{GROUPS}/{names}", f"{GROUPS}/{resource}") if names else (GROUPS, f"{GROUPS}/unified"):
            inside = PurePosixPath(path.lstrip("/"))
            folders.update(dict.fromkeys(str(PurePosixPath(root, part)) for part in (inside, *inside.parents)))
    return list(folders)


def read_text(path: str) -> str:
    """The text of a small file of the system; empty if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, ValueError):
        return ""
