"""`deepen` and `shorten` on every language model of transformers, looked at from outside.

    python -m benchmarks.surgery.language_depth [--only NAME ...] [--operation deepen] [--processes N]

For each class of `benchmarks.language_models`: `ok`, `said` (right, and a remark says what saving would lose),
`refused` (with the reason) or `fault`. Nothing of what the operations verify about themselves is used here. With random
values in everything that is silent, each of these has to hold afterwards if it held before:

* outputs do not depend on later tokens, nor on another sample;
* a batch with padding gives what its sequences give alone;
* a step from a cache gives what the whole pass gives, and `generate` the same tokens with and without a cache;
* `save_pretrained` and `from_pretrained` give the same network, unless the operation says that they do not;
* copies have an effect, and a training step runs;
* `undo`, and a refusal, leave everything as it was, the config too.

A table goes to the terminal and to language_depth.csv.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import skipway as sw
from benchmarks.language_models import build_language_model, language_models
from benchmarks.peers import import_transformers
from benchmarks.surgery.foreign import Outcome, differences, relative, snapshot
from skipway.surgery import Operation, deepen, influence, shorten
from skipway.tracing import preserved_state
from skipway.tracing.containers import tensors_in

__all__ = ["OPERATIONS", "examine", "main"]

FILE = Path(__file__).with_name("language_depth.csv")
CLOSE = 1e-4
"""Difference of outputs, relative to their largest value, that is rounding."""
NEW_TOKENS = 4

Given = dict[str, Any]
Property = Callable[[nn.Module, Given], float]

OPERATIONS: dict[str, Callable[[nn.Module, Given], Operation]] = {
    "deepen": lambda model, given: deepen(model, given, 1),
    "shorten": lambda model, given: shorten(model, given, max(len(influence(model, given)) - 1, 0)),
}


@torch.no_grad()
def first_output(model: nn.Module, given: Given) -> Tensor:
    """The first tensor that the network returns in evaluation mode; random numbers are the same each time."""
    torch.manual_seed(0)
    return next(tensors_in(model.eval()(**given)))


def stepped(given: Given) -> str:
    """The argument that holds the tokens whose next ones the network foretells."""
    return "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"


def later_tokens(model: nn.Module, given: Given) -> float:
    """Change of the first half of the outputs if tokens of the second half are others."""
    name = stepped(given)
    ids = given[name]
    half = ids.shape[1] // 2
    changed = torch.cat([ids[:, :half], 2 + (ids[:, half:] + 5) % 50], 1)
    return relative(first_output(model, given)[:, :half], first_output(model, {**given, name: changed})[:, :half])


def other_samples(model: nn.Module, given: Given) -> float:
    """Change of the outputs of the first sample if the others are exchanged."""
    changed = {}
    for name, value in given.items():
        batched = isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == 2
        changed[name] = torch.cat([value[:1], value[1:].flip(1)]) if batched else value
    return relative(first_output(model, given)[:1], first_output(model, changed)[:1])


def padding(model: nn.Module, given: Given) -> float:
    """Difference of the outputs of a sequence alone and in a batch in which it is padded at its end."""
    ids = given["input_ids"]
    short = ids.shape[1] - 4
    mask = torch.ones_like(ids)
    mask[1, short:] = 0
    alone = {**{name: value[1:] for name, value in given.items()}, "input_ids": ids[1:, :short]}
    alone["attention_mask"] = mask[1:, :short]
    both = first_output(model, {**given, "attention_mask": mask})[1:]
    one = first_output(model, alone)
    length = short if both.shape[1] == ids.shape[1] and stepped(given) == "input_ids" else both.shape[1]
    return relative(one[:, :length], both[:, :length])


@torch.no_grad()
def cached_step(model: nn.Module, given: Given) -> float:
    """Difference of the last outputs of a whole pass and of a step from the cache of the others."""
    name = stepped(given)
    ids = given[name]
    whole = first_output(model, given)[:, -1]
    start = model(**{**given, name: ids[:, :-1]}, use_cache=True)
    cache = next(key for key in ("past_key_values", "cache_params", "state", "mems") if start.get(key) is not None)
    rest = {key: value for key, value in given.items() if key == name or name == "decoder_input_ids"}
    step = next(tensors_in(model(**{**rest, name: ids[:, -1:], cache: start[cache]}, use_cache=True)))
    return relative(whole, step[:, -1])


@torch.no_grad()
def generation(model: nn.Module, given: Given) -> float:
    """Difference of the logits by which `generate` chooses tokens with a cache and without."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    start = {name: value for name, value in given.items() if name != "decoder_input_ids"}
    whole, cached = (model.eval().generate(**start, use_cache=use, **options) for use in (False, True))
    if not torch.equal(whole.sequences, cached.sequences):
        return 1.0
    return relative(torch.stack(whole.logits), torch.stack(cached.logits))


PROPERTIES: dict[str, Property] = {
    "outputs depend on later tokens": later_tokens,
    "outputs depend on other samples": other_samples,
    "padding changes outputs": padding,
    "a cached step differs from the whole pass": cached_step,
    "generate differs with a cache": generation,
}


def held(model: nn.Module, given: Given) -> Iterator[str]:
    """Which properties a network has; one that cannot be looked at it has not, and a cache serves causal ones alone."""
    causal = True
    for name, measure in PROPERTIES.items():
        try:
            kept = measure(model, given) <= CLOSE
            causal &= kept or measure is not later_tokens
            if kept and (causal or measure not in (cached_step, generation)):
                yield name
        except Exception:
            continue


