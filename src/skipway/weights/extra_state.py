"""Extra state: what modules keep beside parameters and buffers, and load by themselves (`get_extra_state`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from skipway.errors import CheckpointError, first_line, printable
from skipway.tracing import unwrap
from skipway.tracing.restoration import run_to_end
from skipway.weights.prefixes import EXTRA, own_name

__all__ = ["extra_state_owners", "refuse_copies", "write_state"]


def extra_state_owners(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with extra state, by the name of that in `own_state`; it is loaded by their `set_extra_state`, since
    what `get_extra_state` returned need not be what they keep.

    Raises:
        CheckpointError: a module has `get_extra_state` alone.
    """
    owners = {
        own_name(f"{name}.{EXTRA}".removeprefix(".")): module
        for name, module in unwrap(model).named_modules(remove_duplicate=False)
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }
    for name, module in owners.items():
        if type(module).set_extra_state is nn.Module.set_extra_state:
            raise CheckpointError(
                f"{printable(name)!r} cannot be loaded: {type(module).__name__} has get_extra_state without "
                "set_extra_state; give it both, or neither"
            )
    return owners


def refuse_copies(own: Mapping[str, Tensor], again: Mapping[str, Tensor], owners: Mapping[str, nn.Module]) -> None:
    """Raise where a state dict has copies, which differ from one reading to the next: writing into them does nothing.

    Args:
        own: what is to be written into, by name.
        again: the same, read once more.
        owners: modules with extra state, by its name, which may be a copy.

    Raises:
        CheckpointError: such a tensor.
    """
    for name, tensor in own.items():
        plain = name not in owners and type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if plain and tensor.data_ptr() != again[name].data_ptr():
            raise CheckpointError(
                f"{printable(name)!r} cannot be loaded: state_dict() returns a copy of it, into which nothing can be "
                "written; use load_state_dict() of the module"
            )


@torch.no_grad()
def write_state(
    own: Mapping[str, Tensor], values: Iterable[tuple[str, Tensor]], owners: Mapping[str, nn.Module]
) -> None:
    """Write values into a network, in place: into the tensors of the same names, and extra state by its owners. Where
    there is extra state, copies of the tensors are kept meanwhile, and all is put back if anything raises.

    Args:
        own: the tensors that are written, by name, and extra state as it is.
        values: of these names.
        owners: modules with extra state, by its name.

    Raises:
        CheckpointError: a `set_extra_state` fails.
    """
    has_extra_state = not own.keys().isdisjoint(owners)
    before = {name: tensor.detach().clone() for name, tensor in own.items()} if has_extra_state else {}
    try:
        for name, value in values:
            write_entry(own, owners, name, value)
    except BaseException:
        with suppress(CheckpointError):  # by the module that failed already
            run_to_end([partial(write_entry, own, owners, name, before[name]) for name in reversed(before)])
        raise


def write_entry(own: Mapping[str, Tensor], owners: Mapping[str, nn.Module], name: str, value: Tensor) -> None:
    """Write one value; see `write_state`."""
    if name not in owners:
        own[name].copy_(value)
        return
    try:
        owners[name].set_extra_state(value)
    except Exception as problem:  # somebody's code
        raise CheckpointError(
            f"{printable(name)!r} cannot be loaded: set_extra_state of {type(owners[name]).__name__} raises "
            f"{type(problem).__name__}: {first_line(problem)}, so that nothing was loaded; let it take what "
            "get_extra_state returned, or take a file of the same version of the module"
        ) from problem
