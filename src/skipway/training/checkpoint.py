"""The state of a run at one step, as one safetensors file: tensors under their parameters' names, the rest as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import CheckpointError
from skipway.training.storage import read_tensors, write_tensors

__all__ = ["all_finite", "load_checkpoint", "save_checkpoint"]

# raised when a file of this version can no longer be read by the code
VERSION = 1


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write weights, optimiser state and `state`, which has to be JSON, to `path`.

    The optimiser's tensors are kept by parameter name, `optimizer/<parameter>/<entry>`, and not by their place in a
    group, so that another grouping of the same parameters still finds them.
    """
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"optimizer/{name}/{entry}"] = torch.as_tensor(value)
    write_tensors(path, tensors, {"version": VERSION, "state": state})


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put the weights and the optimiser state of `path` back in place; the `state` that was saved with them.

    Raises:
        CheckpointError: the file is missing, damaged, of another version, or does not fit the model.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("version") != VERSION or "state" not in metadata:
        raise CheckpointError(f"{path} has version {metadata.get('version')}; this library reads version {VERSION}")
    weights = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model: {error}") from error
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            name, _, entry = key.removeprefix("optimizer/").rpartition("/")
            if name not in parameters:
                raise CheckpointError(f"{path} holds optimiser state of {name!r}, which the model does not have")
            optimizer.state[parameters[name]][entry] = placed_like(tensor, parameters[name], entry)
    return metadata["state"]


def placed_like(tensor: Tensor, parameter: Tensor, entry: str) -> Tensor:
    """An optimiser tensor on its parameter's device and in its memory layout; step counts stay on the CPU."""
    if entry == "step" or tensor.shape != parameter.shape:
        return tensor.clone()
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def all_finite(model: nn.Module) -> bool:
    """Whether every weight is a finite number."""
    sums = [parameter.detach().float().sum() for parameter in model.parameters()]
    return bool(torch.isfinite(torch.stack(sums)).all()) if sums else True
