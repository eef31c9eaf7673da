"""The embedded images: scikit-learn's copy of 1,797 handwritten digits, 8 x 8 grey, from the UCI optdigits test set."""

from __future__ import annotations

from typing import Any

import torch

from skipway.data.parts import MemoryPart
from skipway.data.split import hold_out
from skipway.errors import MissingExtraError

__all__ = ["digits"]


def digits(*, held_out: float = 0.2, seed: int = 0) -> tuple[tuple[str, ...], MemoryPart, MemoryPart]:
    """Class names "0" to "9", the training part and the test part, `held_out` of each class in the latter.

    The scans hold values from 0 to 16, which become 0 to 255.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "digits", "training on the embedded digits") from error
    scans: Any = load_digits()
    images = torch.from_numpy(scans.images).mul(255 / 16).round().to(torch.uint8)[..., None]
    labels = torch.from_numpy(scans.target).long()
    classes = tuple(str(name) for name in range(10))
    names = [f"{label}/{number:04d}" for number, label in enumerate(labels.tolist())]
    by_class = {name: [member for member in names if member[0] == name] for name in classes}
    train_names, test_names = hold_out(by_class, held_out, seed)

    def part(chosen: dict[str, list[str]]) -> MemoryPart:
        members = [member for name in classes for member in chosen[name]]
        index = torch.tensor([int(member[2:]) for member in members])
        return MemoryPart(images[index], labels[index], members)

    return classes, part(train_names), part(test_names)
