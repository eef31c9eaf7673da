"""The embedded images: scikit-learn's copy of 1,797 handwritten digits, 8 x 8 grey, from the UCI optdigits test set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipway.errors import MissingExtraError

__all__ = ["digits"]


def digits() -> tuple[Tensor, list[str]]:
    """The images, uint8 (1797, 8, 8, 1), and their names, "7/0012" for number 12, which shows a seven.

    The scans hold values from 0 to 16, which become 0 to 255. `skipway.data.load()` splits and normalises them.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "digits", "training on the embedded digits") from error
    scans: Any = load_digits()
    images = torch.from_numpy(scans.images).mul(255 / 16).round().to(torch.uint8)[..., None]
    return images, [f"{label}/{number:04d}" for number, label in enumerate(scans.target.tolist())]
