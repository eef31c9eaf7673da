"""`replace_classifier(model, example, classes)`: a fresh classifier in anybody's network."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.surgery.operation import Operation
from skipway.surgery.preconditions import require_operable
from skipway.surgery.transaction import Transaction, transaction
from skipway.surgery.verification import outputs
from skipway.tracing import Example, Program, Value, as_example, watch
from skipway.tracing.paths import parents
from skipway.validation import check_call, check_whole

__all__ = ["INITIAL_DEVIATION", "ends_in_softmax", "find_classifiers", "read_classifiers", "replace_classifier"]

INITIAL_DEVIATION = 0.01
"""Standard deviation of fresh weights: the first probabilities are nearly equal, so the first loss is close to ln K."""

PASSING: frozenset[str] = frozenset({"carry", "scale", "shift", "nonlinear", "pool", "mean", "drop", "slice"})
"""What may follow a classifier: a pool over positions, a temperature, an activation; no map and no norm."""
COUNTS = frozenset(
    {"classes", "num_classes", "n_classes", "nb_classes", "nclasses", "number_of_classes", "num_class", "n_class"}
    | {"nclass", "nb_class", "class_count", "labels", "num_labels", "n_labels", "nb_labels", "number_of_labels"}
)
"""Names of attributes that hold the number of classes; a leading underscore does not count."""


@check_call
def find_classifiers(model: nn.Module, example: Example) -> list[str]:
    """Return the paths of the linear maps that put out the scores of the classes; the model is left alone.

    The scores (N, K) are followed back through pools, activations and factors to the maps that are K wide. A distilled
    DeiT averages two.

    Args:
        model: any module whose output, or first output, is (N, K).
        example: what the model is called with.

    Returns:
        paths in the order of the signal; empty for a trunk, whose output comes from a norm or a residual sum, or which
        says `num_classes = 0` as timm's trunks do.

    >>> import torch
    >>> find_classifiers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5)), torch.zeros(2, 3, 3, 3))
    ['2']
    >>> find_classifiers(nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8)), torch.zeros(2, 3))
    []
    """
    return read_classifiers(require_operable(model), as_example(example))[0]


def read_classifiers(model: nn.Module, example: Example) -> tuple[list[str], int]:
    """The paths that `find_classifiers` returns, and the number of classes, which is 0 where there are no paths."""
    scores = outputs(model, example)[:1]
    if not scores or scores[0].ndim != 2 or getattr(model, "num_classes", None) == 0:
        return [], 0
    classes = scores[0].shape[1]
    program = watch(model, example)
    end = output_value(program)
    maps = [] if end is None else closing_maps(program, end)
    owners = dict.fromkeys(program.weight_owner(value) for value in maps)
    names = [name for name in owners if class_axis(model.get_submodule(name), classes) is not None]
    return names, classes if names else 0


def ends_in_softmax(model: nn.Module, example: Example) -> bool:
    """Whether what a model puts out is made by a softmax, or its logarithm; the model is left alone.

    >>> import torch
    >>> ends_in_softmax(nn.Sequential(nn.Linear(2, 3), nn.Softmax(1)), torch.zeros(1, 2))
    True
    """
    program = watch(require_operable(model), as_example(example))
    end = output_value(program)
    while end is not None and end.part == "carry" and program.signals(end):
        end = program[program.signals(end)[0]]
    return end is not None and end.part == "softmax"


def output_value(program: Program) -> Value | None:
    """The output of the model, or its first."""
    number = next(iter(program.returned.get("", {}).values()), None)
    return None if number is None else program[number]


def closing_maps(program: Program, end: Value) -> list[Value]:
    """The maps that a value is a pool, activation, factor or sum of, in order; empty where it comes from other parts,
    or where one map is computed from another, as in a residual stream.
    """
    found, waiting = set[int](), [end.number]
    while waiting:
        value = program[waiting.pop()]
        if value.part == "map" and value.norm is None:
            found.add(value.number)
        elif value.norm is None and (value.part in PASSING or (value.part == "sum" and len(value.shape) == 2)):
            waiting += program.signals(value)
        else:
            return []
    maps = sorted(found)
    nested = any(program.depends(later, earlier) for later in maps for earlier in maps if earlier < later)
    return [] if nested else [program[number] for number in maps]


def class_axis(module: nn.Module, classes: int) -> int | None:
    """The axis of the weight that counts the classes: 0, as in `nn.Linear`, or 1, as in transformers' `Conv1D`."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim < 2 or next(module.children(), None) is not None:
        return None
    if isinstance(bias, Tensor) and bias.shape != (classes,):
        return None
    transposed = weight.shape[0] != classes or (weight.ndim == 2 and hasattr(module, "nx"))
    axis = int(transposed)
    return axis if weight.shape[axis] == classes else None


