"""What each scheme costs: time and memory of a training step beside the plain network's.

Claim     several streams, n = 4, on ViT-S cost at most 1.25 times the plain step in bfloat16 on a CPU
Command   python -m benchmarks.scheme_cost [--networks vit-small-16 resnet50 convnext-tiny] [--precisions bfloat16 …]
          [--schemes hyperconnections "mhc(form='birkhoff')" …] [--batch 8] [--size 224] [--rounds 9] [--accelerate]
Method    forward, loss and backward; network and plain network take turns, in an order drawn anew each round, after one
          step that is not counted; the ratio is the median over the rounds of scheme / plain, with quartiles. Kept are
          the bytes that autograd holds at the end of the forward pass, each storage once, parameters not counted.
          float32 computes in float32 (with the precision of matrix products that torch has by default), autocast has
          float32 weights, bfloat16 all in bfloat16. Freed memory stays with the process, as in a training of ours.
Result    see docs/log.md, with date and machine
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import skipway as sw
from skipway.hardware.allocator import keep_memory
from skipway.schemes import all_schemes, parse_scheme

PLAIN = "identity"
VARIANTS = ("hyperconnections(dynamic=False)", "mhc(form='birkhoff')")
PRECISIONS = ("float32", "autocast", "bfloat16")


class Kept:
    """Bytes that autograd keeps within the context."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
        self.storages: dict[int, Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage().data_ptr()) not in self.own:
            self.storages[storage] = tensor
        return tensor

    def bytes(self) -> int:
        return sum(each.untyped_storage().nbytes() for each in self.storages.values())


def loss(model: nn.Module, images: Tensor, autocast: bool) -> Tensor:
    """Cross-entropy on any labels."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
        return F.cross_entropy(model(images).float(), torch.arange(len(images), device=images.device))


def seconds(model: nn.Module, images: Tensor, autocast: bool) -> float:
    """Forward and backward, once."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    loss(model, images, autocast).backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kept_bytes(model: nn.Module, images: Tensor, autocast: bool) -> int:
    """Bytes that a step keeps for its backward pass."""
    kept = Kept(model)
    with kept.hooks:
        value = loss(model, images, autocast)
    number = kept.bytes()
    del value
    return number


def network(name: str, scheme: str, images: Tensor, precision: str, accelerate: bool) -> nn.Module:
    """A network as it is trained."""
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = sw.build(name, scheme=scheme, device=images.device, dtype=kind)
    if accelerate:
        sw.accelerate(model, images)
    return model


def compare(name: str, precision: str, options: argparse.Namespace) -> None:
    """Print the rows of one network and precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    images, autocast = images.bfloat16() if precision == "bfloat16" else images, precision == "autocast"
    plain = network(name, PLAIN, images, precision, options.accelerate)
    seconds(plain, images, autocast)
    base, own = kept_bytes(plain, images, autocast), [seconds(plain, images, autocast) for _ in range(3)]
    print(f"\n{name}, {precision}, batch {options.batch} of {options.size}: plain {min(own) * 1e3:.0f} ms, ", end="")
    print(f"keeps {base / 1e6:.0f} MB\n\n| scheme | time / plain | quartiles | kept / plain |\n|---|---|---|---|")
    kinds = all_schemes("attention" if "vit" in name else "conv")
    schemes = options.schemes or [*kinds, *VARIANTS]
    for scheme in schemes:
        if scheme == PLAIN or type(parse_scheme(scheme)) not in kinds.values():
            continue
        model = network(name, scheme, images, precision, options.accelerate)
        seconds(model, images, autocast)
        taken: dict[nn.Module, list[float]] = {model: [], plain: []}
        for _ in range(options.rounds):
            for each in random.sample(list(taken), 2):
                taken[each].append(seconds(each, images, autocast))
        ratios = [a / b for a, b in zip(taken[model], taken[plain], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        kept = kept_bytes(model, images, autocast) / base
        print(f"| {scheme} | {middle:.2f} | {low:.2f} {high:.2f} | {kept:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["vit-small-16", "resnet50", "convnext-tiny"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--schemes", nargs="+", help="by default all, with the variants of several streams")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--accelerate", action="store_true", help="after sw.accelerate, plain network included")
    options = parser.parse_args()
    with keep_memory():
        for name in options.networks:
            for precision in options.precisions:
                compare(name, precision, options)


if __name__ == "__main__":
    main()
