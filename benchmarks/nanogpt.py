"""nanoGPT's run on a CPU, repeated by `skipway train`, beside plain scripts of the same recipe on the same machine.

    python -m benchmarks.nanogpt --data ../shared/data/tinyshakespeare.txt.xz --out nanogpt.json

The recipe (nanoGPT's README, "I only have a macbook"): 4 layers, 4 heads, 128 channels, 64 characters of context, 12
sequences, 2,000 steps, no dropout; AdamW at 1e-3 (β₂ 0.99, decay 0.1 of matrices), 100 steps of warm-up, cosine to
1e-4, gradients clipped at 1, windows drawn at random from the first 90 % of tiny Shakespeare. Published: a validation
loss of about 1.88.

The plain script (`plain`, below) is what one writes today: torch's modules and functions, its fused AdamW. It runs in
four modes, float32 and bfloat16, eager and compiled, so that the best way of running it is among them. All validate on
all of the last 10 %, at the same steps. They take turns between validations, each stopped (SIGSTOP) while another runs,
so that all see the same machine; a clock runs only for the one that runs.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.time_to_accuracy.contestants import Contestant
from skipway.hardware import cpu_count, cpu_name

__all__ = ["plain", "race"]

MODES = {
    "eager": ("float32", False),
    "compiled": ("float32", True),
    "bf16": ("bfloat16", False),
    "bf16-compiled": ("bfloat16", True),
}
LAYERS, HEADS, DIM, CONTEXT, BATCH = 4, 4, 128, 64, 12
PEAK, FLOOR, WARMUP, DECAY = 1e-3, 1e-4, 100, 0.1
METRIC = "validation_loss"


def read(path: Path) -> str:
    """The text, unpacked."""
    return lzma.open(path, "rt").read() if path.suffix == ".xz" else path.read_text()


def plain(given: argparse.Namespace) -> None:
    """The script to compare with: a line of JSON for each validation."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    precision, compiled = MODES[given.mode]
    torch.manual_seed(given.seed)
    text = read(given.data)
    letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
    data = torch.tensor([letters[letter] for letter in text])
    cut = int(0.9 * len(data))
    train, held = data[:cut], data[cut:]

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn, self.c_proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, t, _ = x.shape
            q, k, v = (each.view(n, t, HEADS, -1).transpose(1, 2) for each in self.c_attn(x).split(DIM, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.c_proj(y.transpose(1, 2).reshape(n, t, DIM))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.attn = nn.LayerNorm(DIM, bias=False), Attention()
            self.ln_2, self.c_fc = nn.LayerNorm(DIM, bias=False), nn.Linear(DIM, 4 * DIM, bias=False)
            self.c_proj = nn.Linear(4 * DIM, DIM, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.attn(self.ln_1(x))
            return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(len(letters), DIM), nn.Embedding(CONTEXT, DIM)
            self.h, self.ln_f = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(DIM, bias=False)
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    last = name.endswith("c_proj.weight")
                    nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if last else 0.02)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
            return F.linear(self.ln_f(self.h(x)), self.wte.weight)

    model = Net()
    network = torch.compile(model) if compiled else model
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.99), fused=True)

    def loss_of(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = network(ids)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def validate() -> float:
        whole = (len(held) - 1) // CONTEXT
        ids, targets = held[: whole * CONTEXT].view(whole, CONTEXT), held[1 : whole * CONTEXT + 1].view(whole, CONTEXT)
        pairs = zip(ids.split(BATCH * 8), targets.split(BATCH * 8), strict=True)
        return sum(float(loss_of(x, y)) * len(x) for x, y in pairs) / whole

    training = 0.0
    for step in range(given.steps):
        began = time.monotonic()
        rate = PEAK * (step + 1) / (WARMUP + 1)
        if step >= WARMUP:
            done = (step - WARMUP) / max(given.steps - WARMUP, 1)
            rate = FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(train) - CONTEXT, (BATCH, 1)) + torch.arange(CONTEXT)
        loss = loss_of(train[starts], train[starts + 1])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        training += time.monotonic() - began
        if (step + 1) % given.every == 0:
            row = {"step": step + 1, "validation_loss": validate()}
            with given.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")


