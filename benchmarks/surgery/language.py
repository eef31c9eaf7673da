"""Operations of surgery on tiny networks of transformers' language models, each looked at from outside.

    python -m benchmarks.surgery.language [--only CLASS ...] [--operation NAME ...] [--summary]

A cell (operation × class) is a row of language.csv beside this file; a run goes on where the last one ended. Verdicts:

* `right`: all that is looked at holds.
* `refused`: a `SkipwayError`, with its reason; the network is as it was.
* `raw`: another exception, of the operation or of a later pass through the network.
* `silent`: something does not hold, and nothing said so.

What is looked at, beside what `benchmarks.surgery.foreign` looks at (outputs, gradients and buffers in training, what
outputs depend on, modes, undo to the bit): a training step on a padded batch, of another size than the example, with
finite gradients; greedy generation with and without a cache, which agree, and agree with those before where outputs are
promised to. What the untouched network cannot do is not asked of it afterwards. Networks have random weights away from
their starts and no dropout.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import skipway as sw
from benchmarks.language_models import build_language_model, language_models
from benchmarks.peers import import_transformers, randomise_
from benchmarks.surgery.foreign import (
    GRADIENTS,
    OPERATIONS,
    Promise,
    carry_out,
    compare,
    differences,
    gap_of,
    snapshot,
    twin_of,
)
from skipway.errors import SkipwayError
from skipway.surgery.fusion import fuse
from skipway.tracing import call_model
from skipway.tracing.containers import tensors_in

__all__ = ["CALLS", "IN_PLACE", "Model", "examine_cell", "main"]

FILE = Path(__file__).with_name("language.csv")
HEADER = ["model", "operation", "verdict", "reason", "seconds"]
NEW_TOKENS, PADDING, TOLERANCE, WRITTEN = 4, 4, 1e-4, 1e-3
TASKS = {"causal", "masked", "translating"}
"""Tables of `benchmarks.language_models` whose classes are given tokens."""
IN_PLACE = [
    *("skip_compute", "checkpointed", "reversible", "rescheme", "rescheme, divide", "rescheme, streams"),
    *("fold_gains", "remove_norm", "lesion", "accelerate"),
]
"""Operations of `benchmarks.surgery.foreign` that are carried out; `deepen` and `shorten` have a table of their own."""


Written = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Tokens and their logits, written with a cache and without."""


@dataclass
class Model:
    """A language model and what it is called with.

    Args:
        name: its class.
        network: it, in evaluation mode.
        example: what operations are given.
        padded: a batch of another size, with padding; None where it does not run with one.
        generated: what it writes, with and without a cache; None where it cannot.
    """

    name: str
    network: nn.Module
    example: dict[str, Any]
    padded: dict[str, Tensor] | None = None
    generated: Written | None = field(default=None)

    @classmethod
    def build(cls, name: str, architecture: str | None) -> Model:
        """The model with random weights, and what it can do before anything is done to it."""
        network, example = build_language_model(name, architecture)
        randomise_(network)
        without_dropout(network)
        found = cls(name, network, example)
        batch = padded_batch(network, example)
        found.padded = batch if batch is not None and runs(lambda: train_padded(network, batch)[0]) else None
        with suppress(Exception):
            found.generated = generate(network, found.padded or example)
        return found


def runs(call: Callable[[], Any]) -> bool:
    """Whether something runs and finds no fault."""
    try:
        return not call()
    except Exception:  # whatever somebody's network raises
        return False


def without_dropout(network: nn.Module) -> None:
    """Set every rate of dropout to 0, in place."""
    for module in network.modules():
        for name, value in vars(module).items():
            if re.search("drop", name) and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def padded_batch(network: nn.Module, example: dict[str, Any]) -> dict[str, Tensor] | None:
    """Three rows of ten tokens, the first of which begins with padding in a decoder and ends with it elsewhere."""
    if "input_ids" not in example:
        return None
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (3, 10), generator=generator)
    mask = torch.ones_like(ids)
    decoder = not getattr(network.config, "is_encoder_decoder", False) and network.can_generate()
    mask[0, slice(0, PADDING) if decoder else slice(-PADDING, None)] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if "decoder_input_ids" in example:
        batch["decoder_input_ids"] = torch.randint(2, 64, (3, 7), generator=generator)
    return batch


