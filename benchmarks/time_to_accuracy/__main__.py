"""The commands of `python -m benchmarks.time_to_accuracy`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.time_to_accuracy import __doc__ as about
from benchmarks.time_to_accuracy.ablation import PARTS, ablate, table_lines
from benchmarks.time_to_accuracy.plain_script import NETWORKS, plain
from benchmarks.time_to_accuracy.race import PLANS, race
from skipway.hardware import cpu_count


def run_race(given: argparse.Namespace) -> None:
    """Both contestants, in turns, to each goal."""
    result = race(given)
    for goal, row in result["goals"].items():
        best = {name: max((accuracy for _, accuracy in curve), default=0) for name, curve in row["curves"].items()}
        times = [f"{name} {row[name]} s" if row[name] else f"{name} not (best {best[name]:.4f})" for name in best]
        print(f"{goal}: {', '.join(times)}, plain / skipway {row['plain / skipway']}")
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


def show_table(given: argparse.Namespace) -> None:
    """The table of an ablation, in Markdown."""
    print("\n".join(table_lines([json.loads(line) for line in given.out.read_text().splitlines()])))


def start() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    options = commands.add_parser("race", help=run_race.__doc__)
    options.set_defaults(call=run_race)
    options.add_argument("data", type=Path, help="folder with train/<class>/* and test/<class>/*")
    options.add_argument("--goals", type=float, nargs="+", choices=list(PLANS), default=list(PLANS))
    options.add_argument("--minutes", type=float, default=20.0, help="for all together, at most [20]")
    options.add_argument("--threads", type=int, default=cpu_count(), help="of both, and worker processes [cores]")
    options.add_argument("--model", help="of skipway, for all goals [by goal]")
    options.add_argument("--plain-network", choices=list(NETWORKS), help="of the plain script [by goal]")
    options.add_argument("--epochs", type=int, help="of skipway, for all goals [by goal]")
    options.add_argument("--plain-epochs", type=int, help="of the plain script, for all goals [by goal]")
    options.add_argument("--width", type=int, help="channels of skipway's first stage, for all goals [by goal]")
    options.add_argument("--plain-width", type=int, help="channels of the plain script's, for all goals [by goal]")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="JSON file for the result")

    options = commands.add_parser("plain", help="the script to compare with")
    options.set_defaults(call=plain)
    options.add_argument("data", type=Path)
    options.add_argument("--epochs", type=int, required=True)
    options.add_argument("--batch-size", type=int, required=True)
    options.add_argument("--lr", type=float, required=True)
    options.add_argument("--workers", type=int, default=cpu_count())
    options.add_argument("--shift", type=int, default=4, help="pixels, at most [4]")
    options.add_argument("--network", choices=list(NETWORKS), default="strided", help="how images are halved [strided]")
    options.add_argument("--width", type=int, default=64, help="channels of the first stage [64]")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--rows", type=Path, required=True, help="gets a line of JSON for each epoch")

    options = commands.add_parser("ablation", help=ablate.__doc__)
    options.set_defaults(call=ablate)
    options.add_argument("data", type=Path)
    options.add_argument("--out", type=Path, required=True, help="JSON lines; what it has is not repeated")
    options.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--epochs", type=float, default=4)
    options.add_argument("--threads", type=int, default=1)

    options = commands.add_parser("table", help=show_table.__doc__)
    options.set_defaults(call=show_table)
    options.add_argument("out", type=Path)
    given = parser.parse_args()
    given.call(given)


start()
