"""The same faults for a plain torch recipe, Accelerate, the Hugging Face Trainer, timm and Skipway.

    pip install -c constraints.txt timm torchvision transformers accelerate datasets
    python -m benchmarks.faults.peers --out benchmarks/faults/peers.md

What each is asked to do is in `recipes.py`, as its documentation says. Every case is a process of its own, forked from
this one once the libraries are imported. Nothing is patched in a library but where a fault is put in or a clock read.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.faults.catalogue import KINDS, READERS, outcomes
from benchmarks.faults.kills import ended, kill, preload
from benchmarks.faults.recipes import EPOCHS, PEERS, Digits, Peer, State
from benchmarks.peers import import_torchvision
from skipway.hardware.processor import cpu_name

__all__ = ["measure", "table"]

LIBRARIES = ("torch", "accelerate", "transformers", "timm", "torchvision", "datasets", "safetensors", "pillow", "numpy")
NAN_STEP = 6
MOST_SECONDS = 120


def child(work: Callable[[], Any], answer: Path | None = None) -> int:
    """Run `work` in a process of its own; what it returns goes to `answer` as JSON. Returns the process's number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    os.setpgrp()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    if not os.environ.get("SHOW_ERRORS"):
        os.dup2(null, 2)
    status = 70
    try:
        warnings.simplefilter("ignore")
        value = work()
        if answer is not None:
            answer.write_text(json.dumps(value))
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        os._exit(status)


def asked(work: Callable[[], Any], root: Path) -> Any:
    """What `work` returns in a process of its own; None if that ended badly."""
    answer = root / "answer.json"
    answer.unlink(missing_ok=True)
    return json.loads(answer.read_text()) if ended(child(work, answer)) == 0 and answer.exists() else None


def digest(state: State) -> str:
    """A hash of tensors by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def final(out: Path) -> str:
    """A hash of the weights that a run ended with."""
    return digest(load_file(out / "final.safetensors"))


def fresh(root: Path, name: str) -> Path:
    """An empty folder."""
    out = root / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return out


# --- kills ---------------------------------------------------------------------------------------------------------


def changes(out: Path) -> int:
    """A number that is another one when a file in the folder has changed."""
    found = 0
    for path, _, files in os.walk(out):
        for name in files:
            try:
                entry = os.stat(os.path.join(path, name))
            except OSError:
                continue
            found ^= hash((path, name, entry.st_size, entry.st_mtime_ns))
    return found


def wait_for_writing(out: Path, seconds: float, draw: random.Random) -> None:
    """Until the first change of the folder after a random time, and up to 20 ms more: most often into a save."""
    time.sleep(draw.uniform(0.1, 0.9) * seconds)
    before, until = changes(out), time.monotonic() + seconds
    while time.monotonic() < until and changes(out) == before:
        pass
    time.sleep(draw.uniform(0.0, 0.02))


def killed(peer: Peer, root: Path, seconds: float, writing: bool, draw: random.Random) -> Path:
    """The folder of a run that was killed; one that ended before that does not count, and another is begun."""
    while True:
        out = fresh(root, "killed")
        pid = child(lambda out=out: peer.train(out))
        if writing:
            wait_for_writing(out, seconds, draw)
        else:
            time.sleep(draw.uniform(0.0, seconds))
        if os.waitpid(pid, os.WNOHANG)[0] == 0:
            kill(pid)
            if ended(pid) == -signal.SIGKILL and not (out / "final.safetensors").exists():
                return out


def kills(peer: Peer, root: Path, count: int, seed: int) -> dict[str, Any]:
    """Half at random moments and half while something is written; the same command again; the weights compared."""
    draw = random.Random(seed)
    whole, again = fresh(root, "whole"), fresh(root, "again")
    assert ended(child(lambda: peer.train(whole))) == 0, f"{peer.name}: the undisturbed run failed"
    began = time.monotonic()
    ended(child(lambda: peer.train(again)))
    seconds = time.monotonic() - began
    told = {"kills": count, "resumed": 0, "equal": 0, "repeatable": final(again) == final(whole), "seconds": seconds}
    for number in range(count):
        out = killed(peer, root, seconds, number % 2 == 1, draw)
        fine = ended(child(lambda out=out: peer.train(out))) == 0
        told["resumed"] += fine
        told["equal"] += fine and final(out) == final(whole)
    return told


CIRCUMSTANCES = ("with augmentation and dropout", "without augmentation", "without dropout", "with neither")


def exactness(peer: Peer, root: Path) -> dict[str, bool]:
    """Ended within the last epoch and given again: the weights of the undisturbed run? Under four circumstances."""
    told = {}
    for circumstance in CIRCUMSTANCES:
        shift, drop = Digits.__getitem__, nn.Dropout.forward
        try:
            if circumstance in ("without augmentation", "with neither"):
                Digits.__getitem__ = lambda self, index: (self.images[index], int(self.labels[index]))  # type: ignore
            if circumstance in ("without dropout", "with neither"):
                nn.Dropout.forward = lambda self, input: input  # type: ignore[method-assign]
            whole = fresh(root, "whole")
            ended(child(lambda whole=whole: peer.train(whole)))
            out = unfinished(peer, root)
            fine = ended(child(lambda out=out: peer.train(out))) == 0
            told[circumstance] = fine and final(out) == final(whole)
        finally:
            Digits.__getitem__, nn.Dropout.forward = shift, drop  # type: ignore[method-assign]
    return told


# --- damage --------------------------------------------------------------------------------------------------------


def mutate(files: Sequence[Path], number: int, draw: random.Random) -> None:
    """One bit flipped, an end cut off, or up to 4 KiB zeroed, at a place drawn over all bytes of the files."""
    sizes = [path.stat().st_size for path in files]
    path = draw.choices(list(files), sizes)[0]
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    kind = number % 3
    if kind == 0:
        content[place] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del content[place:]
    else:
        end = min(len(content), place + draw.randint(1, 4096))
        if not any(content[place:end]):
            content[place] ^= 1  # zeros are zeros already
        content[place:end] = bytes(end - place) if any(content[place:end]) else content[place:end]
    path.write_bytes(content)


def loaded(peer: Peer, out: Path) -> str:
    """What loading comes to: a hash, or "noticed"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return digest(peer.state(out))
    except Exception:
        return "noticed"


