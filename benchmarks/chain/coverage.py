"""`skipway.chain` on every model of timm, torchvision's classifiers and 20 classes of Hugging Face.

    python -m benchmarks.chain.coverage [timm|torchvision|transformers] [--every N]

Every model is built on the meta device and traced. A line for each goes to coverage.csv next to this file: connections
by kind of skip, refused additions by reason, seconds, and the error if there was one. Resumes: models that are in the
file are skipped.
"""

from __future__ import annotations

import csv
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

import skipway as sw
from benchmarks.peers import import_timm, import_torchvision, import_transformers
from skipway.tracing.residual_adds import REASONS, Skip

__all__ = ["LIBRARIES", "main", "row"]

FILE = Path(__file__).with_name("coverage.csv")
SKIPS = get_args(Skip)
HEADER = ["model", "connections", *SKIPS, *REASONS, "seconds", "problem"]
# fmt: off
CLASSES = [
    "BeitModel", "BitModel", "ConvNextModel", "ConvNextV2Model", "CvtModel", "DeiTModel", "Dinov2Model",
    "DPTModel", "EfficientNetModel", "FocalNetModel", "HieraModel", "LevitModel", "MobileNetV2Model",
    "MobileViTModel", "PoolFormerModel", "PvtV2Model", "RegNetModel", "ResNetModel", "SegformerModel", "SwinModel",
    "Swinv2Model", "SiglipVisionModel", "CLIPVisionModel", "ViTModel", "ViTMAEModel", "ViTMSNModel",
]
# fmt: on

Built = tuple[nn.Module, Any]


def timm_models() -> Iterator[tuple[str, Callable[[], Built]]]:
    timm = import_timm()

    def build(name: str) -> Built:
        model = timm.create_model(name)
        return model, torch.empty(1, *model.default_cfg["input_size"])

    for name in timm.list_models():
        yield name, lambda name=name: build(name)


def torchvision_models() -> Iterator[tuple[str, Callable[[], Built]]]:
    models = import_torchvision().models
    for name in models.list_models(module=models):
        size = 299 if "inception" in name else 224
        yield name, lambda name=name, size=size: (models.get_model(name), torch.empty(1, 3, size, size))


def transformers_models() -> Iterator[tuple[str, Callable[[], Built]]]:
    transformers = import_transformers()

    def build(name: str) -> Built:
        kind = getattr(transformers, name)
        config = kind.config_class()
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, tuple | list) else (size, size)
        example = torch.empty(1, getattr(config, "num_channels", 3), height, width)
        return kind(config), {"pixel_values": example}

    for name in CLASSES:
        yield name, lambda name=name: build(name)


LIBRARIES = {"timm": timm_models, "torchvision": torchvision_models, "transformers": transformers_models}


def built(build: Callable[[], Built]) -> Built:
    """Build on the meta device, or with real weights where that fails (torchvision's RegNets compute with tensors)."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:
        return build()


def row(name: str, build: Callable[[], Built]) -> dict[str, Any]:
    """The row of one model in the table, with the error where it could not be traced."""
    start = time.perf_counter()
    try:
        model, example = built(build)
        start = time.perf_counter()
        chain = sw.chain(model.eval(), example)
    except Exception as problem:  # the table shows it
        return {"model": name, "seconds": f"{time.perf_counter() - start:.2f}", "problem": str(problem)[:200]}
    counts = Counter(connection.seen.skip for connection in chain)
    refused = Counter(refusal.reason for refusal in chain.refused)
    return {
        "model": name,
        "connections": len(chain),
        **{skip: counts.get(skip, 0) for skip in SKIPS},
        **{reason: refused.get(reason, 0) for reason in REASONS},
        "seconds": f"{time.perf_counter() - start:.2f}",
        "problem": "",
    }


def main(arguments: list[str]) -> int:
    """Trace all models, and count the failures."""
    every = int(arguments[arguments.index("--every") + 1]) if "--every" in arguments else 1
    chosen = [library for library in LIBRARIES if library in arguments] or list(LIBRARIES)
    rows = csv.DictReader(FILE.open()) if FILE.exists() else None
    if rows is not None and rows.fieldnames != HEADER:
        raise SystemExit(f"{FILE.name} has columns of another revision; move it away, and it is made anew")
    done = {line["model"] for line in rows or ()}
    failures = 0
    with FILE.open("a", newline="") as file:
        table = csv.DictWriter(file, HEADER)
        if not done:
            table.writeheader()
        for library in chosen:
            for name, build in list(LIBRARIES[library]())[::every]:
                if f"{library}:{name}" in done:
                    continue
                found = row(f"{library}:{name}", build)
                failures += bool(found["problem"])
                table.writerow(found)
                file.flush()
    print(f"{failures} models could not be watched; table in {FILE.name}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
