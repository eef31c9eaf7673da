"""The published run: our networks against timm, torchvision and transformers, on an idle machine.

Claim     faster than the best of eager, channels-last, compiled and frozen of each
Command   python -m benchmarks.speed [--device cuda] [--networks …] [--precisions …] [--what …] [--peers …] [--modes …]
          [--out FOLDER] [--rounds 7] [--budget 1800] [--name speed]
Method    all contenders of a piece of work take turns in one run; medians of the ratios in each round, with quartiles;
          ceilings of multiplying and copying measured in the same run. Resumable: the same command goes on.
          In parts, where all do not fit one process: `--heat` with some of the modes and peers, as often as it takes,
          then `--finalists 2` for a race of the two fastest of each side, on which the tables are based
Result    benchmarks/NAME.md and .png, with date and machine: speed of a processor with AVX-512, speed-avx2 of one
          without, speed-cuda of a GPU
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.race.architectures import PEERS
from benchmarks.race.chart import draw_chart
from benchmarks.race.devices import DEVICES
from benchmarks.race.modes import MODES
from benchmarks.race.runner import BRANCHES, PRECISIONS, WHAT, BenchmarkPlan, run_plan
from benchmarks.race.summary import deciding_results, write_markdown
from skipway.hardware.device import choose_device

HERE = Path(__file__).parent
SHARED = ("device", "precisions", "peers", "modes", "rounds", "budget", "switches", "heat", "finalists")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=1800.0)
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--networks", nargs="+", default=())
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--what", nargs="+", default=WHAT)
    parser.add_argument("--peers", nargs="+", default=PEERS)
    parser.add_argument("--modes", nargs="+", default=tuple(MODES))
    parser.add_argument("--batches", type=int, nargs="+", default=())
    parser.add_argument("--sizes", type=int, nargs="+", default=(224,))
    parser.add_argument("--branches", type=int, nargs="+", default=BRANCHES)
    parser.add_argument("--switches", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ceilings", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--heat", action="store_true", help="a part of the field, with a pacemaker")
    parser.add_argument("--finalists", type=int, default=0, help="a race of so many of each side of the heats")
    parser.add_argument("--tables", type=Path, default=HERE, help="folder of tables and chart")
    parser.add_argument("--name", help="of the tables and the chart [speed; speed-cuda of a GPU]")
    options = parser.parse_args(arguments)
    choose_device(options.device)
    chosen = {name: getattr(options, name) for name in SHARED}
    own = {name: getattr(options, name) for name in ("what", "networks", "batches", "sizes", "branches", "ceilings")}
    plan = BenchmarkPlan(**own, **chosen)
    journal = run_plan(plan, options.out, lambda text: print(text, flush=True))
    # speed as batch and image size grow, of one network that convolves and one that attends
    for batches, sizes in (((1, 4, 16, 64), (224,)), ((16,), (128, 224, 288))):
        if "growth" in options.what and not options.networks:
            networks = ("resnet50", "vit-small-16")
            grown = BenchmarkPlan(
                networks=networks,
                what=["infer"],
                batches=batches,
                sizes=sizes,
                ceilings=False,
                **chosen,
            )
            journal = run_plan(grown, options.out, lambda text: print(text, flush=True))
    name = options.name or ("speed" if options.device == "cpu" else f"speed-{options.device}")
    print(write_markdown(journal, options.tables / f"{name}.md"))
    usual = [(each.batch, 224, device) for device, each in DEVICES.items()]
    workloads = [(each, each.race.workload) for each in deciding_results(journal)]
    drawn = [each for each, workload in workloads if (workload.batch, workload.size, workload.device) in usual]
    if drawn:
        print(draw_chart(drawn, options.tables / f"{name}.png"))


if __name__ == "__main__":
    main()
