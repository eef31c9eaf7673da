"""What sw.monitor costs: steps with it and without, in turns, on one thread or as many as there are.

    python -m benchmarks.monitor_cost [--steps 600] [--threads 1]

Fails where the monitor takes more than 2 % of the time of a step, by its own count or by the clock beside a plain loop
(median over pairs of blocks of 20 steps, one with and one without, first one first and then the other). What is done
once, such as finding the connections, is printed apart. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import skipway as sw
from skipway.monitoring import Watch

__all__ = ["CASES", "main"]

LIMIT = 0.02
BLOCK = 20


@dataclass(frozen=True)
class Case:
    """A network, its batch and its loss."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]


def gpt() -> nn.Module:
    return sw.build("gpt-micro", vocab=256, context=128)


CASES = (
    Case(
        "ResNet-18 for CIFAR, batch 128",
        lambda: sw.build("resnet18(stem='cifar')", classes=10),
        lambda: (torch.randn(128, 3, 32, 32), torch.randint(10, (128,))),
    ),
    Case(
        "ViT-small, patch 4, batch 64",
        lambda: sw.build("vit-small-16", patch=4, image=32, classes=10),
        lambda: (torch.randn(64, 3, 32, 32), torch.randint(10, (64,))),
    ),
    Case("GPT-micro, 12 x 128 bytes", gpt, lambda: (torch.randint(256, (12, 128)), torch.randint(256, (12, 128)))),
)


def loss_of(output: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of classes or tokens."""
    return F.cross_entropy(output.flatten(0, -2), labels.flatten())


def timed_block(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, watch: Watch | None = None
) -> float:
    """Seconds of a block of steps."""
    start = time.perf_counter()
    for _ in range(BLOCK):
        loss = loss_of(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if watch is not None:
            watch.log(loss=loss)
    return time.perf_counter() - start


def measure(case: Case, steps: int) -> bool:
    """Print the cost of a case; whether it is within the limit."""
    torch.manual_seed(0)
    plain, watched = case.make().train(), case.make().train()
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-4) for each in (plain, watched)]
    x, y = case.batch()
    timed_block(plain, optimizers[0], x, y)
    pairs: list[tuple[float, float]] = []
    with sw.monitor(watched, optimizers[1]) as watch:
        timed_block(watched, optimizers[1], x, y, watch)
        for number in range(steps // BLOCK):
            first = timed_block(plain, optimizers[0], x, y) if number % 2 else 0.0
            with_it = timed_block(watched, optimizers[1], x, y, watch)
            pairs.append((first or timed_block(plain, optimizers[0], x, y), with_it))
    usual = median(without for without, _ in pairs) / BLOCK
    # a block holds a sample or none, so sums are compared; blocks that something else has disturbed are left out
    calm = [pair for pair in pairs if max(pair) < 2 * median(without for without, _ in pairs)]
    clock = sum(each for _, each in calm) / sum(without for without, _ in calm) - 1
    # watch.share counts the plain blocks in between as time of the training
    own = watch.spent / (usual * watch.step)
    print(
        f"{case.name:34} step {1000 * usual:7.1f} ms  clock {clock:+7.2%}  own count {own:6.2%}  samples "
        f"{len(watch.samples)}  once {watch.setup_seconds:.2f} s"
    )
    for remark in watch.remarks:
        print(f"    {remark}")
    return own <= LIMIT and clock <= LIMIT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of each case")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    within = [measure(case, options.steps) for case in CASES if options.only.lower() in case.name.lower()]
    return 0 if all(within) else 1


if __name__ == "__main__":
    sys.exit(main())
