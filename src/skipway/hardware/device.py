"""The choice of device and precision."""

from __future__ import annotations

from typing import Literal

import torch

from skipway.errors import SkipwayError, first_line

__all__ = ["choose_device", "choose_precision", "seed_torch"]


def choose_device(name: str, local: int = 0) -> torch.device:
    """Return the device of that name; "auto" is this process's CUDA device if there is one, else the CPU.

    Args:
        name: auto, cpu, cuda, cuda:1, mps.
        local: local rank of this process, the index of its CUDA device.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local}" if name == "cuda" else name)
        torch.empty(1, device=device)
    except Exception as error:  # torch raises RuntimeError, AssertionError or NotImplementedError by device
        raise SkipwayError(f"device {name!r} cannot be used: {first_line(error)}; try cpu or auto") from error
    return device


def choose_precision(
    setting: Literal["auto", "float32", "bfloat16", "float16"], device: torch.device
) -> tuple[Literal["float32", "bfloat16", "float16"], str]:
    """Return the precision of the forward pass, and the reason for it in a few words.

    "auto" is bfloat16 autocast if the device supports bfloat16 natively, else float32: emulated bfloat16 is slower
    than float32.
    """
    if setting != "auto":
        return setting, "as requested"
    if device.type == "cuda":
        with torch.cuda.device(device):  # the question is about the current one
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "native on this GPU") if native else ("float32", "this GPU has no native bfloat16")
    if device.type == "cpu" and cpu_has_bfloat16():
        return "bfloat16", "native on this CPU"
    return "float32", f"this {device.type.upper()} has no native bfloat16"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has AVX512-BF16 or AMX; torch offers only private queries, whose absence counts as no."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        question = getattr(torch.cpu, name, None)
        if question is not None and question():
            return True
    return False


def seed_torch(seed: int) -> None:
    """Seed the random numbers of torch on all devices, for loops.

    Where there is no accelerator, `torch.manual_seed` keeps a call for later and formats the stack, for each of three
    kinds of devices and every time: a millisecond or more, and memory that is never freed.

    >>> seed_torch(1)
    >>> torch.initial_seed()
    1
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
