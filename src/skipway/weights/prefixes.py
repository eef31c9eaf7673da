"""Prefixes that wrappers put before the names of parameters: `module.`, `_orig_mod.`, `model.` and any other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from skipway.errors import CheckpointError, spell
from skipway.tracing import unwrap
from skipway.tracing.watch import address

__all__ = ["EXTRA", "INSERTED", "names_of_same", "own_name", "own_state", "strip_prefixes"]

INSERTED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Path segments that torch.compile, FSDP and activation checkpointing insert; no module of a network is called so."""
WRAPPERS = INSERTED | {"module"}
"""Path segments that DataParallel, torch.compile, FSDP and activation checkpointing insert, anywhere in a path."""
EXTRA = "_extra_state"
"""Name in a state dict of what a module's `get_extra_state` returns."""
COUNTERS = frozenset({"n_averaged"})
"""Buffers of wrappers that are no weights: `torch.optim.swa_utils.AveragedModel` counts its updates."""


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network, which may be wrapped or have wrapped parts, under the names that it has without."""
    return {own_name(key): tensor for key, tensor in unwrap(model).state_dict().items()}


def own_name(key: str) -> str:
    """A name without the segments that only wrappers insert.

    >>> own_name("blocks.0._orig_mod.weight")
    'blocks.0.weight'
    """
    return without_segments(key, INSERTED)


def names_of_same(own: Mapping[str, Tensor], owners: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The names of each parameter or buffer, by each of them, that one first: a tied head has two. Extra state has
    those of its module, since two modules may return one tensor and keep what is loaded each for itself.
    """
    groups: dict[object, list[str]] = {}
    for key, tensor in own.items():
        same = owners.get(key, address(tensor) if type(tensor) is Tensor else id(tensor))
        groups.setdefault(same, []).append(key)
    return {key: [key, *(each for each in group if each != key)] for group in groups.values() for key in group}


def strip_prefixes(state: Mapping[str, Tensor], expected: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict without the prefixes of wrappers, and a remark if any was dropped.

    A name that is expected stays. Of any other, segments that only wrappers insert are dropped, then `module.` and
    leading segments until the rest is expected; whatever stood before expected names is a prefix, and is dropped from
    the file's other names, too. So no list of prefixes is needed, and none is dropped unless most names of the file
    become expected ones by it: a stray name in a file that fits stays a stray name.

    Args:
        state: names as the file has them.
        expected: all names that the model could take.

    Raises:
        CheckpointError: two prefixes lead to the same parameters, such as those of a student and a teacher.

    >>> state, remarks = strip_prefixes({"module.backbone.fc.weight": Tensor(), "module.head": Tensor()}, {"fc.weight"})
    >>> list(state), remarks
    (['fc.weight', 'head'], ["the prefixes 'module.', 'backbone.' were dropped from 2 of 2 names"])
    """
    state = {key: tensor for key, tensor in state.items() if key not in COUNTERS or key in expected}
    strange = [key for key in state if key not in expected]
    names = {key: key for key in state}
    names.update((key, without_segments(key, INSERTED)) for key in strange)
    unwrapped = {key: without_segments(key, WRAPPERS) for key in strange}
    prefixes = Counter(prefix for name in unwrapped.values() if (prefix := prefix_of(name, expected)) is not None)
    dropped = WRAPPERS
    if sum(prefixes.values()) < len(state) / 2:  # most names are right as they are, or wrong altogether
        prefixes.clear()
        dropped = INSERTED
    longest_first = sorted(prefixes, key=len, reverse=True)
    for key, name in unwrapped.items() if prefixes else ():
        names[key] = name.removeprefix(next((each for each in longest_first if name.startswith(each)), ""))
    twins = [name for name, count in Counter(names.values()).items() if count > 1]
    if twins and len(prefixes) > 2:  # the parts of a network, each of which would fit
        return state, []
    if twins:
        keys = [key for key, name in names.items() if name == twins[0]]
        prefix = keys[0].removesuffix(twins[0]).rstrip(".")
        raise CheckpointError(
            f"{' and '.join(map(repr, keys))} both lead to {twins[0]!r}: the file holds two sets of weights. Take "
            f"those of one prefix: {spell('entry', prefix)}"
        )
    parts = [f"{part}." for part in sorted(dropped) if any(part in key.split(".") for key in strange)]
    listed = ", ".join(map(repr, [*parts, *filter(None, prefixes)]))
    changed = sum(key != name for key, name in names.items())
    form = "prefixes {} were" if "," in listed else "prefix {} was"
    remark = f"the {form.format(listed)} dropped from {changed} of {len(state)} names"
    return {names[key]: tensor for key, tensor in state.items()}, [remark] if changed else []


def without_segments(key: str, segments: Collection[str]) -> str:
    """A name without the given segments of its path."""
    return ".".join(part for part in key.split(".") if part not in segments) or key


def prefix_of(name: str, expected: Collection[str]) -> str | None:
    """The leading segments of a name without which it is expected; None if it never is."""
    parts = name.split(".")
    cut = next((at for at in range(len(parts)) if ".".join(parts[at:]) in expected), None)
    return None if cut is None else ".".join((*parts[:cut], ""))