def draw_silent(model: nn.Module, known: set[nn.Parameter]) -> list[nn.Parameter]:
    """Random values in what was added and puts out 0, and noise on all that was added."""
    added = [parameter for parameter in model.parameters() if parameter not in known]
    with torch.no_grad():
        for parameter in added:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return added


def saved_and_loaded(model: nn.Module, given: Given) -> str:
    """What is wrong with the network that is loaded from the saved one; empty if nothing is."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again, loading = type(model).from_pretrained(folder, output_loading_info=True)
    gap = relative(first_output(model, given), first_output(again, given))
    odd = {kind: sorted(loading[kind])[:2] for kind in ("missing_keys", "unexpected_keys") if loading[kind]}
    return (f"differs by {gap:.2g}" if not gap <= CLOSE else "") + (f" {odd}" if odd else "")


def saves(model: nn.Module, given: Given) -> bool:
    """Whether a network is saved and loaded rightly before anything is done."""
    try:
        return not saved_and_loaded(model, given)
    except Exception:
        return False


def compare(operation: Operation, model: nn.Module, given: Given, known: dict[nn.Parameter, str], before: Any) -> Any:
    """Faults of a network after an operation."""
    old, properties, saved = before
    drawn = draw_silent(model, set(known))
    if drawn and relative(old, first_output(model, given)) <= CLOSE:
        yield "copies have no effect"
    for name in properties:
        try:
            value = PROPERTIES[name](model, given)
        except Exception as problem:
            yield f"{name}: {type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
        else:
            if not value <= 10 * CLOSE:
                yield f"{name} by {value:.2g}"
    if saved and "config" not in operation.refused:
        try:
            if wrong := saved_and_loaded(model, given):
                yield f"loaded from what was saved, it {wrong}"
        except Exception as problem:
            yield f"saving raises {type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
    try:
        with preserved_state(model):
            output = next(tensors_in(model.train()(**given)))
            output.float().square().mean().backward()
        model.zero_grad()
    except Exception as problem:
        yield f"a training step raises {type(problem).__name__}: {' '.join(str(problem).split())[:120]}"


def examine(name: str, architecture: str, operation: str) -> Outcome:
    """Carry out an operation on a network, and look at everything from outside."""
    outcome, started = Outcome(name, operation), time.monotonic()
    try:
        model, given = build_language_model(name, architecture)
        old = first_output(model, given)
    except Exception as problem:
        outcome.verdict, outcome.reason = "not built", " ".join(str(problem).split())[:160]
        return outcome
    before = old, list(held(model, given)), saves(model, given)
    pristine, known = snapshot(model), {parameter: key for key, parameter in model.named_parameters()}
    try:
        done = OPERATIONS[operation](model, given)
        outcome.reason = "; ".join(f"{what}: {why}" for what, why in done.refused.items())
        outcome.verdict = "said" if outcome.reason else "ok"
        outcome.reason += f" [{len(before[1])} properties{', saved' if before[2] else ''}]"
        outcome.faults += compare(done, model, given, known, before)
        done.undo(force=True)
    except sw.SkipwayError as problem:
        outcome.verdict, outcome.reason = "refused", " ".join(str(problem).split())
    except Exception as problem:  # the fault that is looked for
        outcome.faults.append(f"raises {type(problem).__name__}: {' '.join(str(problem).split())}")
    outcome.faults += [f"{what} is not as it was" for what in differences(pristine, snapshot(model))]
    if outcome.faults:
        outcome.verdict, outcome.reason = "fault", "; ".join(outcome.faults)
    outcome.seconds = time.monotonic() - started
    return outcome


def examine_class(task: tuple[str, str, Sequence[str]]) -> list[Outcome]:
    """`examine` in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging = import_transformers().logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name, architecture, operations = task
    return [examine(name, architecture, operation) for operation in operations]


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine the grid; the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="these classes")
    parser.add_argument("--part", default="0/1", help="K/N: every Nth class, from the Kth")
    parser.add_argument("--operation", choices=OPERATIONS, help="this operation alone")
    parser.add_argument("--processes", type=int, default=2)
    choices = parser.parse_args(arguments)
    operations = [choices.operation] if choices.operation else list(OPERATIONS)
    first, step = map(int, choices.part.split("/"))
    classes = [(name, architecture) for architecture, _, name in language_models()]
    chosen = [pair for pair in classes if not choices.only or pair[0] in choices.only][first::step]
    outcomes: list[Outcome] = []
    with multiprocessing.get_context("spawn").Pool(choices.processes, maxtasksperchild=20) as pool:
        for found in pool.imap_unordered(examine_class, [(*pair, operations) for pair in chosen]):
            for each in found:
                print(f"{each.network}, {each.operation}: {each.verdict} {each.reason[:500]}", flush=True)
            outcomes += found
    for operation in operations:
        counts = Counter(each.verdict for each in outcomes if each.operation == operation)
        print(f"{operation}: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    if not choices.only and step == 1 and not choices.operation:
        with FILE.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["network", "operation", "verdict", "reason"])
            writer.writerows([o.network, o.operation, o.verdict, o.reason[:240]] for o in outcomes)
    return sum(outcome.verdict == "fault" for outcome in outcomes)


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
