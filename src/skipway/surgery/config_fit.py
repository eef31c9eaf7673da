"""Configs that a network is built from again after blocks were put in or taken out.

Which entries of a config count the blocks of a container, list one value for each of them, or say where a kind of
blocks begins is not read from their names: a network is built on the meta device from a changed config, and has to have
the keys and shapes of the changed network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.surgery.class_factory import own_class
from skipway.surgery.operation import abbreviate
from skipway.surgery.transaction import Transaction
from skipway.tracing.containers import ATOMS
from skipway.tracing.paths import parents

__all__ = ["SAVING", "ConfigPlan", "config_plans", "fit_configs", "has_config"]

ConfigPath = tuple[str | int, ...]
Values = dict[ConfigPath, Any]
Key = tuple[str, str]
Structure = dict[Key, Any]

MOST_COUNTS = 3
"""Numbers of a config that are changed together at most where each alone is refused."""
MOST_BUILDS = 200
"""Networks that are built in the search for further entries."""
CLASS, WEIGHT = "its class", "its weight"
"""Entries of a structure that are no attributes: the class of a module, and in the place of its path, of a weight."""


def has_config(model: nn.Module) -> bool:
    """Whether a network or a part of it keeps a config that it may be built from again."""
    return any(is_config(vars(module).get("config")) for module in model.modules())


def is_config(value: Any) -> bool:
    """Whether a value is an object with attributes that is neither a module nor a function."""
    return hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type) and not callable(value)


def config_plans(model: nn.Module, path: str, blocks: int) -> list[ConfigPlan]:
    """A plan for each module around a container of so many blocks that keeps a config of its own, outermost first:
    those whose config is none that a module around them keeps.

    Raises:
        SkipwayError: there is no config, or a module is not built again from its config as it is.
    """
    found: list[ConfigPlan] = []
    known: set[int] = set()
    for name in ("", *reversed([*parents(path)])):
        module = model.get_submodule(name)
        config = vars(module).get("config")
        if is_config(config) and id(config) not in known:
            known |= {id(config), *(id(value) for _, value in config_entries(config))}
            found.append(ConfigPlan.of(module, path[len(name) + bool(name) :], blocks))
    if not found:
        raise SkipwayError("the network has no config")
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


def options(value: Any, order: Sequence[int], blocks: int) -> Iterator[Any]:
    """What an entry may become: how many blocks there are, or there are before a border, or the number of the last
    before one; a list of numbers of blocks; a string with a letter for each.

    >>> [list(options(value, [0, 1, 1, 2], 3)) for value in (2, [0, 2], "M*-")]
    [[3], [[0, 3]], ['M**-']]
    """
    if type(value) is int and 0 <= value <= blocks:
        places = sum(place < value for place in order), sum(place <= value for place in order) - 1
        yield from dict.fromkeys(place for place in places if 0 <= place != value)
    elif isinstance(value, list | tuple) and value and all(type(item) is int and item >= 0 for item in value):
        later = [item - blocks + len(order) for item in value if item >= blocks]
        yield type(value)([*(number for number, place in enumerate(order) if place in value), *later])
    elif isinstance(value, str) and len(value) == blocks:
        yield "".join(value[place] for place in order)


def built_structure(module: nn.Module, config: Any) -> Structure:
    """The structure of a network of the module's class that is built from a config."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return structure_of(own_class(module)(config))


