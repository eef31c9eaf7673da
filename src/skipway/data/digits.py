"""The embedded images: scikit-learn's copy of 1,797 handwritten digits, 8 x 8 grey, from the UCI optdigits test set."""

from __future__ import annotations

import gzip
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
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
    package = find_spec("sklearn")
    if package is None:
        raise MissingExtraError("scikit-learn", "digits", "training on the embedded digits")
    table = read_table(Path(package.origin or "").parent / "datasets" / "data" / "digits.csv.gz")
    images = table[:, :-1].double().mul(255 / 16).round().to(torch.uint8).reshape(-1, 8, 8, 1)
    return images, [f"{label}/{number:04d}" for number, label in enumerate(table[:, -1].tolist())]


@lru_cache(maxsize=1)
def read_table(path: Path) -> Tensor:
    """The pixels of each scan and its label, uint8 (1797, 65), from the file that scikit-learn brings.

    It is read once in a process, and without its package, since to import that takes longer than all else before a
    training on the digits; where it lies elsewhere, by its package.
    """
    if not path.is_file():
        from sklearn.datasets import load_digits

        scans: Any = load_digits()
        return torch.cat([torch.from_numpy(scans.data), torch.from_numpy(scans.target)[:, None]], 1).to(torch.uint8)
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    values = [[int(value) for value in line.split(",")] for line in lines]
    return torch.tensor(values, dtype=torch.uint8, device="cpu")  # whatever torch's default device is
