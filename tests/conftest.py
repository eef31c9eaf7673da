"""Every test starts from the same random state, and on one thread: the suite runs beside other work."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
