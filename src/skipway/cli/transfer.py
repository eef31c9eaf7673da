"""`skipway transfer`: does the learning rate of a shallow network suit a deep one?"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from skipway.cli.option_names import option_words
from skipway.cli.study import parse_integers, split_specs
from skipway.errors import duration, printable

if TYPE_CHECKING:
    from rich.status import Status

    from skipway.depth_transfer import DepthTransfer

__all__ = ["transfer"]

Flag = Annotated[bool, Parameter(negative=())]
NETWORKS, BATCH, TRAINING, MACHINE, OUTPUT = (
    Group(name, sort_key=number) for number, name in enumerate(("Networks", "Batch", "Training", "Machine", "Output"))
)
STATUS = {"carries": 0, "does not carry": 1, "undecided": 4}
SECONDS_BETWEEN_LINES = 10.0


def transfer(
    model: str,
    /,
    *,
    depths: Annotated[str, Parameter(group=NETWORKS)],
    schemes: Annotated[str, Parameter(group=NETWORKS)] = "own,depthscaled(exponent=1)",
    batch: Annotated[Path | None, Parameter(group=BATCH)] = None,
    samples: Annotated[int, Parameter(group=BATCH)] = 32,
    columns: Annotated[str | None, Parameter(group=BATCH)] = None,
    optimizer: Annotated[str, Parameter(group=TRAINING)] = "adamw",
    weight_decay: Annotated[float, Parameter(group=TRAINING)] = 0.0,
    warmup: Annotated[int | None, Parameter(group=TRAINING)] = None,
    schedule: Annotated[str, Parameter(group=TRAINING)] = "constant",
    clip: Annotated[float | None, Parameter(group=TRAINING)] = None,
    steps: Annotated[int, Parameter(group=TRAINING)] = 60,
    seeds: Annotated[int, Parameter(group=TRAINING)] = 3,
    coordinates_only: Annotated[Flag, Parameter(group=TRAINING)] = False,
    lr: Annotated[float | None, Parameter(group=TRAINING)] = None,
    device: Annotated[str, Parameter(group=MACHINE)] = "auto",
    out: Annotated[Path, Parameter(name=("--out", "-o"), group=OUTPUT)] = Path("transfers"),
    json: Annotated[Flag, Parameter(group=OUTPUT)] = False,
    quiet: Annotated[Flag, Parameter(group=OUTPUT)] = False,
) -> int:
    """Measure by short trainings whether the best learning rate of a shallow network is that of a deep one.

    Every training is stored immediately; the same command resumes an interrupted one. Exit status 1: the rate does not
    carry; 4: that cannot be told yet.

    Args:
        model: A Skipway family or variant, or FILE.py:NAME of a function of the depth.
        depths: Comma-separated depths: 4,8,16.
        schemes: Comma-separated schemes; own is the network as it is.
        batch: Images as for `train`, or a text. [the file's, digits, a text]
        samples: Samples in a batch of --batch or bundled data.
        columns: Columns of a list, or of the text in a table. [by content]
        optimizer: adamw, sgd(momentum=0.95), muon, …
        weight_decay: Weight decay.
        warmup: Steps in which the rate rises. [a tenth; onecycle 0]
        schedule: Rate after warm-up: constant, cosine, trapezoid.
        clip: Largest norm of the gradient. [none]
        steps: Steps of each training.
        seeds: Trainings at each rate.
        coordinates_only: Check coordinates only; sweep no rates.
        lr: Rate of the coordinate check. [the best of the shallowest]
        device: auto, cpu, cuda.
        out: Folder for trainings, JSON and page.
        json: Print JSON instead of tables.
        quiet: Print the answer only.
    """
    from skipway.depth_transfer import transfer as measure_transfer

    # waiting threads sleep; see `skipway train`
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    name = re.sub(r"[^\w.-]+", "-", model).strip("-.")
    chosen = parse_integers("depths", depths)
    runs = out / f"{name}.jsonl"
    try:
        with ProgressLine(quiet=quiet) as progress:
            found = measure_transfer(
                model,
                chosen,
                batch,
                schemes=split_specs(schemes),
                optimizer=optimizer,
                weight_decay=weight_decay,
                warmup=warmup,
                schedule=schedule,
                clip=clip,
                steps=steps,
                seeds=seeds,
                samples=samples,
                columns=columns,
                sweep=not coordinates_only,
                lr=lr,
                runs=runs,
                device=device,
                progress=progress,
            )
    except KeyboardInterrupt:
        sys.stderr.write(f"\nthe trainings so far are in {runs}; the same command resumes from there\n")
        raise
    options = {
        "schemes": schemes,
        "batch": batch,
        "steps": steps,
        "optimizer": optimizer,
        "seeds": seeds,
        "samples": samples,
        "columns": columns,
        "weight_decay": weight_decay or None,
        "warmup": warmup,
        "schedule": None if schedule == "constant" else schedule,
        "clip": clip,
        "coordinates_only": coordinates_only,
        "lr": lr,
        "device": None if device == "auto" else device,
    }
    command = command_of(model, depths, options)
    pages = write_files(found, out, name, command)
    print_result(found, pages, json=json, quiet=quiet)
    return STATUS[found.answer] if found.schemes else 0


def command_of(model: str, depths: str, options: dict[str, Any]) -> str:
    """The command line of a depth transfer.

    >>> command_of("gpt-micro", "2,4", {"steps": 60})
    'skipway transfer gpt-micro --depths 2,4 --steps 60'
    """
    return shlex.join(["skipway", "transfer", model, "--depths", depths, *option_words(options)])


def write_files(found: DepthTransfer, out: Path, name: str, command: str) -> list[Path]:
    """Write the page and the JSON, and return their paths."""
    from skipway.report import save

    return [save(found, out / f"{name}{ending}", command=command) for ending in (".html", ".json")]


def print_result(found: DepthTransfer, files: list[Path], *, json: bool, quiet: bool) -> None:
    """Print the result as JSON, as its sentence, or as tables, in colours on a terminal."""
    from skipway.depth_transfer.table import transfer_view

    if json:
        sys.stdout.write(found.to_json() + "\n")
        return
    if quiet:
        sys.stdout.write(found.sentence + "\n")
        return
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(transfer_view(found))
    else:
        sys.stdout.write(f"{found}\n")
    for path in files:
        sys.stdout.write(f"{'page' if path.suffix == '.html' else 'json':<10}{path}\n")


class ProgressLine:
    """What was trained last and how long the rest will take: a line that is rewritten on a terminal, else one every ten
    seconds; on standard error.

    Args:
        quiet: say nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.quiet, self.last = quiet, 0.0
        self.status: Status | None = None

    def __enter__(self) -> ProgressLine:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console

            self.status = status = Console(stderr=True, markup=False, highlight=False).status("building the networks")
            status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.status is not None:
            self.status.stop()

    def __call__(self, text: str, seconds: float | None) -> None:
        left = "" if seconds is None else f"; about {duration(seconds)} left"
        line = printable(f"{text}{left}")
        if self.status is not None:
            from rich.text import Text

            self.status.update(Text(line))
        elif not self.quiet and time.monotonic() - self.last > SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
