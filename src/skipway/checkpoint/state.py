"""The tensors of a network and of its optimiser by name, whether it is plain, in DDP, compiled, or spread by FSDP2.

Wrappers put words into the names of parameters; here the names are those of the network alone, so what one run wrote
another reads. Where FSDP2 has spread a tensor over processes it is gathered, which all of them have to do together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skipway.errors import CheckpointError, printable

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
    "unwrapped",
]

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
NUMBERS: dict[str, type] = {"bool": bool, "int": int, "float": float}
# how many steps were taken, where an optimiser counts them for a group and not for each parameter
GROUP_STEP = "group_step"


def unwrapped(model: nn.Module) -> nn.Module:
    """The network in DDP and `torch.compile`.

    >>> network = nn.Linear(2, 1)
    >>> unwrapped(torch.compile(network)) is network
    True
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def clean_name(name: str) -> str:
    """A parameter's name without the words of wrappers.

    >>> clean_name("layer1._orig_mod.0.weight")
    'layer1.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def model_state(model: nn.Module, *, gather: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers by name, as references: they change when training goes on.

    Args:
        model: wrapped or not.
        gather: put spread tensors together, in host memory of rank 0; the other ranks then leave them out. Without,
            they stay spread, for `save_sharded`.

    Raises:
        CheckpointError: a module keeps extra state that is not a tensor.

    >>> list(model_state(nn.Linear(2, 1)))
    ['weight', 'bias']
    """
    state = {}
    for name, value in unwrapped(model).state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{printable(name)!r} is not a tensor but {type(value).__name__}; it cannot be stored"
            )
        state[clean_name(name)] = value
    return gathered(state) if gather else state


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, gather: bool = True) -> dict[str, Tensor]:
    """The optimiser's tensors and counts as `<parameter>/<entry>`: other groups of the same parameters find them too.

    Counts that are Python numbers get their type behind the name, as `<parameter>/<entry>!int`.

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
                    f"the optimiser's {entry!r} of {name} is {type(value).__name__}; only tensors and numbers can be "
                    "stored"
                )
    return gathered(state) if gather else state


def load_model_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put what `model_state` gave back in place: every name, shape and type of number has to be the same.

    Every rank has to give the whole tensors or its own pieces. Nothing is changed if anything does not fit.

    Raises:
        CheckpointError: other names, shapes or types.
    """
    targets = model_state(model, gather=False)
    lost, strange = sorted(set(targets) - set(tensors)), sorted(set(tensors) - set(targets))
    if lost or strange:
        raise CheckpointError(f"the checkpoint does not fit the model: {differences(lost, strange)}")
    for name, target in targets.items():
        source = tensors[name]
        if source.shape != target.shape or source.dtype != target.dtype:
            was, now = (f"{list(each.shape)} {each.dtype}" for each in (source, target))
            raise CheckpointError(f"the checkpoint does not fit the model: {name} is {was} there and {now} here")
    with torch.no_grad():
        for name, target in targets.items():
            local(target).copy_(local(placed(tensors[name], target)))


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put what `optimizer_state` gave back in place; state of parameters that `tensors` lacks is dropped.

    Learning rates and the like are the caller's. Nothing is changed if anything does not fit.

    Raises:
        CheckpointError: a parameter that the model lacks, or a name that is not one of `optimizer_state`.
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
                f"the checkpoint has optimiser state of {printable(name)!r}, which is not trained here"
            )
        if kind and (kind not in NUMBERS or tensor.numel() != 1):
            raise CheckpointError(f"the checkpoint has optimiser state {printable(key)!r}, which cannot be read")
        if kind:
            value: Any = NUMBERS[kind](tensor.item())
        elif tensor.shape == parameter.shape and entry != "step":
            value = placed(tensor, parameter)
        elif entry == "step" and not (groups[id(parameter)].get("capturable") or groups[id(parameter)].get("fused")):
            value = tensor.clone()  # torch counts steps in host memory
        else:
            value = tensor.to(local(parameter).device, copy=True)
        state.setdefault(name, {})[entry] = value
    optimizer.state.clear()
    for name, entries in state.items():
        if GROUP_STEP in entries:
            groups[id(parameters[name])]["step"] = entries.pop(GROUP_STEP)
        if entries:
            optimizer.state[parameters[name]] = entries


def all_finite(model: nn.Module) -> bool:
    """Whether every weight is a finite number; of spread ones, this process' pieces.

    >>> all_finite(nn.Linear(2, 1))
    True
    """
    sums = [local(parameter.detach()).float().sum() for parameter in model.parameters()]
    return bool(torch.isfinite(torch.stack(sums)).all()) if sums else True


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by clean name; of tied ones the first name."""
    return {clean_name(name): parameter for name, parameter in unwrapped(model).named_parameters()}


def gathered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Spread tensors whole, in host memory of rank 0; others as they are."""
    return dict(gather_each(state))


def gather_each(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if not is_spread(value):
            yield name, value
            continue
        whole = value.full_tensor()  # pyrefly: ignore - a DTensor has it
        if dist.get_rank() == 0:
            yield name, whole.detach().cpu()


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor lies on several processes."""
    return DTensor is not None and isinstance(tensor, DTensor)


def local(tensor: Any) -> Tensor:
    """This process' piece of a tensor."""
    return tensor.to_local() if is_spread(tensor) else tensor


def placed(source: Tensor, like: Any) -> Tensor:
    """A copy of `source` on the device of `like`, in its memory layout, spread as it is."""
    if is_spread(source) or not is_spread(like):
        return torch.empty_like(like, dtype=source.dtype, requires_grad=False).copy_(source.detach())
    device = local(like).device
    # every process has the whole and takes its piece: nothing is sent
    return distribute_tensor(source.detach().to(device), like.device_mesh, like.placements, src_data_rank=None)


def differences(lost: list[str], strange: list[str]) -> str:
    """Which names are missing and which are too many, the first of each."""
    parts = [(lost, "it lacks"), (strange, "it also has")]
    return "; ".join(f"{verb} {len(names)}, {printable(names[0])!r} first" for names, verb in parts if names)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 has spread over processes, put together in each of them; any other as it is."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]
