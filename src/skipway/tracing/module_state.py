"""What modules keep between calls, as attributes and in objects: copied, compared, and put back after a pass."""

from __future__ import annotations

import copy
import sys
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from operator import is_not
from types import NoneType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from skipway.tracing.containers import ATOMS, CLOSED, map_tensors, parts_of, tensors_in

__all__ = [
    *("TensorValues", "attribute_restoration", "copy_module", "detach_attributes", "differing_state", "held_by"),
    *("is_changed", "kept_tensors", "version_of", "weights_of", "write_values"),
]

Model = TypeVar("Model", bound=nn.Module)
STANDARD = frozenset({*vars(nn.Module()), "training"})
"""The names in the `__dict__` of every module."""
HOLDERS = (Tensor, list, tuple, dict)
FILLED = (list, dict, OrderedDict, defaultdict, Counter, set, deque)
"""Containers whose entries are put back, of these very classes."""
CONTAINERS = (list, tuple, dict, set, deque)
TABLES = ("_parameters", "_buffers", "_modules")
MISSING = object()
STATELESS = tuple(kind for kind in CLOSED if kind is not nn.Module)
"""Objects that keep nothing of a call."""


def copy_module(module: Model) -> Model:
    """A deep copy of any module, also of one that keeps tensors of a graph, which `copy.deepcopy` refuses: the weights
    that `torch.nn.utils.weight_norm` computes, activations of an earlier pass. They are detached in the copy.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    >>> layer.kept = layer(torch.zeros(1, 2))
    >>> copy_module(layer).kept.requires_grad
    False
    """
    held = [[*each._buffers.values(), *held_by(each).values()] for each in module.modules()]
    memo: dict[int, Any] = {id(each): each.detach().clone() for each in tensors_in(held) if not each.is_leaf}
    return copy.deepcopy(module, memo)


def kept_tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """The tensors among the plain attributes of modules, in containers too, and those with a graph among buffers."""
    for module in modules:
        yield from (buffer for buffer in module._buffers.values() if buffer is not None)
        for name, value in module.__dict__.items():
            if name not in STANDARD and isinstance(value, HOLDERS):
                yield from tensors_in(value)


def detach_attributes(modules: Iterable[nn.Module]) -> None:
    """Cut tensors that an earlier pass left in plain attributes off from its graph, which may have been freed."""
    for module in modules:
        for name, value in held_by(module).items():
            if isinstance(value, HOLDERS) and any(not tensor.is_leaf for tensor in tensors_in(value)):
                module.__dict__[name] = map_tensors(torch.detach, value)


class TensorValues(NamedTuple):
    """A tensor and the values that it had.

    Args:
        tensor: itself.
        version: how often it had been written into.
        shape: that it had.
        values: of each place in its memory.
    """

    tensor: Tensor
    version: int
    shape: torch.Size | None
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> TensorValues:
        """The values that a tensor has now."""
        shape = None if tensor.is_nested else tensor.shape
        return cls(tensor, version_of(tensor), shape, places_in(tensor).detach().clone())

    def put_back(self) -> None:
        """Write the values back, where they are others: a write into what a graph has saved ends its backward pass."""
        now, then = self.tensor, self.values
        shape = None if now.is_nested else now.shape
        if (shape, now.device, now.dtype, now.layout) != (self.shape, then.device, then.dtype, then.layout):
            # resized, as a buffer of `out=`, or given other data
            self.tensor.data = then.clone() if self.shape is None else then.clone().expand(self.shape)
        elif version_of(self.tensor) != self.version or are_different(places_in(self.tensor), self.values):
            write_values(self.tensor, self.values)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written into; inference tensors do not count, nor does what `Tensor.data` is written."""
    return 0 if tensor.is_inference() else tensor._version


def places_in(tensor: Tensor) -> Tensor:
    """A view with each place in memory once, of an expanded tensor, which refuses to be written into.

    >>> places_in(torch.ones(1, 4).expand(8, 4)).shape
    torch.Size([1, 4])
    """
    if tensor.layout is not torch.strided or tensor.is_nested or 0 not in tensor.stride():
        return tensor
    return tensor[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())]


@torch.no_grad()
def write_values(tensor: Tensor, values: Tensor) -> None:
    """Write values into each place of a tensor's memory, see `places_in`; also into an inference tensor."""
    places = places_in(tensor)
    if places is not tensor:
        values = values[tuple(slice(0, length) for length in places.shape)]
    with torch.inference_mode() if tensor.is_inference() else nullcontext():
        places.copy_(values)


