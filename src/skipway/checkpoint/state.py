"""Tensors of a network and of its optimizer by name; the network may be in DDP, compiled, or sharded by FSDP2.

Wrappers add prefixes to parameter names; here the names are those of the unwrapped network, so one kind of run can read
what another wrote. Tensors that FSDP2 has sharded are gathered, which is collective.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skipway.errors import CheckpointError, printable
from skipway.tracing import unwrap
from skipway.weights.extra_state import extra_state_owners, refuse_copies, write_state
from skipway.weights.prefixes import INSERTED

if dist.is_available():
    from torch.distributed.tensor import DTensor, distribute_tensor
else:
    DTensor: Any = None
    distribute_tensor: Any = None

__all__ = [
    "all_finite",
    "clean_name",
    "load_model_state",
    "load_optimizer_state",
    "model_state",
    "optimizer_state",
]

NUMBERS: dict[str, type] = {"bool": bool, "int": int, "float": float}
# the step count of optimizers that keep it per group and not per parameter
GROUP_STEP = "group_step"


def clean_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers.

    >>> clean_name("layer1._orig_mod.0.weight")
    'layer1.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in INSERTED)


def model_state(model: nn.Module, *, gather: bool = True) -> dict[str, Tensor]:
    """Return parameters, buffers and extra state by name, as references: they change as training continues.

    Args:
        model: wrapped or not.
        gather: gather sharded tensors into host memory of rank 0; the other ranks then omit them. False keeps them
            sharded, for `save_sharded`.

    Raises:
        CheckpointError: a module has extra state that is not a tensor, or `get_extra_state` without `set_extra_state`,
            so that it could not be loaded.

    >>> list(model_state(nn.Linear(2, 1)))
    ['weight', 'bias']
    """
    extra_state_owners(model)  # refuses what could not be loaded
    state = {}
    for name, value in unwrap(model).state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{printable(name)!r} is not a tensor but {type(value).__name__}; it cannot be stored"
            )
        state[clean_name(name)] = value
    return gather_tensors(state) if gather else state


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, gather: bool = True) -> dict[str, Tensor]:
    """Return the optimizer's tensors and counts as `<parameter>/<entry>`, independent of the parameter groups.

    A count that is a Python number has its type appended: `<parameter>/<entry>!int`.

    Raises:
        CheckpointError: an entry is neither a tensor nor a number.
    """
    state = {}
    steps = {id(each): group["step"] for group in optimizer.param_groups if "step" in group for each in group["params"]}
    for name, parameter in parameters_of(model).items():
        entries = dict(optimizer.state.get(parameter, {}))
        if id(parameter) in steps:
            entries[GROUP_STEP] = steps[id(parameter)]
        for entry, value in entries.items():
            if isinstance(value, Tensor):
                state[f"{name}/{entry}"] = value.detach()
            elif type(value).__name__ in NUMBERS:
                kind = torch.float64 if isinstance(value, float) else torch.int64
                state[f"{name}/{entry}!{type(value).__name__}"] = torch.tensor(value, dtype=kind)
            elif value is not None:
                raise CheckpointError(
                    f"the optimizer's {entry!r} of {name} is {type(value).__name__}; only tensors and numbers can be "
                    "stored"
                )
    return gather_tensors(state) if gather else state


def load_model_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what `model_state` returned into the model, in place; names, shapes and dtypes must all match, but those of
    extra state, of which each module's `set_extra_state` is given a copy.

    Every rank passes full tensors or its own shards. On a mismatch nothing is changed.

    Raises:
        CheckpointError: names, shapes or dtypes differ, a `set_extra_state` fails, a module has `get_extra_state`
            without it, or its `state_dict()` returns copies.
    """
    targets, owners = model_state(model, gather=False), extra_state_owners(model)
    lost, strange = sorted(set(targets) - set(tensors)), sorted(set(tensors) - set(targets))
    if lost or strange:
        raise CheckpointError(f"the checkpoint does not fit the model: {describe_mismatch(lost, strange)}")
    for name, target in targets.items():
        source = tensors[name]
        if name in owners:
            continue
        if source.shape != target.shape or source.dtype != target.dtype:
            was, now = (f"{list(each.shape)} {each.dtype}" for each in (source, target))
            raise CheckpointError(f"the checkpoint does not fit the model: {name} is {was} there and {now} here")
    values = (
        (name, tensors[name].detach().to(target.device, copy=True))
        if name in owners
        else (name, local_tensor(place_like(tensors[name], target)))
        for name, target in targets.items()
    )
    places = {name: local_tensor(target) for name, target in targets.items()}
    again = model_state(model, gather=False)
    refuse_copies(places, {name: local_tensor(target) for name, target in again.items()}, owners)
    write_state(places, values, owners)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load what `optimizer_state` returned into the optimizer, in place; state of parameters not in `tensors` is
    dropped.

    Learning rates and other group options are left to the caller. On a mismatch nothing is changed.

    Raises:
        CheckpointError: a parameter that the model does not have, or a name that `optimizer_state` does not produce.
    """
    parameters = parameters_of(model)
    groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    state: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        entry, _, kind = entry.partition("!")
        parameter = parameters.get(name)
        if parameter is None or id(parameter) not in groups:
            raise CheckpointError(
                f"the checkpoint has optimizer state of {printable(name)!r}, which is not trained here"
            )
        if kind and (kind not in NUMBERS or tensor.numel() != 1):
            raise CheckpointError(f"the checkpoint has optimizer state {printable(key)!r}, which cannot be read")
        if kind:
            value: Any = NUMBERS[kind](tensor.item())
        elif tensor.shape == parameter.shape and entry != "step":
            value = place_like(tensor, parameter)
        elif entry == "step" and not (groups[id(parameter)].get("capturable") or groups[id(parameter)].get("fused")):
            value = tensor.clone()  # torch counts steps in host memory
        else:
            value = tensor.to(local_tensor(parameter).device, copy=True)
        state.setdefault(name, {})[entry] = value
    optimizer.state.clear()
    for name, entries in state.items():
        if GROUP_STEP in entries:
            groups[id(parameters[name])]["step"] = entries.pop(GROUP_STEP)
        if entries:
            optimizer.state[parameters[name]] = entries


def all_finite(model: nn.Module) -> bool:
    """Whether every parameter is finite; of sharded parameters, the local shard.

    >>> all_finite(nn.Linear(2, 1))
    True
    """
    sums = [local_tensor(parameter.detach()).float().sum() for parameter in model.parameters()]
    return bool(torch.isfinite(torch.stack(sums)).all()) if sums else True


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by clean name; tied parameters appear under their first name."""
    return {clean_name(name): parameter for name, parameter in unwrap(model).named_parameters()}


