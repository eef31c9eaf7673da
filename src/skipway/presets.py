"""Presets: named values for fields of `Recipe`, for what a command leaves out. Importable without torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skipway.errors import SkipwayError, printable, spell
from skipway.registry import Registry

__all__ = ["PRESETS", "Preset", "values_beside"]


@dataclass(frozen=True)
class Preset:
    """Values for fields of `Recipe`. A run records the values and not the name, so a preset may change.

    Args:
        purpose: what it is for.
        values: by field.
        follows: for a field the others that its value belongs to: where one of those is given, the value is left out.

    >>> "lr" in PRESETS["fast"].beside(["optimizer"]), "lr" in PRESETS["fast"].beside(["seed"])
    (False, True)
    """

    purpose: str
    values: Mapping[str, Any]
    follows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def beside(self, given: Collection[str]) -> dict[str, Any]:
        """The values for fields that are not given, and whose value is not for another one than was given."""
        return values_beside(self.values, given, self.follows)

    def check(self, name: str, data: Path | None, weights: str | None) -> None:
        """Raise for what this preset is not for: text, or a start from somebody's weights.

        Args:
            name: of the preset.
            data: of the recipe.
            weights: initial ones of the recipe; None where they are random.
        """
        from skipway.data.source_kind import source_kind

        if data is not None and source_kind(data) == "text":
            raise SkipwayError(
                f"{spell('preset', name)}: it is for images, and {printable(data.name)} holds text; leave it out"
            )
        if weights is not None:
            raise SkipwayError(
                f"{spell('preset', name)}: its network and rates are for random weights, not for "
                f"{spell('start', printable(weights))}; leave one of the two out"
            )


def values_beside(
    values: Mapping[str, Any], given: Collection[str], follows: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """The values for fields that are not given, and whose value is not for another one than was given.

    Args:
        values: by field.
        given: fields that are given.
        follows: see `Preset`.
    """
    return {
        name: value
        for name, value in values.items()
        if name not in given and not any(other in given for other in follows.get(name, ()))
    }


PRESETS: Registry[Preset] = Registry("preset")
PRESETS.add(
    "fast",
    Preset(
        purpose="10,000 small images or more, random weights, few cores: the accuracy of a usual recipe in less time",
        values={
            "size": 32,
            "model": "resnet-patch8",
            "start": "whitened",
            "epochs": 8,
            "batch_size": 500,
            "optimizer": "muon(momentum=0.8)",
            "lr": 0.03,
            "schedule": "onecycle(rise=0.2)",
            "warmup": 0.0,
            "label_smoothing": 0.1,
            "crop": "pad",
            "grow_from": 16,
            "flip_test": True,
        },
        follows={
            "lr": ("optimizer",),
            "warmup": ("schedule",),
            "epochs": ("time", "steps"),
            "grow_from": ("size",),
        },
    ),
)
