"""Containers of blocks that a network's config counts: blocks are put in and taken out, and the config keeps fitting.

Networks that are built from a config (transformers' `num_hidden_layers`, nanoGPT's `n_layer`) are saved as weights and
config, and built again from both. Which numbers of a config count the blocks of a container is not read from their
names: a network is built on the meta device from a changed config, and has to have the keys and shapes of the changed
network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.surgery.block_call import has_module
from skipway.surgery.class_factory import own_class
from skipway.surgery.transaction import Transaction
from skipway.tracing.containers import ATOMS
from skipway.tracing.paths import parents

__all__ = ["edit_container", "has_config", "number_blocks", "numbered_attributes"]

ConfigPath = tuple[str | int, ...]
Structure = dict[tuple[str, str], Any]

MOST_COUNTS = 3
"""Numbers of a config that are changed together at most."""


def edit_container(
    change: Transaction, path: str, order: Sequence[int], copies: Mapping[int, nn.Module] = MappingProxyType({})
) -> None:
    """Put blocks into a container or take some out, renumber what numbers them, and keep the config in agreement, in
    place.

    Args:
        change: the transaction; `touched` holds the entries of the config that changed.
        path: of the container in the model.
        order: places in the container of the blocks that are there afterwards; one that stands there again is its copy.
        copies: of blocks, by their places.

    Raises:
        SkipwayError: the network is not built from a config that counts the blocks.
    """
    container = change.model.get_submodule(path)
    if type(container) not in (nn.ModuleList, nn.Sequential):
        raise SkipwayError(f"{path} is no list of blocks")
    before = list(container.children())
    holders = config_holders(change.model, path)
    if not holders:
        raise SkipwayError("the network has no config")
    plans = [ConfigPlan.of(module, len(before)) for module in holders]
    again = [place in order[:number] for number, place in enumerate(order)]
    after = [copies[place] if twice else before[place] for place, twice in zip(order, again, strict=True)]
    numbers = numbered_attributes(before)
    change.record(partial(refill, container._modules, dict(container._modules)))
    refill(container._modules, {str(number): block for number, block in enumerate(after)})
    number_blocks(change, after, numbers)
    fit_configs(change, plans, order)


def refill(table: dict[str, Any], entries: dict[str, Any]) -> None:
    """Let a table hold these entries, in this order."""
    table.clear()
    table.update(entries)


def numbered_attributes(row: Sequence[nn.Module]) -> list[tuple[str, str, int]]:
    """Attributes that number the blocks of a row, such as `self_attn.layer_idx`: the path of a module in each block,
    the attribute's name and its value in the first block.
    """
    found = []
    for path, module in row[0].named_modules() if len(row) > 1 else ():
        others = [block.get_submodule(path) for block in row if has_module(block, path)]
        for attribute, first in vars(module).items():
            values = [vars(other).get(attribute) for other in others]
            if type(first) is int and values == list(range(first, first + len(row))):
                found.append((path, attribute, first))
    return found


def number_blocks(change: Transaction, blocks: Sequence[nn.Module], numbers: Sequence[tuple[str, str, int]]) -> None:
    """Number blocks in their order by the attributes that `numbered_attributes` found, in place."""
    for number, block in enumerate(blocks):
        for path, attribute, first in numbers:
            change.set_attribute(block.get_submodule(path), attribute, first + number)


def has_config(model: nn.Module) -> bool:
    """Whether a network or a part of it keeps a config that it may be built from again."""
    return any(is_config(vars(module).get("config")) for module in model.modules())


def is_config(value: Any) -> bool:
    """Whether a value is an object with attributes that is neither a module nor a function."""
    return hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type) and not callable(value)


def config_holders(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules around a container that keep a config of their own, outermost first: those whose config is none that
    a module around them keeps.
    """
    found: list[nn.Module] = []
    known: set[int] = set()
    for name in ("", *reversed([*parents(path)])):
        module = model.get_submodule(name)
        config = vars(module).get("config")
        if is_config(config) and id(config) not in known:
            known |= {id(config), *(id(value) for _, value in config_entries(config))}
            found.append(module)
    return found


def config_entries(config: Any, depth: int = 2) -> Iterator[tuple[ConfigPath, Any]]:
    """The entries of a config, of the configs in it and of its lists, with their paths."""
    for name, value in vars(config).items():
        yield (name,), value
        if isinstance(value, list | tuple):
            yield from (((name, number), item) for number, item in enumerate(value) if type(item) is int)
        elif depth and is_config(value):
            yield from (((name, *path), item) for path, item in config_entries(value, depth - 1))


def set_entry(config: Any, path: ConfigPath, value: Any) -> None:
    """Set an entry of a config, frozen ones too."""
    *around, last = path
    holder = config
    for key in around if not isinstance(last, int) else around[:-1]:
        holder = vars(holder)[key]
    if isinstance(last, int):
        old = vars(holder)[around[-1]]
        value, last = type(old)([*old[:last], value, *old[last + 1 :]]), around[-1]
    vars(holder)[last] = value