def gather_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather sharded tensors into host memory of rank 0, which the other ranks omit; return others unchanged."""
    full = {}
    for name, value in state.items():
        if not is_sharded(value):
            full[name] = value
            continue
        gathered = full_tensor(value)
        if dist.get_rank() == 0:
            full[name] = gathered.detach().cpu()
    return full


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP2 has sharded the tensor over processes."""
    return DTensor is not None and isinstance(tensor, DTensor)


def local_tensor(tensor: Any) -> Tensor:
    """The local shard of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def place_like(source: Tensor, like: Any) -> Tensor:
    """A copy of `source` with the device, memory format and sharding of `like`."""
    if is_sharded(source) or not is_sharded(like):
        return torch.empty_like(like, dtype=source.dtype, requires_grad=False).copy_(source.detach())
    device = local_tensor(like).device
    # every process has the full tensor and takes its shard: no communication
    return distribute_tensor(source.detach().to(device), like.device_mesh, like.placements, src_data_rank=None)


def describe_mismatch(lost: list[str], strange: list[str]) -> str:
    """Missing and unexpected names in words, the first of each."""
    parts = []
    for kind, names in (("missing", lost), ("unexpected", strange)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts.append(f"{kind}: {printable(names[0])!r}{more}")
    return "; ".join(parts)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every process; return any other tensor unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
