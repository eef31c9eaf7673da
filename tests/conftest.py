"""Every test starts from the same random state and works on one thread: the tensors are tiny, the processes many."""

from __future__ import annotations

import sys

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Measure coverage in the first case of each parametrised test only, before Python 3.12: its tracer makes tests
    half as slow again, and further cases reach few further lines.
    """
    if not config.pluginmanager.hasplugin("_cov") or sys.version_info >= (3, 12):
        return
    seen = set()
    for item in items:
        function = item.nodeid.partition("[")[0]
        if function in seen:
            item.add_marker("no_cover")
        seen.add(function)
