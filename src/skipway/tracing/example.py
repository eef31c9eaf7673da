"""An example: what a model is called with, in any of the forms in which people hold it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from skipway.errors import SkipwayError

__all__ = ["Example", "as_batch", "as_example", "call_model"]

Example: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | Iterable[Any]
"""A tensor is one argument, a tuple or list positional arguments, a mapping keyword arguments; an iterable of batches,
such as a `DataLoader`, stands for its first batch."""


def call_model(model: nn.Module, example: Example) -> Any:
    """Call `model` with an example and return its output.

    | example | call |
    |---|---|
    | a tensor `x` | `model(x)` |
    | a tuple or list `(x, c)` | `model(x, c)` |
    | a mapping, such as a tokenizer's `BatchEncoding` | `model(**example)` |
    | an iterable of batches, such as a `DataLoader` | the first batch without its targets, see `as_batch` |

    >>> import torch
    >>> call_model(nn.Bilinear(2, 3, 4), (torch.zeros(5, 2), torch.zeros(5, 3))).shape
    torch.Size([5, 4])
    """
    example = as_example(example)
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def as_example(given: Example) -> Tensor | tuple[Any, ...] | dict[str, Any]:
    """Bring an example into one of three forms: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        SkipwayError: `given` is none of the forms of `call_model`, or a loader without batches.
    """
    return as_batch(given)[0]


def as_batch(given: Example, targets: Any = None) -> tuple[Tensor | tuple[Any, ...] | dict[str, Any], Any]:
    """Split what a user hands over into an example and targets.

    Only a loader's batch holds targets: of a sequence the last element is the targets and the others are the
    arguments, as `for images, labels in loader` reads it. A mapping, from a loader or not, goes to the model as it is,
    labels included, as transformers' models take it.

    Args:
        given: an example, or an iterable of batches.
        targets: given by the caller; they take precedence over the loader's.

    Raises:
        SkipwayError: `given` is none of the forms of `call_model`, or a loader without batches.

    >>> import torch
    >>> loader = torch.utils.data.DataLoader([(torch.zeros(3), 0), (torch.ones(3), 1)], batch_size=2)
    >>> example, targets = as_batch(loader)
    >>> example.shape, targets
    (torch.Size([2, 3]), tensor([0, 1]))
    """
    if isinstance(given, Tensor):
        return given, targets
    if isinstance(given, Mapping):
        return dict(given.items()), targets
    if isinstance(given, tuple | list):
        return tuple(given), targets
    if isinstance(given, str | bytes | nn.Module) or not isinstance(given, Iterable):
        raise SkipwayError(
            f"example={type(given).__name__}: the rule is what the model is called with (a tensor, a tuple of "
            "positional arguments, a mapping of keyword arguments) or a DataLoader of such batches"
        )
    batch = next(iter(given), None)
    if batch is None:
        raise SkipwayError(f"example={type(given).__name__}: the loader yields no batch; give one that does")
    if isinstance(batch, tuple | list) and len(batch) > 1:
        *arguments, last = batch
        inputs = arguments[0] if len(arguments) == 1 else tuple(arguments)
        return as_example(inputs), last if targets is None else targets
    if isinstance(batch, tuple | list) and len(batch) == 1:
        batch = batch[0]
    return as_example(batch), targets
