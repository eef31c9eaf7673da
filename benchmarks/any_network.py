"""Networks of others through the whole loop, from the command line: train, kill, resume, predict, evaluate, export.

    python -m benchmarks.any_network DATA --seed 0 --out benchmarks/any_network.md

Networks: 20 of timm drawn by the seed among those of at most 8 million parameters, 5 of torchvision, 5 tiny ones of
transformers from a folder with their config, 3 own files. DATA is a folder of images by class, a small one: each
network is trained on it for an epoch twice. Every command runs in a process of its own.

For each network: one epoch; the same in another folder, killed by SIGKILL in the fourth step, a step after its
checkpoint, and resumed: all weights equal bit for bit; `predict` on all images is right as often as `evaluate` says;
the ONNX file gives the probabilities of `predict`; the hub folder gives them, too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LARGEST, SIDES, SECONDS = 8e6, (32, 64, 128), 600.0
PRELOADED = ["skipway.training.loop", "skipway.inference.publish", "skipway.cli.train"]
KILLED_IN, SAVE_EVERY = 4, 2

OWN = '''
from torch import nn

def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Dropout(0.1), nn.Linear(8, 1000))

class Named(nn.Module):
    """Returns a dict."""

    def __init__(self):
        super().__init__()
        self.net = plain()

    def forward(self, x):
        logits = self.net(x)
        return {"features": logits[:, :2], "logits": logits}

class Normalised(nn.Module):
    """Has its own preprocessing inside."""

    def __init__(self, num_classes):
        super().__init__()
        self.norm, self.net, self.head = nn.InstanceNorm2d(3), plain(), nn.Linear(1000, num_classes)

    def forward(self, x):
        x = nn.functional.interpolate(self.norm(x), scale_factor=2.0, mode="bilinear", antialias=True)
        return self.head(self.net(x).relu())
'''
TINY: dict[str, dict[str, Any]] = {
    "ViT": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 8,
    },
    "ConvNext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
    "Swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 4},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
    "Beit": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 8,
    },
}
"""Configs of transformers: the class is the name with `ForImageClassification`."""
TORCHVISION = ("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5", "efficientnet_b0")


def timm_names(seed: int, count: int) -> list[str]:
    """Names of timm in the order of a draw, those of at most 8 million parameters."""
    import torch

    from skipway.zoo import import_library

    timm = import_library("timm")
    names = sorted(timm.list_models())
    random.Random(seed).shuffle(names)
    small: list[str] = []
    for name in names:
        if len(small) == count:
            break
        with contextlib.suppress(Exception), torch.device("meta"):  # some cannot be made without values
            if sum(each.numel() for each in timm.create_model(name).parameters()) <= LARGEST:
                small.append(f"timm:{name}")
    return small


def write_configs(folder: Path) -> list[str]:
    """Write a folder with the config of each tiny network of transformers."""
    from skipway.zoo import import_library

    transformers = import_library("transformers")
    for name, options in TINY.items():
        made = f"{name}ForImageClassification"
        config = getattr(transformers, made).config_class(**options, architectures=[made])
        config.save_pretrained(folder / name.lower())
    return [f"hf:{folder / name.lower()}" for name in TINY]


def write_own(folder: Path) -> list[str]:
    """Write a file with three networks."""
    file = folder / "own.py"
    file.write_text(OWN)
    return [f"{file}:{name}" for name in ("plain", "Named", "Normalised")]


def fitting_side(name: str) -> int:
    """The smallest side of images that a network can be trained on."""
    from skipway.errors import SkipwayError
    from skipway.inference.network import build_classifier
    from skipway.zoo import ModelRequest, load_model

    for side in SIDES:
        import torch

        try:
            model = build_classifier({"name": name, "classes": 3, "channels": 3, "image": side})
            model.train()(torch.zeros(2, 3, side, side))
        except (SkipwayError, RuntimeError, ValueError, AssertionError):
            continue
        return side
    return load_model(name, ModelRequest()).shape[-1]


def command(*arguments: object) -> str:
    """Run a command; what it printed.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    from skipway.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(each) for each in arguments])
    if status:
        raise RuntimeError(f"{arguments[0]}: {(err.getvalue() or out.getvalue()).strip().splitlines()[-1][:300]}")
    return out.getvalue()


def train_command(name: str, data: Path, side: int, out: Path, batch: int = 8) -> None:
    """Train for an epoch, or resume."""
    chosen = ("--model", name, "--size", side, "--epochs", 1, "--batch-size", batch, "--lr", 0.01, "--start", "random")
    more = ("--save-every", SAVE_EVERY, "--ema", 0.9, "--health", 0.3, "--device", "cpu", "--precision", "float32")
    command("train", data, *chosen, *more, "--out", out, "--resume", "--quiet")


