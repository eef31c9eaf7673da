"""`skipway export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from skipway.errors import SkipwayError

__all__ = ["export"]

OUTPUT = Group("Output")


def export(
    run: str,
    /,
    *,
    onnx: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    pt2: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    hub: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
) -> int:
    """Write a trained run in a form that others take, with its preprocessing, and check it.

    Args:
        run: Run folder, file of weights, or hub folder.
        onnx: ONNX file, compared with the network in onnxruntime.
        pt2: Program of torch.export, read again and compared.
        hub: Folder for the Hugging Face hub: weights, config, model card.
    """
    if onnx is None and pt2 is None and hub is None:
        raise SkipwayError("nothing to write: give --onnx FILE, --pt2 FILE or --hub FOLDER")
    from skipway.data.split import printable
    from skipway.inference.publish import write_hub_folder, write_onnx, write_program

    if onnx is not None:
        difference = write_onnx(run, onnx)
        checked = "not checked: onnxruntime is not installed" if difference is None else f"differs by {difference:.2g}"
        sys.stdout.write(f"onnx      {printable(onnx)}, {checked}\n")
    if pt2 is not None:
        sys.stdout.write(f"pt2       {printable(pt2)}, differs by {write_program(run, pt2):.2g}\n")
    if hub is not None:
        write_hub_folder(run, hub)
        sys.stdout.write(f"hub       {printable(hub)}; fill in the licence in {printable(hub / 'README.md')}\n")
        sys.stdout.write(f"load      skipway.from_pretrained({str(hub)!r})\n")
    return 0
