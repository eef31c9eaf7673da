"""What the abstraction costs: a training step of our resnet50 against a hand-written twin in plain torch.

Claim     forward + backward within 2 % of the twin
Command   python -m benchmarks.overhead [--batch 8] [--size 224] [--rounds 15]
Method    same weights, same images; the two take turns in one run, the ratio is the median over the rounds of
          ours/twin, each round in an order of its own
Result    see docs/log.md, with date and machine
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from torch import Tensor, nn

import skipway as sw
from benchmarks.twin import ClassicBottleneck, ClassicResNet


def seconds(model: nn.Module, images: Tensor) -> float:
    """Forward and backward, once."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    model(images).sum().backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format

    twin = ClassicResNet(ClassicBottleneck, (3, 4, 6, 3)).to(device, memory_format=memory_format)
    ours = sw.load(sw.build("resnet50"), twin.state_dict(), names="torchvision").to(device, memory_format=memory_format)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device).to(memory_format=memory_format)
    contestants = {"ours": ours, "twin": twin}
    difference = (ours(images) - twin(images)).abs().max().item()
    for model in contestants.values():
        seconds(model, images)
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name in random.sample(list(contestants), 2):
            taken[name].append(seconds(contestants[name], images))
    ratios = [a / b for a, b in zip(taken["ours"], taken["twin"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    print(f"largest difference of the logits  {difference:.1e}")
    for name, values in taken.items():
        print(f"{name}  median {statistics.median(values) * 1000:8.1f} ms")
    print(f"ours / twin  median {statistics.median(ratios):.3f}  quartiles {quartiles[0]:.3f} {quartiles[2]:.3f}")


if __name__ == "__main__":
    main()
