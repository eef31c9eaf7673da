"""What the machine could do at best: multiplications in a second, bytes copied in a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.race.devices import DEVICES
from skipway.inference.backends import PRECISIONS
from skipway.kernels.matmul import linear_by_onednn, pack_weight

__all__ = ["Ceiling", "count_flops", "measure_ceiling", "measure_copy_rate"]

SECONDS = 0.4


@dataclass(frozen=True)
class Ceiling:
    """The fastest product of matrices found.

    Args:
        precision: of its elements.
        flops: floating point operations in a second, two for each multiplication and addition.
        how: the operator and the sizes.
    """

    precision: str
    flops: float
    how: str


def measure_ceiling(
    precision: str,
    sizes: Sequence[tuple[int, int, int]] | None = None,
    *,
    device: str = "cpu",
    seconds: float = SECONDS,
) -> Ceiling:
    """The fastest product of matrices over the operators that torch has for it, `F.linear`, `matmul` and oneDNN's own.

    Args:
        precision: "float32" or "bfloat16".
        sizes: rows, columns and inner size of each product; by default the device's.
        device: one of `benchmarks.race.devices.DEVICES`.
        seconds: time that each operator gets for each product.

    >>> found = measure_ceiling("float32", [(64, 64, 64)], seconds=0.01)
    >>> found.flops > 0, found.how.endswith("64x64x64")
    (True, True)
    """
    kind, found = DEVICES[device], []
    with torch.no_grad(), kind.loosened():
        for rows, columns, inner in sizes or kind.products:
            left = torch.randn(rows, inner, dtype=PRECISIONS[precision], device=device)
            weight = torch.randn(columns, inner, dtype=PRECISIONS[precision], device=device)
            for name, product in products(left, weight):
                rate = 2 * rows * columns * inner / fastest_call(product, seconds, finish=kind.finish)
                found.append(Ceiling(precision, rate, f"{name} {rows}x{columns}x{inner}"))
    return max(found, key=lambda each: each.flops)


def products(left: Tensor, weight: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The product by each operator that does it here."""
    yield "F.linear", lambda: functional.linear(left, weight)
    right = weight.t().contiguous()
    yield "matmul", lambda: left @ right
    if (pack := pack_weight(weight, len(left))) is not None:
        yield "oneDNN linear", lambda: linear_by_onednn(left, pack, None)


def fastest_call(
    work: Callable[[], object],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    finish: Callable[[], object] = lambda: None,
) -> float:
    """Seconds of the fastest call among those that the time allows, two at least, after one that is not timed."""
    work()
    finish()
    begun, best, calls = clock(), float("inf"), 0
    while calls < 2 or clock() - begun < seconds:
        start = clock()
        work()
        finish()
        best, calls = min(best, clock() - start), calls + 1
    return best


def measure_copy_rate(size: int | None = None, *, device: str = "cpu", seconds: float = SECONDS) -> float:
    """Bytes read and written in a second by copying memory that no cache holds.

    Args:
        size: bytes that are copied; by default the device's.
        device: one of `benchmarks.race.devices.DEVICES`.
        seconds: time it gets.

    >>> measure_copy_rate(1 << 16, seconds=0.01) > 0
    True
    """
    kind = DEVICES[device]
    size = size or kind.copied
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source).copy_(source)
    return 2 * size / fastest_call(lambda: target.copy_(source), seconds, finish=kind.finish)


def count_flops(work: Callable[[], object]) -> int:
    """Floating point operations of a piece of work in torch, those of convolutions, products and attention.

    >>> layer, images = torch.nn.Linear(3, 5), torch.randn(2, 3)
    >>> count_flops(lambda: layer(images))
    60
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # as plain products attention is counted on every machine
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
