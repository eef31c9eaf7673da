"""Depth: `lesion`, `influence`, `shorten`, `deepen`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.nn import Multiply
from skipway.surgery.insertion import disable_fused_path, insert_after
from skipway.surgery.insertion_point import find_insertion_point
from skipway.surgery.operation import Operation, abbreviate
from skipway.surgery.preconditions import require_operable
from skipway.surgery.transaction import Transaction, transaction
from skipway.surgery.verification import difference, forward_hooks, outputs
from skipway.tracing import Example, Program, as_example, call_model, preserved_state, watch
from skipway.tracing.chain import Chain, WatchedConnection, chain_from_program

__all__ = ["Skipped", "deepen", "influence", "lesion", "shorten"]

Score = Callable[[nn.Module], float]


class Skipped(nn.Module):
    """Takes the place of a block that was left out, and returns its first argument."""

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        return x


def lesion(model: nn.Module, example: Example, names: Iterable[str]) -> Operation:
    """Silence branches, y = x + 0 · F(x), in place: the study of Veit et al. 2016 (https://arxiv.org/abs/1605.06431).

    Args:
        model: any module that `chain` can read.
        example: what the model is called with.
        names: of connections, as `chain(model, example)` gives them.

    Raises:
        SkipwayError: a name is unknown, or its branch has no place to be silenced at; the model is as before.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).eval()
    >>> x = torch.randn(2, 3, 8)
    >>> operation = lesion(layer, x, [":1", ":2"])
    >>> torch.equal(layer(x), x)
    True
    """
    model, example = require_operable(model), as_example(example)
    program = watch(model, example)
    known = {connection.name: connection for connection in chain_from_program(model, program)}
    with transaction(model, example, title=f"lesion of {type(model).__name__}") as change:
        for name in [names] if isinstance(names, str) else names:
            if name not in known:
                listed = abbreviate(list(known)) or "none"
                raise SkipwayError(f"connection {name!r} is unknown; chain(model, example) lists them: {listed}")
            try:
                point = find_insertion_point(model, program, known[name])
            except SkipwayError as problem:
                raise SkipwayError(f"connection {name!r} cannot be silenced: {problem}") from problem
            insert_after(change, model.get_submodule(point.name), Multiply(0.0))
            disable_fused_path(change, point.name)
            change.touched[name] = point.name
        return change.commit()


def find_blocks(model: nn.Module, example: Example, program: Program | None = None) -> list[str]:
    """Names of the modules that add and can be left out or repeated, in the order of the signal: all their connections
    carry x itself, and their output is shaped like their input.

    Args:
        model: any module that `chain` can read; it is left alone.
        example: what the model is called with.
        program: what it runs on the example, if that was watched already.
    """
    owners = by_owner(chain_from_program(model, program or watch(model, example)))
    candidates = [
        owner
        for owner, connections in owners.items()
        if owner
        and all(connection.seen.skip == "identity" for connection in connections)
        # a block within a block goes with it
        and owners.keys().isdisjoint(parents(owner))
    ]
    shapes_agree: dict[str, bool] = {}

    def look(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        first = args[0] if args else None
        same = isinstance(first, Tensor) and isinstance(output, Tensor) and first.shape == output.shape
        shapes_agree[name] = same and name not in shapes_agree

    with forward_hooks(model, candidates, leave=look), preserved_state(model), torch.no_grad():
        call_model(model.eval(), example)
    return [name for name in candidates if shapes_agree.get(name)]


def by_owner(chain: Chain[WatchedConnection]) -> dict[str, list[WatchedConnection]]:
    """The connections of a chain by the module that adds, in the order of the signal."""
    owners: dict[str, list[WatchedConnection]] = {}
    for connection in chain:
        owners.setdefault(connection.seen.owner, []).append(connection)
    return owners


def parents(name: str) -> Iterator[str]:
    """The modules that a module is in, innermost first, without the model itself.

    >>> list(parents("stages.0.3"))
    ['stages.0', 'stages']
    """
    while name := name.rpartition(".")[0]:
        yield name


def influence(model: nn.Module, example: Example, score: Score | None = None) -> dict[str, float]:
    """Return how much each block that can be left out matters, least first; the model is left alone.

    Args:
        model: any module that `chain` can read.
        example: a batch; outputs are compared on it.
        score: model → number, higher is better (the accuracy on a validation set, for example); the influence is what
            is lost without the block. By default the mean relative change of the output, |f(x) − f₋ₗ(x)| / |f(x)|.
    """
    model, example = require_operable(model), as_example(example)
    before = outputs(model, example) if score is None else []

    def agreement(changed: nn.Module) -> float:
        return -difference(before, outputs(changed, example), mean=True)

    measure, found = score or agreement, {}
    full = measure(model)
    for name in find_blocks(model, example):
        with transaction(model, title=f"{name} left out") as trial:  # never committed
            leave_out(trial, name)
            found[name] = full - measure(model)
    return dict(sorted(found.items(), key=lambda entry: entry[1]))


def leave_out(change: Transaction, name: str) -> None:
    """Put the identity in the place of a block, in place."""
    change.set_submodule(name, Skipped().train(change.model.get_submodule(name).training))


def shorten(model: nn.Module, example: Example, to: int, score: Score | None = None) -> Operation:
    """Leave out the blocks of least influence until `to` of those that can be left out remain, in place.

    The parameters of the blocks are gone from the state dict until `undo`; the network is best trained a little more.

    Args:
        model: any module that `chain` can read.
        example: a batch to measure the influence on.
        to: blocks that remain, ≥ 0, of those that `influence` lists (a transformer's block, or in networks of ours
            each of its two connections).
        score: see `influence`.

    Returns:
        the operation; its report holds the difference of the outputs and the influence of every block.

    Raises:
        SkipwayError: fewer blocks can be left out than asked for; the model is as before.
    """
    model, example = require_operable(model), as_example(example)
    measured = influence(model, example, score)
    surplus = len(measured) - to
    if to < 0 or surplus < 0:
        offer = f"the rule is 0 <= to <= {len(measured)}" if measured else "it cannot be shortened"
        raise SkipwayError(f"to={to}: {type(model).__name__} has {len(measured)} blocks that can be left out; {offer}")
    with transaction(model, example, title=f"{type(model).__name__} shortened to {to} blocks") as change:
        change.report = measured
        for name in list(measured)[:surplus]:
            leave_out(change, name)
            change.touched[name] = f"influence {measured[name]:.3g}"
        return change.commit()


def deepen(model: nn.Module, example: Example, by: int, *, tolerance: float = 1e-5) -> Operation:
    """Insert a copy after each of `by` blocks, evenly spread, that starts as the identity: its last maps are 0, in
    place.

    The network computes what it did, and every copy learns from the first step on. Existing keys stay.

    Args:
        model: any module that `chain` can read.
        example: what the model is called with.
        by: blocks that are added, 1 ≤ by ≤ the blocks that can be copied.
        tolerance: bound on the difference of the outputs, relative to their largest value.

    Raises:
        SkipwayError: too many are asked for, a block's branch has no last map, or the output changed (in a post-norm
            network a copy is no identity); the model is as before.
    """
    model, example = require_operable(model), as_example(example)
    program = watch(model, example)
    blocks, owners = find_blocks(model, example, program), by_owner(chain_from_program(model, program))
    if not 1 <= by <= len(blocks):
        offer = f"the rule is 1 <= by <= {len(blocks)}" if blocks else "it cannot be deepened"
        raise SkipwayError(f"by={by}: {type(model).__name__} has {len(blocks)} blocks that can be copied; {offer}")
    chosen = [blocks[(2 * number + 1) * len(blocks) // (2 * by)] for number in range(by)]
    title = f"{type(model).__name__} deepened by {by} blocks"
    hint = "after the additions of these blocks follows something that is not the identity on its own output"
    with transaction(model, example, title=title, tolerance=tolerance, hint=hint) as change:
        for name in chosen:
            block = model.get_submodule(name)
            twin = copy.deepcopy(block)
            silence_branches(twin, [c.seen.closing or c.seen.last for c in owners[name]], name)
            insert_after(change, block, twin)
            change.touched[name] = "copied"
        try:
            return change.commit()
        except (TypeError, ValueError, AttributeError) as problem:  # the copy is called with the block's output alone
            raise SkipwayError(
                f"a copy of {chosen[0]} does not run on the output of that block alone ({problem}): blocks that take "
                "several arguments, such as attention masks or positions, cannot be copied"
            ) from problem


@torch.no_grad()
def silence_branches(block: nn.Module, modules: Sequence[str | None], name: str) -> None:
    """Set the gain of the closing norm, or the last map, of each branch of a copied block to 0, in place."""
    for path in modules:
        if path is None:
            raise SkipwayError(f"a branch of {name!r} ends in no linear map and no norm with a gain")
        closing = block.get_submodule(path.removeprefix(name + "."))
        for parameter in (closing.weight, getattr(closing, "bias", None)):
            if isinstance(parameter, Tensor):
                parameter.zero_()
