"""Formats of files and folders by their content: those that hold weights, and what others are."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path
from typing import Literal

from skipway.errors import CheckpointError, printable

__all__ = ["Format", "describe_folder", "file_format"]

Format = Literal["safetensors", "torch", "numpy"]

FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself; fetch it with git lfs pull"),
    (b"<", "a page of HTML or XML, as a failed download leaves it; download the file again"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive; unpack it first"),
    (b"GGUF", "a GGUF file of llama.cpp, which is not read; use the safetensors file of the same model"),
    (b"\x89HDF", "an HDF5 file of Keras, which is not read; convert it to safetensors"),
    (b"\x93NUMPY", "a single NumPy array, not a state dict (names to arrays)"),
    (b"{", "a JSON file, which describes weights at most; give the file or folder that holds them"),
)
"""First bytes of files that people mistake for weights, and what such a file is."""

SUFFIXES = {
    ".onnx": "an ONNX file: a network for inference, which is not read; use the weights that it was exported from",
    ".msgpack": "a file of Flax (JAX), which is not read; convert it to safetensors",
    ".pb": "a graph of TensorFlow, which is not read; convert its variables to safetensors",
    ".index": "the index of a TensorFlow checkpoint, which is not read; convert its variables to safetensors",
    ".tflite": "a model of LiteRT (TensorFlow Lite), which is not read; use the weights that it was made from",
}
"""Suffixes of formats whose first bytes tell nothing, and what such a file is."""

FOLDERS: tuple[tuple[str, str], ...] = (
    (
        ".metadata",
        "a checkpoint of torch.distributed.checkpoint (FSDP), in parts. If you trust it, make it one file: "
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth",
    ),
    ("zero_to_fp32.py", "a checkpoint of DeepSpeed, in parts; its zero_to_fp32.py makes one file of it"),
    ("saved_model.pb", "a SavedModel of TensorFlow, which is not read; convert its variables to safetensors"),
    ("*.index", "a checkpoint of TensorFlow, which is not read; convert its variables to safetensors"),
    ("tf_model.h5", "a folder with weights for TensorFlow alone; convert them to safetensors"),
    ("flax_model.msgpack", "a folder with weights for Flax (JAX) alone; convert them to safetensors"),
    ("_CHECKPOINT_METADATA", "a checkpoint of Orbax (JAX), which is not read; convert it to safetensors"),
    ("_METADATA", "a checkpoint of Orbax (JAX), which is not read; convert it to safetensors"),
    ("adapter_config.json", "an adapter of PEFT, which holds changes to other weights; merge it into them first"),
)
"""Files that tell what a folder is."""

MAGIC_OF_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The number with which torch.save began its files before version 1.6, after the protocol of the pickle."""


def file_format(path: Path) -> Format:
    """The format of a file of weights, read from its content; its suffix does not matter.

    Raises:
        CheckpointError: an empty file, or one of another kind, which is named.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(264)
    # first, since the length of a header may begin with the byte of a pickle
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    if head[:4] == b"PK\x03\x04":
        return zip_format(path)
    if head[257:262] == b"ustar":
        return tar_format(path)
    if head[:1] == b"\x80":
        if head[2 : 2 + len(MAGIC_OF_TORCH)] == MAGIC_OF_TORCH:
            return "torch"
        raise CheckpointError(
            f"{printable(path)} is damaged or a plain pickle that torch.save did not write: it would run code when "
            "read, which Skipway never does. If you trust the file, read it with pickle.load and save its arrays as "
            "safetensors"
        )
    raise CheckpointError(f"{printable(path)} is {describe_foreign(path, head, size)}")


def describe_foreign(path: Path, head: bytes, size: int) -> str:
    """What a file that holds no weights is."""
    if not size:
        return "damaged: an empty file, as an interrupted download or copy leaves it"
    damaged = f"a damaged safetensors file: its header does not fit its {size:,} bytes"
    if head[8:9] == b"{" and not any(head[4:8]):
        return damaged
    for start, kind in FOREIGN:
        if head.lstrip().startswith(start):
            return kind
    if path.suffix.lower() == ".safetensors":
        return damaged
    if head[4:8] == b"TFL3":
        return SUFFIXES[".tflite"]
    return SUFFIXES.get(path.suffix.lower()) or (
        f"damaged or no file of weights ({size:,} bytes, beginning {head[:8]!r}): the rule is a safetensors file, or "
        "one that torch.save wrote"
    )


def zip_format(path: Path) -> Format:
    """The format of a zip archive: of torch, or of NumPy.

    Raises:
        CheckpointError: it is damaged, or another archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise CheckpointError(
            f"{printable(path)} is damaged: {printable(str(error))}, as if it were cut off"
        ) from error
    if any(name.endswith("archive_format") for name in names):
        raise CheckpointError(
            f"{printable(path)} is a program of torch.export; save its state dict, torch.export.load(…).state_dict"
        )
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "numpy"
    if "model.weights.h5" in names:
        raise CheckpointError(f"{printable(path)} is a model of Keras, which is not read; convert it to safetensors")
    raise CheckpointError(f"{printable(path)} is {describe_archive('zip', names)}")


def tar_format(path: Path) -> Format:
    """The format of a tar archive: of torch before version 0.1.10.

    Raises:
        CheckpointError: it is damaged, or another archive.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            names = archive.getnames()
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{printable(path)} is damaged: {printable(str(error))}") from error
    if {"pickle", "storages", "tensors"} <= set(names):
        return "torch"
    raise CheckpointError(f"{printable(path)} is {describe_archive('tar', names)}")


def describe_archive(kind: str, names: list[str]) -> str:
    """What an archive of other files holds."""
    files = [printable(name) for name in names if not name.endswith("/")]
    listed = f"{', '.join(files[:3])}{' …' if len(files) > 3 else ''}" if files else "nothing"
    return f"a {kind} archive that holds {listed}; unpack it first and give the file of weights"


def describe_folder(folder: Path) -> str | None:
    """What a folder is that holds weights in a form that is not read; None if it holds none that are known."""
    for pattern, kind in FOLDERS:
        if any(folder.glob(pattern)):
            return kind.format(folder=printable(folder))
    return None
