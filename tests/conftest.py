"""Every test starts from the same random state and works on one thread: the tensors are tiny, the processes many."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
