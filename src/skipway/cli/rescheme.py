"""`skipway rescheme`."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from skipway.cli.option_names import print_note
from skipway.errors import SkipwayError, spelling

__all__ = ["rescheme"]

MODEL, OPERATION, OUTPUT = (
    Group(name, sort_key=number) for number, name in enumerate(("Model", "Operation", "Output"))
)
Start = Literal["identity", "divide", "scheme"]


def rescheme(
    model: str,
    /,
    *,
    scheme: Annotated[str, Parameter(group=OPERATION)],
    out: Annotated[Path, Parameter(name=("--out", "-o"), group=OUTPUT)],
    start: Annotated[Start, Parameter(group=OPERATION)] = "identity",
    weights: Annotated[Path | None, Parameter(group=MODEL)] = None,
    weights_names: Annotated[str, Parameter(group=MODEL)] = "skipway",
    weights_entry: Annotated[str | None, Parameter(group=MODEL)] = None,
    weights_adapt: Annotated[str, Parameter(group=MODEL)] = "",
    input: Annotated[str | None, Parameter(group=MODEL)] = None,
    depth: Annotated[int | None, Parameter(group=MODEL)] = None,
    classes: Annotated[int | None, Parameter(group=MODEL)] = None,
    seed: Annotated[int, Parameter(group=MODEL)] = 0,
    overwrite: Annotated[bool, Parameter(group=OUTPUT, negative=())] = False,
) -> None:
    """Dress the residual connections of a network in a scheme: LayerScale, SkipInit, ReZero, stochastic depth.

    Writes OUT/model.safetensors and OUT/rebuild.json; skipway.surgery.rebuild(OUT) builds the network again.

    Args:
        model: A name of ours, timm:NAME, torchvision:NAME, hf:CLASS, or FILE.py:NAME: a module, or what makes one.
        scheme: Scheme that is inserted after every branch.
        out: Folder for the weights and the description of the model.
        start: identity: gains start at 1; divide: at the scheme's value, divided out of the map before; scheme: from
            scratch.
        weights: File of weights of the model. [random]
        weights_names: Naming scheme of the file; skipway: the model's own names.
        weights_entry: State dict of a checkpoint with several. [averaged weights]
        weights_adapt: Differences allowed: classes, size, channels, depth, unexpected. [none]
        input: Shape of one sample, 3,224,224. [the model's]
        depth: Weight layers, for a family. [the model's]
        classes: Number of outputs. [the model's]
        seed: Seed of weights and samples.
        overwrite: Replace what is in OUT.
    """
    import torch

    from skipway._version import __version__
    from skipway.checkpoint.files import write_json, write_tensors
    from skipway.schemes.scheme import parse_scheme
    from skipway.surgery.storage import DESCRIPTION, WEIGHTS, Description
    from skipway.weights import load_state, read_source
    from skipway.weights.stored_config import refuse_other_config
    from skipway.zoo import ModelRequest, load_model

    dressing = str(parse_scheme(scheme))
    if (out / WEIGHTS).exists() and not overwrite:
        raise SkipwayError(f"--out {out}: it holds {WEIGHTS} already; --overwrite replaces it")
    torch.manual_seed(seed)
    loaded = load_model(model, ModelRequest(depth=depth, classes=classes, shape=parse_shape(input)))
    if weights is not None:
        with spelling(entry="weights_entry", names="weights_names", adapt="weights_adapt"):
            allowed = tuple(filter(None, weights_adapt.split(",")))
            refuse_other_config(loaded.model, str(weights), weights_names)
            source = read_source(str(weights), weights_entry, print_note)
            load_state(loaded.model, source, names=weights_names, adapt=allowed, remark=print_note)
    options = {name: value for name, value in (("depth", depth), ("classes", classes)) if value is not None}
    description = Description(
        model=with_absolute_file(model),
        scheme=dressing,
        start=start,
        input=tuple(loaded.shape),
        options=options,
        skipway=__version__,
    )
    operation = description.operate(loaded)
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / WEIGHTS, loaded.model.state_dict(), {})
    write_json(out / DESCRIPTION, asdict(description))
    sys.stdout.write(f"{operation}\nweights   {out / WEIGHTS}\nrebuild   {out / DESCRIPTION}\n")


def with_absolute_file(model: str) -> str:
    """The source of a model with the absolute path of a file, so that it is valid in any folder.

    >>> with_absolute_file("timm:resnet18")
    'timm:resnet18'
    """
    file, colon, name = model.rpartition(":")
    return f"{Path(file).resolve()}{colon}{name}" if file.endswith(".py") else model


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """Parse a shape.

    >>> parse_shape("3,32,32")
    (3, 32, 32)
    """
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*([,x][1-9]\d*)*", text):
        raise SkipwayError(f"--input {text}: the rule is whole numbers with commas, 3,224,224 for example")
    return tuple(int(number) for number in re.split("[,x]", text))
