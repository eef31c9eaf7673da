"""Containers of blocks that a network's config counts: blocks are put in and taken out, and numbers and config follow.

Networks that are built from a config (transformers' `num_hidden_layers`, nanoGPT's `n_layer`) are saved as weights and
config, and built again from both; see `config_fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import nn

from skipway.errors import SkipwayError
from skipway.surgery.block_call import has_module
from skipway.surgery.config_fit import config_plans, fit_configs
from skipway.surgery.transaction import Transaction

__all__ = ["edit_container", "number_blocks", "numbered_attributes"]

Numbers = list[tuple[str, str, int]]


def edit_container(
    change: Transaction,
    path: str,
    order: Sequence[int],
    accept: Callable[[], object],
    copies: Mapping[int, nn.Module] = MappingProxyType({}),
) -> None:
    """Put blocks into a container or take some out, renumber what numbers them, and keep the config in agreement, in
    place.

    Args:
        change: the transaction; `touched` holds the entries of the config that changed, `refused` what the config
            cannot say.
        path: of the container in the model.
        order: places in the container of the blocks that are there afterwards; one that stands there again is its copy.
        accept: raises if the network does not compute what it has to.
        copies: of blocks, by their places.

    Raises:
        SkipwayError: the network is not built from a config that counts the blocks.
    """
    container = change.model.get_submodule(path)
    if type(container) not in (nn.ModuleList, nn.Sequential):
        raise SkipwayError(f"{path} is no list of blocks")
    before = list(container.children())
    plans = config_plans(change.model, path, len(before))
    again = [place in order[:number] for number, place in enumerate(order)]
    after = [copies[place] if twice else before[place] for place, twice in zip(order, again, strict=True)]
    numbers = numbered_attributes(before)
    change.set_modules(container, {str(number): block for number, block in enumerate(after)})
    number_blocks(change, after, numbers)
    fit_configs(change, plans, order, accept)


def numbered_attributes(row: Sequence[nn.Module]) -> Numbers:
    """Attributes that number the blocks of a row, such as `self_attn.layer_idx`: the path of a module in the blocks,
    the attribute's name and the number of the first block.

    An attribute counts up at one path, or at all paths where it is: blocks of unlike kinds (attention and state spaces)
    hold their number in different parts.

    >>> class Block(nn.Module):
    ...     def __init__(self, kind, number):
    ...         super().__init__()
    ...         self.add_module(kind, nn.Identity())
    ...         self.get_submodule(kind).layer_idx = number
    >>> numbered_attributes([Block("attention", 0), Block("mamba", 1), Block("attention", 2)])
    [('attention', 'layer_idx', 0), ('mamba', 'layer_idx', 0)]
    """
    values: dict[str, dict[str, dict[int, int]]] = {}
    for number, block in enumerate(row):
        for path, module in block.named_modules():
            for attribute, value in vars(module).items():
                if type(value) is int:
                    values.setdefault(attribute, {}).setdefault(path, {})[number] = value - number
    found: Numbers = []
    for attribute, paths in values.items():
        everywhere = {first for firsts in paths.values() for first in firsts.values()}
        covered = {number for firsts in paths.values() for number in firsts}
        for path, firsts in paths.items():
            counts_up = len(firsts) == len(row) and len(set(firsts.values())) == 1
            if len(row) > 1 and (counts_up or (len(everywhere) == 1 and len(covered) == len(row))):
                found.append((path, attribute, next(iter(firsts.values()))))
    return found


def number_blocks(change: Transaction, blocks: Sequence[nn.Module], numbers: Numbers, start: int = 0) -> None:
    """Number blocks in their order by the attributes that `numbered_attributes` found, the first of them as the block
    at place `start`, in place.
    """
    for number, block in enumerate(blocks, start):
        for path, attribute, first in numbers:
            if has_module(block, path) and attribute in vars(block.get_submodule(path)):
                change.set_attribute(block.get_submodule(path), attribute, first + number)
