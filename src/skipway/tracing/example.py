"""An example: what a model is called with, in any of the forms in which people hold it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from skipway.errors import SkipwayError
from skipway.tracing.containers import entries_of, leaves_in, map_tensors, tensors_in
from skipway.tracing.foreign_errors import ForeignErrors
from skipway.tracing.reentrant_checkpoints import without_reentry

__all__ = ["Example", "as_batch", "as_example", "batches_of", "call_model", "copy_example", "split_batch"]

Example: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | Iterable[Any]
"""A tensor is one argument, a tuple or list positional arguments, a mapping keyword arguments; an iterable of batches,
such as a `DataLoader`, stands for its first batch; any other object that holds tensors is one argument."""


def call_model(model: nn.Module, example: Example) -> Any:
    """Call `model` with an example and return its output.

    | example | call |
    |---|---|
    | a tensor `x` | `model(x)` |
    | a tuple or list `(x, c)` | `model(x, c)` |
    | a mapping, such as a tokenizer's `BatchEncoding` | `model(**example)` |
    | the same, where `forward` takes no such names but one argument | `model(example)` |
    | another object that holds tensors, such as a dataclass | `model(example)` |
    | an iterable of batches, such as a `DataLoader`, see `batches_of` | the first batch without its targets |

    Raises:
        SkipwayError: the model fails; says with what, where, and what the example was.

    >>> import torch
    >>> call_model(nn.Bilinear(2, 3, 4), (torch.zeros(5, 2), torch.zeros(5, 3))).shape
    torch.Size([5, 4])
    """
    example = as_example(example)
    with ForeignErrors(model, example), without_reentry():
        if isinstance(example, Mapping):
            return model(example) if takes_whole(model, example) else model(**example)
        return model(*example) if isinstance(example, tuple) else model(example)


def takes_whole(model: nn.Module, entries: Mapping[str, Any]) -> bool:
    """Whether `forward` takes a mapping as one argument: it refuses the entries as keywords, and takes the one."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return False
    return not binds(signature, **entries) and binds(signature, entries)


