"""The published run: our networks against timm, torchvision and transformers, on an idle machine.

Claim     faster than the best of eager, channels-last, compiled and frozen of each
Command   python -m benchmarks.speed [--device cuda] [--networks …] [--precisions …] [--what …] [--peers …] [--modes …]
          [--out FOLDER] [--rounds 7] [--budget 1800] [--name speed]
Method    all contenders of a piece of work take turns in one run; medians of the ratios in each round, with quartiles;
          ceilings of multiplying and copying measured in the same run. Resumable: the same command goes on
Result    benchmarks/NAME.md and .png, with date and machine: speed of a processor with AVX-512, speed-avx2 of one
          without, speed-cuda of a GPU
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.race.architectures import PEERS
from benchmarks.race.benchmark import PRECISIONS, WHAT, Plan, measure
from benchmarks.race.chart import draw
from benchmarks.race.contenders import MODES
from benchmarks.race.devices import DEVICES
from benchmarks.race.summary import standings, write_markdown
from skipway.hardware.device import choose_device

HERE = Path(__file__).parent


def main() -> None:
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
    parser.add_argument("--name", help="of the tables and the chart [speed; speed-cuda of a GPU]")
    options = parser.parse_args()
    choose_device(options.device)
    chosen = {name: getattr(options, name) for name in ("device", "precisions", "peers", "modes", "rounds", "budget")}
    plan = Plan(what=options.what, networks=options.networks, **chosen)
    journal = measure(plan, options.out, lambda text: print(text, flush=True))
    # speed as batch and image size grow, of one network that convolves and one that attends
    for batches, sizes in (((1, 4, 16, 64), (224,)), ((16,), (128, 224, 288))):
        if "growth" in options.what:
            networks = ("resnet50", "vit-small-16")
            grown = Plan(
                networks=networks,
                what=["infer"],
                batches=batches,
                sizes=sizes,
                ceilings=False,
                **chosen,
            )
            journal = measure(grown, options.out, lambda text: print(text, flush=True))
    name = options.name or ("speed" if options.device == "cpu" else f"speed-{options.device}")
    print(write_markdown(journal, HERE / f"{name}.md"))
    usual = [(each.batch, 224, device) for device, each in DEVICES.items()]
    cells = [(each, each.race.cell) for each in standings(journal)]
    drawn = [each for each, cell in cells if (cell.batch, cell.size, cell.device) in usual]
    if drawn:
        print(draw(drawn, HERE / f"{name}.png"))


if __name__ == "__main__":
    main()
