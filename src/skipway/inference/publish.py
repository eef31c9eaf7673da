"""Export of a trained run: an ONNX file, a torch.export program, or a folder for the Hugging Face hub."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from skipway._version import __version__
from skipway.checkpoint.files import (
    decode_json,
    describe_os_error,
    encode_json,
    file_aside,
    read_safetensors,
    refuse_other_files,
    write_tensors,
)
from skipway.data.preprocessing import Preprocessing
from skipway.errors import CheckpointError, SkipwayError, counted, printable
from skipway.inference.code_file import code_file, local_imports, network_file, portable_file, portable_name
from skipway.inference.decoder_folder import find_decoder_folder, write_transformers_folder
from skipway.inference.evaluation import wilson_interval
from skipway.inference.metrics import looked_at, percent
from skipway.inference.onnx import Sides, export_onnx, export_program
from skipway.inference.predict import NetworkChoices, describe_network, from_pretrained, weights_file
from skipway.inference.text_inputs import TextInputs
from skipway.inference.tokenizer_files import TOKENIZER_FILES

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["target_kind", "write_hub_folder", "write_onnx", "write_program", "write_transformers"]

HUB_FILES = ("model.safetensors", "config.json", "README.md")
# class names listed in a model card
MAX_CLASSES_LISTED = 100


def target_kind(target: Path) -> str:
    """What a path to export to names: ".onnx", ".pt2", "folder", or nothing for a file of another kind.

    The name of a folder that is not there yet has no ending, or that of a version.

    >>> target_kind(Path("a.onnx")), target_kind(Path("model-v1.0")), target_kind(Path("a.h5"))
    ('.onnx', 'folder', '')
    """
    if target.is_dir():
        return "folder"
    if target.suffix in (".onnx", ".pt2"):
        return target.suffix
    return "folder" if re.fullmatch(r"(\.v?\d+)?", target.suffix) else ""


def write_onnx(
    path: str | Path,
    file: Path,
    *,
    tolerance: float | None = 1e-4,
    sides: Sides = "dynamic",
    opset: int | None = None,
    remark: Callable[[str], None] = warnings.warn,
    **network: Unpack[NetworkChoices],
) -> float | None:
    """Write an ONNX file with the preprocessing as JSON in its metadata, and verify it in onnxruntime.

    Args:
        path: see `from_pretrained`, as for `network`.
        file: output path; see `skipway.export_onnx` for its inputs and outputs, and for the other arguments.

    Returns:
        the largest absolute difference to the network; None, with a remark, if onnxruntime is not installed.
    """
    model = from_pretrained(path, **network)
    inputs = get_inputs(model, sides, remark)
    remark_flips(inputs, remark)
    metadata = {name: json.dumps(value) for name, value in build_metadata(path, inputs).items()}
    return export_onnx(
        model, inputs.example, file, tolerance=tolerance, sides=sides, opset=opset, metadata=metadata, remark=remark
    )


def write_program(
    path: str | Path,
    file: Path,
    *,
    tolerance: float | None = 1e-4,
    sides: Sides = "dynamic",
    remark: Callable[[str], None] = warnings.warn,
    **network: Unpack[NetworkChoices],
) -> float:
    """Write a torch.export program (`.pt2`) with the preprocessing in its extra files, reload and compare it.

    `torch.export.load(file, extra_files={"preprocessing": ""})` returns both. Only load files that you trust. See
    `skipway.export_program` for `tolerance` and `sides`.

    Returns:
        the largest absolute difference to the network.
    """
    model = from_pretrained(path, **network)
    inputs = get_inputs(model, sides, remark)
    remark_flips(inputs, remark)
    extra = {name: json.dumps(value) for name, value in build_metadata(path, inputs).items()}
    return export_program(model, inputs.example, file, tolerance=tolerance, sides=sides, extra=extra, remark=remark)


def remark_flips(inputs: Preprocessing | TextInputs, remark: Callable[[str], None]) -> None:
    """Say that a file computes one of the two logits that the run's result is the mean of."""
    if isinstance(inputs, Preprocessing) and inputs.flip_test:
        remark(
            "the run was tested with the mean of the logits of an image and its mirror image; the file computes those "
            "of what it is given"
        )


def get_inputs(
    model: nn.Module, sides: Sides = "fixed", remark: Callable[[str], None] = warnings.warn
) -> Preprocessing | TextInputs:
    """What is stored with the weights of a network from `from_pretrained` about its inputs."""
    inputs = getattr(model, "text", None) or getattr(model, "preprocessing", None)
    if isinstance(inputs, TextInputs) and sides == "dynamic":
        remark(
            f"the file is for sequences of {inputs.context} tokens: a shorter one is filled up at its end, which "
            "changes nothing before, since no token sees a later one"
        )
    if isinstance(inputs, Preprocessing | TextInputs):
        return inputs
    raise SkipwayError("a folder of transformers is no run of skipway train: --transformers writes it again")