def binds(signature: inspect.Signature, /, *args: Any, **kwargs: Any) -> bool:
    """Whether a function can be called with these arguments."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def as_example(given: Example) -> Tensor | tuple[Any, ...] | dict[str, Any]:
    """Bring an example into one of three forms: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        SkipwayError: `given` is none of the forms of `call_model`, holds no tensor, or is a loader without batches.
    """
    return as_batch(given)[0]


def copy_example(
    example: Example, device: str | None = None, *, gradients: bool = False
) -> Tensor | tuple[Any, ...] | dict[str, Any]:
    """A copy of an example, since a network may write into what it is given, a cache above all; a tensor that stands in
    it twice is one in the copy, too. Modules and functions in it are not copied.

    Args:
        example: what a model is called with.
        device: of the copy; by default each tensor stays where it is.
        gradients: whether copies of tensors that have gradients have them, too.
    """
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # with the tensors, so that no address is used twice

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            plain = tensor.detach()
            made = plain.clone() if device is None else plain.to(device)
            copies[id(tensor)] = tensor, made.requires_grad_(gradients and tensor.requires_grad)
        return copies[id(tensor)][1]

    example = as_example(example)
    memo = {id(each): copied(each) if isinstance(each, Tensor) else each for each in leaves_in(example)}
    try:
        return copy.deepcopy(example, memo)
    except Exception:  # somebody's object
        return map_tensors(copied, example)


def as_batch(given: Example, targets: Any = None) -> tuple[Tensor | tuple[Any, ...] | dict[str, Any], Any]:
    """Split what a user hands over into an example and targets.

    Only a loader's batch holds targets: of a sequence the last element is the targets and the others are the
    arguments, as `for images, labels in loader` reads it. A mapping, from a loader or not, goes to the model as it is,
    labels included, as transformers' models take it.

    Args:
        given: an example, or an iterable of batches.
        targets: given by the caller; they take precedence over the loader's.

    Raises:
        SkipwayError: `given` is none of the forms of `call_model`, holds no tensor, or is a loader without batches.

    >>> import torch
    >>> loader = torch.utils.data.DataLoader([(torch.zeros(3), 0), (torch.ones(3), 1)], batch_size=2)
    >>> example, targets = as_batch(loader)
    >>> example.shape, targets
    (torch.Size([2, 3]), tensor([0, 1]))
    """
    if isinstance(given, Tensor):
        return given, targets
    entries = entries_of(given)
    loader = batches_of(given)
    if loader is not None:
        batch = next(iter(loader), None)
        if batch is None:
            raise SkipwayError(f"example={type(given).__name__}: the loader yields no batch; give one that does")
        return split_batch(batch, targets)
    if entries is not None or (isinstance(given, tuple | list) and not isinstance(given, PackedSequence)):
        return require_tensors(tuple(given) if entries is None else entries, given), targets
    if isinstance(given, torch.utils.data.Dataset):
        raise SkipwayError(
            f"example={type(given).__name__}: a data set holds single samples; give a batch of them, or "
            "torch.utils.data.DataLoader(dataset, batch_size=32)"
        )
    if hasattr(given, "__array__"):
        raise SkipwayError(f"example={type(given).__name__}: the rule is tensors; give torch.as_tensor(example)")
    return require_tensors((given,), given), targets


def batches_of(given: Example) -> Iterable[Any] | None:
    """The iterable of batches that an example stands for; None where it is one batch.

    Batches come from a `DataLoader` or any other iterable that is no container of tensors (an iterator is consumed),
    from a list of batches that are alike (`[(x, y), (x, y)]`, `[{"ids": …}, {"ids": …}]`), and from a function without
    arguments that returns an iterator, such as a generator function, which is called for each pass.
    """
    if isinstance(given, list):
        return given if are_batches(given) else None
    if isinstance(given, FunctionType | partial | MethodType):
        return FunctionBatches(given)
    closed = isinstance(given, Tensor | tuple | str | bytes | nn.Module | type | torch.utils.data.Dataset)
    if closed or not isinstance(given, Iterable) or hasattr(given, "__array__") or entries_of(given) is not None:
        return None
    return given


@dataclass(frozen=True)
class FunctionBatches:
    """The batches of a function that returns an iterator, called anew for each pass."""

    function: Callable[[], Iterable[Any]]

    def __iter__(self) -> Iterator[Any]:
        try:
            return iter(self.function())
        except TypeError as error:
            raise SkipwayError(
                f"example={getattr(self.function, '__name__', 'partial')}(): {error}; the rule is a function without "
                "arguments that returns an iterator of batches"
            ) from error


def are_batches(entries: list[Any]) -> bool:
    """Whether the entries of a list are batches: two or more containers of the same tensors but for their samples."""
    if len(entries) < 2 or not all(isinstance(each, tuple | list | Mapping) for each in entries):
        return False
    kinds = [
        (
            type(each),
            tuple(each) if isinstance(each, Mapping) else len(each),
            tuple((tensor.dtype, tensor.shape[1:]) for tensor in tensors_in(each)),
        )
        for each in entries
    ]
    return bool(kinds[0][2]) and len(set(kinds)) == 1


def split_batch(batch: Any, targets: Any = None) -> tuple[Tensor | tuple[Any, ...] | dict[str, Any], Any]:
    """Split a batch of a loader into an example and targets, as `as_batch` describes."""
    if isinstance(batch, tuple | list) and len(batch) > 1:
        *arguments, last = batch
        inputs = arguments[0] if len(arguments) == 1 else tuple(arguments)
        return as_example(inputs), last if targets is None else targets
    if isinstance(batch, tuple | list) and len(batch) == 1:
        batch = batch[0]
    return as_example(batch), targets


def require_tensors(example: Any, given: Any) -> Any:
    """The example, if it holds a tensor at all."""
    if next(tensors_in(example), None) is not None:
        return example
    held = f" of {', '.join(type(each).__name__ for each in given)}" if isinstance(given, tuple | list) else ""
    raise SkipwayError(
        f"example={type(given).__name__}{held}: it holds no tensor; the rule is what the model is called with (a "
        "tensor, a tuple of positional arguments, a mapping of keyword arguments) or a DataLoader of such batches"
    )
