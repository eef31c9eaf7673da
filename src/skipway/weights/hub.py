"""Weights by their name on the Hugging Face hub, downloaded once into its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from skipway.errors import CheckpointError, MissingExtraError

__all__ = ["PREFIX", "download", "local_path"]

PREFIX = "hf:"
SAFE = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin")


def download(name: str, others: Sequence[str] = ()) -> Path:
    """The folder that holds the weights of `hf:org/name`, or of one revision of it, `hf:org/name@revision`.

    Of the files only the weights are fetched, the pickled ones only where there are no others, and those that fit the
    patterns in `others`. What the cache holds
    is not fetched again, and needs no network.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        CheckpointError: there is no such name or revision, no right to it, or no network.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hub", f"weights by a hub name ({name!r})") from error
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        for patterns in (SAFE, PICKLED):
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=[*patterns, *others]))
            if any(match for pattern in patterns for match in folder.glob(pattern)):
                return folder
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are these
        raise CheckpointError(f"{name} cannot be fetched from the hub: {error}") from error
    raise CheckpointError(f"{name} holds no weights under the usual names: {', '.join((*SAFE, *PICKLED))}")


def local_path(source: str | Path, others: Sequence[str] = ()) -> Path:
    """The path of weights: as it is, or the folder that `download` gives for a name on the hub, "hf:org/name"."""
    return download(str(source), others) if str(source).startswith(PREFIX) else Path(source)
