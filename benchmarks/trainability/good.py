"""What a good recipe reaches on each task: the loss that `tasks.TASKS` calls good.

python -m benchmarks.trainability.good --cifar cifar10-jpeg.tar.xz --text tinyshakespeare.txt.xz
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from benchmarks.trainability.configurations import Configuration
from benchmarks.trainability.tasks import set_data
from benchmarks.trainability.truth import add_data_options, train

__all__ = ["RECIPES", "main"]

OWN = {"init_scale": 1.0, "optimizer": "adamw", "warmup": 50, "schedule": "cosine", "seed": 0}
RECIPES = (
    Configuration(family="resnet", depth=14, scheme="preactivation", placement="preactivation", lr=3e-3, **OWN),
    Configuration(family="timm", depth=4, scheme="test_resnet", placement="own", lr=3e-3, **OWN),
    Configuration(family="gpt", depth=3, scheme="own", placement="pre", lr=6e-3, **OWN),
    Configuration(family="table", depth=6, scheme="gelu", placement="residual-norm", lr=3e-3, **OWN),
    Configuration(family="segmentation", depth=12, scheme="unet", placement="bn", lr=3e-3, **OWN),
)


def main() -> None:
    """Train each recipe to the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_options(parser)
    options = parser.parse_args()
    set_data(options.cifar, options.text)
    torch.set_num_threads(1)
    for recipe in RECIPES:
        row = train(replace(recipe), to_the_end=True)
        print(
            f"{row['task']:8} {row['loss_last']:.3g} of {row['constant']:.3g}  ({row['seconds_per_step']:.4f} s a step)"
        )


if __name__ == "__main__":
    main()