def structure_of(module: nn.Module) -> Structure:
    """What makes two networks with the same weights the same: the shapes of the weights, and of each module its class
    and its numbers and names.
    """
    found: Structure = {(WEIGHT, key): tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    for path, part in module.named_modules():
        found[path, CLASS] = own_class(part)
        for name, value in vars(part).items():
            if isinstance(value, ATOMS) and not name.startswith("_"):
                found[path, name] = value
    return found


def mismatch(one: Structure, other: Structure) -> set[Key]:
    """Weights and attributes that differ."""
    absent = object()
    return {key for key in one.keys() | other.keys() if one.get(key, absent) != other.get(key, absent)}


def read_again(config: Any) -> Any:
    """The config after it was written down and read again, or a copy."""
    if hasattr(config, "to_dict") and hasattr(type(config), "from_dict"):
        return type(config).from_dict(config.to_dict())
    return copy.deepcopy(config)


@dataclass(frozen=True)
class ConfigChange:
    """A changed copy of a config.

    Args:
        module: that keeps the config.
        copies: of the config and of every object in it, by their identities.
        entries: what was changed, by its name, in words.
        built: what is built from it.
        differs: weights and attributes that are others there than in the changed network.
    """

    module: nn.Module
    copies: dict[int, Any]
    entries: dict[str, str]
    built: Structure
    differs: frozenset[Key]

    @property
    def keeps_weights(self) -> bool:
        """Whether what is built has the classes and weights of the network, but for some that were inserted."""
        return not any(path == WEIGHT or name == CLASS for path, name in self.differs & self.built.keys())

    def adopt(self, change: Transaction, kinds: tuple[type, ...]) -> set[Key]:
        """Give the network that is there the attributes of these kinds that are built, in place; returns the others
        that are built, and weights that are not.
        """
        left = {key for key in self.differs if key in self.built or key[0] == WEIGHT}
        for path, name in left & self.built.keys():
            module, value = self.module.get_submodule(path), self.built[path, name]
            if type(value) in kinds and type(vars(module).get(name)) is type(value):
                change.set_attribute(module, name, value)
                left.discard((path, name))
        return left


@dataclass(frozen=True)
class ConfigPlan:
    """What in a config may count the blocks of a container.

    Args:
        module: that keeps the config.
        container: path of the blocks in it.
        blocks: how many there were before.
        counts: numbers equal to the number of blocks.
        lists: with one entry for each block; those that were read by the number of a block when the network was built,
            and all of them.
        ignored: names of attributes that differed from those of a network that is built now: rates that were set, for
            example.
    """

    module: nn.Module
    container: str
    blocks: int
    counts: list[ConfigPath]
    lists: list[list[ConfigPath]]
    ignored: set[str]

    @classmethod
    def of(cls, module: nn.Module, container: str, blocks: int) -> ConfigPlan:
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
                set_entry(watched, path, reading_list(partial(reads.add, path))(dict(entries)[path]))
            ignored = {name for _, name in mismatch(built_structure(module, watched), structure_of(module))}
        except Exception as failure:  # a class of somebody's may want more than a config
            raise SkipwayError(f"a {type(module).__name__} is not built from its config alone: {failure}") from failure
        if ignored & module.state_dict().keys():
            raise SkipwayError(f"a {type(module).__name__} that is built from its config has other weights already")
        read = [path for path in lists if path in reads]
        return cls(module, container, blocks, counts, [read] if read == lists else [read, lists], ignored)

    def attempt(self, values: Values) -> ConfigChange | None:
        """The config with other values, and what is built from it; None if that is refused."""
        config, memo = vars(self.module)["config"], dict[int, Any]()
        changed, entries = copy.deepcopy(config, memo), dict(config_entries(config))
        with suppress(Exception):  # a config that is refused, or a class that is not built from it
            for path, value in values.items():
                set_entry(changed, path, value)
            built = built_structure(self.module, read_again(changed))
            differs = {key for key in mismatch(built, structure_of(self.module)) if key[1] not in self.ignored}
            memo |= {id(entries[path]): value for path, value in values.items() if isinstance(value, list)}
            words = {entry_name(path): f"{entries[path]} → {value}" for path, value in values.items()}
            return ConfigChange(self.module, memo, words, built, frozenset(differs))
        return None

    def starts(self, order: Sequence[int], size: int) -> Iterator[tuple[Values, ConfigChange]]:
        """Changes of so many counts, and of lists beside them or anywhere, that are not refused."""
        entries = dict(config_entries(vars(self.module)["config"]))
        for counts in combinations(self.counts, size):
            around = {path[:-1] for path in counts}
            beside = [[path for path in lists if path[:-1] in around] for lists in self.lists]
            tried: list[Values] = []
            for lists in (*beside, *self.lists, []):
                values = {path: type(entries[path])([entries[path][place] for place in order]) for path in lists}
                chosen = dict.fromkeys(counts, len(order)) | values
                if chosen not in tried and (found := self.attempt(chosen)) is not None:
                    yield chosen, found
                tried.append(chosen)

    def changes(self, order: Sequence[int]) -> Iterator[list[ConfigChange]]:
        """Lists of changes with which the network that is there is built, of few counts first and growing, and at last
        the closest one: borders and lists of numbers are changed for as long as each brings it closer.
        """
        found: list[tuple[Values, ConfigChange]] = []
        for size in (1, 0, *range(2, MOST_COUNTS + 1)):
            found += self.starts(order, size)
            exact = [each for _, each in found if not each.differs]
            if found and not exact:
                break
            yield exact
        if found:
            values, closest = min(found, key=lambda pair: self.distance(pair[1]))
            yield [*exact, self.come_closer(values, closest, order)]

    def distance(self, found: ConfigChange) -> tuple[int, int]:
        """In how many blocks, and weights and attributes, what is built differs from the network that is there."""
        kinds = [path for path, name in found.differs if name == CLASS]
        return sum(path.rpartition(".")[0] == self.container for path in kinds), len(found.differs)

    def come_closer(self, values: Values, closest: ConfigChange, order: Sequence[int]) -> ConfigChange:
        """Change further entries, one at a time, while what is built becomes more like the network."""
        entries = [pair for pair in config_entries(vars(self.module)["config"]) if not isinstance(pair[0][-1], int)]
        tries, before = 0, None
        while closest.differs and before is not closest and tries < MOST_BUILDS:
            before = closest
            start = values
            for path, value in entries:
                settled = path in values and not isinstance(value, list | tuple)  # a list may be one of places instead
                for option in () if settled else options(value, order, self.blocks):
                    tries += 1
                    found = self.attempt({**start, path: option})
                    if found is not None and self.distance(found) < self.distance(closest):
                        closest, values = found, {**start, path: option}
        return closest


def reading_list(note: Callable[[], None]) -> type[list[Any]]:
    """A list that notes that one of its entries was read by its number."""

    class ReadList(list[Any]):
        def __getitem__(self, key: Any) -> Any:
            if isinstance(key, int):
                note()
            return super().__getitem__(key)

    return ReadList


def fit_configs(
    change: Transaction, plans: Sequence[ConfigPlan], order: Sequence[int], accept: Callable[[], object]
) -> None:
    """Let the modules keep configs that count the blocks that are there now, in place.

    Attributes that are built otherwise become what is built where the network computes the same with them (numbers
    derived from the number of a block); what cannot be built is said in `change.refused`.

    Args:
        change: the transaction; `touched` holds the entries that changed.
        plans: for the configs.
        order: places of the blocks that are there now among those before.
        accept: raises if the network does not compute what it has to.

    Raises:
        SkipwayError: no choice of entries gives the network that is there now, or it does not compute that with them.
    """
    problem: Exception | None = None
    closest: list[ConfigChange] = []
    for changes in combined([plan.changes(order) for plan in plans]):
        closest = changes
        if not all(each.keeps_weights for each in changes):
            continue
        for kinds in (*ADOPTED, ()) if any(each.differs for each in changes) else ((),):
            try:
                with change.savepoint():
                    left: set[Key] = set()
                    for each in changes:
                        keep_config(change, each.copies)
                        left |= each.adopt(change, kinds)
                    accept()
            except Exception as failure:  # a network that does not run with this choice
                problem = failure
                continue
            for each in changes:
                change.touched.update(each.entries)
            if left:
                change.refused["config"] = f"the network that is built from it {without(left)}; {SAVING}"
            return
    kinds_of = ", ".join(type(plan.module).__name__ for plan in plans)
    reason = f": {type(problem).__name__}: {problem}" if problem else ""
    differs = {key for each in closest for key in each.differs}
    reason = reason or (f", and the closest differs in {names_of(differs)}" if differs else "")
    raise SkipwayError(f"no entry of the config of {kinds_of} counts these blocks alone{reason}")


def combined(growing: Sequence[Iterator[list[ConfigChange]]]) -> Iterator[list[ConfigChange]]:
    """Every choice of one change from each of several growing lists, once."""
    lists: list[list[ConfigChange]] = [[] for _ in growing]
    seen: set[tuple[int, ...]] = set()
    for grown in zip_longest(*growing):
        lists = [old if new is None else new for old, new in zip(lists, grown, strict=True)]
        for changes in product(*lists):
            if (key := tuple(map(id, changes))) not in seen:
                seen.add(key)
                yield list(changes)


ADOPTED: tuple[tuple[type, ...], ...] = ((int, float, str, bool, type(None)), (int,))
"""Kinds of attributes that a network may take from the one that is built; fewer if it computes otherwise with them."""
SAVING = (
    "save the network itself (torch.save(model, …)), or the state dict, to be loaded into a network on which the same "
    "blocks were changed, not into one built from the config"
)
"""How a network is saved that its config does not describe."""


def without(left: set[Key]) -> str:
    """What a network that is built lacks, and computes with other values of, in words."""
    lacks, others = {key for key in left if key[0] == WEIGHT}, {key for key in left if key[0] != WEIGHT}
    words = [f"lacks {names_of(lacks)}"] * bool(lacks)
    return " and ".join(words + [f"computes with other values of {names_of(others)}"] * bool(others))


def names_of(keys: set[Key]) -> str:
    """Weights and attributes in words."""
    return abbreviate(sorted(name if path in ("", WEIGHT) else f"{path}.{name}" for path, name in keys))


def entry_name(path: ConfigPath) -> str:
    """An entry of a config as Python writes it."""
    return "config" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)


def keep_config(change: Transaction, copies: Mapping[int, Any]) -> None:
    """Let all modules keep the changed copy of a config in the place of the config, and those of its lists that they
    keep themselves, in place.
    """
    for module in change.model.modules():
        for name, value in list(vars(module).items()):
            if (is_config(value) or isinstance(value, list)) and id(value) in copies:
                change.set_attribute(module, name, copies[id(value)])
