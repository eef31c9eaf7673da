"""Every test starts from the same random state and works on one thread: the tensors are tiny, the processes many."""

from __future__ import annotations

import functools
import gc
import os
import sys
import tempfile
import zlib

import pytest
import torch

from skipway.hardware.device import seed_torch
from skipway.hardware.processor import cpu_field

MODULES = pytest.StashKey[int]()
"""How many modules there were when the collector was last told to leave them alone."""

torch.set_num_threads(1)
# no test looks for weights in the caches of the person who runs it, or on a hub
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_CACHE=os.devnull, TORCH_HOME=os.devnull)
# code that torch compiled and kept for other instructions than this process has writes beyond its memory
INSTRUCTIONS = f"{cpu_field('flags')} {torch.backends.cpu.get_cpu_capability()} {os.environ.get('ONEDNN_MAX_CPU_ISA')}"
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"skipway-inductor-{zlib.crc32(INSTRUCTIONS.encode()):08x}"),
)


@pytest.fixture(autouse=True)
def seed() -> None:
    seed_torch(0)


# torch.nn makes many objects and few cycles: a tenth to a third of the time of a test was the collector's
gc.set_threshold(20_000, 10, 10)
# no test cuts the power, and on a disk that others use a run of some steps waited for it as long as it computed
os.fsync = lambda descriptor: None


def settle_modules(config: pytest.Config) -> None:
    """Keep the collector away from what is imported and collected, a million objects: `gc.collect()`, which each timing
    of `skipway.inference.timer` begins with, takes milliseconds in place of 0.3 s.
    """
    gc.collect()
    gc.freeze()
    config.stash[MODULES] = len(sys.modules)


def pytest_collection_finish(session: pytest.Session) -> None:
    settle_modules(session.config)


def keep_registry() -> None:
    """Keep torch's table of operators in ONNX: each export makes it anew, and onnxscript parses the source of 500
    functions for it, half a second long.
    """
    module = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry = getattr(module, "ONNXRegistry", None)
    if registry is not None and isinstance(vars(registry).get("from_torchlib"), classmethod):
        registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))


class Upkeep:
    """What is done after each test, and after the doctests of src, which a hook of this file alone does not see."""

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        keep_registry()
        # transformers, onnx or the compiler came in
        if len(sys.modules) > item.config.stash[MODULES] + 200:
            settle_modules(item.config)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Upkeep())


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # libraries that count what is left at the exit