def attribute_restoration(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """A step that puts back what a forward pass sets, replaces, deletes, fills or writes in place: attributes with
    tensors, numbers, flags and texts, also in containers, and parameters that it replaces.

    Left are objects of other classes, and containers that such were added to or taken from. Where a pass installs
    hooks, as in transformers, replaces methods, or makes modules or parameters, so are flags and what goes with them,
    which may tell that they are there.
    """
    modules = list(modules)
    before = [(module.__dict__, held_by(module)) for module in modules]
    parts = count_parts(before)
    parameters = [(module._parameters, dict(module._parameters)) for module in modules if module._parameters]
    seen: dict[int, Any] = {}
    found = [each for _, held in before for value in held.values() for each in parts_in(value, seen)]
    filled = [(each, copy.copy(each)) for each in found if type(each) in FILLED]
    kept = [each for each in found if isinstance(each, Tensor) and not isinstance(each, nn.Parameter)]
    own = set(map(memory_of, weights_of(modules))) if kept else set()
    tensors = [TensorValues.of(each) for each in kept if memory_of(each) not in own]
    return partial(put_back_attributes, before, parts, parameters, filled, tensors)


def count_parts(before: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> int:
    """How many hooks, modules and parameters modules have, by their tables."""
    return sum(
        len(table)
        for own, _ in before
        for name, table in own.items()
        if name in {"_modules", "_parameters"} or (name in STANDARD and name.endswith("_hooks"))
    )


def weights_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """The parameters and buffers of modules."""
    for module in modules:
        yield from (each for each in (*module._parameters.values(), *module._buffers.values()) if each is not None)


def memory_of(tensor: Tensor) -> int:
    """A number for the memory that a tensor lies in, that of another one where both share it: what lies in a weight is
    written by whoever trains, such as the flat weights of an LSTM.
    """
    try:
        return id(tensor) if tensor.layout is not torch.strided or is_lazy(tensor) else tensor.untyped_storage()._cdata
    except NotImplementedError:
        return id(tensor)


def parts_in(value: Any, seen: dict[int, Any]) -> Iterator[Any]:
    """The containers and tensors in an attribute, each once, though others share them.

    Args:
        value: an attribute.
        seen: those that were found before, by their ids, which are theirs as long as they are kept; these are added.

    >>> inner = [1]
    >>> [len(each) for each in parts_in({"a": inner, "b": (inner,)}, {})]
    [2, 1, 1]
    """
    left = [value] if isinstance(value, (Tensor, *CONTAINERS)) else []
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        yield each
        if not isinstance(each, Tensor):
            left += [part for part in entries_in(each) if isinstance(part, (Tensor, *CONTAINERS))]


def is_state(value: Any) -> bool:
    """Whether a value is what a pass leaves: a tensor, number or text, or a container of those, or with tensors in it.

    >>> [is_state(each) for each in (1, [], [None, "a"], [object()], [torch.ones(1), object()], True, None)]
    [True, True, True, False, True, False, False]
    """
    if not isinstance(value, CONTAINERS):
        return isinstance(value, Tensor) or (isinstance(value, ATOMS) and not isinstance(value, bool | NoneType))
    containers = [each for each in parts_in(value, {}) if isinstance(each, CONTAINERS)]
    known = all(isinstance(part, (*ATOMS, *CONTAINERS)) for each in containers for part in entries_in(each))
    return known or any(True for _ in tensors_in(value))


def entries_in(container: Any) -> Iterable[Any]:
    """What a container holds, without keys."""
    return container.values() if isinstance(container, dict) else container


def put_back_attributes(
    before: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    parts: int,
    parameters: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    filled: Sequence[tuple[Any, Any]],
    tensors: Sequence[TensorValues],
) -> None:
    """Put back attributes and parameters, by the tables of their modules, and what containers and tensors held."""
    # a method that is replaced counts as what a pass installs
    built = count_parts(before) != parts or any(
        callable(new) and not isinstance(new, nn.Module) and held.get(name) is not new
        for own, held in before
        for name, new in own.items()
        if name not in STANDARD
    )
    for own, held in before:
        for name in [each for each in {**held, **own} if each not in STANDARD]:
            old, new = held.get(name, MISSING), own.get(name, MISSING)
            if old is new or not all(each is MISSING or holds_state(each) for each in (old, new)):
                continue
            if new is MISSING and any(name in own.get(table, ()) for table in TABLES):  # what became a parameter
                continue
            # what is set beside hooks or modules that a pass makes may tell that they are there
            if built and not (is_state(old) and is_state(new)) and next(tensors_in((old, new)), None) is None:
                continue
            if name in held:
                own[name] = old
            else:
                del own[name]
    for table, old in parameters:
        for name, parameter in old.items():
            # FSDP exchanges whole and sharded ones, whose classes differ, and knows which are there
            if name in table and table[name] is not parameter and type(table[name]) is type(parameter):
                table[name] = parameter
    for value, old in filled:
        if are_others(value, old) and all(map(holds_state, exchanged(value, old))):
            value.clear()
            value.update(old) if isinstance(value, dict | set) else value.extend(old)
    for each in tensors:
        each.put_back()


def holds_state(entry: Any) -> bool:
    """Whether an entry of a container may be put back with it."""
    return isinstance(entry, ATOMS) or is_state(entry)


def exchanged(value: Any, old: Any) -> list[Any]:
    """The entries that are in one of two containers alone."""
    now, then = ({id(part): part for part in entries_in(each)} for each in (value, old))
    return [*(now[key] for key in now.keys() - then.keys()), *(then[key] for key in then.keys() - now.keys())]


def are_others(value: Any, old: Any) -> bool:
    """Whether a container holds other objects than it did."""
    if len(value) != len(old):
        return True
    if isinstance(value, set):
        return value != old
    if isinstance(value, dict):
        return any(each is not old.get(key, MISSING) for key, each in value.items())
    return any(map(is_not, value, old))


def differing_state(before: nn.Module, after: nn.Module) -> list[str]:
    """The parameters, buffers and attributes in which two copies of a network differ, as `is_changed` compares them.

    >>> layer = nn.Linear(2, 2)
    >>> layer.calls = 0
    >>> copied = copy_module(layer)
    >>> copied.calls += 1
    >>> differing_state(layer, copied)
    ['calls']
    """
    others, found, seen = dict(after.named_modules()), list[str](), dict[tuple[int, int], Any]()
    for path, module in before.named_modules():
        old, new = entries_by_name(module), entries_by_name(others.get(path, module))
        for name in dict.fromkeys((*old, *new)):
            pair = old.get(name), new.get(name)
            if not all(isinstance(each, nn.Module) for each in pair) and is_changed(*pair, seen):
                found.append(f"{path}.{name}" if path else name)
    return found


def is_changed(old: Any, new: Any, seen: dict[tuple[int, int], Any] | None = None) -> bool:
    """Whether a value or what it holds, in containers, objects and modules, differs from that of a copy: tensors,
    numbers, flags and texts, and what has become or was None. NaN for NaN is no difference, and functions and classes
    have no state.

    Args:
        old: a value.
        new: a copy of it, or what has become of that.
        seen: pairs of objects that were compared already, by their ids, which are theirs as long as they are kept;
            these are added.

    >>> is_changed({"calls": [1, torch.zeros(2)]}, {"calls": [1, torch.ones(2)]})
    True
    """
    left, seen = [(old, new)], dict[tuple[int, int], Any]() if seen is None else seen
    while left:
        old, new = left.pop()
        if old is new or isinstance(old, STATELESS) or isinstance(new, STATELESS):
            continue
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            if are_different(old, new):
                return True
        elif type(old) is not type(new):
            return True
        elif isinstance(old, ATOMS):
            if old != new and (old == old or new == new):
                return True
        elif (id(old), id(new)) not in seen:
            seen[id(old), id(new)] = old, new
            before, after = entries_by_name(old), entries_by_name(new)
            left += [(before.get(name), after.get(name)) for name in dict.fromkeys((*before, *after))]
    return False


def are_different(old: Tensor, new: Tensor) -> bool:
    """Whether two tensors have another form or, if they are dense or nested, other values; NaN is as NaN."""
    about = [(each.device, each.dtype, each.layout, each.is_nested) for each in (old, new)]
    if about[0] != about[1]:
        return True
    if old.is_nested:  # such a tensor may have no shape
        parts = old.unbind(), new.unbind()
        return len(parts[0]) != len(parts[1]) or any(map(are_different, *parts))
    if old.shape != new.shape:
        return True
    if old.layout is not torch.strided or old.is_meta or torch.equal(old, new):
        return False
    if not old.is_floating_point() and not old.is_complex():
        return True
    return not bool(((old == new) | (old.isnan() & new.isnan())).all())


def entries_by_name(value: Any) -> dict[Any, Any]:
    """What a module, a container or an object holds, by names that are equal in a copy: in place of a key that is an
    object its position. Of a set, whose order no copy keeps, it is the size, of an array the bytes or the
    objects.
    """
    if isinstance(value, nn.Module):
        return {**value._parameters, **value._buffers, **value._modules, **held_by(value)}
    if isinstance(value, set | frozenset):
        return {"size": len(value)}
    if isinstance(value, array | bytearray):
        return {"bytes": bytes(value)}
    if (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return dict(enumerate(value.ravel().tolist())) if value.dtype.hasobject else {"bytes": value.tobytes()}
    parts = enumerate(enumerate(value) if isinstance(value, deque) else parts_of(value))
    return {name if isinstance(name, ATOMS) else (place,): part for place, (name, part) in parts}


def held_by(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module beside those of every module."""
    return {name: value for name, value in module.__dict__.items() if name not in STANDARD}
