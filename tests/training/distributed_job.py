"""What the processes of tests/training/test_distributed.py run, under torchrun with two processes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from tests.training.few_digits import every_ninth

from skipway.__main__ import end
from skipway.data import loader
from skipway.recipe import Recipe
from skipway.training import mlp_head
from skipway.training.distributed import join_ranks
from skipway.training.loop import train

RECIPE = Recipe(
    model="vit-tiny-16",
    depth=1,
    size=16,
    epochs=2,
    batch_size=28,
    optimizer="adamw",
    device="cpu",
    precision="float32",
    ema=0.9,
    clip="norm(1.0)",
    accumulate=2,
)
MIXED = replace(RECIPE, augment="mixup(0.4)+cutmix+erasing", ema=None)
FEW_ITERATIONS = 5
FITTED = replace(RECIPE, freeze="first(head='mlp')", epochs=1, cache=False)
SPREAD = replace(RECIPE, sharding="full")


class StopAfter:
    """Says stop from the given number of questions on."""

    def __init__(self, questions: int) -> None:
        self.questions = questions

    def __call__(self) -> bool:
        self.questions -= 1
        return self.questions < 0


def main(out: Path) -> None:
    """Every case in one start, and in one group: one that ends and begins again may meet its own leavings."""
    loader.digits = every_ninth
    with join_ranks("cpu"):
        every_case(out)


def every_case(out: Path) -> None:
    mlp_head.ITERATIONS = FEW_ITERATIONS
    train(RECIPE, out / "ddp")
    train(MIXED, out / "mixed")
    train(RECIPE, out / "ddp-stopped", stop=StopAfter(2))
    train(None, out / "ddp-stopped", resume=True)
    train(FITTED, out / "fitted")
    train(FITTED, out / "fitted-stopped", stop=StopAfter(5))
    train(None, out / "fitted-stopped", resume=True)
    train(SPREAD, out / "fsdp")
    train(SPREAD, out / "fsdp-stopped", stop=StopAfter(2))
    train(None, out / "fsdp-stopped", resume=True)
    train(SPREAD, out / "fsdp-half", stop=StopAfter(2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end(0)
