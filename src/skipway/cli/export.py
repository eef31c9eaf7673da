"""`skipway export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from skipway.cli.network_options import NetworkOptions
from skipway.cli.option_names import print_note
from skipway.errors import SkipwayError, printable

__all__ = ["export"]

OUTPUT = Group("Output")


def export(
    run: str,
    /,
    *,
    onnx: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    pt2: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    hub: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    transformers: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    sides: Annotated[Literal["dynamic", "fixed"], Parameter(group=OUTPUT)] = "dynamic",
    opset: Annotated[int | None, Parameter(group=OUTPUT)] = None,
    network: Annotated[NetworkOptions, Parameter(name="*")] = NetworkOptions(),  # noqa: B008 - frozen
) -> int:
    """Export a trained run with its preprocessing to other formats, and verify the result.

    Args:
        run: Run folder, file of weights, or hub folder.
        onnx: Write this ONNX file; compare it in onnxruntime.
        pt2: Write this torch.export program; reload and compare it.
        hub: Write this folder for the Hugging Face hub: weights, config, model card.
        transformers: Write this folder that transformers loads, of a decoder (family gpt): weights, config, tokenizer.
        sides: dynamic: other image sizes, too, if the network allows them; fixed: that of the run.
        opset: Version of the operators of ONNX. [the exporter's]
        network: How a network that is not Skipway's own is built again.
    """
    if onnx is None and pt2 is None and hub is None and transformers is None:
        raise SkipwayError("nothing to export: give --onnx FILE, --pt2 FILE, --hub FOLDER or --transformers FOLDER")
    from skipway.inference.publish import write_hub_folder, write_onnx, write_program, write_transformers

    if onnx is not None:
        difference = write_onnx(run, onnx, sides=sides, opset=opset, **network.choices, remark=print_note)
        checked = "not verified: onnxruntime is not installed"
        if difference is not None:
            checked = f"largest difference {difference:.2g}"
        sys.stdout.write(f"onnx      {printable(onnx)}, {checked}\n")
    if pt2 is not None:
        difference = write_program(run, pt2, sides=sides, **network.choices, remark=print_note)
        sys.stdout.write(f"pt2       {printable(pt2)}, largest difference {difference:.2g}\n")
    if hub is not None:
        write_hub_folder(run, hub, remark=print_note, **network.choices)
        sys.stdout.write(f"hub       {printable(hub)}; add the licence to {printable(hub / 'README.md')}\n")
        trust = ", trust_code=True" if any(hub.glob("*.py")) else ""
        sys.stdout.write(f"load      skipway.from_pretrained({str(hub)!r}{trust})\n")
    if transformers is not None:
        difference = write_transformers(run, transformers, **network.choices)
        checked = "not verified: transformers is not installed"
        if difference is not None:
            checked = f"largest difference {difference:.2g} of the largest logit"
        sys.stdout.write(f"folder    {printable(transformers)}, {checked}\n")
        sys.stdout.write(f"load      transformers.AutoModelForCausalLM.from_pretrained({str(transformers)!r})\n")
    return 0
