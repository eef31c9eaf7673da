"""Places in the arguments and outputs of modules: which argument a tensor is, and where an output holds one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Path", "exchange_at", "item_at", "nodes", "path_text", "tensor_paths"]

Path: TypeAlias = tuple[int | str, ...]
"""Keys that lead to an item: the position or keyword of an argument, then positions, keys or fields in it; () is the
value itself."""


def items(value: Any) -> Iterator[tuple[int | str, Any]]:
    """The items of a container by their keys: of a sequence, a mapping or a dataclass; nothing of anything else."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple | list):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((each.name, getattr(value, each.name, None)) for each in dataclasses.fields(value))


def nodes(value: Any, depth: int = 2) -> Iterator[tuple[Path, Any]]:
    """A value and what is in it, to a depth, with their paths; what contains comes before what it contains."""
    yield (), value
    for key, item in items(value) if depth else ():
        for path, node in nodes(item, depth - 1):
            yield (key, *path), node


def tensor_paths(value: Any, depth: int = 2) -> Iterator[tuple[Path, Tensor]]:
    """Tensors in a value and in the containers in it, to a depth, with their paths.

    >>> import torch
    >>> [path for path, _ in tensor_paths((torch.ones(1), {"mask": torch.ones(1), "cache": None}))]
    [(0,), (1, 'mask')]
    """
    return ((path, node) for path, node in nodes(value, depth) if isinstance(node, Tensor))


def item_at(value: Any, path: Path) -> Any:
    """What a value holds at a path.

    >>> item_at(("x", {"mask": "m"}), (1, "mask"))
    'm'
    """
    for key in path:
        container: Any = value
        value = container[key] if isinstance(value, Mapping | tuple | list) else getattr(value, str(key))
    return value


def exchange_at(value: Any, path: Path, item: Any) -> Any:
    """A copy of a value that holds something else at a path; containers keep their types.

    >>> exchange_at(("x", ["y", "z"]), (1, 0), "new")
    ('x', ['new', 'z'])
    """
    if not path:
        return item
    key, *rest = path
    inner = exchange_at(item_at(value, (key,)), tuple(rest), item)
    if isinstance(value, tuple):
        if hasattr(value, "_replace"):
            return value._replace(**{value._fields[key]: inner})  # type: ignore[attr-defined]
        return (*value[:key], inner, *value[key + 1 :])  # type: ignore[operator]
    if isinstance(value, list | Mapping):
        changed: Any = copy.copy(value)
        changed[key] = inner
        return changed
    return dataclasses.replace(value, **{str(key): inner})


def path_text(path: Path, names: Sequence[str] = (), what: str = "argument") -> str:
    """A path in words; the position of an argument is written as the parameter's name where that is known.

    Args:
        path: in the arguments or in an output.
        names: of the parameters, in order.
        what: the path leads to: an "argument" or an "output".

    >>> path_text((0, "mask"), ("x",)), path_text((1,), what="output"), path_text(())
    ("x['mask']", 'output 1', 'the value itself')
    """
    if not path:
        return "the value itself"
    first, *rest = path
    known = names[first] if isinstance(first, int) and first < len(names) else first
    head = known if isinstance(known, str) else f"{what} {known}"
    return head + "".join(f"[{key!r}]" for key in rest)
