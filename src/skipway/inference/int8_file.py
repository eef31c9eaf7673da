"""Export of a trained run in 8-bit integers, as a file of OpenVINO that is verified on the run's own images."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skipway.checkpoint.files import file_aside
from skipway.errors import SkipwayError, printable
from skipway.inference.answer_check import AnswerChange, AnswerCheck
from skipway.inference.backends import INT8, Choice, compile_openvino
from skipway.inference.onnx import check_path
from skipway.inference.predict import NetworkChoices, from_pretrained
from skipway.inference.publish import build_metadata, remark_flips
from skipway.inference.quantization import CALIBRATION_IMAGES, require_nncf
from skipway.inference.quantized_model import quantize
from skipway.inference.run_images import RunImages
from skipway.surgery.verification import difference

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Int8File", "write_int8"]

BATCH = 16
ROUNDING = 0.1
"""Largest difference over the largest output between the file and the network that was checked: see `TOLERANCES`."""


@dataclass(frozen=True)
class Int8File:
    """What was written.

    Args:
        answer: what the file changes on the validation images.
        layers: number of layers with weights.
        float_layers: names of those that stay in float.
        precision: what is in float as it was checked, by OpenVINO's `INFERENCE_PRECISION_HINT`: "f32" or "bf16".
        speed: the speed against float in a sentence.
    """

    answer: AnswerChange
    layers: int
    float_layers: tuple[str, ...]
    precision: str
    speed: str


def write_int8(
    path: str | Path,
    file: Path,
    *,
    limit: float = 0.005,
    seconds: float = 60.0,
    remark: Callable[[str], None] = warnings.warn,
    progress: Callable[[str], None] | None = None,
    **network: Unpack[NetworkChoices],
) -> Int8File:
    """Write a run's network in 8-bit integers as OpenVINO's `.xml` and `.bin`, and verify the file by running it.

    It is quantised as by `skipway.quantize`: calibrated on training images, and checked on the validation images, which
    are held in memory. It takes batches of any size, of images in the run's size; what is stored with the weights
    (network, preprocessing, classes) is in it as JSON, `openvino.Core().read_model(file).get_rt_info(["skipway",
    "preprocessing"])`, and as "precision" the type of what is in float, in which it was checked: OpenVINO's own choice
    may be a coarser one.

    Args:
        path: a run folder, or a file of weights in it.
        file: output path with the suffix `.xml`; the weights are written beside it.
        limit: largest fall of top-1 on the validation images, as a share of them.
        seconds: time of the search for the fastest way in float, see `optimize`.
        remark: called with a sentence about too few images, and where int8 is no faster than float here.
        progress: see `optimize`.
        network: see `from_pretrained`.

    Raises:
        MissingExtraError: nncf or openvino is not installed.
        CheckpointError: the weights cannot be used.
        DataError: the run's images have changed, or it has no validation images.
        SkipwayError: top-1 falls by more than the limit, another suffix, a `.bin` of that name without its `.xml`, or a
            file that computes something else.
    """
    file = check_path(file)
    if file.suffix != ".xml":
        raise SkipwayError(f"{printable(file)}: the rule is the suffix .xml, OpenVINO's; .bin is written beside it")
    weights = file.with_suffix(".bin")
    if os.path.lexists(weights) and not os.path.lexists(file):
        raise SkipwayError(
            f"{printable(weights)} is there without {printable(file.name)}, and would be overwritten by the weights: "
            "the rule is a name of which there are both files or neither; move it, or give another name"
        )
    require_nncf()
    model, run = from_pretrained(path, **network), RunImages(path)
    remark_flips(run.preprocessing, remark)
    images, labels = run.held_out()
    calibration = run.calibration(CALIBRATION_IMAGES)
    fast = quantize(
        *(model, calibration),
        check=(images, labels),
        limit=limit,
        example=calibration[:BATCH],
        backends=["openvino"],
        seconds=seconds,
        patience=math.inf,  # it was asked for, and nothing takes its place
        progress=progress,
    )
    found = fast.quantized
    if found is None or found.outputs is None:
        raise SkipwayError(f"nothing is written: {fast.remark}")
    written = found.network()
    for name, value in build_metadata(path, run.preprocessing).items():
        written.set_rt_info(json.dumps(value), ["skipway", name])
    written.set_rt_info(found.rest, ["skipway", "precision"])
    with file_aside(file) as aside:
        import openvino

        openvino.save_model(written, aside, compress_to_fp16=False)
        run_file = compile_openvino(openvino.Core().read_model(aside), Choice("openvino", INT8), found.rest)
        gap = difference([found.outputs], [run_file(found.example)])
        single = difference([found.outputs[:1]], [run_file(found.example[:1])])
        if not max(gap, single) <= ROUNDING:
            raise SkipwayError(
                f"{printable(file.name)} in OpenVINO differs from the network that was checked by "
                f"{max(gap, single):.1e} of the largest output"
            )
        check = AnswerCheck(images, labels, limit, BATCH)
        check.watch(model)
        answer = check.change(run_file)
        if not answer.kept:
            raise SkipwayError(f"{printable(file.name)} in OpenVINO: {answer.refusal}")
    if answer.doubt:
        remark(answer.doubt)
    if fast.precision != INT8:
        remark(f"the file is no gain in speed here: {fast.remark}")
    return Int8File(answer, len(found.layers), found.float_layers, found.rest, fast.remark)
