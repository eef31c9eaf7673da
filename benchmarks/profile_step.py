"""Where the time of a step on this machine's CPU goes: shares of products, norms, activations and the rest.

    python -m benchmarks.profile_step --network vit-small-16 --precision bfloat16 [--library timm] [--mode accelerate]
    python -m benchmarks.profile_step --what infer --mode channels-last

The step is that of `benchmarks.speed`, under torch's profiler: of training, forward, cross entropy, backward, SGD,
autocast in bfloat16; of inference, forward in the precision, in modes whose operators torch calls one by one. The time
an operator takes itself is counted to the kind whose pattern its name, or the name of the operator around it that a
pattern knows, matches first. The wall clock of a step is taken without the profiler, which makes operators slower.
`--functions N` lists operators and their shapes too. Results: docs/log.md.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Iterator

from torch.profiler import ProfilerActivity, profile

from benchmarks.race.contenders import Contender, Workload

KINDS = {
    "attention": r"attention|skipway::(block_|window_)?(attention|sdpa)|softmax",
    "depthwise": r"skipway::depthwise",
    "products": r"linear|mm$|matmul|convolution|addmm|conv2d|pointwise|einsum",
    "norms": r"norm",
    "activations": r"gelu|relu|silu|threshold|hardtanh|sigmoid",
    "optimizer": r"^Optimizer|_fused_|_foreach_",
    "casts": r"^aten::(to|_to_copy)$",
    "copies": r"copy_|contiguous|clone|cat$|roll|index|pad|gather|slice_backward|select_backward|fill_|zero",
    "sums": r"sum|mean",
    "elementwise": r"add|mul|sub|div|bernoulli|neg|rsub",
}
"""Kinds of operators, in the order in which patterns are tried; the outermost operator that one matches decides."""


def kind_of(name: str) -> str | None:
    """Return the kind of an operator; None where no pattern knows it."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), None)


def walk(event: object, outer: str | None = None) -> Iterator[tuple[str | None, str, str, float]]:
    """Yield kind, name, shapes and milliseconds of an event itself and of all within it."""
    own = outer or kind_of(event.name)
    shapes = str([shape for shape in event.input_shapes if shape][:3])
    yield own, event.name, shapes, event.self_cpu_time_total / 1000
    # a backward node is named by its function, and its operators say what they are
    within = None if own in (None, "elementwise", "copies", "sums") else own
    for child in event.cpu_children:
        yield from walk(child, within)


def measure(contender: Contender, workload: Workload, steps: int) -> tuple[Counter, Counter, float]:
    """Return milliseconds of a step by kind, by operator and shapes, and by the clock without the profiler."""
    ready = contender.prepare(workload)
    with ready.within():
        ready.run()
        start = time.perf_counter()
        for _ in range(steps):
            ready.run()
        clock = (time.perf_counter() - start) * 1000 / steps
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
            for _ in range(steps):
                ready.run()
    kinds, operators = Counter(), Counter()
    for event in trace.events():
        if event.cpu_parent is None:
            for kind, name, shapes, milliseconds in walk(event):
                kinds[kind or "other"] += milliseconds / steps
                operators[kind or "other", name, shapes] += milliseconds / steps
    return kinds, operators, clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="train", choices=("train", "infer"))
    parser.add_argument("--network", default="vit-small-16")
    parser.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--library", default="skipway")
    parser.add_argument("--mode", default="accelerate-channels-last")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--functions", type=int, default=0, metavar="N", help="list the N costliest operators too")
    given = parser.parse_args()
    workload = Workload(
        network=given.network, what=given.what, precision=given.precision, batch=given.batch, size=given.size
    )
    contender = Contender(
        library=given.library, mode=given.mode, what=given.what, precision=given.precision, switched=True
    )
    kinds, operators, clock = measure(contender, workload, given.steps)
    print(f"{workload}, {contender}: {clock:.0f} ms a step, {sum(kinds.values()):.0f} in operators under the profiler")
    for kind, milliseconds in kinds.most_common():
        print(f"{kind:12} {milliseconds:8.1f} ms {milliseconds / sum(kinds.values()):6.1%}")
    for (kind, name, shapes), milliseconds in operators.most_common(given.functions):
        print(f"    {milliseconds:7.1f} ms  {kind:12} {name[:60]:60} {shapes}")


if __name__ == "__main__":
    main()