def ours(given: argparse.Namespace, out: Path, *changes: str) -> list[str]:
    """`skipway train` with the recipe's options; later ones replace earlier ones."""
    options = {
        "--model": "gpt-micro",
        "--tokenizer": "chars",
        "--context": CONTEXT,
        "--batch-size": BATCH,
        "--steps": given.steps,
        "--sampling": "random",
        "--holdout": 0.001,
        "--validation": 0.1,
        "--seed": given.seed,
        "--optimizer": "adamw(beta2=0.99)",
        "--lr": PEAK,
        "--weight-decay": DECAY,
        "--clip": "norm(1.0)",
        "--warmup": WARMUP / given.steps,
        "--schedule": f"cosine(floor={FLOOR / PEAK})",
        "--device": "cpu",
        **dict(zip(changes[::2], changes[1::2], strict=True)),
    }
    flags = [part for name, value in options.items() for part in (name, str(value))]
    return [sys.executable, "-m", "skipway", "train", str(given.text), *flags, "--out", str(out)]


def race(given: argparse.Namespace, root: Path) -> list[Contestant]:
    """All in turns, from one validation to the next, until all have made their steps."""
    here = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here / "src"), str(here)]),
        "OMP_NUM_THREADS": str(given.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "SKIPWAY_CACHE": str(root / "cache"),
    }
    given.text = root / "tinyshakespeare.txt"
    given.text.write_text(read(given.data))
    contestants = []
    for mode in given.modes:
        flags = ["--data", str(given.text), "--mode", mode, "--rows", str(root / f"{mode}.jsonl")]
        flags += ["--steps", str(given.steps), "--every", str(given.every), "--seed", str(given.seed)]
        command = [sys.executable, "-m", "benchmarks.nanogpt", *flags]
        contestants.append(
            Contestant(f"plain {mode}", command, root / f"{mode}.jsonl", root / f"{mode}.log", environment, METRIC)
        )
    for name, changes in {"skipway": (), "skipway tuned": tuple(given.tuned.split())}.items():
        if name == "skipway" or changes:
            out = root / name.replace(" ", "-")
            command = ours(given, out, *changes)
            contestants.append(
                Contestant(name, command, out / "metrics.jsonl", out.with_suffix(".log"), environment, METRIC)
            )
    running = list(contestants)
    try:
        while running:
            running = [each for each in running if each.turn(math.inf)]
    finally:
        for each in contestants:
            each.end()
    return contestants


def summary(contestants: list[Contestant], given: argparse.Namespace) -> dict[str, Any]:
    """Seconds, tokens per second between the first and the last validation, and losses."""
    rows = {}
    for each in contestants:
        (began, _), (ended, loss) = each.results[0], each.results[-1]
        tokens = given.every * BATCH * CONTEXT * (len(each.results) - 1)
        rows[each.name] = {
            "seconds": round(ended, 1),
            "tokens per second": round(tokens / (ended - began)),
            "loss": round(loss, 4),
            "lowest loss": round(min(value for _, value in each.results), 4),
            "curve": [(round(seconds, 1), round(value, 4)) for seconds, value in each.results],
        }
    return {"machine": f"{cpu_name()}, {cpu_count()} cores", "date": time.strftime("%Y-%m-%d"), "runs": rows}


def start() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="tiny Shakespeare, also as .xz")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--modes", nargs="*", choices=[*MODES], default=[*MODES], help="of the plain script [all]")
    parser.add_argument("--tuned", default="", help="options of a second run of skipway: '--lr 4e-3'")
    parser.add_argument("--threads", type=int, default=cpu_count(), help="of all [one per core]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--every", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=[*MODES], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.every = given.every or max(1, given.steps // 10)  # as `skipway train` validates
    if given.rows is not None:
        plain(given)
        return
    with tempfile.TemporaryDirectory() as name:
        result = summary(race(given, Path(name)), given)
    for name, row in result["runs"].items():
        print(f"{name:20} {row['seconds']:8.1f} s {row['tokens per second']:8,} tokens/s  loss {row['loss']:.4f}")
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    start()
