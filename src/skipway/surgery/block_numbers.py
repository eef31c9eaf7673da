"""The number of the transformer block that each connection of somebody's network is in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from skipway.errors import SkipwayError
from skipway.schemes.scheme import Scheme
from skipway.tracing import Program
from skipway.tracing.chain import Chain, WatchedConnection
from skipway.tracing.walks import Walker

__all__ = ["with_block_numbers"]


def with_block_numbers(
    chain: Chain[WatchedConnection], program: Program, scheme: Scheme
) -> tuple[Chain[WatchedConnection], dict[str, str]]:
    """The chain with sites that have the number of their block, counted from 0 along each stream: of an encoder and a
    decoder each from its own embedding; and why a connection has none, by its name.

    Where a stream has attention and others, a block begins at each attention that follows another kind of branch. Where
    all are of one kind, as with attention and MLP in parallel, it begins where another module adds.

    Raises:
        SkipwayError: which connections make a block cannot be told.
    """
    numbers: dict[str, int] = {}
    found, refused = streams(chain, program)
    try:
        for stream in found:
            for number, block in enumerate(blocks(stream)):
                numbers.update((connection.name, number) for connection in block)
    except SkipwayError as problem:
        raise SkipwayError(
            f"{scheme} counts transformer blocks, and which connections of {type(chain.model).__name__} make one "
            f"cannot be told: {problem}; a scheme that counts branches is depthscaled"
        ) from problem
    connections = [replace(each, site=replace(each.site, block=numbers.get(each.name))) for each in chain]
    reasons = {name: f"{scheme} counts transformer blocks, and {reason}" for name, reason in refused.items()}
    return Chain(chain.model, connections, chain.classifier, chain.refused), reasons


def streams(chain: Chain[WatchedConnection], program: Program) -> tuple[list[list[WatchedConnection]], dict[str, str]]:
    """The connections that follow one another on each stream, the first of which begins one; and why others, with those
    behind them, are on none: a stream parts there, or comes from several sums.
    """
    walker, found, refused = Walker(program, {}, {}), list[list[WatchedConnection]](), dict[str, str]()
    totals: dict[int, list[WatchedConnection]] = {}
    for connection in chain:
        skip, _, total, _ = connection.seen.numbers
        last, here = skip, skip if skip in totals else walker.main_operand(program[skip])
        while here is not None and here not in totals:
            last, here = here, walker.main_operand(program[here])
        if here is not None and totals[here][-1].seen.numbers[2] != here:
            refused[connection.name] = f"{connection.name} carries on what {totals[here][-1].name} carries on, too"
            continue
        if here is None and any(program.depends(last, each) for each in totals):
            refused[connection.name] = f"what {connection.name} carries on comes from more than one tensor"
            continue
        if here is None:
            found.append([])
        totals[total] = found[-1] if here is None else totals[here]
        totals[total].append(connection)
    return found, refused


def blocks(stream: Sequence[WatchedConnection]) -> list[list[WatchedConnection]]:
    """The connections of a stream, block by block.

    Raises:
        SkipwayError: a branch is convolutional, an MLP comes first, or blocks are unlike each other.
    """
    kinds = [connection.site.kind for connection in stream]
    if "conv" in kinds:
        raise SkipwayError(f"{stream[kinds.index('conv')].name} has a convolutional branch")
    mixed = len(set(kinds)) > 1
    if mixed and kinds[0] != "attention":
        raise SkipwayError(f"{stream[0].name}, an MLP, stands before the first attention")
    found = [[stream[0]]]
    for before, after in pairwise(stream):
        attends = after.site.kind == "attention" and before.site.kind != "attention"
        begins = attends if mixed else after.seen.owner != before.seen.owner
        found += [[]] if begins else []
        found[-1].append(after)
    if kinds[0] == "mlp" and 1 < len(stream) == len(found):
        raise SkipwayError("all branches are MLPs that modules of their own add")
    forms = [[connection.site.kind for connection in block] for block in found]
    unlike = next((number for number, form in enumerate(forms) if form != forms[0]), None)
    if unlike is not None:
        raise SkipwayError(
            f"the branches are {', '.join(forms[0])} at {found[0][0].name} and {', '.join(forms[unlike])} at "
            f"{found[unlike][0].name}"
        )
    return found
