"""A trained run as others take it: an ONNX file, a program of torch.export, a folder for the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from skipway._version import __version__
from skipway.checkpoint.files import decode_json, encode_json, read_safetensors, write_atomically, write_tensors
from skipway.data.preprocessing import Preprocessing
from skipway.data.split import printable
from skipway.errors import CheckpointError, SkipwayError
from skipway.inference.evaluation import wilson_interval
from skipway.inference.metrics import percent
from skipway.inference.onnx import export_onnx, export_program
from skipway.inference.predict import from_pretrained, weights_file

__all__ = ["write_hub_folder", "write_onnx", "write_program"]

HUB_FILES = ("model.safetensors", "config.json", "README.md")
# class names in a model card
MOST_NAMED = 100


def write_onnx(path: str | Path, file: Path) -> float | None:
    """An ONNX file, checked in onnxruntime, with the preprocessing as JSON in its metadata.

    Args:
        path: see `from_pretrained`.
        file: where to; `skipway.export_onnx` says what it takes and yields.

    Returns:
        the largest difference to the network; None where onnxruntime is not installed.
    """
    model = from_pretrained(path)
    made = preprocessing_of(model)
    difference = export_onnx(model, made.example, file)
    import onnx

    # the weights of a large network are in a file of their own, which stays as it is
    proto = onnx.load(file, load_external_data=False)
    for name, value in described(path, made).items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = name, json.dumps(value)
    content = proto.SerializeToString()
    write_atomically(file, lambda aside: aside.write_bytes(content))
    return difference


def write_program(path: str | Path, file: Path) -> float:
    """A `.pt2` file of torch.export, read again and compared, with the preprocessing in its extra files.

    `torch.export.load(file, extra_files={"preprocessing": ""})` gives both back. That call trusts the file.

    Returns:
        the largest difference to the network.
    """
    model = from_pretrained(path)
    made = preprocessing_of(model)
    extra = {name: json.dumps(value) for name, value in described(path, made).items()}
    return export_program(model, made.example, file, extra=extra)


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """That of a network of `from_pretrained`."""
    made = getattr(model, "preprocessing", None)
    assert isinstance(made, Preprocessing)
    return made


def described(path: str | Path, made: Preprocessing) -> dict[str, Any]:
    """What goes with the weights: network, preprocessing, version."""
    file = weights_file(path)
    _, header = read_safetensors(file)
    return {
        "model": decode_json(header["model"].encode(), file),
        "preprocessing": made.to_json(),
        "skipway": __version__,
    }


def write_hub_folder(path: str | Path, folder: Path) -> None:
    """Weights, config and model card in the layout of the Hugging Face hub; `from_pretrained` loads the folder.

    Args:
        path: a run folder, or a file of weights in it.
        folder: new, empty, or holding what this function wrote before.

    Raises:
        SkipwayError: the folder holds something else.
        CheckpointError: weights that cannot be used, or the folder cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(not ours(entry) for entry in folder.iterdir())):
        raise SkipwayError(f"{printable(folder)} holds something else; choose a new or an empty folder")
    made = preprocessing_of(from_pretrained(path))
    file = weights_file(path)
    tensors, _ = read_safetensors(file)
    about = described(path, made)
    card = model_card(about, made, result_of(file))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "model.safetensors", tensors, about)
        config = {"library_name": "skipway", "architecture": about["model"]["name"], **about}
        write_atomically(folder / "config.json", lambda aside: aside.write_bytes(encode_json(config)))
        write_atomically(folder / "README.md", lambda aside: aside.write_text(card, encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{printable(folder)} cannot be written: {error.strerror or error}") from error


def ours(entry: Path) -> bool:
    """Whether a file is one of a hub folder's, or git's."""
    return entry.name in HUB_FILES or entry.name.startswith(".git")


def result_of(file: Path) -> dict[str, Any] | None:
    """The test result in the header of a file of weights; None where they were not tested."""
    _, header = read_safetensors(file)
    if "result" not in header:
        return None
    result = decode_json(header["result"].encode(), file)
    counts = [result.get(name) if isinstance(result, dict) else None for name in ("test_correct", "test_images")]
    return result if all(isinstance(count, int) and count >= 0 for count in counts) else None


def model_card(about: dict[str, Any], made: Preprocessing, result: dict[str, Any] | None) -> str:
    """The card in Markdown. Its head is YAML, of which JSON is a part, so every text in it is quoted."""
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
        figures = (
            f"{percent(correct / max(1, images))} of {images:,} test images are classified correctly "
            f"(95 % interval {100 * low:.1f} to {percent(high)}). They were looked at once, after these weights had "
            f"been chosen{f' on {validation:,} validation images' if validation else ' as those of the last epoch'}."
        )
        metric = {"type": "accuracy", "value": correct / max(1, images)}
        task = {"type": "image-classification"}
        dataset = {"name": "the run's test images", "type": "image-folder"}
        head["model-index"] = [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": [metric]}]}]
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    classes = ", ".join(code(each) for each in made.classes[:MOST_NAMED])
    more = f" and {len(made.classes) - MOST_NAMED:,} more, see config.json" if len(made.classes) > MOST_NAMED else ""
    colour = "grey" if made.channels == 1 else "colour"
    return f"""---
{yaml}
---

# {name}

A residual network for {len(made.classes):,} classes, trained with Skipway {__version__}.

## How to use it

```python
import skipway as sw

model = sw.from_pretrained("FOLDER OR hf:ORG/NAME")  # evaluation mode, model.preprocessing
```

```
skipway predict FOLDER photo.jpg
```

The weights are safetensors; nothing in this repository is run when it is loaded.

## Result

{figures}

## Images

{made.size} x {made.size} {colour}; mean {list(made.mean)}, standard deviation {list(made.std)} of values from 0 to 1;
the central {percent(made.share)} of the shorter side.

## Classes

{classes}{more}

## Licence

To be filled in: the licence of these weights, which may depend on that of the images.
"""


def code(name: str) -> str:
    """A name as it can stand in Markdown."""
    return "`" + printable(name).replace("`", "'") + "`"
