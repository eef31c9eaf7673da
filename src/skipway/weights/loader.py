"""`load`: strict, with an account of every key; any difference to be allowed is the caller's explicit choice."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from skipway.errors import CheckpointError, SkipwayError, counted, printable, spell
from skipway.models import build
from skipway.tracing import unwrap
from skipway.weights.adapt import CHOICES, Change, Misfit, read_choices
from skipway.weights.container import cut, select_state_dict
from skipway.weights.extra_state import extra_state_owners, refuse_copies, write_state
from skipway.weights.files import read_weights
from skipway.weights.forms import describe_forms
from skipway.weights.keymap import KeyMap, equal_tensors
from skipway.weights.loading_hooks import after_loading, before_loading
from skipway.weights.prefixes import names_of_same, own_state, strip_prefixes
from skipway.weights.stored_config import refuse_other_config
from skipway.weights.tables import find_keymap, guess_architecture, known_libraries

__all__ = ["LoadReport", "Source", "load", "load_state", "match", "read_source"]

M = TypeVar("M", bound=nn.Module)
Source = str | Path | Mapping[str, Tensor]

SHOWN = 8
"""Rows of a part of the report that are printed."""


@dataclass(frozen=True)
class LoadReport:
    """Account of every key on both sides.

    Args:
        tensors: what fits: our key and the tensor for it, in our shape.
        matched: our keys that have the same name and shape in the file.
        renamed: our key → their names.
        reshaped: our key → both shapes, where only axes of length 1 differ.
        absent: ours that a file may lack (a BatchNorm's batch counter); they keep their value.
        missing: ours that the file lacks → the names it should have there.
        unexpected: their keys that match none of ours.
        misshapen: ours → both shapes.
        unequal: ours → another of our names for the same parameter (a tied head), of which the file has other values.
        doubled: ours → another of ours, which is another parameter and has the same name in the file.
        other: what tables of the file that need not be loaded show of another network, in words.
        near: one of `unexpected` → what comes closest to it.
        resampled: ours → both shapes, where `adapt` allowed to resample.
        fresh: ours that keep their value since `adapt` allowed that.
        left_out: theirs that are not loaded, since `adapt` allowed that or the library's class alone has them.
        used: the choices of `adapt` that allowed something.
        remarks: sentences about what was decided unasked: prefixes dropped, names without use left out.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    matched: list[str] = field(default_factory=list)
    renamed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reshaped: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    misshapen: dict[str, str] = field(default_factory=dict)
    unequal: dict[str, str] = field(default_factory=dict)
    doubled: dict[str, str] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)
    near: dict[str, str] = field(default_factory=dict)
    resampled: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """True if every key on both sides has its counterpart."""
        return not (self.missing or self.unexpected or self.misshapen or self.unequal or self.doubled or self.other)

    def differences(self) -> dict[str, list[str]]:
        """What was allowed to differ, and the names that it concerns."""
        parts = {"newly initialised": self.fresh, "resampled": list(self.resampled), "left out": self.left_out}
        return {title: keys for title, keys in parts.items() if keys}

    def __str__(self) -> str:
        missing = [f"{' + '.join(theirs)} (for {ours})" for ours, theirs in self.missing.items()]
        unexpected = [f"{key}{self.near.get(key, '')}" for key in self.unexpected]
        unequal = [f"{ours} ({other})" for ours, other in self.unequal.items()]
        doubled = [f"{ours} (as {other})" for ours, other in self.doubled.items()]
        lines = [f"{len(self.tensors)} keys fit ({len(self.renamed)} renamed, {len(self.reshaped)} reshaped)"]
        for title, rows in (
            ("missing from the file", missing),
            ("not known to the model", unexpected),
            ("of another shape", [f"{ours}: {both}" for ours, both in self.misshapen.items()]),
            ("unequal to another name of the same parameter (leave out one of the two)", unequal),
            ("of the same name in the file as another parameter, so its network is another one", doubled),
            ("shown by tables of the file, of another network (give build(…) the file's)", self.other),
            ("resampled", [f"{ours}: {both}" for ours, both in self.resampled.items()]),
            ("kept as they are in the model", self.fresh),
            ("of the file left out", self.left_out),
        ):
            lines += group(title, rows)
        return "\n".join(lines)

    def adapt(self, change: Change) -> None:
        """Enter what a choice allows."""
        for ours in change.fresh:
            self.missing.pop(ours, None)
            self.misshapen.pop(ours, None)
            self.fresh.append(ours)
        for ours, tensor in change.resampled.items():
            self.resampled[ours] = self.misshapen.pop(ours)
            self.tensors[ours] = tensor
        for theirs in change.left_out:
            self.unexpected.remove(theirs)
            self.left_out.append(theirs)