def mutations(peer: Peer, root: Path, count: int, seed: int) -> dict[str, int]:
    """Damage the newest checkpoint of a run that was killed in its last epoch; load it; put it right again."""
    out, kept = unfinished(peer, root), root / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(out, kept)
    draw = random.Random(seed)

    def work(first: int, last: int, state: Any) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            draw.setstate(state)
            good, told = loaded(peer, out), {"noticed": 0, "silent": 0, "harmless": 0}
            assert good != "noticed", "the sound checkpoint does not load"
            for number in range(first, last):
                files = peer.newest(out)
                before = {path: path.read_bytes() for path in files}
                mutate(files, number, draw)
                found = loaded(peer, out)
                told["noticed" if found == "noticed" else "harmless" if found == good else "silent"] += 1
                for path, content in before.items():
                    path.write_bytes(content)
            return {"told": told, "state": draw.getstate()}

        return run

    found = asked(work(0, count, draw.getstate()), root)
    return {"mutations": count, **({"died": count} if found is None else found["told"])}


def unfinished(peer: Peer, root: Path) -> Path:
    """A run with a checkpoint that it can go on from: ended in its last epoch."""
    out = fresh(root, "unfinished")

    def run() -> None:
        losses = [0]
        loss = nn.functional.cross_entropy

        def counted(*arguments: Any, **options: Any) -> Any:
            losses[0] += 1
            if losses[0] > 11 * (EPOCHS - 1) + 6 and torch.is_grad_enabled():
                os._exit(9)
            return loss(*arguments, **options)

        nn.functional.cross_entropy = counted  # type: ignore[assignment]
        peer.train(out)

    ended(child(run))
    return out


# --- hostile files -------------------------------------------------------------------------------------------------