def kill_self() -> None:
    """End this process as a power failure does."""
    os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(
    name: str, data: Path, side: int, out: Path, kill: Callable[[], None] = kill_self, batch: int = 8
) -> None:
    """Train, and die in the fourth step."""
    from skipway.training import step

    count, backward = 0, step.backward

    def dying(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == KILLED_IN:
            kill()
        return backward(*given)

    step.backward = dying
    try:
        train_command(name, data, side, out, batch)
    finally:
        step.backward = backward


def find_faults(name: str, data: Path, side: int, folder: Path, batch: int = 8, *, onnx: bool = True) -> list[str]:
    """Resume the killed run, use the other one with every command, and return what is wrong."""
    from skipway.inference.code_file import code_file

    faults = []
    stopped, whole = folder / "killed", folder / "whole"
    if (stopped / "summary.json").exists() or not any((stopped / "checkpoints").iterdir()):
        faults.append("the run was not killed between its first checkpoint and its end")
    train_command(name, data, side, stopped, batch)
    for file in ("last.safetensors", "best.safetensors"):
        if not equal_weights(whole / file, stopped / file):
            faults.append(f"{file} of the resumed run differs")
    trust = ["--trust-code"] if code_file(name) is not None else []
    evaluated = json.loads(command("evaluate", whole, data, "--json", "--device", "cpu", *trust))
    rows = predicted(whole, data, trust)
    right = sum(row["label"] == Path(row["file"]).parent.name for row in rows)
    if (right, len(rows)) != (evaluated["correct"], evaluated["images"]):
        faults.append(f"predict is right for {right} of {len(rows)}, evaluate for {evaluated['correct']}")
    command("export", whole, "--hub", folder / "hub", *trust)
    gap = largest_gap(rows, predicted(folder / "hub", data, trust))
    if gap > 1e-5:
        faults.append(f"the hub folder predicts other probabilities: {gap:.1e}")
    if not onnx:
        return faults
    command("export", whole, "--onnx", folder / "net.onnx", *trust)
    gap = onnx_gap(folder / "net.onnx", whole, rows, bool(trust))
    if gap > 1e-3:
        faults.append(f"the ONNX file predicts other probabilities: {gap:.1e}")
    return faults


def equal_weights(first: Path, second: Path) -> bool:
    """Whether two files hold the same tensors, bit for bit."""
    import torch
    from safetensors.torch import load_file

    left, right = load_file(first), load_file(second)
    same = (torch.equal(left[key].view(-1).view(torch.uint8), right[key].view(-1).view(torch.uint8)) for key in left)
    return left.keys() == right.keys() and all(same)


def predicted(run: Path, data: Path, trust: list[str]) -> list[dict[str, Any]]:
    """What `skipway predict` prints for all images."""
    text = command("predict", run, data, "--json", "--top", 1000, "--device", "cpu", *trust)
    return [json.loads(line) for line in text.splitlines()]


def largest_gap(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> float:
    """The largest difference of probabilities."""
    pairs = zip(first, second, strict=True)
    return max(abs(a["probabilities"][key] - b["probabilities"][key]) for a, b in pairs for key in a["probabilities"])


def onnx_gap(file: Path, run: Path, rows: list[dict[str, Any]], trust: bool) -> float:
    """The largest difference of the file's probabilities in onnxruntime to those of `predict`."""
    import onnxruntime
    import torch

    from skipway.data.preprocessing import Preprocessing

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    stored = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    preprocessing = Preprocessing.from_json(stored, str(file))
    worst = 0.0
    for row in rows:
        pixels = preprocessing.of_file(Path(row["file"]))[None]
        inputs = preprocessing.of_tensor(pixels.permute(0, 3, 1, 2)).contiguous().numpy()
        logits = torch.as_tensor(session.run(None, {"images": inputs})[0])
        for key, share in zip(preprocessing.classes, logits.softmax(1)[0].tolist(), strict=True):
            worst = max(worst, abs(share - row["probabilities"][key]))
    return worst


def send_result(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Run a function in a child process and send back what it returns, or its error."""
    try:
        sender.send(("result", function(*arguments)))
    except BaseException as error:
        sender.send(("error", f"{type(error).__name__}: {error}"))


def in_process(function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """A function's result in a process of its own: ("result", value), ("error", text), or ("ended", exit code)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            process.kill()
            return "error", f"no answer within {SECONDS:.0f} s"
        return receiver.recv()
    except EOFError:
        process.join()
        return "ended", process.exitcode
    finally:
        process.join()


def check_network(name: str, data: Path, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    began = time.monotonic()
    kind, side = in_process(fitting_side, name)
    row = {"network": name, "size": side if kind == "result" else "", "result": "right"}
    steps: Iterator[tuple[Any, ...]] = iter(
        (
            (train_command, name, data, side, folder / "whole"),
            (train_until_killed, name, data, side, folder / "killed"),
            (find_faults, name, data, side, folder),
        )
    )
    for step in steps if kind == "result" else ():
        kind, value = in_process(*step)
        if step[0] is train_until_killed and (kind, value) == ("ended", -signal.SIGKILL):
            continue
        if kind != "result" or value:
            row["result"] = "; ".join(value) if isinstance(value, list) else f"{step[0].__name__}: {value}"
            break
    else:
        if kind != "result":
            row["result"] = str(side)
    return {**row, "seconds": round(time.monotonic() - began)}


def write_table(file: Path, rows: list[dict[str, Any]], seed: int) -> None:
    """Write the table in Markdown."""
    right = sum(row["result"] == "right" for row in rows)
    lines = [
        "# Any network",
        "",
        f"`python -m benchmarks.any_network DATA --seed {seed}`: {right} of {len(rows)} networks are trained for an "
        "epoch, killed and resumed bit for bit; predictions equal evaluation, the ONNX file and the hub folder.",
        "",
        "| network | pixels | result |",
        "|---|---|---|",
        *(f"| `{row['network']}` | {row['size']} | {row['result']} |" for row in rows),
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Check all networks and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timm", type=int, default=20)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        kind, drawn = in_process(timm_names, given.seed, given.timm)
        names = [*(drawn if kind == "result" else []), *(f"torchvision:{name}" for name in TORCHVISION)]
        names += [*in_process(write_configs, folder)[1], *write_own(folder)]
        for number, name in enumerate(each for each in names if given.only in each):
            row = check_network(name, given.data.resolve(), folder / str(number))
            row["network"] = name.replace(f"{folder}/", "")
            rows.append(row)
            print("\t".join(map(str, row.values())), flush=True)
            if given.out is not None:
                write_table(given.out, rows, given.seed)


if __name__ == "__main__":
    main()
