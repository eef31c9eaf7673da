"""`skipway evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from skipway.cli.network_options import NetworkOptions
from skipway.errors import SkipwayError, counted, printable, spelling
from skipway.json_values import finite

if TYPE_CHECKING:
    from skipway.inference.run_evaluation import RunEvaluation

__all__ = ["evaluate"]

EVALUATION, HARDWARE, OUTPUT = (
    Group(name, sort_key=number) for number, name in enumerate(("Evaluation", "Hardware", "Output"))
)
# width of the labels, as in `skipway train`
LABEL = 10
SHOWN = 5
COLUMNS = "image,label,split"


def evaluate(
    run: str,
    data: Path | None = None,
    /,
    *,
    flip: Annotated[bool | None, Parameter(group=EVALUATION)] = None,
    batch_size: Annotated[int | None, Parameter(group=EVALUATION)] = None,
    outside: Annotated[bool, Parameter(negative=(), group=EVALUATION)] = False,
    max_megapixels: Annotated[float, Parameter(group=EVALUATION)] = 64.0,
    columns: Annotated[str, Parameter(group=EVALUATION)] = COLUMNS,
    device: Annotated[str, Parameter(group=HARDWARE)] = "auto",
    json: Annotated[bool, Parameter(negative=(), group=OUTPUT)] = False,
    network: Annotated[NetworkOptions, Parameter(name="*")] = NetworkOptions(),  # noqa: B008 - frozen
) -> int:
    """Evaluate a trained run: accuracy with its interval, and recall, precision and F1 per class, or bits per byte.

    Without DATA, the best weights on the test split of the run itself. No code from the run folder
    is executed.

    Args:
        run: Run folder, file of weights, hub folder, folder of transformers, or hf:ORG/NAME.
        data: Other images, as for `skipway train`, of classes of the run, or another text. [test split of the run]
        flip: Average the logits with those of the mirrored image. [as the run]
        json: Print JSON, with the confusion matrix up to 1,000 classes.
        batch_size: Images or sequences per forward pass. [as in training; 64 for DATA, 16 for text]
        outside: Follow links out of DATA.
        max_megapixels: Refuse images that decode to more megapixels; JPEG counts as reduced.
        columns: Column names of a list, or of the text in a table.
        network: How a network that is not Skipway's own is built again.
        device: auto, cpu, cuda, cuda:1.
    """
    if batch_size is not None and batch_size < 1:
        raise SkipwayError(f"--batch-size {batch_size}: the rule is --batch-size >= 1")
    from skipway.data.sources.columns import parse_column, parse_columns
    from skipway.inference.decoder_folder import find_decoder_folder
    from skipway.inference.predict import find_text_inputs
    from skipway.inference.run_evaluation import evaluate_images, evaluate_run

    if find_decoder_folder(run) is not None or find_text_inputs(run) is not None:
        options = {"--flip": flip is not None, "--max-megapixels": max_megapixels != 64.0}
        refuse(options, ": an option for images, and this run is of text")
        options = {f"--{name.replace('_', '-')}": bool(value) for name, value in network.choices.items()}
        refuse(options, ": an option for networks of others, and one of text is Skipway's own")
        if data is None:
            options = {"--outside": outside, "--columns": columns != COLUMNS}
            refuse(options, " has no effect without DATA: the run's test text is read as in training")
        choices = {"column": parse_column(columns), "outside": outside, "device": device, "batch_size": batch_size}
        return evaluate_text(run, data, as_json=json, **choices)
    if data is None:
        options = {"--outside": outside, "--max-megapixels": max_megapixels != 64.0, "--columns": columns != COLUMNS}
        refuse(options, " has no effect without DATA: the run's test images are read as in training")
        result = evaluate_run(run, device=device, flip=flip, batch_size=batch_size, **network.choices)
    else:
        from skipway.hardware.limits import cpu_count

        result = evaluate_images(
            run,
            data,
            device=device,
            flip=flip,
            batch_size=batch_size or 64,
            workers=cpu_count(),
            outside=outside,
            max_megapixels=max_megapixels,
            columns=parse_columns(columns),
            **network.choices,
        )
    if json:
        sys.stdout.write(encode_evaluation(result) + "\n")
    else:
        print_evaluation(result)
    return 0


def refuse(options: dict[str, bool], reason: str) -> None:
    """Refuse the first option that is given, with the reason why it has no effect."""
    for option in (name for name, given in options.items() if given):
        raise SkipwayError(f"{option}{reason}; leave it out")


def evaluate_text(run: str, data: Path | None, *, as_json: bool, **choices: Any) -> int:
    """Evaluate a language model, see `evaluate_text_run`, and print the result."""
    from dataclasses import asdict

    from skipway.cli.option_names import option_spelling
    from skipway.inference.text_run import evaluate_text_run
    from skipway.report.text_summary import bits_text

    with spelling(column="columns"):
        result = evaluate_text_run(run, data, **choices)
    found = result.evaluation
    if as_json:
        values = {
            "data": result.name,
            **asdict(found),
            "bits_per_byte": found.bits_per_byte,
            "accuracy": found.accuracy,
            "remarks": [option_spelling(remark) for remark in result.remarks],
        }
        sys.stdout.write(json.dumps(finite(values)) + "\n")
        return 0
    lines = [("data", printable(result.name)), *(("note", option_spelling(remark)) for remark in result.remarks)]
    for label, text in (*lines, ("bits", bits_text(found))):
        sys.stdout.write(f"{label:<{LABEL}}{text}\n")
    return 0


def encode_evaluation(result: RunEvaluation) -> str:
    """Encode the evaluation with all metrics as JSON."""
    from skipway.inference.evaluation import wilson_interval
    from skipway.inference.metrics import class_scores

    evaluation = result.evaluation
    scores = class_scores(evaluation.confusion)
    values: dict[str, Any] = {
        "data": result.name,
        "accuracy": evaluation.accuracy,
        "interval": wilson_interval(evaluation.correct, evaluation.total),
        "correct": evaluation.correct,
        "images": evaluation.total,
        "loss": evaluation.loss,
        "balanced_accuracy": scores.balanced_accuracy,
        "macro_f1": scores.macro_f1,
        "classes": [
            {"name": name, "images": int(images), "recall": recall, "precision": precision, "f1": f1}
            for name, images, recall, precision, f1 in zip(
                result.classes,
                *(column.tolist() for column in (scores.images, scores.recall, scores.precision, scores.f1)),
                strict=True,
            )
        ],
        "confusion": None if evaluation.confusion.is_sparse else evaluation.confusion.tolist(),
        "unreadable": [list(entry) for entry in result.unreadable],
        "remarks": list(result.remarks),
    }
    return json.dumps(finite(values))


def print_evaluation(result: RunEvaluation) -> None:
    """Print the result, and the classes in a table, the worst first."""
    from skipway.cli.option_names import option_spelling
    from skipway.cli.table import print_table
    from skipway.data.split import name_list
    from skipway.inference.metrics import class_scores, percent
    from skipway.report.summary import accuracy_text, mistakes_text

    evaluation = result.evaluation
    scores = class_scores(evaluation.confusion)

    def say(label: str, text: str) -> None:
        sys.stdout.write(f"{label:<{LABEL}}{text}\n")

    classes = counted(len(result.classes), "class", "classes")
    say("data", f"{printable(result.name)}: {counted(evaluation.total, 'image')}, {classes}")
    for file, reason in result.unreadable[:SHOWN]:
        say("damaged", f"{printable(file)}: {option_spelling(reason)}")
    if len(result.unreadable) > SHOWN:
        say("damaged", f"and {len(result.unreadable) - SHOWN:,} more")
    for remark in result.remarks:
        say("note", option_spelling(remark))
    if result.absent:
        say("note", f"no image of class {name_list(result.absent)}")
    say("accuracy", accuracy_text(evaluation))
    say("mean", f"recall {percent(scores.balanced_accuracy)} and F1 {percent(scores.macro_f1)} over the classes")
    say("mistakes", mistakes_text(evaluation, result.classes))
    sys.stdout.write("\n")
    titles = ("class", "recall", "precision", "F1", "images")
    rows: list[tuple[str, ...]] = []
    for place in scores.f1.sort(stable=True).indices.tolist():
        shares = [percent(float(column[place])) for column in (scores.recall, scores.precision, scores.f1)]
        rows.append((printable(result.classes[place]), *shares, f"{int(scores.images[place]):,}"))
    print_table(titles, rows, right=titles[1:])
