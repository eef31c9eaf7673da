"""The blocks of a network: `find_blocks` reads how each is called from a watched program and one pass.

Every operation that leaves out, repeats, recomputes or thins out blocks asks this record; none of them assumes that a
block is f(x).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from skipway.errors import SkipwayError
from skipway.nn import History, Residual
from skipway.surgery.block_call import CONTAINERS, BlockCall, parameter_names
from skipway.surgery.call_recorder import CallRecorder
from skipway.surgery.insertion import STREAMED, carries_streams
from skipway.surgery.operation import abbreviate, names_by_reason
from skipway.tracing import Example, Program, watch
from skipway.tracing.chain import WatchedConnection, chain_from_program
from skipway.tracing.paths import parents

__all__ = ["BlockSurvey", "find_blocks", "mixing_connections", "require_blocks"]


@dataclass(frozen=True)
class BlockSurvey:
    """The blocks of a network that carry x itself, in the order in which they run.

    Args:
        calls: how each is called, by its name.
        connections: of each block.
        forms: the output of each block without its tensors.
        others: the arguments of each block, by position or keyword, with None in place of x.
        refused: why a module that adds is no such block, by its name.
    """

    calls: dict[str, BlockCall]
    connections: dict[str, list[WatchedConnection]]
    forms: dict[str, Any]
    others: dict[str, dict[int | str, Any]]
    refused: dict[str, str]

    def reasons(self) -> str:
        """Why modules that add are no blocks, as the end of a message."""
        names = names_by_reason(self.refused)
        return abbreviate([f"{abbreviate(names[reason])}: {reason}" for reason in names], separator="; ")


def find_blocks(model: nn.Module, example: Example, program: Program | None = None) -> BlockSurvey:
    """The modules that can be left out or repeated: all their connections carry x itself, which is one of their
    arguments, and one of their outputs is shaped like it. The model is left alone.

    Args:
        model: any module that `chain` can read.
        example: what the model is called with.
        program: what it runs on the example, if that was watched already.
    """
    program = program or watch(model, example)
    refused = {"": STREAMED} if carries_streams(model) else {}
    owners: dict[str, list[WatchedConnection]] = {}
    for connection in chain_from_program(model, program):
        owners.setdefault(enclosing_module(program, connection), []).append(connection)
    for name in list(owners):
        if runs_blocks(model, program, name, owners):
            refused[name] = "it runs blocks of its own beside what it adds"
            del owners[name]
    # a block within a block goes with it
    outer = {name: owned for name, owned in owners.items() if owners.keys().isdisjoint(parents(name))}
    for name in outer:
        within = [each for owner in owners if f"{owner}.".startswith(f"{name}.") for each in owners[owner]]
        outermost = [each for each in within if not any(is_inner(program, each, other) for other in within)]
        outer[name] = sorted(outermost, key=lambda each: each.site.index)
    calls: dict[str, BlockCall] = {}
    for name, owned in merged(model, program, outer).items():
        call = static_call(model, program, name, owned)
        if isinstance(call, str):
            refused[name] = call
        else:
            calls[name] = call
            outer[name] = owned
    recorder = CallRecorder(calls)
    recorder.watch(model, example)
    refused.update(recorder.refused)
    refused.update((name, MIXES) for name in mixing_connections(model) if name not in recorder.finished)
    connections = {name: outer[name] for name in recorder.finished}
    return BlockSurvey(recorder.finished, connections, recorder.forms, recorder.others, refused)


MIXES = "it mixes several streams or hands on earlier outputs, so no x itself is carried past it"


def mixing_connections(model: nn.Module) -> list[str]:
    """Names of connections of ours that carry several streams."""
    return [name for name, each in model.named_modules() if isinstance(each, Residual) and each.streams is not None]


def require_blocks(model: nn.Module, example: Example, program: Program | None = None) -> BlockSurvey:
    """The blocks that carry x itself, of which there has to be one."""
    survey = find_blocks(model, example, program)
    if not survey.calls:
        kind = type(model).__name__
        raise SkipwayError(
            f"{kind} has no block that adds to x itself and returns what is shaped like it: {survey.reasons()}"
            if survey.refused
            else f"{kind} has no block that adds to x itself and returns what is shaped like it"
        )
    return survey


def enclosing_module(program: Program, connection: WatchedConnection) -> str:
    """The innermost module that computes a whole connection: where the one that adds is given x and, as another
    argument, what was made of x outside (BERT's `BertSelfOutput(hidden, x)`), it is one around that.
    """
    owner, start = connection.seen.owner, connection.seen.numbers[3]
    for name in (owner, *parents(owner)):
        given = program.given.get(name)
        if given is None:
            continue
        if program.runs[name] > 1 or not any(program.depends(number, start) for number in given.values()):
            return name
    return owner


def is_inner(program: Program, inner: WatchedConnection, outer: WatchedConnection) -> bool:
    """Whether a connection is made within the branch of another one."""
    _, branch, _, start = outer.seen.numbers
    total = inner.seen.numbers[2]
    return inner is not outer and start < total and (branch == total or program.depends(branch, total))


def runs_blocks(model: nn.Module, program: Program, name: str, owners: Mapping[str, list[WatchedConnection]]) -> bool:
    """Whether a module that adds runs a container of blocks, too, not only within what it adds (Wav2Vec2's encoder)."""
    members: dict[tuple[str, type[nn.Module]], int] = {}
    for inner, owned in owners.items():
        around, total = inner.rpartition(".")[0], owned[-1].seen.numbers[2]
        within = f"{inner}.".startswith(f"{name}.") and inner != name
        if within and not any(program.depends(outer.seen.numbers[1], total) for outer in owners[name]):
            key = around, type(model.get_submodule(inner))
            members[key] = members.get(key, 0) + 1
    return any(
        count > 1 and isinstance(model.get_submodule(around), CONTAINERS) for (around, _), count in members.items()
    )


def merged(
    model: nn.Module, program: Program, owners: Mapping[str, list[WatchedConnection]]
) -> dict[str, list[WatchedConnection]]:
    """Blocks of unlike classes in one member of a container are one block, a T5 layer's attention and feed-forward
    parts for example, if that member runs as one block.
    """
    groups: dict[str, list[str]] = {}
    for name in owners:
        around = next((each for each in parents(name) if each in program.given), "")
        groups.setdefault(around, []).append(name)
    found: dict[str, list[WatchedConnection]] = {}
    for around, names in groups.items():
        together = [connection for name in names for connection in owners[name]]
        kinds = {type(model.get_submodule(name)) for name in names}
        in_container = around and isinstance(model.get_submodule(around.rpartition(".")[0]), CONTAINERS)
        whole = (
            in_container and 1 < len(names) == len(kinds) and not isinstance(model.get_submodule(around), CONTAINERS)
        )
        if whole and isinstance(static_call(model, program, around, together), BlockCall):
            found[around] = together
        else:
            found.update((name, owners[name]) for name in names)
    return dict(sorted(found.items(), key=lambda entry: entry[1][0].site.index))


def static_call(
    model: nn.Module, program: Program, name: str, connections: Sequence[WatchedConnection]
) -> BlockCall | str:
    """How a block is called as far as the program tells, or why it is no block that can be left out or repeated."""
    if not name:
        return "it adds in its own forward, and no module of its own holds the connection"
    given = program.given.get(name, {})
    for connection in connections:
        if connection.residual is not None and isinstance(connection.residual.streams, History):
            return f"its connection {connection.name} hands on earlier outputs, which later ones count"
        if connection.seen.skip == "mixed":
            return f"its connection {connection.name} mixes several streams, so x itself is not carried past it"
        if connection.seen.skip != "identity":
            return f"its connection {connection.name} carries x through a {connection.seen.skip}, not x itself"
    if program.runs.get(name, 0) != 1:
        return f"it runs {program.runs.get(name, 0)} times in a pass"
    stream = carried(program, connections[0].seen.numbers[3])
    x = next((path for path, number in given.items() if number in stream), None)
    if x is None:
        return "x is none of its arguments"
    shape = program[given[x]].shape
    total = connections[-1].seen.numbers[2]
    outputs = program.returned[name]
    fitting = [path for path, number in outputs.items() if program[number].shape == shape]
    ours = [path for path in fitting if outputs[path] == total or program.depends(outputs[path], total)]
    if not ours:
        shapes = ", ".join(str(program[number].shape) for number in outputs.values()) or "no tensor"
        return f"it returns nothing shaped like the x that it is given: {shape} became {shapes}"
    return BlockCall(x, ours[0], parameter_names(model.get_submodule(name)))


def carried(program: Program, number: int) -> set[int]:
    """A value, and those that it was carried on from without being computed with."""
    found = {number}
    while program[number].part == "carry" and len(signals := program.signals(program[number])) == 1:
        number = signals[0]
        found.add(number)
    return found
