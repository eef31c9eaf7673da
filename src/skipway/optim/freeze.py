"""What of a network is frozen, and when. Importable without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from skipway.errors import counted
from skipway.registry import Registry, parse_spec
from skipway.validation import check_choice, check_positive_int, check_rule, is_whole

__all__ = ["FREEZES", "FreezePlan", "FrozenBlocks", "FrozenEpochs", "FrozenTrunk", "TrunkAtFirst", "parse_freeze"]


@dataclass(frozen=True)
class FreezePlan:
    """Nothing is frozen; the other plans differ in what they answer.

    Layers are those of `skipway.optim.groups.layer_indices`: 0 before the blocks, 1 … L the blocks, L + 1 after them.
    """

    fits_classifier: ClassVar[bool] = False
    """Whether the classifier is fitted to features of the frozen network before the first step."""
    takes_steps: ClassVar[bool] = True
    """Whether the run takes optimizer steps at all."""
    keeps_statistics: ClassVar[bool] = False
    """Whether running means and variances of initial weights stay, and normalise in training, too."""

    def frozen_layers(self, epoch: int, last: int) -> int:
        """The number of layers, counted from the input, that are frozen in an epoch, from 0.

        Args:
            epoch: from 0.
            last: number of the last layer, L + 1, which holds the classifier.
        """
        return 0

    def describe(self) -> str:
        """In words, for the terminal and the report; empty where nothing is frozen."""
        return ""


@dataclass(frozen=True)
class FrozenTrunk(FreezePlan):
    """Everything but the classifier, which is fitted to the features of the trunk.

    Args:
        views: features of so many random augmentations of each training image besides those of the image itself.
        head: "linear", multinomial logistic regression; "mlp", one hidden layer, which becomes a part of the network.

    >>> FrozenTrunk(views=4).takes_steps
    False
    """

    views: int = 0
    head: Literal["linear", "mlp"] = "linear"

    fits_classifier = True
    takes_steps = False

    def __post_init__(self) -> None:
        check_rule("views", self.views, is_whole(self.views, 0), "a whole number >= 0")
        check_choice("head", self.head, ("linear", "mlp"))

    def describe(self) -> str:
        views = f" and {counted(self.views, 'view')} of each image" if self.views else ""
        return f"the classifier is fitted to features of the frozen network{views}"


@dataclass(frozen=True)
class TrunkAtFirst(FrozenTrunk):
    """The classifier is fitted to the features of the trunk first, then everything is trained, and kept only where
    validation improves (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).
    """

    takes_steps = True
    # the classifier is fitted to features that these normalise; statistics of a batch of other images shift them
    keeps_statistics = True

    def describe(self) -> str:
        return f"{super().describe()} first, running means and variances stay"


@dataclass(frozen=True)
class FrozenEpochs(FreezePlan):
    """Everything before the layers after the blocks, in the first epochs.

    >>> plan = FrozenEpochs(2)
    >>> [plan.frozen_layers(epoch, last=9) for epoch in range(3)]
    [9, 9, 0]
    """

    epochs: int

    def __post_init__(self) -> None:
        check_positive_int("freeze", self.epochs)

    def frozen_layers(self, epoch: int, last: int) -> int:
        return last if epoch < self.epochs else 0

    def describe(self) -> str:
        return f"blocks frozen for {self.epochs} epoch{'s' * (self.epochs != 1)}"


@dataclass(frozen=True)
class FrozenBlocks(FreezePlan):
    """Everything up to block `count`, in the whole run.

    >>> FrozenBlocks(3).frozen_layers(epoch=7, last=9)
    4
    """

    count: int

    def __post_init__(self) -> None:
        check_positive_int("blocks", self.count)

    def frozen_layers(self, epoch: int, last: int) -> int:
        return min(self.count + 1, last)

    def describe(self) -> str:
        return f"everything up to block {self.count} frozen"


FREEZES: Registry[Callable[..., FreezePlan]] = Registry("freeze")
for name, plan in (
    ("none", FreezePlan),
    ("all", FrozenTrunk),
    ("first", TrunkAtFirst),
    ("blocks", FrozenBlocks),
):
    FREEZES.add(name, plan)


def parse_freeze(text: str | int) -> FreezePlan:
    """Parse a spec string, or the number of epochs in which only the classifier is trained.

    >>> parse_freeze("first"), parse_freeze("2"), parse_freeze("blocks(3)")
    (TrunkAtFirst(views=0, head='linear'), FrozenEpochs(epochs=2), FrozenBlocks(count=3))
    """
    text = str(text).strip()
    number = text.removeprefix("-")
    return FrozenEpochs(int(text)) if number.isdecimal() else parse_spec(text, FREEZES.__getitem__)
