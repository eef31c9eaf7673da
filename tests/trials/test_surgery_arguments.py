"""Kind: an argument of a wrong type or value gives an error of Python or torch, or is taken for another one.

Every pair is refused with a SkipwayError that holds the argument and the rule, and the model stays what it was.

| trial | input | right value |
|---|---|---|
| model | a number, None, a class, a name, a state dict | refused: a `torch.nn.Module`, an instance |
| example | a number, None, a name, an empty tuple or mapping, an array, a model | refused: tensors |
| order | arguments missing, exchanged, unknown, of an earlier revision | refused: the order |
| numbers of blocks | True, 2.5, "4", None, -1, nan, a tensor | refused: a whole number |
| shares, tolerances, bytes | "0.1", nan, negative, None, True, 0, 1, complex | refused: a number |
| words | another word, another type | refused: the words |
| scores | a number, a word; one that returns a word, None, nan | refused: a function |
| names | a number, None, none at all, numbers, connections | refused: names |
| hints | `remove_norm` with a tolerance that is too small | no hint at `start`, which it does not have |
| numbers of NumPy, tensors of one number as score | `np.int64(2)`, `np.float64(0.5)` | taken |
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.surgery.test_depth import Net, X
from torch import nn

import skipway as sw
from skipway import SkipwayError
from skipway.surgery import (
    Budget,
    Every,
    checkpointed,
    deepen,
    fold_gains,
    influence,
    lesion,
    rebuild,
    remove_norm,
    replace_classifier,
    rescheme,
    reversible,
    shorten,
    skip_compute,
    undo,
)
from skipway.surgery.fusion import fuse_with_report
from skipway.surgery.storage import Description
from skipway.surgery.transaction import transaction

NAN = math.nan
# operations by name, as functions of a model and an example
DOORS: dict[str, Callable[[Any, Any], object]] = {
    "rescheme": lambda m, x: rescheme(m, x, "layerscale"),
    "remove_norm": lambda m, x: remove_norm(m, x),
    "lesion": lambda m, x: lesion(m, x, "blocks.0"),
    "influence": lambda m, x: influence(m, x),
    "shorten": lambda m, x: shorten(m, x, 1),
    "deepen": lambda m, x: deepen(m, x, 1),
    "skip_compute": lambda m, x: skip_compute(m, x, 0.5),
    "checkpointed": lambda m, x: checkpointed(m, x),
    "reversible": lambda m, x: reversible(m, x),
    "fold_gains": lambda m, x: fold_gains(m, x),
    "accelerate": lambda m, x: sw.accelerate(m, x),
    "replace_classifier": lambda m, x: replace_classifier(m, x, 3),
    "fuse": lambda m, _: sw.fuse(m),
    "chain": lambda m, x: sw.chain(m, x),
}
NO_MODELS: dict[str, Any] = {
    "number": 3,
    "nothing": None,
    "class": Net,
    "name": "resnet20",
    "mapping": {"weight": X},
    "state dict": Net(1).state_dict(),
}
NO_EXAMPLES: dict[str, Any] = {
    "number": 3,
    "nothing": None,
    "name": "layerscale",
    "no arguments": (),
    "no keywords": {},
    "array": np.zeros((8, 3, 10, 10)),
    "model": nn.Identity(),
}
# the argument that a message has to name, and the call
WRONG: list[tuple[str, Callable[[Net], object]]] = [
    *[("scheme", lambda m, v=v: rescheme(m, X, v)) for v in (3, None, True, ["layerscale"], sw.schemes.LayerScale, X)],
    *[("start", lambda m, v=v: rescheme(m, X, "skipinit", start=v)) for v in ("one", True, None, ["identity"])],
    *[("tolerance", lambda m, v=v: rescheme(m, X, "skipinit", tolerance=v)) for v in (NAN, -1, "1e-5", None, True, 1j)],
    *[("how", lambda m, v=v: remove_norm(m, X, v)) for v in ("x", 3, None, X)],
    *[("calibrate", lambda m, v=v: remove_norm(m, X, calibrate=v)) for v in ("yes", None, 1)],
    *[("tolerance", lambda m, v=v: remove_norm(m, X, tolerance=v)) for v in (NAN, -1e-3, "a", None)],
    *[("names", lambda m, v=v: lesion(m, X, v)) for v in (3, None, [], [3], [["blocks.0"]], X)],
    ("connection", lambda m: lesion(m, X, "blocks.99")),
    *[("score", lambda m, v=v: influence(m, X, v)) for v in (3, "accuracy", True, X)],
    *[("score", lambda m, v=v: influence(m, X, lambda _: v)) for v in (None, "high", NAN, X, [1.0])],
    *[("to", lambda m, v=v: shorten(m, X, v)) for v in ("4", True, 2.5, None, -1, 99, NAN, X)],
    ("score", lambda m: shorten(m, X, 1, score=3)),
    *[("by", lambda m, v=v: deepen(m, X, v)) for v in (True, 0, -1, 2.0, "1", None, 99, [1])],
    *[("tolerance", lambda m, v=v: deepen(m, X, 1, tolerance=v)) for v in (NAN, -1.0, "x")],
    *[("rate", lambda m, v=v: skip_compute(m, X, v)) for v in ("0.1", 0, 1, NAN, None, True, -0.5, 2, X)],
    *[("rising", lambda m, v=v: skip_compute(m, X, 0.5, rising=v)) for v in ("no", None, 0)],
    *[("segments", lambda m, v=v: checkpointed(m, X, v)) for v in (0, -1, 2.5, True, None, [1], Every)],
    ("segments", lambda m: checkpointed(m, X, "squareroots")),
    ("bytes", lambda m: checkpointed(m, X, "budget(0)")),
    *[("bytes", lambda m, v=v: checkpointed(m, X, Budget(v))) for v in ("1e9", None, NAN, -1, True)],
    *[("blocks", lambda m, v=v: checkpointed(m, X, Every(v))) for v in ("2", 0, None, 1.5)],
    *[("tolerance", lambda m, v=v: reversible(m, X, tolerance=v)) for v in (NAN, -1, "1e-3", None)],
    *[("tolerance", lambda m, v=v: fold_gains(m, X, tolerance=v)) for v in (NAN, -1, "1e-3", None)],
    *[("tolerance", lambda m, v=v: sw.accelerate(m, X, tolerance=v)) for v in (NAN, -1, "1e-3", None)],
    *[("classes", lambda m, v=v: replace_classifier(m, X, v)) for v in (0, -3, 2.0, "10", None, True, ["cat", "dog"])],
    *[("folder", lambda m, v=v: rebuild(v)) for v in (3, None, b"runs", Net())],
    *[("operation", lambda m, v=v: undo(v)) for v in (3, None, Net)],
    ("force", lambda m: rescheme(copy.deepcopy(m), X, "skipinit").undo(force="yes")),
    *[("model", lambda m, v=v: sw.fuse(v)) for v in (3, None, Net, "resnet20")],
    ("model", lambda m: fuse_with_report(3)),
    *[("tolerance", lambda m, v=v: transaction(m, X, title="t", tolerance=v).__enter__()) for v in (NAN, "a", -1)],
    ("model", lambda m: transaction(3, X, title="t").__enter__()),
]
# the beginning of a message, and the call
MESSAGES: list[tuple[str, Callable[[Net], object]]] = [
    ("example=int: ", lambda m: rescheme(m, 5, "layerscale")),
    ("example=NoneType: ", lambda m: deepen(m, None, 1)),
    ("scheme=5: the rule is a Scheme, or its name", lambda m: rescheme(m, X, 5)),
    ("scheme=None: the rule is a Scheme, or its name", lambda m: rescheme(m, X, None)),
    ("start=5: the rule is one of", lambda m: rescheme(m, X, "layerscale", start=5)),
    ("how=None: the rule is one of", lambda m: remove_norm(m, X, how=None)),
    ("names=5: the rule is names of connections", lambda m: lesion(m, X, 5)),
    ("names=None: the rule is names of connections", lambda m: lesion(m, X, None)),
    ("names=[]: the rule is names of connections", lambda m: lesion(m, X, [])),
    ("names=[5]: the rule is names of connections", lambda m: lesion(m, X, [5])),
    ("rate='half': the rule is a share", lambda m: skip_compute(m, X, "half")),
    ("rate=None: the rule is a share", lambda m: skip_compute(m, X, None)),
    ("rate=[0.5]: the rule is a share", lambda m: skip_compute(m, X, [0.5])),
    ("segments=1.5: the rule is a number of blocks", lambda m: checkpointed(m, X, 1.5)),
    ("segments=None: the rule is a number of blocks", lambda m: checkpointed(m, X, None)),
    ("bytes='a': the rule is a number above 0", lambda m: checkpointed(m, X, "budget('a')")),
    ("bytes=None: the rule is a number above 0", lambda m: Budget(None)),
    ("bytes=True: the rule is a number above 0", lambda m: Budget(True)),
    ("tolerance='a': the rule is a number of at least 0", lambda m: reversible(m, X, tolerance="a")),
    ("tolerance=nan: the rule is a number of at least 0", lambda m: reversible(m, X, tolerance=NAN)),
    ("tolerance=-1: the rule is a number of at least 0", lambda m: deepen(m, X, 1, tolerance=-1)),
    ("operation=5: the rule is the Operation", lambda m: undo(5)),
    ("score=5: the rule is a function", lambda m: influence(m, X, score=5)),
    ("score(model) returned None: the rule is", lambda m: influence(m, X, score=lambda _: None)),
    ("score(model) returned nan: the rule is", lambda m: shorten(m, X, 1, score=lambda _: NAN)),
    ("folder=5: the rule is the path of a folder", lambda m: rebuild(5)),
]
ORDER: list[tuple[str, Callable[[Net], object]]] = [
    ("rescheme(model, example, scheme", lambda m: rescheme(m, "layerscale")),
    ("example", lambda m: rescheme(m, "layerscale", X)),
    ("preserve", lambda m: rescheme(m, X, "layerscale", preserve=True)),
    ("shorten(model, example, to", lambda m: shorten(m, to=4, x=X)),
    ("deepen(model, example, by", lambda m: deepen(m, 2)),
    ("lesion(model, example, names", lambda m: lesion(m, ["blocks.0"])),
    ("skip_compute(model, example, rate", lambda m: skip_compute(m, 0.5)),
    ("example", lambda m: skip_compute(m, 0.5, X)),
    ("replace_classifier(model, example, classes", lambda m: replace_classifier(m, 10)),
    ("reversible(model, example", lambda m: reversible(m, X, preserve=False)),
    ("remove_norm(model, example", lambda m: remove_norm(m)),
    ("fuse(model", lambda m: sw.fuse(m, copy=True)),
    ("accelerate(model, example", lambda m: sw.accelerate()),
    ("undo(operation", lambda m: undo()),
    ("rebuild(folder", lambda m: rebuild()),
]


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net(2).eval()


def refused(net: Net, call: Callable[[Net], object]) -> str:
    """The message; the model is what it was."""
    classes, values = [type(module) for module in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(SkipwayError) as problem:
        call(net)
    now = net.state_dict()
    assert [type(module) for module in net.modules()] == classes
    assert list(now) == list(values)
    assert all(torch.equal(now[key], values[key]) for key in values)
    assert len(str(problem.value)) < 700
    return str(problem.value)


@pytest.mark.parametrize("given", NO_MODELS)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_model_is_refused_at_every_door(net, door, given):
    message = refused(net, lambda _: DOORS[door](NO_MODELS[given], X))
    assert re.match(r"model=.*: the rule is a torch\.nn\.Module", message, re.DOTALL)


@pytest.mark.parametrize("given", NO_EXAMPLES)
@pytest.mark.parametrize("door", [door for door in DOORS if door not in {"accelerate", "fuse", "chain"}])
def test_what_is_no_example_is_refused_at_every_door(net, door, given):
    assert refused(net, lambda m: DOORS[door](m, NO_EXAMPLES[given])).startswith("example=")


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_arguments(net, number):
    argument, call = WRONG[number]
    message = refused(net, call)
    assert argument in message.split(":")[0]
    assert "rule is" in message or argument in {"connection", "segments", "to", "by"}
    assert not any(word in message for word in ("TypeError", "AttributeError", "ValueError", "unsupported operand"))


@pytest.mark.parametrize(("beginning", "call"), MESSAGES, ids=[beginning for beginning, _ in MESSAGES])
def test_the_argument_the_value_and_the_rule_are_named(net, beginning, call):
    assert refused(net, call).startswith(beginning)


@pytest.mark.parametrize("number", range(len(ORDER)))
def test_the_order_of_arguments_is_said(net, number):
    named, call = ORDER[number]
    assert named in refused(net, call)


def test_a_call_that_does_not_fit_is_a_type_error_too(net):
    with pytest.raises(TypeError, match="missing a required argument: 'scheme'"):
        rescheme(net, X)  # type: ignore[call-arg]


def test_hints_are_possible(net):
    message = refused(net, lambda m: remove_norm(m, X, tolerance=0))
    assert "start" not in message
    assert "more than tolerance=0" in message
    assert "freed of" in message


@pytest.mark.parametrize(
    "text",
    [
        '{"model": 3, "scheme": "skipinit", "input": [3, 32, 32], "skipway": "0.1"}',
        '{"model": "resnet20", "scheme": 3, "input": [3, 32, 32], "skipway": "0.1"}',
        '{"model": "resnet20", "scheme": "skipinit", "input": "abc", "skipway": "0.1"}',
        '{"model": "resnet20", "scheme": "skipinit", "input": [3, 32], "skipway": "0.1", "options": 3}',
        '{"model": "resnet20", "scheme": "skipinit", "input": [3, 32, 32], "skipway": "0.1", "start": "one"}',
        "[1, 2]",
        "{}",
    ],
)
def test_descriptions_of_networks(text):
    with pytest.raises(SkipwayError, match="rule is|does not describe"):
        Description.read(text)


def test_numbers_of_numpy_and_scores_of_tensors_are_taken(net):
    assert len(influence(net, X, lambda m: m(X).square().mean())) == 2
    shorten(net, X, np.int64(1), score=lambda m: np.float64(m(X).detach().sum())).undo()
    deepen(net, X, np.int64(1)).undo()
    skip_compute(net, X, np.float64(0.5)).undo()
    checkpointed(net, X, np.int64(2)).undo()
    reversible(net, X, tolerance=np.float32(1e-3)).undo()
    replace_classifier(net, X, np.int32(3)).undo()
