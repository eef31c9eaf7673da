"""Processor time of `skipway.chain` on a decoder of a billion parameters, on the meta device.

    python -m benchmarks.chain.speed            # a Llama of 16 layers, 2,048 channels and a vocabulary of 128,256
    python -m benchmarks.chain.speed --timm 40  # and the median over every 40th model of timm
    python -m benchmarks.chain.speed --profile  # where it goes

Processor time is that of this process, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn

import skipway as sw
from benchmarks.chain.coverage import timm_models
from benchmarks.peers import import_transformers

__all__ = ["main"]


def billion() -> tuple[nn.Module, dict[str, Any]]:
    """A Llama of 1.24 billion parameters without memory for them, and what it is called with."""
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config), {"input_ids": torch.zeros(1, 512, dtype=torch.long)}


def seconds(model: nn.Module, example: Any) -> tuple[float, int]:
    """Processor seconds of one call of `chain`, and how many connections it finds."""
    start = time.process_time()
    found = len(sw.chain(model, example))
    return time.process_time() - start, found


def main(arguments: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--timm", type=int, help="every how many models of timm")
    parser.add_argument("--profile", action="store_true")
    chosen = parser.parse_args(arguments)
    model, example = billion()
    seconds(model, example)  # imports, and what torch makes at first use
    spent, found = seconds(model, example)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"Llama of {size:,} parameters: chain finds {found} connections in {spent:.2f} s of processor time")
    if chosen.profile:
        with cProfile.Profile() as profile:
            sw.chain(model, example)
        pstats.Stats(profile).sort_stats("cumulative").print_stats(25)
    if chosen.timm:
        times = []
        for _, build in list(timm_models())[:: chosen.timm]:
            with torch.device("meta"):
                network = build()
            times.append(seconds(*network)[0])
        median, longest = statistics.median(times), max(times)
        print(f"{len(times)} models of timm: median {median:.2f} s, longest {longest:.2f} s of processor time")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
