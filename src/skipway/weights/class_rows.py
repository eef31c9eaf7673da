"""The rows of a classifier by the names of the classes, where both the weights and the model have names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from skipway.errors import CheckpointError, printable, spell
from skipway.tracing import unwrap
from skipway.weights.adapt import classifier_parameters
from skipway.weights.container import cut
from skipway.weights.keymap import KeyMap
from skipway.weights.prefixes import own_state, strip_prefixes
from skipway.weights.tables import find_keymap

__all__ = ["arrange_classes"]


def arrange_classes(
    model: nn.Module,
    state: Mapping[str, Tensor],
    names: str,
    theirs: Sequence[str] | None,
    ours: Sequence[str],
    adapt: Iterable[str],
    classifiers: Iterable[str] = (),
) -> tuple[Mapping[str, Tensor], list[str]]:
    """A state dict whose classifier has the model's classes in the model's order, and remarks about what was changed.

    Rows of classes that both know are taken by name, and rows of new classes from the model. Where no class is shared,
    or the names of the weights' classes are not known, the rows are left out, and the classifier stays as it is.

    Args:
        model: the network that the weights are for; it is not changed.
        state: the weights.
        names: the naming scheme of the weights.
        theirs: the classes of the weights in the order of their outputs; None: not known.
        ours: the classes of the model in the order of its outputs.
        classifiers: paths of the classifiers of a network that is not ours.
        adapt: the differences that are allowed, see `load`. Without "classes", unnamed rows are taken by their order.

    Raises:
        CheckpointError: the classes differ, and "classes" is not allowed.
    """
    if theirs is not None and tuple(theirs) == tuple(ours):
        return state, []
    model = unwrap(model)
    keymap, own = find_keymap(model, names), own_state(model)
    bare, remarks = strip_prefixes(state, {name for key in own for name in keymap.names(key)})
    parameters = [key for _, keys in classifier_parameters(model, frozenset(classifiers)) for key in keys]
    rows = {key: their_key for key in parameters if (their_key := their_name(keymap, key, bare)) is not None}
    if theirs is not None and any(len(bare[their_key]) != len(theirs) for their_key in rows.values()):
        theirs = None  # names of something else
    same_count = all(len(bare[their_key]) == len(ours) for their_key in rows.values())
    if not rows or (theirs is None and (not same_count or "classes" not in adapt)):
        return state, []
    # of classes that share a name, the first
    row_of = {name: row for row, name in reversed([*enumerate(theirs or ())])}
    shared = {name: row for row, name in enumerate(ours) if name in row_of}
    if theirs is not None and set(theirs) != set(ours) and "classes" not in adapt:
        raise CheckpointError(
            f"the weights know the classes {listed(theirs)}, the images have {listed(ours)}; "
            f"{spell('adapt', ('classes',))} takes the rows of those in both"
        )
    if theirs is None or not shared:
        why = (
            f"the names of its classes are not known, and their order may be another; without 'classes' in "
            f"{spell('adapt', tuple(adapt))} its rows are taken in order"
            if theirs is None
            else f"it knows {listed(theirs)}, none of which is here"
        )
        left = {their_key: tensor for their_key, tensor in bare.items() if their_key not in rows.values()}
        return left, [*remarks, f"the classifier of the weights is not used, since {why}"]
    for key, their_key in rows.items():
        found, tensor = bare[their_key], own[key].clone()
        taken = found[[row_of[name] for name in shared]]
        tensor[list(shared.values())] = taken.reshape(-1, *tensor.shape[1:]).to(tensor)
        bare[their_key] = tensor
    fresh, unused = [[each for each in some if each not in shared] for some in (ours, theirs)]
    parts = [f"of {len(shared)} of {len(ours)} classes taken by name"]
    parts += [f"new for {listed(fresh)}"] if fresh else []
    parts += [f"those of {listed(unused)} left out"] if unused else []
    return bare, [*remarks, f"rows of the classifier: {', '.join(parts)}"]


def their_name(keymap: KeyMap, key: str, state: Mapping[str, Tensor]) -> str | None:
    """The name in the file of a parameter that is one tensor there as it is here; None: it is not."""
    found = keymap.find(key, state)
    if found is None or found[0].convert is not None or len(found[1]) != 1 or found[1][0] not in state:
        return None
    return found[1][0]


def listed(names: Iterable[str]) -> str:
    """Some class names for a message."""
    return cut([repr(printable(name)) for name in names])
