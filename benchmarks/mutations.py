"""How many damaged checkpoints are noticed: seeded mutations of a good one, each with a good one before it.

    python -m benchmarks.mutations --count 10000

A mutation is noticed when `Checkpoints.newest` passes the damaged checkpoint over, names the file in its sentence, and
gives the one before it, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from skipway.checkpoint.manifest import MANIFEST
from skipway.checkpoint.store import Checkpoints, Snapshot
from skipway.errors import CheckpointError

EARLIER, LATER = 120, 240
Mutation = Callable[[random.Random, Path, Path], str]


def snapshot(step: int) -> Snapshot:
    """A small state that differs from step to step in every file but has files of equal sizes."""
    generator = torch.Generator().manual_seed(step)
    weights = {f"layer{k}.weight": torch.randn(4, 4, generator=generator) for k in range(3)}
    momenta = {f"{name}/momentum_buffer": torch.randn(4, 4, generator=generator) for name in weights}
    return Snapshot(step, {"model": weights, "optimizer": momenta, "ema": weights}, {"epoch": step, "note": "x" * 40})


def file_in(chance: random.Random, folder: Path) -> Path:
    """Any file of the checkpoint, the manifest included."""
    return chance.choice(sorted(folder.iterdir()))


def flip(chance: random.Random, folder: Path, earlier: Path) -> str:
    """One bit."""
    path = file_in(chance, folder)
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return path.name


def truncate(chance: random.Random, folder: Path, earlier: Path) -> str:
    """Cut at a multiple of a fiftieth of the size."""
    path = file_in(chance, folder)
    os.truncate(path, path.stat().st_size * chance.randrange(50) // 50)
    return path.name


def append(chance: random.Random, folder: Path, earlier: Path) -> str:
    """Bytes appended to the end of the file."""
    path = file_in(chance, folder)
    with path.open("ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 40)))
    return path.name


def zero(chance: random.Random, folder: Path, earlier: Path) -> str:
    """Zeros over a stretch, as a disk leaves them that lost a block."""
    path = file_in(chance, folder)
    content = bytearray(path.read_bytes())
    begin = chance.randrange(len(content))
    end = min(len(content), begin + chance.choice((1, 64, 512, 4096)))
    if not any(content[begin:end]):
        begin, end = 0, len(content)
    content[begin:end] = bytes(end - begin)
    path.write_bytes(content)
    return path.name


def noise(chance: random.Random, folder: Path, earlier: Path) -> str:
    """Other bytes of the same length over a stretch."""
    path = file_in(chance, folder)
    content = bytearray(path.read_bytes())
    begin = chance.randrange(len(content))
    for place in range(begin, min(len(content), begin + chance.randrange(1, 200))):
        content[place] ^= chance.randrange(1, 256)
    path.write_bytes(content)
    return path.name


def swap(chance: random.Random, folder: Path, earlier: Path) -> str:
    """Two files exchanged."""
    # the EMA and the weights are equal here, as they are at the start of a run: that exchange changes nothing
    one, other = chance.sample([path for path in sorted(folder.iterdir()) if path.name != "ema.safetensors"], 2)
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    return f"{one.name}|{other.name}"


def lose(chance: random.Random, folder: Path, earlier: Path) -> str:
    """A file gone."""
    path = file_in(chance, folder)
    path.unlink()
    return path.name


def old_manifest(chance: random.Random, folder: Path, earlier: Path) -> str:
    """The manifest of the checkpoint before."""
    shutil.copy(earlier / MANIFEST, folder / MANIFEST)
    return MANIFEST


def old_file(chance: random.Random, folder: Path, earlier: Path) -> str:
    """A file of the checkpoint before, whole and valid by itself."""
    path = file_in(chance, folder)
    shutil.copy(earlier / path.name, path)
    return path.name


def old_folder(chance: random.Random, folder: Path, earlier: Path) -> str:
    """The whole checkpoint before, under the later name."""
    shutil.rmtree(folder)
    shutil.copytree(earlier, folder)
    return MANIFEST


def extra(chance: random.Random, folder: Path, earlier: Path) -> str:
    """A file too many."""
    name = chance.choice(("x.safetensors", ".metadata", "model.pt", "state.json.bak", "model.safetensors.tmp", "__0_0"))
    (folder / name).write_bytes(chance.randbytes(20))
    return name


def rename(chance: random.Random, folder: Path, earlier: Path) -> str:
    """A file under another name."""
    path = file_in(chance, folder)
    path.rename(path.with_name("renamed.safetensors"))
    return path.name


def link(chance: random.Random, folder: Path, earlier: Path) -> str:
    """A link to a file of the same content."""
    path = file_in(chance, folder)
    away = path.rename(folder.parent.parent / "away")
    path.symlink_to(away)
    return path.name


def directory(chance: random.Random, folder: Path, earlier: Path) -> str:
    """A folder in place of a file."""
    path = file_in(chance, folder)
    path.unlink()
    path.mkdir()
    return path.name


KINDS: tuple[Mutation, ...] = (
    *(flip, flip, flip, flip, truncate, truncate, zero, noise, append),
    *(swap, lose, old_manifest, old_file, old_folder, extra, rename, link, directory),
)


def run(count: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Mutations by kind, and a sentence for each that was not noticed."""
    counts: Counter[str] = Counter()
    missed = []
    with tempfile.TemporaryDirectory() as place:
        good, work = Path(place) / "good", Path(place) / "work"
        checkpoints = Checkpoints(good)
        for step in (EARLIER, LATER):
            checkpoints.save(snapshot(step))
        expected = snapshot(EARLIER)
        for number in range(count):
            chance = random.Random(f"{seed}/{number}")
            kind = KINDS[number % len(KINDS)]
            shutil.copytree(good, work)
            names = kind(chance, work / f"step-{LATER:08d}", work / f"step-{EARLIER:08d}")
            fault = verdict(work, names, expected)
            counts[kind.__name__] += 1
            if fault:
                missed.append(f"{kind.__name__} {number} of {names}: {fault}")
            shutil.rmtree(work)
            (Path(place) / "away").unlink(missing_ok=True)
    return counts, missed


def verdict(folder: Path, names: str, expected: Snapshot) -> str | None:
    """What is wrong with how a damaged checkpoint was treated, if anything."""
    try:
        found, damaged = Checkpoints(folder).newest()
    except CheckpointError as error:
        return f"nothing was loaded: {error}"
    if found.step != expected.step:
        return "the damaged one was loaded"
    if len(damaged) != 1 or not any(name in damaged[0] for name in names.split("|")):
        return f"the file is not named: {damaged}"
    same = found.state == expected.state and all(
        torch.equal(found.tensors[stem][name], tensor)
        for stem, tensors in expected.tensors.items()
        for name, tensor in tensors.items()
    )
    return None if same else "the one before is not what was saved"


def main() -> None:
    parser = argparse.ArgumentParser(description="damaged checkpoints: how many are noticed")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.perf_counter()
    counts, missed = run(given.count, given.seed)
    for kind, number in counts.items():
        print(f"{kind:>14} {number:>7,}")
    for line in missed:
        print("MISSED", line)
    print(f"{given.count:,} mutations, {given.count - len(missed):,} noticed, {time.perf_counter() - began:.1f} s")
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
