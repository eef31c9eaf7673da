"""Every test starts from the same random state and works on one thread: the tensors are tiny, the processes many."""

from __future__ import annotations

import os
import sys
from zlib import crc32

import pytest
import torch

torch.set_num_threads(1)
# no test looks for weights in the caches of the person who runs it, or on a hub
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_CACHE=os.devnull, TORCH_HOME=os.devnull)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Measure coverage in a third of the tests only, before Python 3.12: its tracer makes a test half as slow again."""
    if not config.pluginmanager.hasplugin("_cov") or sys.version_info >= (3, 12):
        return
    seen = set()
    for item in items:
        function = item.nodeid.partition("[")[0]
        if function in seen or crc32(function.encode()) % 3:
            item.add_marker("no_cover")
        seen.add(function)
