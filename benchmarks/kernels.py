"""Every implementation of every kernel at the sizes of real networks: time, fraction of the copy rate, speed.

Claim     the fastest implementation of a kernel is no slower than plain torch; the end of a residual connection comes
          near the rate of copying
Command   python -m benchmarks.kernels [--device cuda] [--precision bfloat16] [--only residual depthwise …]
Method    implementations of a kernel are timed interleaved, the median of the rounds counts; those that differ from
          plain torch by more than rounding are named and not timed. Bytes are those that have to be read and written
          once; freed memory stays with the process
Result    benchmarks/kernels-DEVICE-PRECISION.md, with date and machine; none where --only picks some
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.race.ceilings import measure_copy_rate
from benchmarks.race.devices import DEVICES
from benchmarks.race.summary import markdown_table
from skipway.hardware.allocator import keep_memory
from skipway.inference.backends import PRECISIONS
from skipway.inference.timer import Candidate, median_seconds, time_interleaved
from skipway.kernels.autotune import KERNELS, TOLERANCE, mismatch

HERE = Path(__file__).parent
ROUNDS = 7
STAGES = ((1, 56), (2, 28), (4, 14), (8, 7))
"""Stages of ConvNeXt and Swin: width as a multiple of the first stage's, side of the map."""
FIELD = {"cpu": (16, 96, 384), "cuda": (128, 128, 768)}
"""Images at a time, channels of the first stage, and a ViT's: small networks on a CPU, base ones on a GPU."""
RESNET = (((16, 512, 7, 7), (512, 3, 1)), ((16, 256, 14, 14), (256, 3, 1)), ((16, 1024, 14, 14), (2048, 1, 2)))
"""Maps of ResNet-50 and the filters on them: channels, side, stride."""
SMALL_IMAGES = (
    ((500, 64, 8, 8), (64, 3, 1)),
    ((500, 64, 8, 8), (128, 3, 2)),
    ((500, 128, 4, 4), (128, 3, 1)),
    ((500, 256, 2, 2), (256, 3, 1)),
)
"""The same of the preset `fast` at 16 pixels."""
Make = Callable[..., Tensor]
NAMED = {each.name: each for each in KERNELS}


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Args:
        kernel: its name.
        sizes: for the table.
        given: the kernel's arguments.
        moved: bytes that have to be read and written once, as a multiple of the first argument's.
    """

    kernel: str
    sizes: str
    given: tuple[Any, ...]
    moved: float


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the cases of a device one after the other, so that only one's tensors are in memory."""
    random = partial(torch.randn, device=device, dtype=dtype)
    batch, width, dim = FIELD[device]
    for times, side in STAGES:
        yield from connections(random, (batch, width * times, side, side))
    yield from connections(random, (batch, 197, dim))
    for times, side in STAGES:
        yield from convolutions(random, (batch, width * times, side, side))
    for times, side in STAGES:
        yield from windows(random, batch, side, width * times // 32)
    for shape, filters in (*RESNET, *SMALL_IMAGES):
        yield weight_gradient(random, shape, *filters)
    q, k, v = random(batch, 197, 3, dim // 64, 64).permute(2, 0, 3, 1, 4).unbind()
    sizes = f"{batch}x197, {dim // 64} heads of 64"
    yield Case("attention", sizes, (q, k, v, None, False), 4)
    yield Case("attention backward", sizes, (v, q, k, v, None, random(0)), 7)


def connections(random: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    """The end of a residual connection, of a map or of tokens."""
    sizes, is_map = size_text(shape), len(shape) == 4
    channels = shape[1] if is_map else shape[2]
    shortcut, branch = channels_last(random(*shape)), channels_last(random(*shape))
    gain, mask = random(channels), torch.ones_like(random(shape[0], *[1] * (len(shape) - 1)))
    gain = gain.view(-1, 1, 1) if is_map else gain
    yield Case("residual", sizes, (shortcut, branch, gain, mask), 3)
    yield Case("residual backward", sizes, (shortcut, branch, gain, mask), 3)


def convolutions(random: Make, shape: tuple[int, ...]) -> Iterator[Case]:
    """Depthwise 7 × 7, forward and both gradients."""
    x, gradient, taps = channels_last(random(*shape)), channels_last(random(*shape)), random(shape[1], 1, 7, 7) / 7
    yield Case("depthwise", size_text(shape), (x, taps, random(shape[1])), 2)
    yield Case("depthwise to input", size_text(shape), (gradient, x, taps), 2)
    yield Case("depthwise to weight", size_text(shape), (gradient, x, taps), 2)


def weight_gradient(random: Make, shape: tuple[int, ...], out: int, side: int, stride: int) -> Case:
    """The gradient of a dense convolution's weight."""
    x, sides = channels_last(random(*shape)), ((length - 1) // stride + 1 for length in shape[2:])
    given = (channels_last(random(shape[0], out, *sides)), x, channels_last(random(out, shape[1], side, side)))
    sizes = f"{size_text(shape)}, {out} of {side}x{side} / {stride}"
    return Case("convolution to weight", sizes, (*given, stride, side // 2), 1 + x.numel() / given[0].numel())


def windows(random: Make, batch: int, side: int, heads: int) -> Iterator[Case]:
    """Attention within shifted windows of 7 × 7, from map to map; a map of one window is not shifted."""
    shift = 3 if side > 7 else 0
    qkv, position = random(batch, side, side, 96 * heads), random(heads, 49, 49)
    sizes = f"{batch}x{side}x{side}, {heads} heads of 32"
    yield Case("windows", sizes, (qkv, position, shift, shift), 4 / 3)
    yield Case("windows backward", sizes, (random(batch, side, side, 32 * heads), qkv, position, shift, shift), 7)


def size_text(shape: tuple[int, ...]) -> str:
    """A shape as 16x96x56x56."""
    return "x".join(map(str, shape))


def channels_last(x: Tensor) -> Tensor:
    """Lay maps out channels-last; tokens stay as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


@torch.no_grad()
def measure_case(case: Case, device: str, rate: float) -> Iterator[list[str]]:
    """Yield a row for each implementation: µs, fraction of the copy rate, speed over plain torch."""
    kernel, given, kind = NAMED[case.kernel], case.given, DEVICES[device]
    expected, entrants = kernel.implementations[0].compute(*given), []
    for each in kernel.implementations:
        if not each.supports(*given):
            continue
        if problem := mismatch(each.compute(*given), expected, TOLERANCE[given[0].dtype]):
            yield [case.kernel, case.sizes, each.name, "–", "–", problem]
            continue
        run = partial(each.compute, *given)
        entrants.append(Candidate(each.name, run, each.name, calls=kind.calls, finish=kind.finish))
    with keep_memory():
        found = median_seconds(time_interleaved(entrants, ROUNDS))
    moved = case.moved * given[0].numel() * given[0].element_size()
    for name, seconds in found.items():
        gain = found["reference"] / seconds
        yield [case.kernel, case.sizes, name, f"{1e6 * seconds:,.0f}", f"{moved / seconds / rate:.0%}", f"{gain:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bfloat16")
    parser.add_argument("--only", nargs="+", default=())
    options = parser.parse_args()
    rate = measure_copy_rate(device=options.device)
    rows = []
    for case in cases(options.device, PRECISIONS[options.precision]):
        if not options.only or any(case.kernel.startswith(name) for name in options.only):
            for row in measure_case(case, options.device, rate):
                print(*row, sep="  ", flush=True)
                rows.append(row)
    machine = f"{DEVICES[options.device].title()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d %H:%M')}"
    columns = ("kernel", "sizes", "implementation", "µs", "of copy rate", "speed over plain torch")
    text = (
        f"# Kernels in {options.precision}\n\n{machine}; copying {rate / 1e9:,.1f} GB/s read and written. Made by "
        f"`python -m benchmarks.kernels`.\n\n{markdown_table(columns, rows)}\n"
    )
    path = HERE / f"kernels-{options.device}-{options.precision}.md"
    if not options.only:
        print(path, path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
