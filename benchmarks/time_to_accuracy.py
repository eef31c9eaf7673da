"""Wall-clock time to an accuracy on CIFAR-10: `skipway train` beside a plain training script of the same network.

    mkdir -p /work/build/cifar10 && tar -xJf ../shared/data/cifar10-jpeg.tar.xz -C /work/build/cifar10
    python -m benchmarks.time_to_accuracy --data /work/build/cifar10 --minutes 120 --out times.json

Both train the network that `skipway.build` makes, with one recipe: SGD with momentum, a one-cycle rate, smoothed
labels, shifts and flips, an average of the weights, tested with the mirrored image, bfloat16 where the CPU has it. Ours
is the command line. The other is what one writes today: torchvision's ImageFolder and transforms on PIL, a DataLoader
with worker processes, timm's ModelEmaV3, a plain loop (`plain`, below). They take turns epoch by epoch, each stopped
(SIGSTOP) while the other runs, so that both see the same machine; a clock runs only for the one that runs, from the
start of its interpreter on, with reading and decoding the images. Both see the accuracy on the test images after each
epoch, which nothing is chosen by: for `skipway train` they are the validation split, and a thousandth of the training
images, which it never trains on, is its test split.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skipway.hardware import cpu_count, cpu_name

__all__ = ["Contestant", "plain", "race"]

GOALS = (0.8, 0.9)
MODEL = {"depth": 8, "width": 32}
SMOOTHING, AVERAGE, RATE_PER_IMAGE = 0.1, 0.99, 0.4 / 256
SCHEDULE = "onecycle(rise=0.2)"
POLL_SECONDS = 0.02


def options(given: argparse.Namespace) -> list[str]:
    """The recipe as options of `skipway train`."""
    return [
        *("--model", "resnet20", "--depth", str(MODEL["depth"]), "--width", str(MODEL["width"])),
        *("--epochs", str(given.epochs), "--batch-size", str(given.batch_size), "--seed", str(given.seed)),
        *("--lr", str(RATE_PER_IMAGE * given.batch_size), "--weight-decay", "5e-4", "--schedule", SCHEDULE),
        *("--warmup", "0", "--label-smoothing", str(SMOOTHING), "--ema", str(AVERAGE), "--flip-test"),
        *("--crop", "pad", "--flip", "--device", "cpu", "--precision", given.precision),
    ]


def plain(given: argparse.Namespace) -> None:
    """The script to compare with: one line of JSON for each epoch."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    import skipway as sw
    from benchmarks.peers import import_timm
    from skipway.hardware.device import cpu_has_bfloat16
    from skipway.optim.schedules import lr_factor, parse_schedule
    from skipway.recipe import ResolvedRecipe

    import_timm()
    from timm.utils import ModelEmaV3
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    torch.manual_seed(given.seed)
    normalize = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    varied = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]
    train = ImageFolder(str(given.data / "train"), transforms.Compose(varied))
    test = ImageFolder(str(given.data / "test"), transforms.Compose([transforms.ToTensor(), normalize]))
    train_loader = DataLoader(
        train, given.batch_size, shuffle=True, drop_last=True, num_workers=given.workers, persistent_workers=True
    )
    test_loader = DataLoader(test, given.batch_size, num_workers=given.workers, persistent_workers=True)

    net: Any = sw.build("resnet20", classes=len(train.classes), channels=3, **MODEL)
    net = net.to(memory_format=torch.channels_last)
    recipe = ResolvedRecipe(batch_size=given.batch_size, lr=RATE_PER_IMAGE * given.batch_size, weight_decay=5e-4)
    groups = sw.param_groups(net, lr=recipe.peak_lr, weight_decay=recipe.decay)
    optimizer = recipe.optimizer_spec.build(groups)
    total, shape = given.epochs * len(train_loader), parse_schedule(SCHEDULE)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(min(step, total - 1), total, 0.0, shape)
    )
    average = ModelEmaV3(net, decay=AVERAGE, use_warmup=True)
    half = given.precision == "bfloat16" or (given.precision == "auto" and cpu_has_bfloat16())
    done = 0
    for epoch in range(1, given.epochs + 1):
        net.train()
        loss_sum = 0.0
        for images, labels in train_loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                logits = net(images.to(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            done += 1
            average.update(net, step=done)
            loss_sum += loss.item()
        average.eval()
        correct = 0
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            for images, labels in test_loader:
                images = images.to(memory_format=torch.channels_last)
                logits = average(images).float() + average(images.flip(-1)).float()
                correct += int((logits.argmax(1) == labels).sum())
        row = {"epoch": epoch, "validation_accuracy": correct / len(test), "train_loss": loss_sum / len(train_loader)}
        with given.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")


@dataclass
class Contestant:
    """A training in a process group of its own that runs only in its turns.

    Args:
        name: for the table.
        command: what to start.
        rows: the file that gets a line of JSON for each epoch.
        log: where its output goes.
        environment: of the command.
        metric: what the lines are read for.
        seconds: that it has run so far.
        results: (seconds, metric) at the end of each epoch.
    """

    name: str
    command: list[str]
    rows: Path
    log: Path
    environment: dict[str, str]
    metric: str = "validation_accuracy"
    seconds: float = 0.0
    results: list[tuple[float, float]] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    def turn(self, most: float) -> bool:
        """Run until an epoch is done, for so many seconds at most; False once it has ended or time is up."""
        began = time.monotonic()
        if self.process is None:
            log = self.log.open("wb")
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        else:
            os.killpg(self.process.pid, signal.SIGCONT)
        ended = late = False
        while len(found := self.read()) == len(self.results) and not ended and not late:
            time.sleep(POLL_SECONDS)
            ended, late = self.process.poll() is not None, time.monotonic() - began > most
        if not ended:
            os.killpg(self.process.pid, signal.SIGSTOP)
        self.seconds += time.monotonic() - began
        if len(found) > len(self.results):
            self.results.append((self.seconds, found[-1][self.metric]))
            print(
                f"{self.name:14} {len(self.results):3}  {self.seconds:8.1f} s  {self.metric} {self.results[-1][1]:.4f}"
            )
            sys.stdout.flush()
            return True
        if ended and self.process.returncode:
            raise SystemExit(f"{self.name} failed:\n{self.log.read_text()[-2000:]}")
        return False

    def read(self) -> list[dict[str, Any]]:
        """The complete lines so far."""
        if not self.rows.exists():
            return []
        return [json.loads(line) for line in self.rows.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def end(self) -> None:
        """Kill it and all that it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def time_to(self, goal: float) -> float | None:
        """Seconds until the first epoch that ends with this accuracy."""
        return next((seconds for seconds, accuracy in self.results if accuracy >= goal), None)

    def reached(self, goal: float) -> bool:
        """Whether there was one."""
        return self.time_to(goal) is not None


def race(given: argparse.Namespace, root: Path) -> list[Contestant]:
    """Both, in turns, until both have reached the goal, their epochs are done or the time is up."""
    here = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here / "src"), str(here)]),
        "OMP_NUM_THREADS": str(given.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "SKIPWAY_CACHE": str(root / "cache"),  # an empty one: reading the images counts
    }
    data = root / "data"
    data.mkdir()
    for split, name in (("train", "train"), ("val", "test")):
        (data / split).symlink_to(given.data / name, target_is_directory=True)
    ours = ["-m", "skipway", "train", str(data), "--holdout", "0.001", "--out", str(root / "ours"), *options(given)]
    kept = {name: getattr(given, name) for name in ("epochs", "batch_size", "seed", "precision", "workers")}
    flags = [part for name, value in kept.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    rows = root / "plain.jsonl"
    theirs = [
        "-m",
        "benchmarks.time_to_accuracy",
        "--data",
        str(given.data),
        *flags,
        "--rows",
        str(rows),
    ]
    contestants = [
        Contestant("skipway", [sys.executable, *ours], root / "ours" / "metrics.jsonl", root / "ours.log", environment),
        Contestant("plain", [sys.executable, *theirs], rows, root / "plain.log", environment),
    ]
    until = time.monotonic() + 60 * given.minutes
    running = list(contestants)
    try:
        while running and time.monotonic() < until:
            for each in list(running):
                left = until - time.monotonic()
                if left <= 0 or not each.turn(left) or each.reached(given.goal):
                    running.remove(each)
    finally:
        for each in contestants:
            each.end()
    return contestants


def machine() -> str:
    """What this is measured on."""
    return f"{cpu_name()}, {cpu_count()} cores"


def told(contestants: list[Contestant], given: argparse.Namespace) -> dict[str, Any]:
    """Times, and the ratio of plain to skipway."""
    ours, theirs = contestants
    goals = {}
    for goal in sorted({*GOALS, given.goal}):
        mine, other = ours.time_to(goal), theirs.time_to(goal)
        ratio = None if mine is None or other is None else round(other / mine, 2)
        goals[f"{100 * goal:g} %"] = {"skipway": mine, "plain": other, "plain / skipway": ratio}
    epochs = min(len(ours.results), len(theirs.results))
    same = round(theirs.results[epochs - 1][0] / ours.results[epochs - 1][0], 2) if epochs else None
    return {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "threads": given.threads,
        "options": options(given),
        "goals": goals,
        "epochs both": epochs,
        "plain / skipway, the same epochs": same,
        "curves": {each.name: each.results for each in contestants},
    }


def start() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--minutes", type=float, default=120.0, help="for both together, at most [120]")
    parser.add_argument("--goal", type=float, default=0.9, help="accuracy at which each one may stop [0.9]")
    parser.add_argument("--epochs", type=int, default=16, help="that the schedule is for [16]")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument(
        "--workers", type=int, default=cpu_count(), help="of the plain script's DataLoader [one per core]"
    )
    parser.add_argument("--threads", type=int, default=cpu_count(), help="of both [one per core]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.data = given.data.resolve()
    if given.rows is not None:
        plain(given)
        return
    with tempfile.TemporaryDirectory() as name:
        result = told(race(given, Path(name)), given)
    print(json.dumps({name: value for name, value in result.items() if name != "curves"}, indent=2))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    start()