def build_metadata(path: str | Path, inputs: Preprocessing | TextInputs) -> dict[str, Any]:
    """The metadata stored with the weights: network (no folders of this machine in it), inputs, version."""
    file = weights_file(path)
    _, header = read_safetensors(file)
    model = decode_json(header["model"].encode(), file)
    if isinstance(inputs, TextInputs):
        return {"model": model, "text": inputs.to_json(), "skipway": __version__}
    return {
        "model": {**model, "name": portable_name(model["name"])},
        "preprocessing": inputs.to_json(),
        "input_steps": input_steps(inputs),
        "skipway": __version__,
        **({"reference": decode_json(header["reference"].encode(), file)} if "reference" in header else {}),
    }


def input_steps(preprocessing: Preprocessing) -> list[str]:
    """What has to be done to an image file before the network sees it, for a reader without Skipway."""
    size, share = preprocessing.size, f"{100 * preprocessing.crop_share:g} %"
    square = {
        "crop": f"take the central square of {share} of the shorter side",
        "pad": f"centre it on a square of grey 128 as wide as its longer side, and take the central {share} of that",
        "squeeze": f"take the central {share} of both sides",
    }[preprocessing.fit]
    grey16 = {
        "range": "scale 16-bit grey to 8 bits by round(value / 257)",
        "minmax": "scale 16-bit grey to 8 bits by the least and the largest value of the image",
    }[preprocessing.grey16]
    mode = "8-bit grey (L = 0.299 R + 0.587 G + 0.114 B)" if preprocessing.channels == 1 else "8-bit RGB"
    return [
        "decode the first frame (a JPEG of many times the size may be decoded at 1/2, 1/4 or 1/8 of its size)",
        "turn it upright by its EXIF orientation",
        grey16,
        f"lay transparency on white, and convert to {mode}",
        square,
        f"scale it to {size} x {size}, {preprocessing.resample}, antialiased as Pillow does it",
        "divide by 255",
        f"subtract the mean {list(preprocessing.mean)}, divide by the standard deviation {list(preprocessing.std)}",
        f"order as (N, {preprocessing.channels}, {size}, {size}), float32",
        *["run the network on the mirror image, too, and take the mean of the logits"] * preprocessing.flip_test,
    ]


def write_hub_folder(
    path: str | Path,
    folder: Path,
    *,
    remark: Callable[[str], None] = warnings.warn,
    **network: Unpack[NetworkChoices],
) -> None:
    """Write weights, config and model card in the layout of the Hugging Face hub; `from_pretrained` loads the folder.

    The Python file or config of a network that is made by one is written beside the weights.

    Args:
        path: a run folder, or a file of weights in it.
        folder: output folder: new, empty, or written by this function before.
        remark: called with a sentence about modules that the Python file imports and that are not written.
        network: see `from_pretrained`.

    Raises:
        SkipwayError: the folder contains other files.
        CheckpointError: the weights cannot be used, or the folder cannot be written.
    """
    file = weights_file(path)
    tensors, header = read_safetensors(file)
    described = describe_network(decode_json(header.get("model", "{}").encode(), file), network.get("model"), file)
    code, made_by = code_file(described["name"]), network_file(described["name"])
    beside = portable_file(described["name"])
    own = (*HUB_FILES, *([] if beside is None else [beside.name]))
    refuse_other_files(folder, own)
    preprocessing = get_inputs(from_pretrained(path, **network))
    if isinstance(preprocessing, TextInputs):
        raise SkipwayError("a language model is written for the hub by --transformers FOLDER, which transformers loads")
    about = build_metadata(path, preprocessing)
    about["model"]["name"] = portable_name(described["name"])
    missing = [] if code is None else local_imports(code)
    if missing and code is not None:
        remark(f"{code.name} imports {', '.join(missing)} from its folder, not written: put the code into one file")
    card = model_card(about, preprocessing, read_result(file), missing)
    config = {"library_name": "skipway", "architecture": about["model"]["name"], **about}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{printable(folder)} cannot be written: {describe_os_error(error)}") from error
    try:
        with file_aside(folder / "config.json") as file:
            write_tensors(file.with_name("model.safetensors"), tensors, about)
            file.with_name("README.md").write_text(card, encoding="utf-8")
            if made_by is not None and beside is not None:
                file.with_name(beside.name).write_bytes(made_by.read_bytes())
            file.write_bytes(encode_json(config))
    finally:
        with suppress(OSError):  # holds something, as it should
            folder.rmdir()


