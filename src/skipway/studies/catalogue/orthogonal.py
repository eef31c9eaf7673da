"""Orthogonal updates: add only the part of the branch that is orthogonal to the stream.

Claim:    orthogonal updates improve generalisation: ResNetV2 and ViT on CIFAR, TinyImageNet and ImageNet,
          by 4.3 points for ViT-B on ImageNet.
Source:   Oh et al. 2025, "Revisiting Residual Connections: Orthogonal Updates for Stable and Efficient Deep Networks".
Rule:     test loss and test error, each variant at the learning rate with its lowest mean training loss; a difference
          counts if the 95 % interval of its mean over paired seeds excludes 0. Fixed before the run.
Command:  skipway study orthogonal
Hardware: two shared cores of a virtual machine, one process each.
Time:     7 minutes of one core on a loaded machine (60 cells).
Result:   29 November 2026, digits, 5 seeds: errors fall where the network is small, from 9.2 to 5.4 % in a ViT of 6
          blocks and from 4.6 to 3.5 % in a pre-activation ResNet of 6; at 18 blocks nothing is gained. The ViT's losses
          do not differ, and its best learning rates do (0.003 and 0.01).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from skipway.data import Data
from skipway.studies.cell import Cell, Row
from skipway.studies.study import STUDIES, Verdict
from skipway.studies.variants import NetworkVariant, TrainingGrid, VariantStudy, build_network, compare

__all__ = ["OrthogonalStudy"]

SUM, ORTHOGONAL = "addition", "orthogonal update"
SEEDS = (0, 1, 2, 3, 4)


class OrthogonalStudy(VariantStudy):
    """Losses and errors of ViT and pre-activation ResNet with both ways to join."""

    name = "orthogonal"
    title = "Orthogonal updates in ViT and ResNetV2"
    claim = (
        "Adding only the part of a branch that is orthogonal to the stream improves ViTs and pre-activation ResNets."
    )
    source = "Oh et al. 2025"
    minutes = "7 minutes of one core under load"
    variants: ClassVar = {SUM: NetworkVariant(), ORTHOGONAL: NetworkVariant("orthogonal")}
    grids: ClassVar = {
        "cpu": {
            "vit": TrainingGrid(depths=(6,), width=32, epochs=8, rates=(3e-3, 1e-2), seeds=SEEDS),
            "resnet": TrainingGrid(depths=(6, 18), width=8, epochs=4, rates=(0.03, 0.1), seeds=SEEDS),
        },
        "gpu": {
            "vit": TrainingGrid(depths=(6, 12), width=192, epochs=60, rates=(1e-3, 3e-3), seeds=SEEDS),
            "resnet": TrainingGrid(depths=(8, 16), width=64, epochs=60, rates=(0.03, 0.1), seeds=SEEDS),
        },
        "paper": {
            "vit": TrainingGrid(depths=(12,), width=768, epochs=300, rates=(3e-3,)),
            "resnet": TrainingGrid(depths=(8,), width=64, epochs=200, rates=(0.1,)),
        },
    }

    def build(self, cell: Cell, data: Data) -> nn.Module:
        variant = self.variants.get(cell["scheme"]) or NetworkVariant(cell["scheme"])
        if cell["family"] == "resnet":
            variant = NetworkVariant(f"preactivation + {variant.scheme}")
        return build_network(cell["family"], variant, cell["depth"], cell["width"], data)

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [
            compare("With orthogonal updates the test loss is lower.", rows, ORTHOGONAL, SUM),
            compare("With orthogonal updates the test error is lower.", rows, ORTHOGONAL, SUM, "test_error"),
            compare("With orthogonal updates the training loss is lower.", rows, ORTHOGONAL, SUM, "train_loss"),
        ]


STUDIES.add("orthogonal", OrthogonalStudy())
