"""Small language models: which of 72 configurations train, and what a diagnosis says before training.

    python -m benchmarks.trainability.language truth [--text FILE] [--limit N]     # trains, and resumes
    python -m benchmarks.trainability.language measure [--text FILE] [--limit N]   # diagnoses, and resumes
    python -m benchmarks.trainability.language verdicts                            # compares

Decoders of 2 to 16 blocks on bytes of a text; without one, of Python's standard library. A line of
language_truth.jsonl or language_measurements.jsonl next to this file for each configuration. Nothing was chosen by an
outcome.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import skipway as sw
from benchmarks.trainability.configurations import deal, scale_
from benchmarks.trainability.truth import GRACE, IN_A_ROW, STEPS, TOO_LARGE, WINDOW, finite
from skipway.data.text import TextData, load_text
from skipway.diagnosis.diagnosis import examine
from skipway.diagnosis.indicators import read_indicators
from skipway.diagnosis.settings import settings_of
from skipway.diagnosis.subject import Subject

__all__ = ["LanguageConfiguration", "TorchDecoder", "language_configurations", "main"]

COUNT, SEED = 72, 20261129
DIM, HEADS, VOCAB, CONTEXT, BATCH, SHOWN = 32, 2, 256, 32, 16, 64
BEYOND = 0.3
"""Reached: a mean training loss over 20 batches that is 0.3 nats below that of the best constant answer."""
RATES = {"adamw": (-4.25, -1.0), "sgd": (-2.0, 1.0), "muon": (-3.25, 0.0)}
"""log₁₀ of the learning rates; beside Muon, AdamW has a tenth of its rate."""
STARTS = ("own", "own", "own", "1/√L", "table", "x3")
"""As built; last maps of branches times 1/√L; a table of deviation 1; all maps times 3."""
NETWORKS = {
    "gpt": ("pre", "post", "respost", "sandwich"),
    "llama": ("pre", "post", "respost", "sandwich"),
    "qwen": ("pre", "sandwich"),
    "torch": ("pre", "post"),
}
OURS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {"rms": True, "gated": True, "act": "silu", "position": "rotary", "bias": "none", "tied": False},
    "qwen": {"rms": True, "gated": True, "act": "silu", "position": "rotary", "bias": "none", "head_norm": True},
}
FOLDER = Path(__file__).parent
TRUTH, MEASUREMENTS = FOLDER / "language_truth.jsonl", FOLDER / "language_measurements.jsonl"


@dataclass(frozen=True)
class LanguageConfiguration:
    """A decoder, its start and its training.

    Args:
        network: a key of `NETWORKS`.
        blocks: of attention and MLP.
        norm: placement of the norms.
        start: one of `STARTS`.
        optimizer: "adamw" (decay 0.01), "sgd" (momentum 0.9), or "muon" for the maps of the blocks with AdamW for the
            rest.
        lr: constant learning rate.
        seed: of the weights.
    """

    network: str
    blocks: int
    norm: str
    start: str
    optimizer: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Unique and readable."""
        return f"{self.network} {self.blocks} {self.norm} {self.start} {self.optimizer} {self.lr:g} seed {self.seed}"

    @property
    def held_out(self) -> bool:
        """Whether it is in the half on which nothing may be tuned, by a bit of the name's SHA-256."""
        return hashlib.sha256(self.name.encode()).digest()[0] % 2 == 1

    def build(self) -> nn.Module:
        """The network at its start."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.network == "torch":
                model: nn.Module = TorchDecoder(self.blocks, self.norm)
            else:
                size = {"dim": DIM, "heads": HEADS, "blocks": self.blocks, "vocab": VOCAB, "context": CONTEXT}
                model = sw.build("gpt-micro", norm=self.norm, **OURS[self.network], **size)
            self.begin(model)
        return model.train()

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        """Change the start in place."""
        if self.start == "x3":
            scale_(model, 3.0)
        elif self.start == "1/√L":
            for connection in sw.chain(model, torch.zeros(2, CONTEXT, dtype=torch.long)):
                connection.multiply_((2 * self.blocks) ** -0.5)
        elif self.start == "table":
            table = next(p for p in model.parameters() if p.shape == (VOCAB, DIM))
            nn.init.normal_(table)

    def make_optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """One optimizer, or Muon and AdamW."""
        named = dict(model.named_parameters())
        if self.optimizer == "sgd":
            return [torch.optim.SGD(named.values(), lr=self.lr, momentum=0.9)]
        if self.optimizer == "adamw":
            return [torch.optim.AdamW(named.values(), lr=self.lr, weight_decay=0.01)]
        maps = [p for name, p in named.items() if p.ndim == 2 and "blocks" in name]
        held = {id(each) for each in maps}
        rest = [p for p in named.values() if id(p) not in held]
        return [torch.optim.Muon(maps, lr=self.lr), torch.optim.AdamW(rest, lr=self.lr / 10, weight_decay=0.01)]


class TorchDecoder(nn.Module):
    """Layers of torch with a causal mask and positions, started as torch starts them: a table of deviation 1."""

    def __init__(self, blocks: int, norm: str) -> None:
        super().__init__()
        first = norm == "pre"
        self.table, self.positions = nn.Embedding(VOCAB, DIM), nn.Embedding(CONTEXT, DIM)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, 0.0, "gelu", batch_first=True, norm_first=first)
        last = nn.LayerNorm(DIM) if first else None
        self.blocks = nn.TransformerEncoder(layer, blocks, norm=last, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.positions(torch.arange(ids.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.blocks(x, mask=mask, is_causal=True))


def language_configurations() -> list[LanguageConfiguration]:
    """All configurations, in a fixed shuffled order: a Latin hypercube over depth and rate, the rest dealt evenly."""
    draw = random.Random(SEED)
    slices = {what: draw.sample(range(COUNT), COUNT) for what in ("depth", "lr")}
    networks, starts, optimizers = (deal(draw, each, COUNT) for each in (tuple(NETWORKS), STARTS, tuple(RATES)))
    found = []
    for number in range(COUNT):
        place = {what: (slices[what][number] + draw.random()) / COUNT for what in slices}
        low, high = RATES[optimizers[number]]
        found.append(
            LanguageConfiguration(
                network=networks[number],
                blocks=round(2 * 8 ** (place["depth"] ** 1.6)),
                norm=draw.choice(NETWORKS[networks[number]]),
                start=starts[number],
                optimizer=optimizers[number],
                lr=float(f"{10 ** (low + (high - low) * place['lr']):.2g}"),
                seed=draw.randrange(1000),
            )
        )
    return found


def chance(data: TextData) -> float:
    """Entropy of the training tokens, in nats: the loss of the best constant answer."""
    counts = torch.from_numpy(data.train.id_counts(VOCAB)).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def train(configuration: LanguageConfiguration, data: TextData) -> dict[str, Any]:
    """Train for 300 steps, or until the outcome is clear; a line of language_truth.jsonl."""
    model = configuration.build()
    optimizers = configuration.make_optimizers(model)
    losses: list[float] = []
    recent: deque[float] = deque(maxlen=WINDOW)
    outcome, large, goal = "stuck", 0, chance(data) - BEYOND
    for step in range(1, STEPS + 1):
        ids, targets = data.train_batch(epoch=0, step=step - 1, batch_size=BATCH)
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        recent.append(losses[-1])
        large = large + 1 if step > GRACE and losses[-1] > TOO_LARGE else 0
        if not math.isfinite(losses[-1]) or large >= IN_A_ROW:
            outcome = "diverged"
        elif len(recent) == WINDOW and sum(recent) / WINDOW <= goal:
            outcome = "reached"
        if outcome != "stuck":
            break
    return {
        **asdict(configuration),
        "outcome": outcome,
        "steps": len(losses),
        "loss_first": finite(losses[0]),
        "loss_last": finite(sum(recent) / len(recent)),
        "chance": round(goal + BEYOND, 4),
        "text": data.fingerprint,
    }


def measure(configuration: LanguageConfiguration, data: TextData) -> dict[str, Any]:
    """Diagnose the untrained network on other windows than it is trained on; a line of language_measurements.jsonl."""
    model = configuration.build()
    settings = replace(settings_of(configuration.make_optimizers(model), model), steps=STEPS)
    ids, targets = data.train_batch(epoch=1, step=0, batch_size=SHOWN)
    diagnosis = examine(Subject(model, ids, targets), settings)
    indicators = asdict(read_indicators(diagnosis.measurement, settings))
    return {
        "verdict": diagnosis.verdict,
        "rules": [f"{finding.rule}:{finding.level}" for finding in diagnosis.findings],
        **{name: float(f"{value:.6g}") for name, value in indicators.items()},
        "passes": round(diagnosis.measurement.passes, 2),
        "text": data.fingerprint,
    }


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file by name; none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def verdicts() -> list[str]:
    """The table of outcomes and verdicts in Markdown, and a line for each configuration that was judged wrongly."""
    truth, said = read_lines(TRUTH), read_lines(MEASUREMENTS)
    chosen = [c for c in language_configurations() if c.name in truth and c.name in said]
    lines = ["| outcome | said to train | not |", "|---|---|---|"]
    counts = Counter((truth[c.name]["outcome"] == "reached", said[c.name]["verdict"] == "trains") for c in chosen)
    for reached, word in ((True, "reached"), (False, "stuck or diverged")):
        lines.append(f"| {word} | {counts[reached, True]} | {counts[reached, False]} |")
    shares = [counts[t, t] / n for t in (True, False) if (n := counts[t, True] + counts[t, False])]
    lines += ["", f"balanced accuracy {sum(shares) / max(len(shares), 1):.1%} of {len(chosen)} configurations", ""]
    for c in chosen:
        row, seen = truth[c.name], said[c.name]
        if (row["outcome"] == "reached") != (seen["verdict"] == "trains"):
            end = f"{row['outcome']} ({row['loss_last']} beside {row['chance']:.2f})"
            lines.append(f"* {c.name}: {end}; said {seen['verdict']} {', '.join(seen['rules'])}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("truth", "measure", "verdicts"))
    parser.add_argument("--text", type=Path, help="a file of text")
    parser.add_argument("--limit", type=int, help="no more than the first N")
    options = parser.parse_args(arguments)
    if options.what == "verdicts":
        print("\n".join(verdicts()))
        return
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    data = load_text(options.text, tokenizer="bytes", context=CONTEXT)
    path, work = (TRUTH, train) if options.what == "truth" else (MEASUREMENTS, measure)
    known = read_lines(path)
    for configuration in language_configurations()[: options.limit]:
        if configuration.name not in known:
            line = {"name": configuration.name, **work(configuration, data)}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
