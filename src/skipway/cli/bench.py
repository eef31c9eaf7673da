"""`skipway bench`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from skipway.errors import MissingExtraError, SkipwayError, printable

if TYPE_CHECKING:
    from skipway.speed.journal import Journal
    from skipway.speed.summary import Standing

__all__ = ["bench"]

WORK, FIELD, RUNNING, OUTPUT = (
    Group(name, sort_key=number) for number, name in enumerate(("Work", "Contenders", "Running", "Output"))
)
NO_RESULT = 1
MODES = ("eager", "channels-last", "compiled", "frozen", "accelerate", "optimize")


def several(group: Group) -> Parameter:
    """An option that takes values up to the next option."""
    return Parameter(group=group, consume_multiple=True, negative=())


def bench(
    networks: Annotated[list[str] | None, Parameter(negative=())] = None,
    /,
    *,
    what: Annotated[tuple[Literal["infer", "train", "memory", "startup", "growth"], ...] | None, several(WORK)] = None,
    precision: Annotated[tuple[Literal["float32", "bfloat16"], ...] | None, several(WORK)] = None,
    batch: Annotated[tuple[int, ...] | None, several(WORK)] = None,
    size: Annotated[tuple[int, ...] | None, several(WORK)] = None,
    branches: Annotated[tuple[int, ...] | None, several(WORK)] = None,
    peers: Annotated[tuple[Literal["timm", "torchvision", "transformers"], ...] | None, several(FIELD)] = None,
    modes: Annotated[
        tuple[Literal["eager", "channels-last", "compiled", "frozen", "accelerate", "optimize"], ...] | None,
        several(FIELD),
    ] = None,
    switches: Annotated[bool, Parameter(group=FIELD)] = True,
    ceilings: Annotated[bool, Parameter(group=FIELD)] = True,
    rounds: Annotated[int, Parameter(group=RUNNING)] = 5,
    budget: Annotated[float | None, Parameter(group=RUNNING)] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], Parameter(group=RUNNING)] = "auto",
    out: Annotated[Path, Parameter(name=("--out", "-o"), group=OUTPUT)] = Path("bench"),
) -> int:
    """Race our networks against timm, torchvision and transformers on this machine.

    All contenders of a piece of work take turns in one run; what counts is the ratio in each round. What is measured is
    on disk at once: the same command goes on where it was stopped.

    Args:
        networks: Names of models, or FAMILY@BRANCHES: vit@1000. [resnet50 and small ViT, ConvNeXt and Swin; on a
            GPU base ones]
        what: Inference, training steps, their peak memory, import and build time, training by depth. [infer train]
        precision: Of the numbers. [both]
        batch: Images at a time; several to see how speed grows. [16; 128 on a GPU]
        size: Side of the images in pixels; several to see how speed grows. [224]
        branches: Depths of growth. [8 32 128 512 2048 10000]
        peers: Whom to race against. [all three]
        modes: Ways of running a network; the last two are ours alone. [all]
        switches: Everybody also under our process-wide switches; peers then count apart.
        ceilings: Measure how fast the machine multiplies and copies, too.
        rounds: Turns of each contender.
        budget: Seconds for each race, half of them for preparing. [no limit]
        device: auto, cpu, cuda.
        out: Folder for rows, table and chart.
    """
    # threads that wait should sleep; see `skipway train`
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from skipway.speed.benchmark import BRANCHES, PRECISIONS, Plan, measure
    from skipway.speed.contenders import MODES as KNOWN
    from skipway.speed.summary import standings
    from skipway.training.device import choose_device

    plan = Plan(
        device=choose_device(device).type,
        networks=networks or (),
        what=what or ("infer", "train"),
        precisions=precision or PRECISIONS,
        batches=batch or (),
        sizes=size or (224,),
        branches=branches or BRANCHES,
        peers=("timm", "torchvision", "transformers") if peers is None else peers,
        modes=[name for name in KNOWN if any(belongs(name, mode) for mode in modes or MODES)],
        rounds=rounds,
        budget=budget,
        switches=switches,
        ceilings=ceilings,
    )
    try:
        journal = measure(plan, out, say)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nwhat is measured is in {out}; the same command goes on from there\n")
        raise
    every = standings(journal)
    show(every)
    written(journal, every, out)
    return 0 if every or set(plan.what) <= {"memory", "startup"} else NO_RESULT


def belongs(name: str, mode: str) -> bool:
    """Whether a mode is meant by a word of the command line.

    >>> belongs("optimize-openvino", "optimize"), belongs("frozen", "eager")
    (True, False)
    """
    return name == mode or name.startswith(f"{mode}-")


def say(text: str) -> None:
    """One line, at once: a log is looked at while it grows."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def show(every: list[Standing]) -> None:
    """Best peer against ours in a table."""
    from skipway.cli.tables import print_table
    from skipway.speed.summary import NOTHING
    from skipway.speed.summary import show as number

    rows: list[tuple[str, ...]] = []
    for each in every:
        gains = [each.gain(each.best.get("ours", ""), side) for side in ("peer", "switched")]
        told = [NOTHING if gain is None else str(gain) for gain in gains]
        sides = [f"{number(each.rate(side))} {each.best.get(side, '')}".strip() for side in ("peer", "ours")]
        rows.append((str(each.race.cell), *sides, *told))
    if rows:
        sys.stdout.write("\n")
        print_table(("images/s", "best peer", "ours", "ours / peer", "ours / peer + switches"), rows)


def written(journal: Journal, every: list[Standing], out: Path) -> None:
    """The table and the chart."""
    from skipway.speed.chart import draw
    from skipway.speed.summary import write_markdown

    sys.stdout.write(f"\nrows   {journal.path}\ntable  {write_markdown(journal, out / 'speed.md')}\n")
    try:
        sys.stdout.write(f"chart  {draw(every, out / 'speed.png')}\n")
    except MissingExtraError as error:
        sys.stdout.write(f"chart  {error}\n")
    except SkipwayError:
        # memory, start and growth have tables alone
        return
