"""`skipway predict`."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from skipway.errors import DataError, SkipwayError

if TYPE_CHECKING:
    from skipway.inference.predict import Prediction

__all__ = ["predict"]

OUTPUT, MACHINE = (Group(name, sort_key=number) for number, name in enumerate(("Output", "Machine")))
Write = Callable[["Prediction"], object]


def predict(
    run: str,
    /,
    *images: Path,
    top: Annotated[int, Parameter(group=OUTPUT)] = 5,
    csv: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    json: Annotated[bool, Parameter(negative=(), group=OUTPUT)] = False,
    flip: Annotated[bool, Parameter(negative=(), group=OUTPUT)] = False,
    batch_size: Annotated[int, Parameter(group=MACHINE)] = 64,
    workers: Annotated[int | None, Parameter(group=MACHINE)] = None,
    device: Annotated[str, Parameter(group=MACHINE)] = "auto",
) -> int:
    """Say what images show, by a trained run. Nothing that its folder holds is run.

    Writes a row per image: file, class, probability, and the classes that come next. An image that cannot be read has
    the reason in its row; the exit status is 3 if that is so for all of them.

    Args:
        run: Run folder, file of weights, hub folder, or hf:ORG/NAME.
        images: Image files, and folders of them.
        top: Classes that are told, the most probable ones.
        csv: Write the rows to this file.
        json: One JSON object per line.
        flip: See the mirror images too.
        batch_size: Images at a time.
        workers: Threads that decode. [one per core]
        device: auto, cpu, cuda, cuda:1.
    """
    if not images:
        raise SkipwayError("no images: skipway predict RUN IMAGE…, files or folders")
    if json and csv is not None:
        raise SkipwayError("--json and --csv: give one of the two")
    for name, value in (("top", top), ("batch-size", batch_size)):
        if value < 1:
            raise SkipwayError(f"--{name} {value}: the rule is at least 1")
    from skipway.hardware.processor import cpu_count
    from skipway.inference.predict import Predictor, image_files

    files = image_files(images)
    predictor = Predictor.load(run, device=device)
    top = min(top, len(predictor.classes))
    read, first = 0, ""
    with writer(csv, as_json=json, top=top) as write:
        for prediction in predictor.stream(
            files, top=top, flip=flip, batch_size=batch_size, workers=cpu_count() if workers is None else workers
        ):
            write(prediction)
            read += not prediction.error
            if prediction.error and not first:
                first = f"{prediction.file}: {prediction.error}"
    if not read:
        from skipway.data.split import printable

        raise DataError(f"none of the {len(files)} images can be read; the first: {printable(first)}")
    return 0


@contextmanager
def writer(file: Path | None, *, as_json: bool, top: int) -> Iterator[Write]:
    """What takes the rows: lines of JSON, a CSV file, or text with tabs between the columns."""
    if as_json:
        yield lambda prediction: print(json.dumps(row_of(prediction)))
    elif file is not None:
        try:
            opened = file.open("w", encoding="utf-8", newline="")
        except OSError as error:
            raise SkipwayError(f"--csv {file}: cannot be written: {error.strerror}") from error
        with opened as stream:
            table = csv.writer(stream)
            table.writerow(columns(top))
            yield lambda prediction: table.writerow(cells(prediction, top))
    else:
        yield lambda prediction: sys.stdout.write(line_of(prediction) + "\n")


def row_of(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON values; numbers that are none become null."""
    if prediction.error:
        return {"file": prediction.file, "label": None, "probability": None, "error": prediction.error}
    shares = {name: share if math.isfinite(share) else None for name, share in prediction.probabilities.items()}
    return {
        "file": prediction.file,
        "label": prediction.label,
        "probability": shares[prediction.label],
        "probabilities": shares,
    }


def columns(top: int) -> list[str]:
    """The head of a table.

    >>> columns(2)
    ['file', 'label', 'probability', 'label_2', 'probability_2', 'error']
    """
    more = [f"{name}_{place}" for place in range(2, top + 1) for name in ("label", "probability")]
    return ["file", "label", "probability", *more, "error"]


def cells(prediction: Prediction, top: int) -> list[str]:
    """A row of a table; names as a terminal can show them."""
    from skipway.data.split import printable

    pairs = list(prediction.probabilities.items())
    told = [text for name, share in pairs for text in (printable(name), f"{share:.6f}")]
    return [printable(prediction.file), *told, *[""] * (2 * top - len(told)), prediction.error]


def line_of(prediction: Prediction) -> str:
    """A row of text."""
    from skipway.data.split import printable

    told = [f"{printable(name)} {share:.4f}" for name, share in prediction.probabilities.items()]
    return "\t".join([printable(prediction.file), *(told or [f"cannot be read: {prediction.error}"])])
