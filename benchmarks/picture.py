"""The picture in the README: what the schemes do to the signal at any depth, and a real run.

Command   python -m benchmarks.picture RUN --out docs/result.png     (RUN: a folder that `skipway train` made)
Left      variance of the stream after each of the 600 connections of resnet1202 at initialisation, relative to the
          first, on random images (no training; one forward pass a scheme)
Right     accuracy by epoch of the run, from its metrics.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

import skipway as sw

SCHEMES = {
    "identity, no norm": "skipinit(init=1.0, norm='remove')",
    "identity": "identity",
    "skipinit 1/√L, no norm": "skipinit(init='depth', norm='remove')",
    "depthscaled": "depthscaled",
    "layerscale": "layerscale",
    "fixup": "fixup",
}


@torch.no_grad()
def variances(spec: str) -> list[float]:
    """Variance of the stream after every connection, relative to the first."""
    torch.manual_seed(0)
    model = sw.build("resnetv2-1202", scheme=spec, width=32, stem_width=32, dtype=torch.float64)
    out: list[float] = []
    for connection in sw.chain(model):
        connection.residual.register_forward_hook(lambda *args: out.append(args[2].var().item()))
    model(torch.randn(8, 3, 32, 32, dtype=torch.float64))
    return [value / out[0] for value in out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/result.png"))
    options = parser.parse_args()
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, spec in SCHEMES.items():
        values = variances(spec)
        # two schemes leave the stream alike
        style = (0, (3, 3)) if name == "fixup" else "solid"
        left.plot(range(1, len(values) + 1), values, label=name, linewidth=1.6, linestyle=style)
    left.set(
        xscale="log",
        yscale="log",
        ylim=(1e-2, 1e6),
        xlabel="residual connection",
        title="Signal at initialisation, ResNet-1202",
    )
    left.set_ylabel("variance of the stream / first")
    left.legend(frameon=False, fontsize=8)
    rows = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((options.run / "config.json").read_text())
    for key, label in (("train_accuracy", "train"), ("validation_accuracy", "validation")):
        right.plot(
            [row["epoch"] for row in rows], [100 * row[key] for row in rows], marker="o", markersize=3, label=label
        )
    right.set(
        xlabel="epoch",
        ylabel="accuracy, %",
        title=f"skipway train: {config['model']['name']}, {Path(config['recipe']['data'] or 'digits').name}",
    )
    right.legend(frameon=False)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
