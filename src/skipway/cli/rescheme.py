"""`skipway rescheme`."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from skipway.errors import SkipwayError

__all__ = ["rescheme"]

MODEL, OPERATION, OUTPUT = (
    Group(name, sort_key=number) for number, name in enumerate(("Model", "Operation", "Output"))
)
Keep = Literal["one", "divide", "none"]


def rescheme(
    model: str,
    /,
    *,
    scheme: Annotated[str, Parameter(group=OPERATION)],
    out: Annotated[Path, Parameter(name=("--out", "-o"), group=OUTPUT)],
    preserve: Annotated[Keep, Parameter(group=OPERATION)] = "one",
    weights: Annotated[Path | None, Parameter(group=MODEL)] = None,
    input: Annotated[str | None, Parameter(group=MODEL)] = None,
    depth: Annotated[int | None, Parameter(group=MODEL)] = None,
    classes: Annotated[int | None, Parameter(group=MODEL)] = None,
    seed: Annotated[int, Parameter(group=MODEL)] = 0,
    overwrite: Annotated[bool, Parameter(group=OUTPUT, negative=())] = False,
) -> None:
    """Dress the residual connections of a network in a scheme: LayerScale, SkipInit, ReZero, stochastic depth.

    Writes OUT/model.safetensors and OUT/rebuild.json; skipway.surgery.rebuild(OUT) gives the network back.

    Args:
        model: A name of ours, timm:NAME, torchvision:NAME, hf:CLASS, or FILE.py:NAME: a module, or what makes one.
        scheme: What stands behind every branch.
        out: Folder for the weights and how to rebuild the model.
        preserve: Gains start at 1; or at the scheme's value, divided out of the map in front; none: from scratch.
        weights: Its .safetensors or .pth file. [random]
        input: Shape of one sample, 3,224,224. [the model's]
        depth: Weight layers, for a family. [the model's]
        classes: Outputs. [the model's]
        seed: Of weights and samples.
        overwrite: Replace what is in OUT.
    """
    import torch

    from skipway._version import __version__
    from skipway.checkpoint.files import write_json, write_tensors
    from skipway.schemes.scheme import parse_scheme as read_scheme
    from skipway.surgery.storage import DESCRIPTION, WEIGHTS, Description, fill
    from skipway.zoo import ModelRequest, load_model

    dressing = str(read_scheme(scheme))
    if (out / WEIGHTS).exists() and not overwrite:
        raise SkipwayError(f"--out {out}: it holds {WEIGHTS} already; --overwrite replaces it")
    torch.manual_seed(seed)
    loaded = load_model(model, ModelRequest(depth=depth, classes=classes, shape=shape_of(input)))
    if weights is not None:
        fill(loaded.model, weights)
    options = {name: value for name, value in (("depth", depth), ("classes", classes)) if value is not None}
    description = Description(
        model=standing(model),
        scheme=dressing,
        preserve=preserve if preserve != "none" else False,
        input=tuple(loaded.shape),
        options=options,
        skipway=__version__,
    )
    operation = description.operate(loaded)
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / WEIGHTS, loaded.model.state_dict(), {})
    write_json(out / DESCRIPTION, asdict(description))
    sys.stdout.write(f"{operation}\nweights   {out / WEIGHTS}\nrebuild   {out / DESCRIPTION}\n")


def standing(model: str) -> str:
    """The text of a model, with the path of a file written out, so that it holds from any folder.

    >>> standing("timm:resnet18")
    'timm:resnet18'
    """
    file, colon, name = model.rpartition(":")
    return f"{Path(file).resolve()}{colon}{name}" if file.endswith(".py") else model


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """A shape in numbers.

    >>> shape_of("3,32,32")
    (3, 32, 32)
    """
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*([,x][1-9]\d*)*", text):
        raise SkipwayError(f"--input {text}: the rule is whole numbers with commas, 3,224,224 for colour images")
    return tuple(int(number) for number in re.split("[,x]", text))
