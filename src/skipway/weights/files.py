"""Tensors from files, without ever running code from one."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from skipway.errors import CheckpointError

__all__ = ["read"]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pth`, `.pt`, `.bin` file (read with `weights_only=True`).

    Raises:
        CheckpointError: no such file, a suffix that is not known, a damaged file, one that wants to run code, or one
            that holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path}: the suffix says nothing of the format; known are {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a foreign pickle's protocol number; what it holds is judged below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and would run code when read, which Skipway never does; convert it to "
            "safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or no PyTorch checkpoint: {error}") from error
    return tensors(content, path)


def tensors(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what a checkpoint held: itself, or the one entry that is known to hold it."""
    if isinstance(content, dict):
        for key in ("state_dict", "model", "model_state_dict"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {str(key).removeprefix("module."): value for key, value in content.items()}
    raise CheckpointError(f"{path} holds no state dict (names to tensors)")
