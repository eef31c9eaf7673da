"""`skipway predict`."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from skipway.cli.network_options import NetworkOptions
from skipway.cli.option_names import option_spelling
from skipway.errors import DataError, SkipwayError, counted, printable
from skipway.json_values import finite

if TYPE_CHECKING:
    from skipway.inference.predict import Prediction

__all__ = ["predict"]

PREDICTION, HARDWARE, OUTPUT = (
    Group(name, sort_key=number) for number, name in enumerate(("Prediction", "Hardware", "Output"))
)
Write = Callable[["Prediction"], object]


def predict(
    run: str,
    /,
    *images: Path,
    top: Annotated[int, Parameter(group=PREDICTION)] = 5,
    flip: Annotated[bool | None, Parameter(group=PREDICTION)] = None,
    batch_size: Annotated[int, Parameter(group=PREDICTION)] = 64,
    outside: Annotated[bool, Parameter(negative=(), group=PREDICTION)] = False,
    max_megapixels: Annotated[float, Parameter(group=PREDICTION)] = 64.0,
    device: Annotated[str, Parameter(group=HARDWARE)] = "auto",
    workers: Annotated[int | None, Parameter(group=HARDWARE)] = None,
    csv: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    json: Annotated[bool, Parameter(negative=(), group=OUTPUT)] = False,
    network: Annotated[NetworkOptions, Parameter(name="*")] = NetworkOptions(),  # noqa: B008 - frozen
) -> int:
    """Classify images with a trained run. No code from the run folder is executed.

    Prints one row per image: file, class, probability, and the next most probable classes. An image that cannot be read
    has the reason in its row; if none can be read, the exit status is 3.

    Args:
        run: Run folder, file of weights, hub folder, or hf:ORG/NAME.
        images: Image files and folders of images.
        top: Number of classes per image, the most probable first.
        flip: Average the logits with those of the mirrored image. [as the run]
        batch_size: Images per forward pass.
        outside: Follow links out of the folders of images.
        max_megapixels: Refuse images that decode to more megapixels; JPEG counts as reduced.
        network: How a network that is not Skipway's own is built again.
        device: auto, cpu, cuda, cuda:1.
        workers: Threads that decode images. [one per core]
        csv: Write the rows to this CSV file.
        json: Print one JSON object per line.
    """
    if not images:
        raise SkipwayError("no images: give files or folders, skipway predict RUN IMAGES…")
    if json and csv is not None:
        raise SkipwayError("--json and --csv: give one of the two")
    for name, value in (("top", top), ("batch-size", batch_size)):
        if value < 1:
            raise SkipwayError(f"--{name} {value}: the rule is --{name} >= 1")
    from skipway.hardware.limits import cpu_count
    from skipway.inference.predict import Predictor, image_files

    files, left_out = image_files(images, outside=outside)
    for sentence in left_out.sentences():
        print(f"skipway: {option_spelling(sentence)}", file=sys.stderr)
    predictor = Predictor.load(run, device=device, max_megapixels=max_megapixels, **network.choices)
    top = min(top, len(predictor.classes))
    read, first = 0, ""
    with open_writer(csv, as_json=json, top=top) as write:
        for prediction in predictor.stream(
            files, top=top, flip=flip, batch_size=batch_size, workers=cpu_count() if workers is None else workers
        ):
            write(replace(prediction, error=option_spelling(prediction.error)))
            read += not prediction.error
            if prediction.error and not first:
                first = f"{prediction.file}: {prediction.error}"
    if not read:
        raise DataError(
            f"none of {counted(len(files), 'image')} can be read; the first: {printable(first)}; see "
            "whether a viewer opens them"
        )
    return 0


@contextmanager
def open_writer(file: Path | None, *, as_json: bool, top: int) -> Iterator[Write]:
    """Yield a function that writes a prediction: as a line of JSON, to a CSV file, or as tab-separated text."""
    if as_json:
        yield lambda prediction: print(json.dumps(to_json(prediction)))
    elif file is not None:
        try:
            opened = file.open("w", encoding="utf-8", newline="")
        except OSError as error:
            raise SkipwayError(f"--csv {file}: cannot be written: {error.strerror}; name another file") from error
        with opened as stream:
            table = csv.writer(stream)
            table.writerow(csv_header(top))
            yield lambda prediction: table.writerow(csv_row(prediction, top))
    else:
        yield lambda prediction: sys.stdout.write(format_row(prediction) + "\n")


def to_json(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON values."""
    if prediction.error:
        return {"file": prediction.file, "label": None, "probability": None, "error": prediction.error}
    return finite(
        {
            "file": prediction.file,
            "label": prediction.label,
            "probability": prediction.probabilities[prediction.label],
            "probabilities": prediction.probabilities,
        }
    )


def csv_header(top: int) -> list[str]:
    """The titles of the CSV columns.

    >>> csv_header(2)
    ['file', 'label', 'probability', 'label_2', 'probability_2', 'error']
    """
    more = [f"{name}_{place}" for place in range(2, top + 1) for name in ("label", "probability")]
    return ["file", "label", "probability", *more, "error"]


def csv_row(prediction: Prediction, top: int) -> list[str]:
    """A prediction as a CSV row, with printable names."""
    pairs = list(prediction.probabilities.items())
    named = [text for name, share in pairs for text in (printable(name), f"{share:.6f}")]
    return [printable(prediction.file), *named, *[""] * (2 * top - len(named)), prediction.error]


def format_row(prediction: Prediction) -> str:
    """A prediction as tab-separated text."""
    classes = [f"{printable(name)} {share:.4f}" for name, share in prediction.probabilities.items()]
    return "\t".join([printable(prediction.file), *(classes or [f"cannot be read: {prediction.error}"])])