def write_transformers(path: str | Path, folder: Path, **network: Unpack[NetworkChoices]) -> float | None:
    """Write the decoder of a run, or of a folder of transformers, as a folder of transformers with its tokenizer.

    Args:
        path: see `from_pretrained`, as for `network`.
        folder: see `write_transformers_folder`, as for what is returned and raised.
    """
    model, source = from_pretrained(path, **network), find_decoder_folder(path)
    if source is not None and any((source / name).is_file() for name in TOKENIZER_FILES):
        return write_transformers_folder(model, folder, tokenizer=source)
    inputs = getattr(model, "text", None)
    return write_transformers_folder(model, folder, tokenizer=inputs.tokenizer if inputs is not None else None)


def read_result(file: Path) -> dict[str, Any] | None:
    """Read the test result from the header of a weight file; None if the weights were not tested."""
    _, header = read_safetensors(file)
    if "result" not in header:
        return None
    result = decode_json(header["result"].encode(), file)
    counts = [result.get(name) if isinstance(result, dict) else None for name in ("test_correct", "test_images")]
    return result if all(isinstance(count, int) and count >= 0 for count in counts) else None


def loading_text(name: str, missing: Sequence[str]) -> str:
    """How the network of a hub folder is loaded, in Markdown, and whether that runs code."""
    code = code_file(name)
    trust, option = ("", "") if code is None else (", trust_code=True", " --trust-code")
    lines = [
        *("```python", "import skipway as sw", ""),
        f'model = sw.from_pretrained("FOLDER OR hf:ORG/NAME"{trust})  # evaluation mode, model.preprocessing',
        *("```", "", "```", f"skipway predict FOLDER photo.jpg{option}", "```", ""),
    ]
    if code is None:
        return "\n".join([*lines, "The weights are safetensors; loading them executes no code from this repository."])
    lines.append(
        f"The network is made by {format_code(code.name)} in this repository, which is run by the lines above: read it "
        "first. The weights are safetensors."
    )
    if missing:
        lines.append(f"It imports {', '.join(map(format_code, missing))}, to be added to this repository.")
    return "\n".join(lines)


def model_card(
    about: dict[str, Any], preprocessing: Preprocessing, result: dict[str, Any] | None, missing: Sequence[str] = ()
) -> str:
    """The model card in Markdown. Its header is YAML, a superset of JSON, so every string in it is quoted."""
    name = str(about["model"]["name"])
    head: dict[str, Any] = {
        "library_name": "skipway",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "residual-network", "skipway"],
        "license": "other",
    }
    figures = "Not measured here."
    if result is not None:
        correct, images = int(result["test_correct"]), int(result["test_images"])
        low, high = wilson_interval(correct, images)
        validation = int(result.get("validation_images") or 0)
        chosen = f"on {counted(validation, 'validation image')}" if validation else "as those of the last epoch"
        tests = result.get("tested_after")
        looked = looked_at(
            len(tests) if isinstance(tests, list) else 1, f"after these weights had been chosen {chosen}"
        )
        figures = (
            f"Correctly classified: {percent(correct / max(1, images))} of {counted(images, 'test image')} "
            f"(95 % interval {100 * low:.1f} to {percent(high)}). The test images were {looked}."
        )
        metric = {"type": "accuracy", "value": correct / max(1, images)}
        task = {"type": "image-classification"}
        dataset = {"name": "the run's test images", "type": "image-folder"}
        head["model-index"] = [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": [metric]}]}]
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    classes = ", ".join(format_code(each) for each in preprocessing.classes[:MAX_CLASSES_LISTED])
    more = (
        f" and {len(preprocessing.classes) - MAX_CLASSES_LISTED:,} more, see config.json"
        if len(preprocessing.classes) > MAX_CLASSES_LISTED
        else ""
    )
    steps = "\n".join(f"{number}. {step}." for number, step in enumerate(input_steps(preprocessing), 1))
    return f"""---
{yaml}
---

# {name}

A residual network for {len(preprocessing.classes):,} classes, trained with Skipway {__version__}.

## How to use it

{loading_text(name, missing)}

## Result

{figures}

## Images

{steps}

## Classes

{classes}{more}

## Licence

To be filled in: the licence of these weights, which may depend on that of the images.
"""


def format_code(name: str) -> str:
    """Format a name as inline code in Markdown."""
    return "`" + printable(name).replace("`", "'") + "`"