class Payload:
    """Whoever unpickles this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def hostile(peer: Peer, root: Path) -> dict[str, Any]:
    """Put a pickle that runs a command in the place of each file of the checkpoint in turn, as torch.save writes it
    and as pickle does; load; look whether the command ran.
    """
    import pickle

    out, marker = unfinished(peer, root), root / "marker"
    ran: list[str] = []
    cases = 0
    for path in peer.newest(out):
        content = path.read_bytes()
        for form in ("torch", "pickle"):
            if form == "torch":
                torch.save(Payload(marker), path)
            else:
                path.write_bytes(pickle.dumps(Payload(marker)))
            marker.unlink(missing_ok=True)
            asked(lambda: loaded(peer, out), root)
            cases += 1
            if marker.exists():
                ran.append(f"{path.name} ({form})")
        path.write_bytes(content)
    return {"files": cases, "refused": cases - len(ran), "ran": ran}


# --- numbers and time ----------------------------------------------------------------------------------------------


def not_a_number(peer: Peer, root: Path) -> dict[str, Any]:
    """The loss of one training step is NaN: do the weights stay finite, and how does the run end?"""
    out = fresh(root, "nan")

    def run() -> None:
        steps, loss = [0], nn.functional.cross_entropy

        def spoiled(*arguments: Any, **options: Any) -> Any:
            value = loss(*arguments, **options)
            if value.requires_grad:
                steps[0] += 1
                if steps[0] == NAN_STEP:
                    return value * math.nan
            return value

        nn.functional.cross_entropy = spoiled  # type: ignore[assignment]
        peer.train(out)

    status = ended(child(run))

    def finite() -> bool:
        done = out / "final.safetensors"
        state = load_file(done) if done.exists() else peer.state(out)
        return all(bool(torch.isfinite(tensor).all()) for tensor in state.values() if tensor.is_floating_point())

    return {"status": status, "weights finite": asked(finite, root)}


def save_time(peer: Peer, root: Path) -> dict[str, float]:
    """How long a save takes, and a run in all: the median of the saves of a run."""
    out = fresh(root, "timed")

    def run() -> dict[str, float]:
        owner, name = peer.saver()
        call, seconds = getattr(owner, name), []

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.monotonic()
            try:
                return call(*arguments, **options)
            finally:
                seconds.append(time.monotonic() - began)

        setattr(owner, name, timed)
        began = time.monotonic()
        peer.train(out)
        return {"run": time.monotonic() - began, "save": statistics.median(seconds), "saves": len(seconds)}

    found = asked(run, root)
    assert found is not None, f"{peer.name}: the timed run failed"
    found["bytes"] = sum(path.stat().st_size for path in peer.newest(out))
    return found


# --- all of it -----------------------------------------------------------------------------------------------------


def measure(peer: Peer, root: Path, kill_count: int, mutation_count: int, seed: int) -> dict[str, Any]:
    """Everything about one of them."""
    found = {
        "kills": kills(peer, root, kill_count, seed),
        "exactness": exactness(peer, root),
        "mutations": mutations(peer, root, mutation_count, seed),
        "hostile": hostile(peer, root),
        "nan": not_a_number(peer, root),
        "save": save_time(peer, root),
        "images": asked(lambda: outcomes(peer.name, root / "images"), root),
    }
    print(peer.name, json.dumps(found), file=sys.stderr)
    return found


def row(title: str, cells: Sequence[object]) -> str:
    """A line of a markdown table."""
    return f"| {title} | " + " | ".join(str(cell) for cell in cells) + " |"


def table(found: dict[str, dict[str, Any]]) -> str:
    """The table in markdown."""
    columns = list(found.values())
    names = list(found)
    kills, damage = [each["kills"] for each in columns], [each["mutations"] for each in columns]
    images = [each["images"] or {} for each in columns]
    lines = [
        row("", names),
        "|---" * (len(names) + 1) + "|",
        row("an undisturbed run gives the same weights twice", ["yes" if k["repeatable"] else "no" for k in kills]),
        row("killed, then the same command: resumed", [f"{k['resumed']} of {k['kills']}" for k in kills]),
        row("… and ended in the weights of the undisturbed run", [f"{k['equal']} of {k['kills']}" for k in kills]),
        *(
            row(f"… ended in the last epoch, {each}: equal", ["yes" if c["exactness"][each] else "no" for c in columns])
            for each in CIRCUMSTANCES
        ),
        row("damaged checkpoints noticed", [f"{d.get('noticed', 0)} of {d['mutations']}" for d in damage]),
        row("… loaded with other weights or momenta, silently", [d.get("silent", 0) for d in damage]),
        row("… loaded, these unchanged", [d.get("harmless", 0) for d in damage]),
        row(
            "code in a file of the checkpoint refused",
            [f"{each['hostile']['refused']} of {each['hostile']['files']}" for each in columns],
        ),
        row(
            "a NaN loss in one step reached the weights",
            ["no" if each["nan"]["weights finite"] else "yes" for each in columns],
        ),
        row("… and the run said so", ["yes" if each["nan"]["status"] else "no" for each in columns]),
        row(f"of {len(KINDS)} kinds of images handled", [sum(v["fine"] for v in i.values()) for i in images]),
        row("… of the user's files changed", [sum(v["changed"] for v in i.values()) for i in images]),
        row("one save, ms (median)", [f"{1000 * each['save']['save']:.1f}" for each in columns]),
        row("… of KB", [f"{each['save']['bytes'] / 1000:.0f}" for each in columns]),
    ]
    return "\n".join(lines)


def images_table(found: dict[str, dict[str, Any]]) -> str:
    """What became of each kind of image."""
    names = list(found)
    lines = [row("", names), "|---" * (len(names) + 1) + "|"]
    for kind, (_, _, wanted) in KINDS.items():
        cells = []
        for each in found.values():
            told = (each["images"] or {}).get(kind, {"fine": False, "what": "the process died"})
            cells.append(("" if told["fine"] else "**✗** ") + told["what"])
        lines.append(row(f"{kind} — {wanted}", cells))
    return "\n".join(lines)


def versions() -> str:
    """Of the libraries."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)


