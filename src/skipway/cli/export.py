"""`skipway export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from skipway.cli.network_options import NetworkOptions
from skipway.cli.option_names import print_note
from skipway.errors import SkipwayError, counted, printable

__all__ = ["export"]

OUTPUT = Group("Output")


def export(
    run: str,
    target: Path | None = None,
    /,
    *,
    onnx: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    pt2: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    hub: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    transformers: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    int8: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    limit: Annotated[float | None, Parameter(group=OUTPUT)] = None,
    sides: Annotated[Literal["dynamic", "fixed"], Parameter(group=OUTPUT)] = "dynamic",
    opset: Annotated[int | None, Parameter(group=OUTPUT)] = None,
    network: Annotated[NetworkOptions, Parameter(name="*")] = NetworkOptions(),  # noqa: B008 - frozen
) -> int:
    """Export a trained run with its preprocessing to other formats, and verify the result.

    Args:
        run: Run folder, file of weights, or hub folder.
        target: FILE.onnx, FILE.pt2, or a folder for the hub; the options name each.
        onnx: Write this ONNX file; compare it in onnxruntime.
        pt2: Write this torch.export program; reload and compare it.
        hub: Write this folder for the Hugging Face hub: weights, config, model card.
        transformers: Write this folder that transformers loads, of a decoder (family gpt): weights, config, tokenizer.
        int8: Write this .xml and .bin of OpenVINO in 8-bit integers, layers in float where the answers need it.
        limit: With --int8, how far top-1 on the validation images may fall. [0.005, half a point]
        sides: dynamic: other image sizes, too, if the network allows them; fixed: that of the run.
        opset: Version of the operators of ONNX. [the exporter's]
        network: How a network that is not Skipway's own is built again.
    """
    if target is not None:
        from skipway.inference.publish import target_kind

        kind = target_kind(target)
        if {".onnx": onnx, ".pt2": pt2, "folder": hub}.get(kind, target) is not None:
            raise SkipwayError(
                f"{printable(target)}: the rule is FILE.onnx, FILE.pt2 or a folder, and none of the same kind "
                "beside it; --hub FOLDER takes a folder of any name"
            )
        onnx = target if kind == ".onnx" else onnx
        pt2 = target if kind == ".pt2" else pt2
        hub = target if kind == "folder" else hub
    if onnx is None and pt2 is None and hub is None and transformers is None and int8 is None:
        raise SkipwayError(
            "nothing to export: give FILE.onnx, FILE.pt2 or a folder for the hub, or one of --onnx FILE, --pt2 FILE, "
            "--int8 FILE.xml, --hub FOLDER, --transformers FOLDER"
        )
    if limit is not None and int8 is None:
        raise SkipwayError(f"--limit {limit:g} has no effect without --int8 FILE.xml; leave it out")
    from skipway.inference.publish import write_hub_folder, write_onnx, write_program, write_transformers

    if onnx is not None:
        difference = write_onnx(run, onnx, sides=sides, opset=opset, **network.choices, remark=print_note)
        checked = "not verified" if difference is None else f"largest difference {difference:.2g}"
        sys.stdout.write(f"onnx      {printable(onnx)}, {checked}\n")
    if pt2 is not None:
        difference = write_program(run, pt2, sides=sides, **network.choices, remark=print_note)
        sys.stdout.write(f"pt2       {printable(pt2)}, largest difference {difference:.2g}\n")
    if int8 is not None:
        from skipway.inference.int8_file import write_int8

        found = write_int8(run, int8, limit=0.005 if limit is None else limit, **network.choices, remark=print_note)
        sys.stdout.write(f"int8      {printable(int8)} and {printable(int8.with_suffix('.bin').name)}\n")
        sys.stdout.write(f"answers   {found.answer}\n")
        names = ", ".join(map(printable, found.float_layers))
        layers = f"{len(found.float_layers)} of {counted(found.layers, 'layer')}"
        sys.stdout.write(f"float     {layers}{': ' * bool(names)}{names}\n")
        sys.stdout.write(f"checked   with INFERENCE_PRECISION_HINT={found.precision}\n")
        sys.stdout.write(f"speed     {found.speed}\n")
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