@check_call
def replace_classifier(model: nn.Module, example: Example, classes: int) -> Operation:
    """Give any network a fresh classifier for another number of classes, in place.

    The classifier is found in the watched program (`find_classifiers`), never by its name, and keeps its class and
    options. The fresh weights are drawn from N(0, 0.01²) and biases are 0; other parameters of it that do not count the
    classes, such as the scale of a cosine classifier, stay what they are. Numbers of classes that the model keeps as
    attributes of known names (`num_classes`, `n_labels`, transformers' `config.num_labels`) follow.

    Args:
        model: any module whose output, or first output, is (N, K).
        example: what the model is called with.
        classes: outputs of the new classifier, ≥ 1.

    Returns:
        the operation; `touched` holds the classifiers, and with each the attributes that followed.

    Raises:
        SkipwayError: `classes` is below 1, no classifier is found, or one holds other parameters or buffers with an
            axis as long as there were classes, whose fresh values nobody knows; the model is as before.

    >>> import torch
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1000))
    >>> operation = replace_classifier(model, torch.zeros(1, 3, 2, 2), 10)
    >>> model[3], dict(operation.touched)
    (Linear(in_features=8, out_features=10, bias=True), {'3': '1000 classes replaced by 10'})
    """
    wrapped, model, example = model, require_operable(model), as_example(example)
    check_whole("classes", classes, 1)
    names, old = read_classifiers(model, example)
    if not names:
        raise SkipwayError(
            f"{type(model).__name__} has no classifier: the rule is an output (N, K) that is made by a linear map; for "
            "a trunk, which puts out features, write a module that applies nn.Linear to them"
        )
    title = f"classifier of {type(model).__name__} for {classes} classes"
    with transaction(model, title=title, wrapped=wrapped) as change:
        for name in names:
            counts = replace_one(change, name, old, classes)
            followed = f", and in {', '.join(counts)}" if counts else ""
            change.touched[name] = f"{old} classes replaced by {classes}{followed}"
        count = outputs(model, example)[0].shape[1]
        if count != classes:
            raise SkipwayError(
                f"classes={classes}: with new classifiers at {', '.join(names)} the output has {count} columns, so "
                "something after them depends on the number of classes"
            )
        return change.commit()


def replace_one(change: Transaction, name: str, old: int, classes: int) -> list[str]:
    """Put a fresh copy of another width in the place of one classifier; returns the attributes that followed."""
    module = change.model.get_submodule(name)
    paths = [path for path, each in change.model.named_modules(remove_duplicate=False) if each is module]
    owners = dict.fromkeys(("", *(owner for path in paths for owner in parents(path))))
    axis = class_axis(module, old)
    fresh = copy.copy(module)
    fresh._parameters = dict(module._parameters)
    for leaf, held in (*module._parameters.items(), *module._buffers.items()):
        known = leaf in ("weight", "bias") and leaf in module._parameters
        if held is not None and not known and old in held.shape:
            raise SkipwayError(
                f"{leaf!r} of the classifier {name!r}, of shape {tuple(held.shape)}, has an axis of length {old}, "
                f"the number of classes, and its values for {classes} others are not known; the rule is a weight "
                "and a bias; put a classifier of your own in its place"
            )
    for leaf in ("weight", "bias"):
        parameter = module._parameters.get(leaf)
        if parameter is None:
            continue
        shape = list(parameter.shape)
        shape[axis if leaf == "weight" and axis is not None else 0] = classes
        values = parameter.new_zeros(shape)
        if leaf == "weight":
            values.normal_(std=INITIAL_DEVIATION)
        fresh._parameters[leaf] = nn.Parameter(values)  # to be trained, in a frozen network too
    for attribute in ("out_features", "out_channels", "nf"):
        if getattr(fresh, attribute, None) == old:
            setattr(fresh, attribute, classes)
    change.set_submodule(name, fresh)
    return [
        f"{owner}.{attribute}".removeprefix(".")
        for owner in owners
        for attribute in set_class_counts(change, change.model.get_submodule(owner), old, classes)
    ]


def set_class_counts(change: Transaction, module: nn.Module, old: int, classes: int) -> list[str]:
    """Let the attributes of a module, and of its config, that hold the number of classes follow; returns which."""
    changed = [
        attribute
        for attribute, value in vars(module).items()
        if type(value) is int and value == old and attribute.removeprefix("_") in COUNTS
    ]
    for attribute in changed:
        change.set_attribute(module, attribute, classes)
    config: Any = getattr(module, "config", None)
    if getattr(config, "num_labels", None) == old:  # a property of transformers, which rewrites the names of classes
        fresh = copy.deepcopy(config)
        fresh.num_labels = classes
        change.set_attribute(module, "config", fresh)
        changed.append("config.num_labels")
    return changed