def train_padded(network: nn.Module, batch: dict[str, Tensor]) -> tuple[list[str], Tensor, dict[str, Tensor]]:
    """Faults of one training step on a padded batch, the logits that are no padding, and gradients of the parameters;
    the network's gradients, buffers and modes are put back.
    """
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    modes = {module: module.training for module in network.modules()}
    torch.manual_seed(2)
    try:
        output = network.train()(**batch)
        logits = next(t for t in tensors_in(output) if t.requires_grad)
        shown = batch["attention_mask"].bool()
        logits = (logits[shown] if logits.shape[:2] == shown.shape else logits).float()
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
        grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        wrong = [name for name, grad in grads.items() if not bool(grad.isfinite().all())]
        faults = [f"gradients of a padded batch are not finite: {', '.join(wrong[:2])}"] * bool(wrong)
        return faults, logits.detach(), grads
    finally:
        for parameter in network.parameters():
            parameter.grad = None
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def generate(network: nn.Module, batch: dict[str, Tensor]) -> Written:
    """What a model writes greedily, with its cache and without."""
    modes = {module: module.training for module in network.modules()}
    given = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")}
    given |= {"do_sample": False, "num_beams": 1, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    network.eval()
    try:
        found = [
            network.generate(**given, use_cache=cache, output_logits=True, return_dict_in_generate=True)
            for cache in (True, False)
        ]
    finally:
        for module, mode in modes.items():
            module.training = mode
    one, two = ((each.sequences[:, -NEW_TOKENS:], torch.stack(each.logits, 1)) for each in found)
    return one, two


def agree(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    """Whether the same is written up to rounding: logits are compared as long as the tokens before them are equal."""
    (tokens, logits), (others, other_logits) = one, other
    same = (tokens == others).long().cumprod(1).roll(1, 1)
    same[:, 0] = 1
    return gap_of([logits[same.bool()]], [other_logits[same.bool()]]) <= WRITTEN


def look(model: Model) -> Callable[..., list[str]]:
    """What is looked at after an operation, for `carry_out`."""

    def faults_of(promise: Promise, twin: nn.Module, network: nn.Module, example: Any, known: Any) -> list[str]:
        faults = compare(promise, twin, network, example, known)
        if model.padded is not None:
            faults += step_faults(promise, twin, network, model.padded)
        if model.generated is not None:
            faults += generation_faults(model, network, promise.outputs)
        return faults

    return faults_of


def step_faults(promise: Promise, twin: nn.Module, network: nn.Module, batch: dict[str, Tensor]) -> list[str]:
    """Faults of a training step on a padded batch, compared with the copy from before where that is promised."""
    try:
        faults, logits, grads = train_padded(network, batch)
    except SkipwayError as problem:
        return [f"refused afterwards: {' '.join(str(problem).split())}"]
    except Exception as problem:
        return [f"a padded batch: afterwards {type(problem).__name__}: {' '.join(str(problem).split())[:160]}"]
    if promise.training:
        _, before, old = train_padded(twin, batch)
        gap = gap_of([before], [logits])
        faults += [f"outputs of a padded batch differ by {gap:.2g} in training"] * (not gap <= 10 * TOLERANCE)
        theirs, ours = dict(twin.named_parameters()), dict(network.named_parameters())
        same = [name for name in old if name in grads and torch.equal(theirs[name], ours[name])]
        largest = max(float(old[name].abs().max()) for name in same)
        gap = max(float((old[name] - grads[name]).abs().max()) for name in same) / largest
        faults += [f"gradients of a padded batch differ by {gap:.2g}"] * (not gap <= GRADIENTS)
    return faults


def generation_faults(model: Model, network: nn.Module, kept: bool) -> list[str]:
    """Faults of generation, with a cache and without."""
    assert model.generated is not None
    try:
        found = generate(network, model.padded or model.example)
    except Exception as problem:
        return [f"generate: afterwards {type(problem).__name__}: {' '.join(str(problem).split())[:160]}"]
    if kept:
        same = all(agree(old, new) for old, new in zip(model.generated, found, strict=True))
        return ["generate writes something else than before"] * (not same)
    return ["generate writes something else with a cache than without"] * (
        agree(*model.generated) and not agree(*found)
    )


def fused_outputs(model: Model) -> list[str]:
    """Faults of `fuse`, which returns another network."""
    gap = gap_of(outputs(model.network, model.example), outputs(fuse(model.network), model.example))
    return [f"outputs differ by {gap:.2g}"] * (not gap <= TOLERANCE)


@torch.no_grad()
def outputs(network: Any, example: Any) -> list[Tensor]:
    """All tensors that come out."""
    return list(tensors_in(call_model(network, example) if isinstance(network, nn.Module) else network(**example)))


def optimized_outputs(model: Model) -> list[str]:
    """Faults of `optimize`: another structure, type or value, on the example or on a padded batch."""
    fast = sw.optimize(model.network, model.example, backends=["eager"])
    faults = []
    for what, batch in (("the example", model.example), ("a padded batch", model.padded)):
        if batch is None:
            continue
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "arguments of other shapes, types or names")  # a mask, which is slower
            old, new = model.network(**batch), fast(**batch)
        before, after = list(tensors_in(old)), list(tensors_in(new))
        faults += [f"returns a {type(new).__name__} for a {type(old).__name__}"] * (type(new) is not type(old))
        faults += ["types differ"] * ([t.dtype for t in before] != [t.dtype for t in after])
        gap = gap_of(before, after) if len(before) == len(after) else float("inf")
        faults += [f"{what}: outputs differ by {gap:.2g}"] * (not gap <= 1e-3)
    return faults


def tapped_streams(model: Model) -> list[str]:
    """Faults of taps behind all connections, and of one of each kind by number."""
    chain = sw.chain(model.network, model.example)
    found = sw.features(model.network, model.example)
    faults = ["no stream for some connection"] * (len(found) != len(chain))
    faults += ["a stream is not finite"] * (not all(bool(t.isfinite().all()) for t in found.values()))
    x, branch, y = sw.features(model.network, model.example, ["0:before", "0:branch", "0:after"]).values()
    if chain[0].seen.skip == "identity" and chain[0].seen.weights == (1, 1):
        faults += ["x + F(x) is not y"] * (not gap_of([y], [x + branch]) <= TOLERANCE)
    return faults


def decayed_parameters(model: Model) -> list[str]:
    """Faults of `param_groups`: weights of linear maps and experts are decayed, embeddings and vectors are not."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        groups = sw.param_groups(model.network, model.example, lr=1.0, weight_decay=1.0)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    embedded = {id(m.weight) for m in model.network.modules() if isinstance(m, nn.Embedding)}
    maps = (nn.Linear, nn.Conv1d, import_transformers().Conv1D)
    weights = {
        id(p)
        for name, m in model.network.named_modules()
        for key, p in m._parameters.items()
        if p is not None and ((isinstance(m, maps) and key == "weight") or ("expert" in name and p.ndim == 3))
    }
    named = [(name, id(p), p) for name, p in model.network.named_parameters() if p.requires_grad]
    left = [name for name, key, _ in named if key in weights - embedded and not decay[key]]
    wrong = [name for name, key, p in named if decay[key] and (key in embedded or p.ndim == 0)]
    unknown = ["role" in str(each.message) and "not known" in str(each.message) for each in said]
    faults = [f"not decayed: {', '.join(left[:3])}"] * bool(left) + [f"decayed: {', '.join(wrong[:3])}"] * bool(wrong)
    return [] if any(unknown) and all(name in str(said[0].message) for name in left[:1]) else faults


def layer_rates(model: Model) -> list[str]:
    """Faults of layer decay: one rate in a block, larger from block to block; the first for embeddings, the last for
    the head.
    """
    groups = sw.param_groups(model.network, model.example, lr=1.0, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    faults = []
    for path, container in model.network.named_modules():
        kinds = {type(member) for member in container.children()}
        if not isinstance(container, nn.ModuleList) or len(kinds) != 1 or len(container) != 4 or "expert" in path:
            continue
        if re.search(r"\.\d+(\.|$)", path):
            continue  # within a block
        rates = [{rate[id(p)] for p in block.parameters() if p.requires_grad} for block in container]
        faults += [f"several rates in a block of {path}"] * any(len(each) > 1 for each in rates)
        firsts = [max(each) for each in rates if each]
        faults += [f"rates of {path} are not twice as large from one to the next"] * any(
            abs(b / a - 2) > 1e-6 for a, b in itertools.pairwise(firsts)
        )
        table = model.network.get_input_embeddings().weight
        faults += ["the embedding has a rate of the blocks"] * (
            rate[id(table)] > min(min(each) for each in rates if each) / 2 + 1e-9
        )
    head = model.network.get_output_embeddings()
    if head is not None and id(head.weight) in rate:
        tied = any(head.weight is m.weight for m in model.network.modules() if isinstance(m, nn.Embedding))
        faults += ["the head has not the largest rate"] * (not tied and rate[id(head.weight)] != 1.0)
    return list(dict.fromkeys(faults))


CALLS: dict[str, Callable[[Model], list[str]]] = {
    "fuse": fused_outputs,
    "optimize": optimized_outputs,
    "features": tapped_streams,
    "param_groups": decayed_parameters,
    "layer decay": layer_rates,
}
"""What leaves a network alone, and its faults."""


def examine_cell(model: Model, operation: str) -> tuple[str, str]:
    """Verdict and reason of one operation on one model, which is as before afterwards unless the verdict says so."""
    pristine = snapshot(model.network)
    try:
        faults = CALLS[operation](model) if operation in CALLS else operate(model, OPERATIONS[operation])
    except SkipwayError as problem:
        faults = [] if str(problem) else ["refused without a reason"]
        faults += [f"refused, and {what} is not as it was" for what in differences(pristine, snapshot(model.network))]
        return ("silent", "; ".join(faults)) if faults else ("refused", " ".join(str(problem).split()))
    except Exception as problem:  # the fault that is looked for
        return "raw", f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    faults += [f"{what} is not as it was" for what in differences(pristine, snapshot(model.network))]
    reason = "; ".join(faults)
    if not faults:
        return "right", ""
    if all(fault.startswith("refused afterwards") for fault in faults):
        return "refused", reason
    return ("raw" if re.search(r"afterwards [A-Z]\w+:|raises [A-Z]\w+:", reason) else "silent"), reason


def operate(model: Model, promise: Promise) -> list[str]:
    """Faults of an operation in place."""
    prepared = promise.prepare(model.network, model.example) if promise.prepare is not None else None
    try:
        pristine, twin = snapshot(model.network), twin_of(model.network)
        faults = carry_out(promise, twin, model.network, model.example, look(model))
        return faults + [f"{what} is not as it was" for what in differences(pristine, snapshot(model.network))]
    finally:
        if prepared is not None:
            prepared.undo()


def rows_of(name: str, architecture: str | None, operations: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows of one model."""
    model = Model.build(name, architecture)
    for operation in operations:
        started = time.monotonic()
        verdict, reason = examine_cell(model, operation)
        seconds = f"{time.monotonic() - started:.1f}"
        yield dict(zip(HEADER, (name, operation, verdict, reason[:300], seconds), strict=True))
        if verdict in ("raw", "silent"):
            model = Model.build(name, architecture)


def summary(lines: Sequence[dict[str, str]]) -> str:
    """Operation × verdict, the faults, and the most frequent reasons."""
    verdicts = ("right", "refused", "raw", "silent")
    text = [f"{'':18}" + "".join(f"{each:>9}" for each in verdicts)]
    for operation in dict.fromkeys(line["operation"] for line in lines):
        counts = Counter(line["verdict"] for line in lines if line["operation"] == operation)
        text.append(f"{operation:18}" + "".join(f"{counts[each]:9}" for each in verdicts))
    text += [f"{x['model']}, {x['operation']}: {x['reason']}" for x in lines if x["verdict"] in ("raw", "silent")]
    return "\n".join([*text, f"{len({line['model'] for line in lines})} models"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the table, and sum it up; the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="classes, in this order")
    parser.add_argument("--operation", nargs="+", choices=[*IN_PLACE, *CALLS], default=[*IN_PLACE, *CALLS])
    parser.add_argument("--table", type=Path, default=FILE)
    parser.add_argument("--summary", action="store_true", help="print what the table holds")
    choices = parser.parse_args(arguments)
    known = list(csv.DictReader(choices.table.open())) if choices.table.exists() else []
    if not choices.summary:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        classes = {name: architecture for architecture, task, name in language_models() if task in TASKS}
        with choices.table.open("a", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, HEADER, lineterminator="\n")
            if not known:
                table.writeheader()
            for name in choices.only or classes:
                done = {line["operation"] for line in known if line["model"] == name}
                left = [each for each in choices.operation if each not in done]
                try:
                    for line in rows_of(name, classes.get(name), left) if left else ():
                        table.writerow(line)
                        stream.flush()
                        known.append(line)
                        print(
                            *list(line.values())[:2], line["verdict"], line["reason"][:200], line["seconds"], flush=True
                        )
                except Exception as problem:  # a class that does not build: `benchmarks.language_models` says why
                    print(f"{name}: {type(problem).__name__}: {str(problem)[:120]}", flush=True)
    print(summary(known))
    return sum(line["verdict"] in ("raw", "silent") for line in known)


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
