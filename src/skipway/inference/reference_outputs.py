"""What a network that is not ours puts out for one fixed image, stored with its weights.

The code of such a network is not stored: a file may be edited and a library updated after training, and the weights fit
the changed code as well. So whoever builds the network again compares what it computes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import CheckpointError, printable
from skipway.inference.code_file import code_file
from skipway.inference.network import is_ours
from skipway.tracing import preserved_state
from skipway.tracing.restoration import generator_devices, own_tensors, seed_generators
from skipway.zoo import source_of

__all__ = ["describe_outputs", "find_change", "refuse_change"]

OUTPUTS = 16
"""Logits that are stored."""
TOLERANCE = 1e-2
"""Largest difference of outputs that are the same on another machine, over the largest of them. In single precision
kernels differ by 1e-6 to 1e-4 of it; a dropped activation, a changed factor or another norm by far more."""


def reference_image(channels: int, size: int, device: torch.device) -> Tensor:
    """A fixed image (1, channels, size, size), normalised: waves of three lengths, other ones in each channel. An image
    of one colour would hide what depends on edges.
    """
    rows, columns = (torch.arange(size, dtype=torch.float64).view(shape) for shape in ((-1, 1), (1, -1)))
    waves = [
        torch.sin(0.9 * rows + 0.7 * number) + torch.sin(0.31 * columns + number) + torch.sin(0.05 * rows * columns)
        for number in range(channels)
    ]
    return torch.stack(waves)[None].to(device, torch.float32)


def compute_outputs(model: nn.Module, channels: int, size: int, seed: int = 0) -> Tensor:
    """The first logits for the fixed image, in evaluation mode and single precision; the model stays as it is."""
    device = next(model.parameters()).device
    image = reference_image(channels, size, device)
    with (
        preserved_state(model),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False),
    ):
        seed_generators(generator_devices(own_tensors(model)), seed)
        return model.eval()(image)[0].flatten()[:OUTPUTS].cpu().double()  # not every device has float64


def describe_outputs(model: nn.Module, description: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is stored with the weights that the model has now: its outputs, and the version of its code.

    None for a network of ours, and for one whose outputs are not finite or random in evaluation mode.
    """
    name, channels, size = (description.get(key) for key in ("name", "channels", "image"))
    if is_ours(str(name)) or channels is None or size is None:
        return None
    outputs, again = (compute_outputs(model, channels, size, seed) for seed in (0, 1))
    if not bool(torch.isfinite(outputs).all()) or difference(outputs, again) > TOLERANCE:
        return None
    return {"outputs": outputs.tolist(), "code": code_version(str(name))}


def find_change(model: nn.Module, description: Mapping[str, Any], stored: object) -> str:
    """What the network computes otherwise than when its weights were written, in words; "" if it computes the same."""
    values = stored.get("outputs") if isinstance(stored, dict) else None
    if (
        not isinstance(stored, dict)
        or not isinstance(values, list)
        or not values
        or not all(isinstance(each, int | float) for each in values)
    ):
        return ""
    then = torch.tensor(values, dtype=torch.float64)
    now = compute_outputs(model, description["channels"], description["image"])
    written, read = (str(each) for each in (stored.get("code"), code_version(str(description["name"]))))
    if difference(then, now) <= TOLERANCE:
        if (
            "SHA-256" in written and written.split()[-1] != read.split()[-1]
        ):  # what happens in training, or with several images, is not known
            warnings.warn(
                f"{printable(written)} when the weights were written, {printable(read)} now; for a fixed image the "
                "network computes the same",
                stacklevel=2,
            )
        return ""
    versions = f"{printable(written)} then, {printable(read)} now" if written != read else f"both with {read}"
    return (
        f"{printable(str(description['name']))} computes something else than when the weights were written: for a "
        f"fixed image {brief(then)} then, {brief(now)} now ({versions})"
    )


def refuse_change(change: str, source: str, remedy: str) -> None:
    """Raise if `find_change` found one.

    Raises:
        CheckpointError: it did.
    """
    if change:
        raise CheckpointError(f"{source}: {change}; put back the code of that time, or {remedy}")


def difference(first: Tensor, second: Tensor) -> float:
    """The largest difference of two answers over the largest number in the first; infinite if they cannot be compared.

    >>> difference(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0])), difference(torch.zeros(2), torch.zeros(2))
    (0.5, 0.0)
    """
    if first.shape != second.shape or not bool(torch.isfinite(second).all()):
        return math.inf
    gap = float((first - second).abs().max())
    return gap / max(float(first.abs().max()), 1e-12)


def brief(outputs: Tensor) -> str:
    """The first numbers of an answer."""
    return f"({', '.join(f'{value:.4g}' for value in outputs[:3].tolist())}{', …' if len(outputs) > 3 else ''})"


def code_version(name: str) -> str:
    """The version of the library of a network, or the hash of its file.

    >>> code_version("nowhere.py:make")
    'nowhere.py'
    """
    file = code_file(name)
    if file is not None:
        if not file.is_file():
            return file.name
        return f"{file.name} with SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    library = str(source_of(name)[0].library)
    package = "transformers" if library == "huggingface" else library
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # imported from a folder
        return package
