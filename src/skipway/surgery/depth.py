"""Changing depth: lesion, influence, shorten, deepen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.nn import Multiply
from skipway.surgery.insertion import behind, on_slow_path
from skipway.surgery.insertion_point import place_behind
from skipway.surgery.operation import Operation
from skipway.surgery.preconditions import admitted
from skipway.surgery.verification import difference, outputs
from skipway.tracing import Example, Program, preserved_state, watch
from skipway.tracing.chain import Chain, WatchedConnection, chain_from_program
from skipway.tracing.example import call_model

__all__ = ["Skipped", "deepen", "influence", "lesion", "shorten"]

Score = Callable[[nn.Module], float]


class Skipped(nn.Module):
    """Stands where a block stood, and passes on the first thing that it is given."""

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        return x


def lesion(model: nn.Module, connections: Iterable[str], example: Example) -> Operation:
    """Silence branches, y = x + 0 · F(x), in place: the study of Veit et al. 2016 (https://arxiv.org/abs/1605.06431).

    Args:
        model: any module that `chain` can read.
        connections: names as `chain(model, example)` gives them.
        example: what the model is called with.

    Raises:
        SkipwayError: a name is unknown, or its branch has no place to be silenced at; the model is as before.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).eval()
    >>> x = torch.randn(2, 3, 8)
    >>> operation = lesion(layer, [":1", ":2"], x)
    >>> torch.equal(layer(x), x)
    True
    """
    model = admitted(model)
    program = watch(model, example)
    chain = chain_from_program(model, program)
    known = {connection.name: connection for connection in chain}
    operation = Operation(model, f"lesion of {type(model).__name__}", {}, {}, {})
    before, touched = outputs(model, example), {}
    try:
        for name in connections:
            if name not in known:
                raise SkipwayError(f"connection {name!r}: the model has {', '.join(map(repr, known)) or 'none'}")
            place = place_behind(model, program, known[name])
            if isinstance(place, str):
                raise SkipwayError(f"connection {name!r} cannot be silenced: {place}")
            operation.steps.append(behind(model.get_submodule(place.name), Multiply(0.0)))
            operation.steps += on_slow_path(model, place.name)
            touched[name] = place.name
    except Exception:
        operation.undo()
        raise
    operation.touched, operation.report = touched, {"difference": difference(before, outputs(model, example))}
    return operation


def blocks_of(model: nn.Module, example: Example, program: Program | None = None) -> list[str]:
    """Modules that add, and can be left out or put in twice: all their connections carry x itself, and what they put
    out is shaped like what they take. In the order of the signal.

    Args:
        model: any module that `chain` can read.
        example: what the model is called with.
        program: what it runs on it, where that was watched already.
    """
    chain = chain_from_program(model, program or watch(model, example))
    owners = owned(chain)
    whole = [
        owner
        for owner, connections in owners.items()
        if owner
        and all(connection.seen.skip == "identity" for connection in connections)
        # a block within a block goes with it
        and owners.keys().isdisjoint(outer(owner))
    ]
    shapes: dict[str, bool] = {}

    def watcher(name: str) -> Callable[..., None]:
        def look(module: nn.Module, given: Any, out: Any) -> None:
            first = given[0] if given else None
            same = isinstance(first, Tensor) and isinstance(out, Tensor) and first.shape == out.shape
            shapes[name] = same and name not in shapes

        return look

    handles = [model.get_submodule(name).register_forward_hook(watcher(name)) for name in whole]
    try:
        with preserved_state(model), torch.no_grad():
            call_model(model.eval(), example)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in whole if shapes.get(name)]


def owned(chain: Chain[WatchedConnection]) -> dict[str, list[WatchedConnection]]:
    """The connections of a chain by the module that adds, in the order of the signal."""
    owners: dict[str, list[WatchedConnection]] = {}
    for connection in chain:
        owners.setdefault(connection.seen.owner, []).append(connection)
    return owners


def outer(name: str) -> Iterator[str]:
    """The modules that a module is in, innermost first, without the model itself.

    >>> list(outer("stages.0.3"))
    ['stages.0', 'stages']
    """
    while name := name.rpartition(".")[0]:
        yield name


def influence(model: nn.Module, example: Example, score: Score | None = None) -> dict[str, float]:
    """How much each block that can be left out matters, least first.

    Args:
        model: any module that `chain` can read.
        example: a batch; outputs are compared on it.
        score: model → number, higher is better (accuracy on a validation set, say); the influence is what is lost
            without the block. By default the mean relative change of the output, |f(x) − f₋ₗ(x)| / |f(x)|.
    """
    model = admitted(model)
    whole = outputs(model, example) if score is None else score(model)
    found = {}
    for name in blocks_of(model, example):
        kept = model.get_submodule(name)
        model.set_submodule(name, Skipped().train(kept.training))
        try:
            if score is None:
                found[name] = difference(whole, outputs(model, example), mean=True)  # type: ignore[arg-type]
            else:
                found[name] = whole - score(model)  # type: ignore[operator]
        finally:
            model.set_submodule(name, kept)
    return dict(sorted(found.items(), key=lambda entry: entry[1]))


def shorten(model: nn.Module, to: int, example: Example, score: Score | None = None) -> Operation:
    """Leave out the blocks of least influence until `to` of those that can be left out remain, in place.

    The parameters of what is left out are gone from the state dict until `undo`; train on for a little.

    Args:
        model: any module that `chain` can read.
        to: blocks that remain, ≥ 0, of those that `influence` lists (a transformer's block, or in networks of ours
            each of its two connections).
        example: a batch to measure the influence on.
        score: see `influence`.

    Returns:
        the operation; its report holds the influence of every block, and by how much the output changed.

    Raises:
        SkipwayError: fewer blocks can be left out than asked for.
    """
    model = admitted(model)
    measured = influence(model, example, score)
    surplus = len(measured) - to
    if to < 0 or surplus < 0:
        raise SkipwayError(f"to={to}: {len(measured)} blocks of {type(model).__name__} can be left out, so 0 to that")
    before = outputs(model, example)
    operation = Operation(model, f"{type(model).__name__} shortened to {to} blocks", {}, {}, {})
    for name in list(measured)[:surplus]:
        kept = model.get_submodule(name)
        model.set_submodule(name, Skipped().train(kept.training))
        operation.steps.append(lambda name=name, kept=kept: model.set_submodule(name, kept))
    operation.touched = {name: f"influence {measured[name]:.3g}" for name in list(measured)[:surplus]}
    operation.report = {**measured, "difference": difference(before, outputs(model, example))}
    return operation


def deepen(model: nn.Module, by: int, example: Example, *, tolerance: float = 1e-5) -> Operation:
    """Put a copy behind each of `by` blocks, evenly spread, that starts as the identity: its last maps are 0, in place.

    The network computes what it did, and every copy learns from the first step on. Existing keys stay.

    Args:
        model: any module that `chain` can read.
        by: blocks that are added, 1 ≤ by ≤ the blocks that can be copied.
        example: what the model is called with.
        tolerance: by how much the output may differ, relative to its largest value.

    Raises:
        SkipwayError: too many are asked for, a block's branch has no last map, or the output changes (behind
            post-norm a copy is no identity); the model is as before.
    """
    model = admitted(model)
    blocks = blocks_of(model, example)
    if not 1 <= by <= len(blocks):
        raise SkipwayError(f"by={by}: {len(blocks)} blocks of {type(model).__name__} can be copied, so 1 to that")
    before = outputs(model, example)
    owners = owned(chain_from_program(model, watch(model, example)))
    chosen = [blocks[(2 * number + 1) * len(blocks) // (2 * by)] for number in range(by)]
    operation = Operation(model, f"{type(model).__name__} deepened by {by} blocks", {}, {}, {})
    try:
        for name in chosen:
            block = model.get_submodule(name)
            twin = copy.deepcopy(block)
            silence(twin, [c.seen.closing or c.seen.last for c in owners[name]], name)
            operation.steps.append(behind(block, twin))
        report = {"difference": difference(before, outputs(model, example))}
        if not report["difference"] <= tolerance:
            raise SkipwayError(
                f"with silent copies the output changes by {report['difference']:.3g} of its largest value: what "
                "follows the additions of these blocks is not the identity on their own output"
            )
    except Exception:
        operation.undo()
        raise
    operation.touched, operation.report = dict.fromkeys(chosen, "copied"), report
    return operation


@torch.no_grad()
def silence(block: nn.Module, modules: Sequence[str | None], name: str) -> None:
    """Set what closes each branch of a copied block to 0: the gain of its closing norm, or its last map."""
    for path in modules:
        if path is None:
            raise SkipwayError(f"a branch of {name!r} ends in no linear map and no norm with a gain")
        closing = block.get_submodule(path.removeprefix(name + "."))
        for parameter in (closing.weight, getattr(closing, "bias", None)):
            if isinstance(parameter, Tensor):
                parameter.zero_()