def built_structure(module: nn.Module, config: Any) -> Structure:
    """The structure of a network of the module's class that is built from a config."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return structure_of(own_class(module)(config))


def structure_of(module: nn.Module) -> Structure:
    """What makes two networks with the same weights the same: the shapes of the weights, and of each module its class
    and its numbers and names.
    """
    found: Structure = {("", key): tuple(tensor.shape) for key, tensor in module.state_dict().items() if key}
    for path, part in module.named_modules():
        found[path, "its class"] = own_class(part)
        for name, value in vars(part).items():
            if isinstance(value, ATOMS) and not name.startswith("_"):
                found[path, name] = value
    return found


def mismatch(one: Structure, other: Structure) -> set[str]:
    """Names of weights and attributes that differ."""
    absent = object()
    return {key[1] for key in one.keys() | other.keys() if one.get(key, absent) != other.get(key, absent)}


def read_again(config: Any) -> Any:
    """The config after it was written down and read again, or a copy."""
    if hasattr(config, "to_dict") and hasattr(type(config), "from_dict"):
        return type(config).from_dict(config.to_dict())
    return copy.deepcopy(config)


@dataclass
class ConfigPlan:
    """What in a config may count the blocks of a container.

    Args:
        module: that keeps the config.
        counts: numbers equal to the number of blocks.
        lists: with one entry for each block, which were read by the number of a block when the network was built.
        ignored: attributes that differed from those of a network that is built now: rates that were set, for example.
    """

    module: nn.Module
    counts: list[ConfigPath]
    lists: list[ConfigPath]
    ignored: set[str]

    @classmethod
    def of(cls, module: nn.Module, blocks: int) -> ConfigPlan:
        """The plan for a module before anything is changed.

        Raises:
            SkipwayError: the module is not built again from its config as it is.
        """
        config = vars(module)["config"]
        entries = list(config_entries(config))
        counts = [path for path, value in entries if type(value) is int and value == blocks]
        lists = [path for path, value in entries if isinstance(value, list | tuple) and len(value) == blocks]
        reads: set[ConfigPath] = set()
        try:
            watched = read_again(config)
            for path in lists:
                set_entry(watched, path, reading_list(partial(reads.add, path))(dict(config_entries(config))[path]))
            ignored = mismatch(built_structure(module, watched), structure_of(module))
        except Exception as failure:  # a class of somebody's may want more than a config
            raise SkipwayError(f"a {type(module).__name__} is not built from its config alone: {failure}") from failure
        if ignored & module.state_dict().keys():
            raise SkipwayError(f"a {type(module).__name__} that is built from its config has other weights already")
        return cls(module, counts, [path for path in lists if path in reads], ignored)


def reading_list(note: Callable[[], None]) -> type[list[Any]]:
    """A list that notes that one of its entries was read by its number."""

    class ReadList(list[Any]):
        def __getitem__(self, key: Any) -> Any:
            if isinstance(key, int):
                note()
            return super().__getitem__(key)

    return ReadList


@dataclass
class ConfigChange:
    """A changed copy of a config.

    Args:
        copies: of the config and of every object in it, by their identities.
        entries: what was changed, by its name, in words.
    """

    copies: dict[int, Any]
    entries: dict[str, str]


def fit_configs(change: Transaction, plans: Sequence[ConfigPlan], order: Sequence[int]) -> None:
    """Let the modules keep configs that count the blocks that are there now, in place.

    Raises:
        SkipwayError: no choice of entries gives the network that is there now, or it does not run with them.
    """
    problem: Exception | None = None
    for size in range(1, MOST_COUNTS + 1):
        options = [list(fitting_changes(plan, order, size)) for plan in plans]
        for changes in product(*options):
            try:
                with change.savepoint():
                    for each in changes:
                        keep_config(change, each.copies)
                    change.compare()
            except Exception as failure:  # a network that does not run with this choice
                problem = failure
                continue
            for each in changes:
                change.touched.update(each.entries)
            return
    kinds = ", ".join(type(plan.module).__name__ for plan in plans)
    reason = f": {type(problem).__name__}: {problem}" if problem else ""
    raise SkipwayError(f"no entry of the config of {kinds} counts these blocks alone{reason}")


def fitting_changes(plan: ConfigPlan, order: Sequence[int], size: int) -> Iterator[ConfigChange]:
    """Changes of at most `size` counts with which a network is built that has the keys of the one that is there."""
    config = vars(plan.module)["config"]
    structure, entries = structure_of(plan.module), dict(config_entries(config))
    for counts in (chosen for number in range(1, size + 1) for chosen in combinations(plan.counts, number)):
        memo: dict[int, Any] = {}
        changed = copy.deepcopy(config, memo)
        for path in plan.lists:
            set_entry(changed, path, type(entries[path])([entries[path][place] for place in order]))
        for path in counts:
            set_entry(changed, path, len(order))
        after = dict(config_entries(changed))
        with suppress(Exception):  # a config that is refused, or a class that is not built from it
            if mismatch(built_structure(plan.module, read_again(changed)), structure) <= plan.ignored:
                paths = [*counts, *plan.lists]
                yield ConfigChange(memo, {entry_name(path): f"{entries[path]} → {after[path]}" for path in paths})


def entry_name(path: ConfigPath) -> str:
    """An entry of a config as Python writes it."""
    return "config" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)


def keep_config(change: Transaction, copies: Mapping[int, Any]) -> None:
    """Let all modules keep the changed copy of a config in the place of the config, in place."""
    for module in change.model.modules():
        for name, value in list(vars(module).items()):
            if is_config(value) and id(value) in copies:
                change.set_attribute(module, name, copies[id(value)])
