"""Speed of Skipway's own rooms: reading a chain, a diagnosis, building a network beside timm, importing.

    python -m benchmarks.rooms            # all four, a line each
    python -m benchmarks.rooms chain      # or some: chain, diagnose, build, import

Times are seconds by the wall clock in a process that has imported what is measured, the first call of a process apart:
torch imports its compiler and SymPy with the first operator on the meta device. Imports and first builds are measured
in processes of their own, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import skipway as sw
from benchmarks.chain.coverage import timm_models
from benchmarks.peers import import_timm

__all__ = ["main"]

ROUNDS = 5
# fmt: off
MODELS = (
    "beit_base_patch16_224", "cait_xxs24_224", "coat_tiny", "convnext_tiny", "convnextv2_tiny", "densenet121",
    "edgenext_small", "efficientnet_b0", "eva02_tiny_patch14_224", "hrnet_w18", "levit_192", "maxvit_tiny_tf_224",
    "mixer_s16_224", "mobilenetv3_large_100", "nfnet_f0", "poolformer_s12", "pvt_v2_b1", "regnety_016",
    "res2net50_26w_4s", "resnet50", "resnext50_32x4d", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "vit_small_patch16_224", "xcit_tiny_12_p8_224",
)
# fmt: on
FIRST_BUILD = {
    "skipway": "import skipway; make = skipway.build",
    "timm": "from benchmarks.peers import import_timm; make = import_timm().create_model",
}
TIMED_BUILD = "import time; {}; start = time.perf_counter(); make('resnet50'); print(time.perf_counter() - start)"
TIMED_IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def seconds_printed(code: str) -> float:
    """What a process of its own prints, which runs a line of code."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def chain_lines() -> Iterator[str]:
    """`skipway.chain` over models of timm, on the meta device."""
    builders = dict(timm_models())
    networks = {}
    for name in MODELS:
        with torch.device("meta"):
            networks[name] = builders[name]()
    first = seconds(lambda: sw.chain(*networks["resnet50"]))
    times = {name: seconds(lambda given=given: sw.chain(*given)) for name, given in networks.items()}
    longest = max(times, key=lambda name: times[name])
    middle = statistics.median(times.values())
    yield (
        f"chain of {len(times)} models of timm: median {middle:.2f} s, longest {times[longest]:.2f} s ({longest}); "
        f"first call {first:.2f} s"
    )


def diagnosis_lines() -> Iterator[str]:
    """`skipway.diagnose` of ResNet-50 on 8 samples of 224² whose labels are drawn at random."""
    torch.manual_seed(0)
    model, images = sw.build("resnet50"), torch.randn(8, 3, 224, 224)
    sw.chain(model, images)  # torch's imports
    found = sw.diagnose(model, images)
    ahead = found.measurement.ahead
    steps = 0 if ahead is None else len(ahead.losses)
    yield (
        f"diagnosis of ResNet-50, 8 samples: {found.seconds:.1f} s for {found.measurement.passes:.1f} forward-backward "
        f"passes of the batch, {steps} trial steps and {len(found.tried)} remedies; {found.verdict}"
    )


def build_lines() -> Iterator[str]:
    """`build("resnet50")` beside timm's `create_model`, the first call of a process and later ones, in turns."""
    makers = {"skipway": sw.build, "timm": import_timm().create_model}
    for make in makers.values():
        make("resnet50")
    later: dict[str, list[float]] = {name: [] for name in makers}
    first: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(ROUNDS):
        for name, make in makers.items():
            later[name].append(seconds(lambda make=make: make("resnet50")))
            first[name].append(seconds_printed(TIMED_BUILD.format(FIRST_BUILD[name])))
    for name in makers:
        yield (
            f"build of ResNet-50 by {name}: {statistics.median(later[name]):.3f} s, first call of a process "
            f"{statistics.median(first[name]):.3f} s"
        )


def import_lines() -> Iterator[str]:
    """`import skipway` beside `import torch`, in turns."""
    times: dict[str, list[float]] = {name: [] for name in ("torch", "skipway", "torch, skipway.tracing")}
    for _ in range(ROUNDS):
        for name, taken in times.items():
            taken.append(seconds_printed(TIMED_IMPORT.format(name)))
    yield ", ".join(f"import {name} {statistics.median(taken):.2f} s" for name, taken in times.items())


ROOMS = {"chain": chain_lines, "diagnose": diagnosis_lines, "build": build_lines, "import": import_lines}


def main(arguments: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rooms", nargs="*", help=f"what to measure: {', '.join(ROOMS)}; all if none is given")
    chosen = parser.parse_args(arguments).rooms or [*ROOMS]
    if unknown := set(chosen) - ROOMS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for room in chosen:
        for line in ROOMS[room]():
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
