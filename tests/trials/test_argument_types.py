"""Kind: an argument of a wrong type ends in the TypeError or AttributeError of a line somewhere inside.

| trial | input | right value |
|---|---|---|
| – | a name, a class, a state dict, None where the model belongs | refused: the rule is a module |
| – | a number, None where an example, a scheme, names, segments belong | refused, with argument, value, rule |
| – | a text, None, a list, not a number where a number belongs | refused, with argument, value, rule |
| – | a score that cannot be called, or returns no finite number | refused; the block is not called necessary |
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipway as sw
from skipway.surgery import (
    Budget,
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

X = torch.randn(4, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def network() -> nn.Module:
    return nn.Sequential(Block(), Block())


MODELS: dict[str, Callable[[Any], object]] = {
    "rescheme": lambda m: rescheme(m, X, "layerscale"),
    "remove_norm": lambda m: remove_norm(m, X),
    "shorten": lambda m: shorten(m, X, 1),
    "deepen": lambda m: deepen(m, X, 1),
    "lesion": lambda m: lesion(m, X, ["0"]),
    "skip_compute": lambda m: skip_compute(m, X, 0.5),
    "checkpointed": lambda m: checkpointed(m, X),
    "reversible": lambda m: reversible(m, X),
    "fold_gains": lambda m: fold_gains(m, X),
    "influence": lambda m: influence(m, X),
    "replace_classifier": lambda m: replace_classifier(m, X, 3),
    "accelerate": lambda m: sw.accelerate(m, X),
    "fuse": sw.fuse,
    "chain": lambda m: sw.chain(m, X),
}


@pytest.mark.parametrize("model", ["resnet20", Block, network().state_dict(), None, 5], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_a_module(name, model):
    with pytest.raises(sw.SkipwayError, match=r"model=.*: the rule is a torch.nn.Module"):
        MODELS[name](model)


@pytest.mark.parametrize(
    ("operate", "message"),
    [
        (lambda: rescheme(network(), 5, "layerscale"), "example=int: "),
        (lambda: deepen(network(), None, 1), "example=NoneType: "),
        (lambda: rescheme(network(), X, 5), "scheme=5: the rule is a Scheme, or its name"),
        (lambda: rescheme(network(), X, None), "scheme=None: the rule is a Scheme, or its name"),
        (lambda: rescheme(network(), X, "layerscale", start=5), "start=5: the rule is one of"),
        (lambda: remove_norm(network(), X, how=None), "how=None: the rule is one of"),
        (lambda: lesion(network(), X, 5), "names=5: the rule is names of connections"),
        (lambda: lesion(network(), X, None), "names=None: the rule is names of connections"),
        (lambda: lesion(network(), X, []), "names=[]: the rule is names of connections"),
        (lambda: lesion(network(), X, [5]), "names=[5]: the rule is names of connections"),
        (lambda: skip_compute(network(), X, "half"), "rate='half': the rule is a share"),
        (lambda: skip_compute(network(), X, None), "rate=None: the rule is a share"),
        (lambda: skip_compute(network(), X, [0.5]), "rate=[0.5]: the rule is a share"),
        (lambda: checkpointed(network(), X, 1.5), "segments=1.5: the rule is a number of blocks"),
        (lambda: checkpointed(network(), X, None), "segments=None: the rule is a number of blocks"),
        (lambda: checkpointed(network(), X, "budget('a')"), "bytes='a': the rule is a number above 0"),
        (lambda: Budget(None), "bytes=None: the rule is a number above 0"),
        (lambda: Budget(True), "bytes=True: the rule is a number above 0"),
        (lambda: reversible(network(), X, tolerance="a"), "tolerance='a': the rule is a number of at least 0"),
        (lambda: reversible(network(), X, tolerance=float("nan")), "tolerance=nan: the rule is a number of at least 0"),
        (lambda: deepen(network(), X, 1, tolerance=-1), "tolerance=-1: the rule is a number of at least 0"),
        (lambda: undo(5), "operation=5: the rule is the Operation"),
        (lambda: influence(network(), X, score=5), "score=5: the rule is a function"),
        (
            lambda: influence(network(), X, score=lambda m: None),
            "score(model) returned None: the rule is",
        ),
        (
            lambda: shorten(network(), X, 1, score=lambda m: float("nan")),
            "score(model) returned nan: the rule is",
        ),
        (lambda: rebuild(5), "folder=5: the rule is the path of a folder"),
    ],
)
def test_the_argument_the_value_and_the_rule_are_named(operate, message):
    with pytest.raises(sw.SkipwayError, match=re.escape(message)):
        operate()