def group(title: str, rows: list[str]) -> list[str]:
    """A titled part of the report, cut."""
    if not rows:
        return []
    more = [f"  … and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    return [f"{len(rows)} {title}:", *(f"  {row}" for row in rows[:SHOWN]), *more]


@overload
def load(
    model: str,
    source: Source,
    *,
    names: str = ...,
    adapt: Iterable[str] = ...,
    entry: str | None = ...,
    remark: Callable[[str], None] = ...,
) -> nn.Module: ...


@overload
def load(
    model: M,
    source: Source,
    *,
    names: str = ...,
    adapt: Iterable[str] = ...,
    entry: str | None = ...,
    remark: Callable[[str], None] = ...,
) -> M: ...


def load(
    model: nn.Module | str,
    source: Source,
    *,
    names: str = "skipway",
    adapt: Iterable[str] = (),
    entry: str | None = None,
    remark: Callable[[str], None] = warnings.warn,
) -> nn.Module:
    """Load weights into `model` in place, strictly: every key on both sides has to fit, else nothing is changed.

    Prefixes of wrappers (`module.`, `_orig_mod.`, `model.`, any other) are dropped where the names fit without them.
    Extra state of modules (`get_extra_state`) that is a tensor, of any shape, goes through their `set_extra_state`, and
    hooks for loading (`register_load_state_dict_pre_hook`, `…_post_hook`) are called.
    Each difference that is to be allowed is one word of `adapt`; `match` tells the effect of each:

    | choice | what may differ | what happens |
    |---|---|---|
    | `"classes"` | the number of classes, or the file has no classifier | the model's classifier stays as it is |
    | `"size"` | the size of images, windows or texts that position tables are for | resampled, bicubic; of texts cut |
    | `"channels"` | the image channels of the first map | summed for one channel, else repeated at 3/C (as timm does) |
    | `"depth"` | the number of blocks | by their numbers: what the model lacks is left out, the rest stays |
    | `"unexpected"` | names in modules that the model lacks altogether (a loss, metrics) | they are left out |

    Args:
        model: a network or a block, also in DDP or `torch.compile`, or the name of a network, which is built first
            (`build(name)`).
        source: a file of weights of any suffix (safetensors, or written by `torch.save`), a folder in Hugging Face's
            layout (`model.safetensors`, its shards, or `pytorch_model.bin`), a name on its hub (`"hf:org/name"`), or a
            state dict.
        names: the naming scheme of the file: "skipway", or a library with a key map for the model ("torchvision",
            "timm", "huggingface").
        adapt: the differences to allow.
        entry: the state dict to take from a checkpoint that holds several, by default the averaged weights; or the
            prefix of names to take, where a file holds several sets under prefixes.
        remark: called with a sentence for each choice that was made unasked: the entry taken, prefixes dropped.

    Returns:
        the model.

    Raises:
        CheckpointError: a file that cannot be read safely, or keys that do not fit, each named, with the choice that
            would allow it; a loading hook that fails, or a module with a `_load_from_state_dict` of its own; or a
            module whose extra state is no tensor, or cannot be set, or whose
            `state_dict()` returns copies, so that there is nothing to write into.
        MissingExtraError: a name on the hub without huggingface_hub.

    >>> import skipway as sw
    >>> block = sw.BasicBlock(8, 8)
    >>> from skipway.weights import export_names
    >>> twin = sw.load(sw.BasicBlock(8, 8), export_names(block, "torchvision"), names="torchvision")
    >>> bool((twin.branch.conv1.weight == block.branch.conv1.weight).all())
    True
    >>> deeper = sw.load("resnet32", sw.build("resnet20", classes=7).state_dict(), adapt=("classes", "depth"))
    """
    if not isinstance(model, str | nn.Module):
        raise SkipwayError(f"model={model!r:.60}: the rule is a torch.nn.Module, or the name of a network")
    if not isinstance(source, str | os.PathLike | Mapping):
        hint = "; give its state_dict()" if isinstance(source, nn.Module) else ""
        raise SkipwayError(
            f"source={type(source).__name__}: the rule is a path, the name of a repository, or a state dict{hint}"
        )
    network = build(model) if isinstance(model, str) else model
    if not isinstance(source, Mapping):
        refuse_other_config(unwrap(network), source, names)
    load_state(network, read_source(source, entry, remark), names=names, adapt=adapt, remark=remark)
    return network


def load_state(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *,
    names: str = "skipway",
    adapt: Iterable[str] = (),
    classifiers: Iterable[str] = (),
    remark: Callable[[str], None] = warnings.warn,
) -> LoadReport:
    """Load a state dict into a network in place, as `load` does, and return the account of every key.

    Args:
        network: any module, wrapped or not.
        state: names and tensors.
        names: library that the names come from, see `load`; those of a network that is not ours are "skipway".
        adapt: differences to allow, see `load`.
        classifiers: paths of the classifiers of a network that is not ours, for `adapt=("classes",)`.
        remark: called with each choice that was made unasked.

    Raises:
        CheckpointError: as `load`; the network is unchanged.
    """
    network = unwrap(network)
    state, remarks = before_loading(network, state)
    report = match(network, state, names=names, adapt=adapt, classifiers=classifiers)
    report.remarks[:0] = remarks
    if not report.fits:
        raise CheckpointError(
            f"the weights do not fit this {type(network).__name__} ({spell('names', names)}):\n"
            + "\n".join([str(report), *misfit_hints(network, state, report, names, read_choices(adapt))])
        )
    own, owners = own_state(network), extra_state_owners(network)
    if (empty := next((key for key in report.tensors if own[key].is_meta), None)) is not None:
        raise CheckpointError(
            f"{empty} of this {type(network).__name__} is on the meta device, where there is no place for values; "
            'build the network on a device, or give it memory first: network.to_empty(device="cpu")'
        )
    bare = next((key for key, tensor in report.tensors.items() if tensor.is_meta), None)
    if bare is not None:
        raise CheckpointError(f"{bare}: a tensor without values (meta); the rule is dense tensors")
    # all are converted before the first is written
    ready = {
        key: tensor.detach().to(own[key].device, copy=True)
        if key in owners
        else tensor.to(own[key].device, own[key].dtype)
        for key, tensor in report.tensors.items()
    }
    places = {key: own[key] for key in ready}
    refuse_copies(places, own_state(network), owners)
    write_state(places, ready.items(), owners)
    after_loading(network)
    odd = [key for key, tensor in ready.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    if odd:
        report.remarks.append(f"values that are not finite, in {counted(len(odd), 'tensor')}: {cut(odd)}")
    for sentence in report.remarks:
        remark(sentence)
    return report


def misfit_hints(
    network: nn.Module, state: Mapping[str, Tensor], report: LoadReport, names: str, made: frozenset[str]
) -> list[str]:
    """Sentences about what is known of weights that do not fit, and ways out, each of which was tried."""
    known = [f"{sentence[:1].upper()}{sentence[1:]}." for sentence in report.remarks]
    forms = describe_forms(report.unexpected)
    if forms:  # leaving them out would leave out a part of the weights
        return [*known, *forms]
    libraries = [names, *(each for each in known_libraries(network) if each != names)]
    trials = {library: matched(network, state, library, CHOICES)[0] for library in libraries}
    fitting = [
        each for each, trial in trials.items() if trial.fits and 2 * len(trial.tensors) >= len(network.state_dict())
    ]
    if fitting:
        best = min(fitting, key=lambda each: len(trials[each].used))
        needed = [choice for choice in CHOICES if choice in made or choice in trials[best].used]
        ways = [spell("names", best)] if best != names else []
        ways += [spell("adapt", tuple(needed))] if set(needed) - made else []
        return [*known, f"All of it fits with {' and '.join(ways)}."]
    counts = {library: len(trial.tensors) for library, trial in trials.items()}
    best = max(libraries, key=lambda library: counts[library])
    if 2 * counts[best] >= len(network.state_dict()) and counts[best] > counts[names]:
        rest = str(match(network, state, names=best, adapt=CHOICES)).partition("\n")[2]
        return [*known, f"By {spell('names', best)} {counts[best]} keys fit; there would remain:", rest]
    guess = guess_architecture(state)
    if guess is not None and not isinstance(network, guess[0]):
        known.append(f"Its keys look like a {guess[0].__name__} of {guess[1]}.")
    return known


def read_source(source: Source, entry: str | None, remark: Callable[[str], None]) -> dict[str, Tensor]:
    """The state dict of a source."""
    if isinstance(source, Mapping):
        state, remarks = select_state_dict(source, "the mapping", entry) if source else ({}, [])
        for sentence in remarks:
            remark(sentence)
        return state
    return read_weights(source, entry, remark)


def match(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    names: str = "skipway",
    adapt: Iterable[str] = (),
    classifiers: Iterable[str] = (),
) -> LoadReport:
    """Match the keys of `state` with the model under the given choices, without changing the model."""
    report, keymap, taken = matched(model, state, names, adapt, classifiers)
    report.near.update({key: nearest_keys(key, keymap, taken) for key in report.unexpected[:SHOWN]})
    return report


def matched(
    model: nn.Module, state: Mapping[str, Tensor], names: str, adapt: Iterable[str], classifiers: Iterable[str] = ()
) -> tuple[LoadReport, KeyMap, set[str]]:
    """`match` without what comes closest to unexpected keys, which takes the longest; the key map and the keys that the
    model has.
    """
    model = unwrap(model)
    keymap, made = find_keymap(model, names), read_choices(adapt)
    own, owners = own_state(model), extra_state_owners(model)
    if (odd := next((key for key, value in own.items() if not isinstance(value, Tensor)), None)) is not None:
        raise CheckpointError(
            f"{printable(odd)!r} of this {type(model).__name__} is not a tensor but {type(own[odd]).__name__}, which "
            "no file of weights holds; let get_extra_state return a tensor"
        )
    state, remarks = strip_prefixes(state, {name for ours in own for name in keymap.names(ours)})
    state = keymap.without_copies(state)
    report, misshapen, aliases = LoadReport(remarks=remarks), {}, names_of_same(own, owners)
    sources: dict[str, tuple[str, ...]] = {}
    for ours, tensor in own.items():
        sources[ours], found = fetch_shared(keymap, aliases[ours], state)
        theirs = sources[ours]
        if found is None and ours.endswith("num_batches_tracked"):
            report.absent.append(ours)
        elif found is None:
            report.missing[ours] = theirs
        elif (
            not copy_tensor(report, ours, theirs, found, found if ours in owners else tensor)
            and layout_of(found) == "dense"
        ):
            misshapen[ours] = found
    report.unequal.update(unequal_names(report.tensors, sources, aliases))
    firsts: dict[str, str] = {}
    for ours, other in ((key, firsts.setdefault(name, key)) for key in report.tensors for name in sources[key]):
        if other not in aliases[ours]:
            report.doubled[ours] = other
    report.other.extend(keymap.differences(model, state))
    taken = {name for theirs in sources.values() for name in theirs}
    rest = [key for key in state if key not in taken and not keymap.ignores(key)]
    report.left_out.extend(key for key in rest if keymap.leaves_out(key))
    report.unexpected.extend(key for key in rest if not keymap.leaves_out(key))
    if report.left_out:
        listed = cut(report.left_out)
        report.remarks.append(
            f"{counted(len(report.left_out), 'name')} that this model has no use for left out: {listed}"
        )
    for name, choice in CHOICES.items():
        if report.fits or name not in made:
            continue
        still = {ours: tensor for ours, tensor in misshapen.items() if ours in report.misshapen}
        lists = (frozenset(report.tensors), still, tuple(report.missing), tuple(report.unexpected), frozenset(taken))
        change = choice(Misfit(model, keymap, *lists, frozenset(classifiers)))
        if change:
            report.adapt(change)
            report.used.append(name)
    return report, keymap, taken


def unequal_names(
    tensors: Mapping[str, Tensor], sources: Mapping[str, tuple[str, ...]], aliases: Mapping[str, list[str]]
) -> dict[str, str]:
    """Our names for which the file holds other values than for an earlier name of the same parameter."""
    shared = (key for key in tensors if len(aliases[key]) > 1)
    firsts = {key: next(each for each in tensors if each in aliases[key]) for key in shared}
    return {
        key: first
        for key, first in firsts.items()
        if sources[key] != sources[first] and not equal_tensors(tensors[key], tensors[first])
    }


def nearest_keys(key: str, keymap: KeyMap, known: Iterable[str]) -> str:
    """The closest match to their key: a parameter that the model lacks, else the closest known key."""
    ours = keymap.to_ours(key)
    if ours is not None and ours != key:
        return f" (it would be {ours}, which this model lacks)"
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return f" (no rule matches it; the closest known key is {close[0]})" if close else ""


def fetch_shared(
    keymap: KeyMap, names: Sequence[str], state: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], Tensor | None]:
    """As `fetch_tensor`, for the first of our names for one parameter that the file has: some files hold it once."""
    first = fetch_tensor(keymap, names[0], state)
    if first[1] is not None:
        return first
    others = (fetch_tensor(keymap, name, state) for name in names[1:])
    return next((each for each in others if each[1] is not None), first)


def fetch_tensor(keymap: KeyMap, ours: str, state: Mapping[str, Tensor]) -> tuple[tuple[str, ...], Tensor | None]:
    """Their names for our key, and the tensor that they make; None where the file lacks one of them."""
    row, theirs = keymap.find(ours, state) or (None, (ours,))
    if any(name not in state for name in theirs):
        return theirs, None
    parts = [state[name] for name in theirs]
    odd = next((part for part in parts if layout_of(part) != "dense"), None)
    if odd is not None:
        return theirs, odd
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return theirs, tensor if row is None or row.convert is None else row.convert.to_ours(tensor)


def layout_of(tensor: Tensor) -> str:
    """How a tensor is stored: dense, sparse, quantised or nested."""
    if tensor.is_nested:
        return "nested"
    return "quantised" if tensor.is_quantized else "dense" if tensor.layout == torch.strided else "sparse"


def is_float8(tensor: Tensor) -> bool:
    """Whether the numbers are floating-point ones of 8 bits, which stand for others by a scale that is stored apart."""
    return tensor.is_floating_point() and tensor.element_size() == 1


def copy_tensor(report: LoadReport, ours: str, theirs: tuple[str, ...], found: Tensor, wanted: Tensor) -> bool:
    """Write one pair into the report; whether it fits."""
    if layout_of(found) != "dense":
        report.misshapen[ours] = f"{layout_of(found)} in the file, dense in the model"
        return False
    shapes = f"{tuple(found.shape)} in the file, {tuple(wanted.shape)} in the model"
    kinds = [(tensor.is_floating_point(), tensor.is_complex(), is_float8(tensor)) for tensor in (found, wanted)]
    if kinds[0] != kinds[1]:
        report.misshapen[ours] = f"{found.dtype} in the file, {wanted.dtype} in the model".replace("torch.", "")
        return False
    if found.shape != wanted.shape and found.squeeze().shape != wanted.squeeze().shape:
        report.misshapen[ours] = shapes
        return False
    report.tensors[ours] = found.reshape(wanted.shape)
    if found.shape != wanted.shape:
        report.reshaped[ours] = shapes
    if theirs == (ours,):
        report.matched.append(ours)
    else:
        report.renamed[ours] = theirs
    return True
