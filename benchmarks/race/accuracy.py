"""What a mode and a precision do to the accuracy of a trained network: for the table of speed at equal accuracy.

    python -m benchmarks.race.accuracy --networks resnet50 --out bench [--size 64] [--minutes 8] [--modes …]

Each architecture is trained as it is, at smaller images, on the embedded digits; weights stay in the folder of the run.
Then the held-out digits are classified in every mode and precision. What falls by more than half a point below float32
takes no part in a race of precision "any". The speed does not depend on the weights and is measured at full size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.race.architectures import make_model
from benchmarks.race.devices import DEVICES
from benchmarks.race.engines import calibrated, logits_of
from benchmarks.race.modes import MODES, OURS
from skipway.data.digits import digits
from skipway.hardware.device import choose_precision
from skipway.inference.backends import PRECISIONS
from skipway.inference.timer import error_line

__all__ = ["ALLOWED", "accuracy_of", "base_mode", "held_out", "loses_accuracy"]

ALLOWED = 0.5
"""Points of top-1 that a precision may cost."""
BATCH = 16
HELD_OUT = 37 * BATCH
CALIBRATING = 18 * BATCH
RATE, DECAY = 5e-4, 0.05
Row = Mapping[str, Any]


def base_mode(mode: str) -> str:
    """The mode whose arithmetic a mode has: pieces and streams change none.

    >>> base_mode("frozen-pieces"), base_mode("openvino-throughput")
    ('frozen', 'openvino')
    """
    return mode.removesuffix("-pieces").removesuffix("-throughput")


def loses_accuracy(rows: Iterable[Row], network: str, contender: Row) -> bool:
    """Whether a contender falls short of the accuracy of float32, or nobody has looked.

    Args:
        rows: of accuracies.
        network: its name.
        contender: its fields.

    >>> row = {"network": "net", "mode": "openvino", "precision": "int8", "top1": 96.0, "reference": 96.4}
    >>> loses_accuracy([row], "net", {"mode": "openvino-throughput", "precision": "int8"})
    False
    """
    wanted = (network, base_mode(contender["mode"]), contender["precision"])
    found = [row for row in rows if (row["network"], row["mode"], row["precision"]) == wanted and not row.get("error")]
    if not found:
        return contender["precision"] != "float32"
    return found[-1]["top1"] < found[-1]["reference"] - ALLOWED


def held_out(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits to train on, their labels, digits that are held out, and their labels; float32 (N, 3, size, size)."""
    scans, names = digits()
    labels = torch.tensor([int(name[0]) for name in names])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = functional.interpolate(scans.permute(0, 3, 1, 2).float() / 127.5 - 1, size=size, mode="bilinear")
    images, labels = images[order].expand(-1, 3, -1, -1).contiguous(), labels[order]
    return images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT]


def train(network: str, size: int, minutes: float, say: Any) -> dict[str, Any]:
    """Train an architecture with AdamW under autocast for a time, the rate falling to 0 over it."""
    torch.manual_seed(0)
    images, labels, _, _ = held_out(size)
    model = make_model(OURS, network, size).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=DECAY)
    begun, epoch, steps = time.monotonic(), 0, 0
    while (share := (time.monotonic() - begun) / (60 * minutes)) < 1:
        losses = []
        for batch in torch.randperm(len(labels)).split(2 * BATCH)[:-1]:
            share = min(1.0, (time.monotonic() - begun) / (60 * minutes))
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (steps + 1) / 50) * (1 - share)
            shift = torch.randint(-(size // 16), size // 16 + 1, (2,)).tolist()
            with torch.autocast(
                "cpu", torch.bfloat16, enabled=choose_precision("auto", images.device)[0] == "bfloat16"
            ):
                loss = functional.cross_entropy(model(images[batch].roll(shift, (2, 3))).float(), labels[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            steps += 1
        epoch += 1
        say(f"{network}: epoch {epoch}, loss {sum(losses) / len(losses):.3f}")
    trained = f"{steps} steps of {2 * BATCH} digits at {size}x{size}"
    return {"state": model.eval().state_dict(), "trained": trained}


@torch.no_grad()
def accuracy_of(call: Any, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent, a batch of the size that a network was prepared for at a time."""
    answers = [logits_of(call(batch)).float().argmax(1) for batch in images.split(BATCH)]
    return 100 * (torch.cat(answers) == labels).float().mean().item()


def accuracies(network: str, size: int, stored: Row, wanted: Collection[str] = MODES) -> Iterable[dict[str, Any]]:
    """The accuracy in each of the wanted modes and precisions in which the CPU runs inference."""
    known, _, images, labels = held_out(size)

    def trained() -> nn.Module:
        model = make_model(OURS, network, size)
        model.load_state_dict(stored["state"])
        return model.eval()

    reference = accuracy_of(trained(), images, labels)
    about = {"network": network, "trained": stored["trained"], "images": len(labels), "reference": reference}
    for name, mode in MODES.items():
        if (
            name not in wanted
            or name != base_mode(name)
            or "infer" not in mode.what
            or "cpu" not in mode.devices
            or name == "optimize"
        ):
            continue
        for precision in mode.precisions:
            row = {"kind": "accuracy", **about, "mode": name, "precision": precision}
            dtype = torch.float32 if mode.keeps else PRECISIONS[precision]
            layout = torch.channels_last if mode.channels_last else torch.contiguous_format
            model, given = trained().to(dtype).to(memory_format=layout), images.to(dtype).to(memory_format=layout)
            try:
                with calibrated(known[:CALIBRATING]):
                    call = mode.ready(model, given[:BATCH].contiguous(memory_format=layout), precision, None)
                yield {**row, "top1": accuracy_of(call, given, labels), "error": ""}
            except Exception as error:  # libraries raise errors of their own
                yield {**row, "error": error_line(error)}
            torch.compiler.reset()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not trained yet, classify, and write the rows."""
    from benchmarks.race.journal import Journal

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=DEVICES["cpu"].networks)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=tuple(MODES))
    options = parser.parse_args(arguments)
    journal = Journal(options.out)
    for network in options.networks:
        path = options.out / f"{network}-{options.size}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = train(network, options.size, options.minutes, lambda line: print(line, flush=True))
            torch.save(stored, path)
        for row in accuracies(network, options.size, torch.load(path), options.modes):
            journal.write(row)
            print(
                {key: row[key] for key in ("network", "mode", "precision", "top1", "reference", "error") if key in row}
            )


if __name__ == "__main__":
    main()
