"""The preset with each of its parts switched off in turn, and with parts that it does not have."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.time_to_accuracy.race import environment, linked_data, machine

__all__ = ["PARTS", "Part", "ablate", "table_lines"]

COMMAND = "import sys; from skipway.cli import main; sys.exit(main(sys.argv[1:]))"
# every image mirrored by a coin in every epoch
COINS = (
    "from skipway.data import batches, randomness as r; "
    "batches.alternating = lambda count, seed, epoch: r.uniforms(count, 1, seed, epoch, 'flip')[:, 0]; "
)


class Part(NamedTuple):
    """What is changed of the preset.

    Args:
        options: of `skipway train`, which replace those of the preset.
        share: epochs over those of the preset, with which the processor time is about the same.
        before: Python that is run before the command, for what has no option.
    """

    options: tuple[str, ...] = ()
    share: float = 1.0
    before: str = ""


PARTS = {
    "the preset": Part(),
    "full size from the start": Part(("--grow-from", "32"), 0.5),
    "random first convolution": Part(("--start", "random")),
    "SGD for Muon": Part(("--optimizer", "sgd", "--lr", "0.8")),
    "AdamW for Muon": Part(("--optimizer", "adamw", "--lr", "0.004")),
    "cosine for one cycle": Part(("--schedule", "cosine", "--warmup", "0.2")),
    "no label smoothing": Part(("--label-smoothing", "0")),
    "no mirrored test image": Part(("--no-flip-test",)),
    "flips by a coin": Part(before=COINS),
    "no flips": Part(("--no-flip", "--no-flip-test")),
    "no shifts": Part(("--crop", "none")),
    "batch 250": Part(("--batch-size", "250")),
    "batch 1000": Part(("--batch-size", "1000")),
    "float32": Part(("--precision", "float32"), 0.5),
    "CIFAR's stem": Part(("--model", "resnet8", "--width", "32"), 0.75),
    "with random erasing": Part(("--augment", "erasing")),
    "with averaged weights": Part(("--ema", "0.98")),
}


def ablate(given: Namespace) -> None:
    """Train with each part and seed that the file does not have."""
    rows = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    known = {(row["part"], row["seed"], row["epochs"]) for row in rows}
    for seed in given.seeds:
        for name in given.parts:
            epochs = max(1, round(given.epochs * PARTS[name].share))
            if (name, seed, epochs) in known:
                continue
            row = train(given, PARTS[name], epochs, seed)
            with given.out.open("a") as file:
                file.write(json.dumps({"part": name, "seed": seed, "epochs": epochs, **row}) + "\n")
            print(f"{name}, seed {seed}: {row['accuracy']:.4f} in {row['processor']:.0f} s of one core", flush=True)


def train(given: Namespace, part: Part, epochs: int, seed: int) -> dict[str, Any]:
    """The accuracy after the last epoch, the best one, and seconds of processor time of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data, out = linked_data(given.data, root), root / "run"
        options = ["--preset", "fast", "--epochs", str(epochs), "--holdout", "0.001", "--outside", "--device", "cpu"]
        command = [sys.executable, "-c", part.before + COMMAND, "train", str(data), *options, *part.options]
        done = subprocess.run(
            [*command, "--seed", str(seed), "--out", str(out), "--health", "0"],
            env=environment(root, given.threads),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        curve = [json.loads(line)["validation_accuracy"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    about = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "options": list(part.options)}
    return {"accuracy": curve[-1], "curve": curve, "processor": round(seconds, 1), **about}


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each part: mean accuracy over the seeds, its difference from the preset's, the processor time."""
    by_part: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_part.setdefault(row["part"], []).append(row)
    base = mean([row["accuracy"] for row in by_part["the preset"]])
    lines = ["| | epochs | accuracy | beside the preset | processor time | seeds |", "|---|---|---|---|---|---|"]
    for name, found in by_part.items():
        accuracy, seconds = (mean([row[key] for row in found]) for key in ("accuracy", "processor"))
        beside = "" if name == "the preset" else f"{100 * (accuracy - base):+.1f}"
        cells = (name, found[0]["epochs"], f"{100 * accuracy:.1f} %", beside, f"{seconds:.0f} s", len(found))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def mean(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)
