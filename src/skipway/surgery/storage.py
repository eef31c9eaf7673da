"""Networks after an operation in a folder: the weights, and a description of how to build the network again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from skipway.errors import CheckpointError
from skipway.surgery.operation import Operation
from skipway.surgery.rescheme import Start, rescheme
from skipway.tracing import Example
from skipway.validation import check_call, check_choice, check_rule, is_whole
from skipway.weights import load
from skipway.zoo import LoadedModel, ModelRequest, load_model

__all__ = ["DESCRIPTION", "WEIGHTS", "Description", "example_of", "rebuild"]

WEIGHTS, DESCRIPTION = "model.safetensors", "rebuild.json"


@dataclass(frozen=True, kw_only=True)
class Description:
    """A description from which a network after `rescheme` is built again.

    Args:
        model: source of the network, "timm:resnet50" for example; see `skipway.zoo.SOURCES`.
        scheme: the scheme that it was dressed in.
        start: see `rescheme`.
        input: shape of one sample.
        options: options of the source: depth, classes.
        skipway: version that wrote the description.

    >>> Description.read('{"model": "resnet20", "scheme": "skipinit", "input": [3, 32, 32], "skipway": "0.1"}').request
    ModelRequest(depth=None, scheme=None, classes=None, shape=(3, 32, 32), ...)
    """

    model: str
    scheme: str
    input: tuple[int, ...]
    skipway: str
    start: Start = "identity"
    options: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "scheme"):
            check_rule(name, getattr(self, name), isinstance(getattr(self, name), str), "a text")
        sides = isinstance(self.input, tuple) and all(is_whole(side, 1) for side in self.input)
        check_rule("input", self.input, sides, "whole numbers, the shape of one sample")
        check_choice("start", self.start, get_args(Start))
        check_rule("options", self.options, isinstance(self.options, Mapping), "options by their names")

    @classmethod
    def read(cls, text: str) -> Description:
        """Read a description from JSON.

        Raises:
            CheckpointError: it is no JSON, or has other fields.
        """
        known = {each.name for each in fields(cls)}
        try:
            values: Any = json.loads(text)
        except ValueError as problem:
            raise CheckpointError(f"{DESCRIPTION} does not describe a network: it is no JSON ({problem})") from problem
        given = set(values) if isinstance(values, dict) else set()
        if not {"model", "scheme", "input", "skipway"} <= given <= known:
            raise CheckpointError(
                f"{DESCRIPTION} does not describe a network: it holds {', '.join(sorted(given)) or 'no fields'}; its "
                f"fields are {', '.join(sorted(known))}"
            )
        shape = values["input"]
        values["input"] = tuple(shape) if isinstance(shape, list) else shape
        return cls(**values)

    @property
    def request(self) -> ModelRequest:
        """The request to the source of the network."""
        return ModelRequest(depth=self.options.get("depth"), classes=self.options.get("classes"), shape=self.input)

    def operate(self, loaded: LoadedModel, *, tolerance: float = 1e-5) -> Operation:
        """Dress a network as described, in place."""
        example = example_of(loaded)
        return rescheme(loaded.model, example, self.scheme, start=self.start, tolerance=tolerance)


def example_of(loaded: LoadedModel) -> Example:
    """One random sample, or the inputs that the source provides."""
    batch = loaded.batch
    if batch is None:
        return loaded.random(1)
    pair = isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)
    return batch[0] if pair else batch


@check_call
def rebuild(folder: str | Path) -> nn.Module:
    """Build the network that `skipway rescheme … -o folder` wrote, in evaluation mode; returns a new one.

    The network is built by its source, dressed again, and loaded with the weights. Nothing in the folder is run as
    code; but a network that was given as FILE.py:NAME is built by that file, at the path in the description.

    Args:
        folder: with `model.safetensors` and `rebuild.json`.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit.
        SkipwayError: the source is not there.
    """
    rule = "the path of a folder that skipway rescheme wrote"
    check_rule("folder", folder, isinstance(folder, str | Path), rule)
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {DESCRIPTION}; skipway rescheme writes it")
    description = Description.read(path.read_text(encoding="utf-8"))
    loaded = load_model(description.model, description.request)
    # the weights are loaded afterwards, so the outputs of the fresh ones do not matter
    description.operate(loaded, tolerance=math.inf)
    load(loaded.model, folder / WEIGHTS)
    return loaded.model.eval()
