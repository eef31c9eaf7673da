"""Errors that somebody's model raises, told as what failed, where, and the way out."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from skipway.errors import SkipwayError
from skipway.tracing.containers import tensors_in

__all__ = ["ForeignErrors"]


class ForeignErrors(AbstractContextManager["ForeignErrors"]):
    """Context manager at a door: what the model, its loss or torch raises inside leaves as a `SkipwayError`.

    The message names the error, the module in which it was raised, the example, and a way out by what went wrong. An
    error from outside of the model, that of a caller or of Skipway itself, passes as it is, and so do
    `torch.OutOfMemoryError` and a `SkipwayError`.

    Args:
        model: the model that runs.
        example: what it is called with, for the message.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 5))
    >>> with ForeignErrors(model, torch.zeros(1, 2)):
    ...     model(torch.zeros(1, 2))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    skipway.errors.SkipwayError: Sequential fails on this example (float32 (1, 2)): in 1: RuntimeError: mat1 and ...
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.example = model, example

    def __exit__(self, kind: Any, error: BaseException | None, traceback: TracebackType | None) -> None:
        if not isinstance(error, Exception) or isinstance(error, SkipwayError | torch.OutOfMemoryError):
            return
        where = place_of(self.model, traceback)
        if where is not None:
            raise SkipwayError(
                f"{type(self.model).__name__} fails on this example ({describe(self.example)}): "
                f"{f'in {where}: ' if where else ''}{type(error).__name__}: {first_lines(error)}; "
                f"{way_out(self.model, self.example, error)}"
            ) from error


def place_of(model: nn.Module, traceback: TracebackType | None) -> str | None:
    """The path of the innermost module of `model` that was running, "" for the model itself; None if none was."""
    running: nn.Module | None = None
    inside = False
    paths = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
    while traceback is not None:
        own = traceback.tb_frame.f_locals.get("self")
        if isinstance(own, nn.Module) and id(own) in paths:
            running, inside = own, True
        elif "torch/autograd/" in traceback.tb_frame.f_code.co_filename.replace("\\", "/"):
            inside = True
        traceback = traceback.tb_next
    return (paths[id(running)] if running is not None else "") if inside else None


def first_lines(error: Exception) -> str:
    """The message of an error, without the stack that some of torch's carry."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:3]) or "no message"
    return text if len(text) <= 300 else f"{text[:299]}…"


def describe(example: Any) -> str:
    """The tensors of an example in a few words, with the names that keyword arguments have.

    >>> describe({"ids": torch.zeros(2, 3, dtype=torch.long), "flag": True})
    'ids: int64 (2, 3)'
    """
    named = example.items() if isinstance(example, Mapping) else [("", example)]
    parts = []
    for name, value in named:
        tensors = [f"{str(each.dtype).removeprefix('torch.')} {tuple(each.shape)}" for each in tensors_in(value)]
        parts += [f"{name}: {', '.join(tensors)}" if name else ", ".join(tensors)] if tensors else []
    return "; ".join(parts) or type(example).__name__


def way_out(model: nn.Module, example: Any, error: Exception) -> str:
    """A way out of an error: by where model and example are, then by the words of the message."""
    tensors = list(tensors_in(example))
    held = [*model.parameters(), *model.buffers()]
    devices = {str(each.device) for each in held}
    apart = sorted({str(each.device) for each in tensors} - devices)
    if devices and apart:
        return f"the example is on {', '.join(apart)} and the model on {', '.join(sorted(devices))}: move one of them"
    real = {each.dtype for each in held if each.is_floating_point()}
    values = {each.dtype for each in tensors if each.is_floating_point() or each.is_complex()}
    other = sorted(str(kind) for kind in values - real)
    if len(real) == 1 and other and DTYPE.search(str(error)):
        (kind,) = real
        return f"the example is {', '.join(other)} and the model {kind}: give example.to({kind})"
    if any(not each.is_floating_point() and not each.is_complex() for each in tensors) and DTYPE.search(str(error)):
        return "the example holds whole numbers where the model takes real ones: give example.float()"
    words = next((words for pattern, words in WAYS_OUT if pattern.search(str(error))), OTHERWISE)
    return words + (f"; forward takes ({', '.join(arguments_of(model))})" if words == ARGUMENTS else "")


def arguments_of(model: nn.Module) -> list[str]:
    """The names of forward's arguments."""
    try:
        return list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return ["…"]


DTYPE = re.compile(r"dtype|scalar type|Tensor[A-Za-z ]* for argument|should be the same|input type", re.IGNORECASE)
ARGUMENTS = (
    "the example has to be what the model is called with: a tensor, a tuple of positional arguments or a mapping of "
    "keyword arguments"
)
OTHERWISE = f"call the model with it to see the error alone; {ARGUMENTS}"
WAYS_OUT = tuple(
    (re.compile(pattern, re.IGNORECASE), words)
    for pattern, words in (
        (r"must be Tensor, not|positional argument|keyword argument|got multiple values", ARGUMENTS),
        (
            r"more than 1 value per channel",
            "a norm of batch statistics needs more than one value per channel: give more samples, or larger ones",
        ),
        (
            r"'indices'|indices to be|index out of range|out of bounds",
            "tokens and labels are whole numbers (int64), each below the size of the table that is looked up",
        ),
        (r"expected .*\d-?d|channels|shapes? |size|dimension|elements|mat1", "check the shape of the example"),
        (
            r"backward through the graph a second time|modified by an inplace|deepcopy protocol",
            "the model keeps tensors of an earlier pass: detach what it keeps, x.detach(), or clear it before",
        ),
        (r"not implemented", "torch has no such operator for this type or device: give another dtype or device"),
        (r"meta", "a tensor of the model or of the example has no values (meta device): give one with values"),
    )
)
