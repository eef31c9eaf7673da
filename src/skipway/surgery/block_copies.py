"""Copies of blocks that start as the identity: as the next blocks of a container, or as parts of their blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from skipway.errors import SkipwayError
from skipway.surgery.block_list import edit_container, number_blocks, numbered_attributes
from skipway.surgery.block_survey import BlockSurvey
from skipway.surgery.config_fit import SAVING, has_config
from skipway.surgery.insertion import OUTPUT, disable_fused_path, repeat
from skipway.surgery.operation import abbreviate
from skipway.surgery.silence import silence_branch
from skipway.surgery.transaction import Transaction
from skipway.tracing import Program
from skipway.tracing.arguments import path_text
from skipway.tracing.module_state import copy_module

__all__ = ["by_container", "listed_copies", "silent_copy", "slotted_copy"]


def by_container(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of blocks by the container that they are in."""
    containers: dict[str, list[str]] = {}
    for name in names:
        containers.setdefault(name.rpartition(".")[0], []).append(name)
    return containers


def silent_copy(change: Transaction, survey: BlockSurvey, name: str, program: Program) -> nn.Module:
    """A copy of a block whose branches put out 0, and that is trained: all of it where nothing of the block is, what
    its branches end in otherwise.
    """
    twin = copy_module(change.model.get_submodule(name))
    if not any(parameter.requires_grad for parameter in twin.parameters()):
        for parameter in twin.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    for connection in survey.connections[name]:
        silence_branch(change, twin, name, program, connection)
    return twin


def listed_copies(change: Transaction, container: str, copies: Mapping[str, nn.Module]) -> bool:
    """Put copies into a container that the network's config counts, each after its block, in place; False, and nothing
    is changed, if there is none or the output would change.
    """
    if not has_config(change.model):
        return False
    touched = dict(change.touched)
    members = list(change.model.get_submodule(container)._modules)
    places = {members.index(name.rpartition(".")[2]): name for name in copies}
    order = [place for place in range(len(members)) for _ in range(2 if place in places else 1)]

    def check() -> None:
        if change.tolerance is not None and not change.compare() <= change.tolerance:
            raise SkipwayError("the output would change")

    try:
        with change.savepoint():
            edit_container(change, container, order, check, {place: copies[name] for place, name in places.items()})
    except Exception as problem:  # whatever a network raises that was not made for it
        change.touched = touched
        change.refused["config"] = f"it does not build the network with these copies: {problem}; {SAVING}"
        return False
    entries = {name: value for name, value in change.touched.items() if name not in touched}
    later = [order.index(place) + 1 for place in places]
    change.touched = {
        **touched,
        **{
            name: f"copied to {container}.{number}; later blocks are renumbered"
            for name, number in zip(copies, later, strict=True)
        },
        **entries,
    }
    return True


def slotted_copy(change: Transaction, survey: BlockSurvey, name: str, twin: nn.Module, added: int) -> None:
    """Register a copy in its block, so that it runs after it with its arguments, in place; it gets a number of its own
    where blocks are numbered, and so its own slot in a cache.

    Raises:
        SkipwayError: the block writes into an argument, and has no number there.
    """
    model, call = change.model, survey.calls[name]
    row = list(model.get_submodule(name.rpartition(".")[0]).children())
    numbers = numbered_attributes(row)
    number_blocks(change, [twin], numbers, len(row) + added)
    if call.written_arguments and not numbers:
        raise SkipwayError(
            f"{name} writes into {abbreviate(call.written_arguments)}, and its copy would write into the same place: "
            "give an example without it (use_cache=False)"
        )
    repeat(change, model.get_submodule(name), twin, call)
    disable_fused_path(change, f"{name}.{OUTPUT}")
    threaded = dict(call.threads).values()
    rest = [path_text(path, what="output") for path in call.computed if path not in threaded]
    change.touched[name] = "copied" + (f"; the copy's {abbreviate(rest)} is dropped" if rest else "")