def machine() -> str:
    """What this was measured on."""
    return f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}, one thread each"


PAGE = """# Faults: a plain recipe, Accelerate, the Trainer, timm and Skipway

`python -m benchmarks.faults.peers --kills {kills} --mutations {mutations} --out benchmarks/faults/peers.md`,
{date}, {machine}.
Python {python}, {versions}. It took {minutes:.0f} minutes.

{table}

## What was done

The programs are in [`recipes.py`](recipes.py), each after its library's documentation: {usages}

* **Kills**: SIGKILL, half of them at a random moment of the run, half within 20 ms after a file in the folder
  changed. Then the same command is run once more; no file is touched by hand. "Equal" means bit for bit. A run that
  is killed before its first checkpoint starts from the beginning and is equal for every library. The documented
  procedures restore weights, optimizer and schedule, some also the state of the random numbers, but not always the
  order, augmentation and dropout of the interrupted epoch. The rows below "equal" show where they differ: there,
  every run is stopped at the same step of its last epoch. Skipway's run uses random shifts and stochastic depth
  throughout.
* **Damage**: one bit flipped, the end cut off, or up to 4 KiB zeroed, a third each, at a position drawn over all
  bytes of the newest checkpoint. It counts as noticed if loading raises an exception or, for Skipway, if it reports
  the damage and takes the checkpoint before.
* **Code**: a pickle that runs a command in the place of each file of the checkpoint in turn, as `torch.save` and as
  `pickle.dump` write it. {ran}
* **NaN**: the loss of step {nan} is multiplied by NaN.
* **Save**: with fsync, hashes and reading back for Skipway, without for the others. Milliseconds, on a machine that
  did other work at the same time.
* **Images**: twelve files, each next to eight intact ones, read through {readers}. The same rule applies to all,
  whatever each documents: a damaged file is handled if it is left out or refused *and* named, in an error or in a
  log; an intact one if its pixels are right.

{images}
"""


def usages() -> str:
    """One clause per recipe."""
    texts = [f"{peer.name}: {' '.join((peer.train.__doc__ or '').split()).rstrip('.')}" for peer in PEERS]
    return "; ".join(texts) + "."


def page(found: dict[str, dict[str, Any]], given: argparse.Namespace, minutes: float) -> str:
    """All of it as markdown."""
    ran = {name: each["hostile"]["ran"] for name, each in found.items() if each["hostile"]["ran"]}
    told = "; ".join(f"{name} ran it from {', '.join(files)}" for name, files in ran.items()) or "Nobody ran it"
    return PAGE.format(
        kills=given.kills,
        mutations=given.mutations,
        date=date.today().isoformat(),
        machine=machine(),
        python=platform.python_version(),
        versions=versions(),
        minutes=minutes,
        table=table(found),
        usages=usages(),
        ran=told + ".",
        nan=NAN_STEP,
        readers=", ".join(f"{reader.__doc__} ({name})" for name, reader in READERS.items()),
        images=images_table(found),
    )


def start() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--mutations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", nargs="+", default=[peer.name for peer in PEERS])
    parser.add_argument("--out", type=Path, help="markdown file to write; else it is printed")
    given = parser.parse_args()
    began = time.monotonic()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    torch.set_num_threads(1)
    import_torchvision()
    preload()
    for peer in PEERS:
        for library in peer.libraries:
            importlib.import_module(library)
    found = {}
    for peer in PEERS:
        if peer.name in given.peers:
            with tempfile.TemporaryDirectory() as name:
                found[peer.name] = measure(peer, Path(name), given.kills, given.mutations, given.seed)
    text = page(found, given, (time.monotonic() - began) / 60)
    if given.out is None:
        print(text)
    else:
        given.out.write_text(text)


if __name__ == "__main__":
    start()
