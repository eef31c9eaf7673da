"""`skipway diagnose`: will a network train, what is at fault, what to do."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from skipway.errors import SkipwayError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from skipway.diagnosis import Diagnosis, Finding, Treatment
    from skipway.zoo import LoadedModel

__all__ = ["Question", "diagnose"]

OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"]
Flag = Annotated[bool, Parameter(negative=())]
MODEL, BATCH, TRAINING, DIAGNOSIS, MACHINE, OUTPUT = (
    Group(name, sort_key=number)
    for number, name in enumerate(("Model", "Batch", "Training", "Diagnosis", "Machine", "Output"))
)
WILL_NOT_TRAIN = 1


@dataclass(frozen=True, kw_only=True)
class Question:
    """The options of `skipway diagnose`. The line under each field is its help on the command line."""

    scheme: Annotated[str | None, Parameter(group=MODEL)] = None
    """Residual scheme. [the model's own]"""

    depth: Annotated[int | None, Parameter(group=MODEL)] = None
    """Weight layers, of a family. [the model's own]"""

    classes: Annotated[int | None, Parameter(group=MODEL)] = None
    """Classes. [the model's, or those of --batch]"""

    input: Annotated[str | None, Parameter(group=BATCH)] = None
    """Shape of a sample, 3,224,224. [the model's]"""

    samples: Annotated[int, Parameter(group=BATCH)] = 32
    """Samples in the batch."""

    batch: Annotated[Path | None, Parameter(group=BATCH)] = None
    """Folder of images by class, or a text. [random]"""

    outside: Annotated[bool, Parameter(negative=(), group=BATCH)] = False
    """Follow links out of the folder of images."""

    optimizer: Annotated[OptimizerName, Parameter(group=TRAINING)] = "sgd"
    """Optimizer used for training."""

    lr: Annotated[float | None, Parameter(group=TRAINING)] = None
    """Learning rate. [sgd 0.1, adam 0.001]"""

    weight_decay: Annotated[float, Parameter(group=TRAINING)] = 0.0
    """Weight decay."""

    warmup: Annotated[int, Parameter(group=TRAINING)] = 0
    """Steps of learning rate warm-up."""

    steps: Annotated[int, Parameter(group=TRAINING)] = 1000
    """Planned steps of training."""

    eval_mode: Annotated[Flag, Parameter(group=TRAINING)] = False
    """Measure in evaluation mode."""

    thorough: Annotated[Flag, Parameter(group=DIAGNOSIS)] = False
    """Also measure largest singular values."""

    fix: Annotated[Flag, Parameter(group=DIAGNOSIS)] = False
    """Apply remedies; compare before and after."""

    lint: Annotated[Flag, Parameter(group=DIAGNOSIS)] = False
    """Only check for known mistakes; runs nothing."""

    device: Annotated[str, Parameter(group=MACHINE)] = "auto"
    """auto, cpu, cuda or cuda:1."""

    seed: Annotated[int, Parameter(group=MACHINE)] = 0
    """Seed of weights, samples and dropout."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 8), ("warmup", 0), ("steps", 1), ("weight_decay", 0), ("classes", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise SkipwayError(f"{name}={value}: the rule is {name} >= {least}")
        if self.lr is not None and not self.lr > 0:
            raise SkipwayError(f"lr={self.lr}: the rule is lr > 0")
        if self.lint and (self.fix or self.thorough):
            raise SkipwayError("--lint runs no pass, so it excludes --fix and --thorough; leave them away")
        if self.shape is not None and self.batch is not None:
            image_side(self.shape)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """`input` as numbers; None where it is not given.

        >>> Question(input="3,32,32").shape
        (3, 32, 32)
        """
        if self.input is None:
            return None
        if not re.fullmatch(r"[1-9]\d*([,x][1-9]\d*)*", self.input):
            raise SkipwayError(
                f"--input {self.input}: the rule is whole numbers with commas, 3,224,224 for colour images"
            )
        return tuple(int(number) for number in re.split("[,x]", self.input))


def diagnose(
    model: str,
    /,
    question: Annotated[Question, Parameter(name="*")] = Question(),
    *,
    out: Annotated[list[Path] | None, Parameter(group=OUTPUT, negative=())] = None,
    save_model: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    json: Annotated[Flag, Parameter(group=OUTPUT)] = False,
    quiet: Annotated[Flag, Parameter(group=OUTPUT)] = False,
) -> int:
    """Tell from one batch before training whether a network will train, what is at fault and what to do.

    Exit status 1: it will not train (with --fix: not even the mended model).

    Args:
        model: A Skipway model, timm:NAME, torchvision:NAME, hf:CLASS, or FILE.py:NAME of a module or its factory.
        question: The options.
        out: Save as .json, .html, .png, .svg or .pdf; repeatable.
        save_model: Save the mended weights (with --fix), as safetensors.
        json: Print JSON instead of a table.
        quiet: Print the verdict only.
    """
    check_outputs(question, out or (), save_model)
    # waiting threads sleep; see `skipway train`
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    output = Output(json=json, quiet=quiet)
    with output.working(f"loading {model}"):
        loaded, batch, output.remark = prepared(model, question)
    if question.lint:
        return lint_model(loaded, batch, output)
    diagnosis = diagnose_loaded(loaded, batch, question)  # says on a terminal how long it takes
    treatment = diagnosis.fix() if question.fix and diagnosis.verdict != "trains" and diagnosis.remedies else None
    last = diagnosis if treatment is None else treatment.after
    output.diagnosed(diagnosis, treatment, healthy=question.fix and treatment is None)
    for path in out or ():
        from skipway.report import save

        written = save(treatment or diagnosis, path, command=command_of(model, question), name=model)
        output.labelled("report", str(written))
    if save_model is not None:
        model_to_save = loaded.model if treatment is None else treatment.model
        output.labelled("weights", save_weights(model_to_save, save_model))
    return 0 if last.trains else WILL_NOT_TRAIN


def command_of(model: str, question: Question) -> str:
    """The command line of a diagnosis, with every option that is not the default.

    >>> command_of("resnet20", Question(input="3,32,32", fix=True))
    'skipway diagnose resnet20 --input 3,32,32 --fix'
    """
    words = ["skipway", "diagnose", model]
    for field in dataclasses.fields(question):
        value = getattr(question, field.name)
        if value != field.default:
            words += [f"--{field.name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def check_outputs(question: Question, out: Sequence[Path], save_model: Path | None) -> None:
    """Refuse, before anything is measured, outputs that cannot be written."""
    from skipway.report.files import ENDINGS

    for path in out:
        if path.suffix not in ENDINGS:
            raise SkipwayError(f"--out {path}: the rule is one of the endings {' '.join(ENDINGS)}")
    if save_model is not None and not question.fix:
        raise SkipwayError("--save-model saves the mended model; give --fix with it")
    if question.lint and out:
        raise SkipwayError("--lint writes no report, so it excludes --out; use --json and redirect the output")


class Output:
    """The command's output: colours on a terminal, plain text in a pipe, JSON, or one line.

    Args:
        json: JSON, for programs.
        quiet: the verdict only.
    """

    def __init__(self, *, json: bool, quiet: bool) -> None:
        self.json, self.quiet, self.remark = json, quiet, ""

    def working(self, message: str) -> AbstractContextManager[Any]:
        """A status line on the terminal while the passes run."""
        if self.quiet or not sys.stderr.isatty():
            return nullcontext()
        from rich.console import Console

        return Console(stderr=True).status(message)

    def labelled(self, label: str, text: str) -> None:
        """Print one line with a label, for people only."""
        if not (self.json or self.quiet):
            sys.stdout.write(f"{label:<10}{text}\n")

    def diagnosed(self, diagnosis: Diagnosis, treatment: Treatment | None, *, healthy: bool) -> None:
        """Print a diagnosis, and the result of its remedies."""
        from skipway.diagnosis.table import SENTENCES

        last = diagnosis if treatment is None else treatment.after
        if self.json:
            sys.stdout.write(json_text(diagnosis, treatment, self.remark))
        elif self.quiet:
            sys.stdout.write(f"{' '.join([SENTENCES[last.verdict], '; '.join(last.conditions)]).strip()}\n")
        else:
            self.labelled("batch", self.remark)
            self.printed(diagnosis)
            if treatment is not None:
                sys.stdout.write("\n")
                self.printed(treatment)
            elif healthy:
                sys.stdout.write("\nnothing to fix\n")

    def printed(self, view: Any) -> None:
        """Print a result in colours on a terminal, up to 100 columns wide, else as plain text."""
        from skipway.diagnosis.table import WIDTH, as_text

        if not sys.stdout.isatty():
            sys.stdout.write(as_text(view) + "\n")
            return
        from rich.console import Console

        console = Console()
        console.print(view, width=min(WIDTH, console.width))

    def linted(self, findings: Sequence[Finding]) -> None:
        """Print the findings of the linter."""
        from skipway.diagnosis.table import findings_view
        from skipway.errors import counted

        if self.json:
            sys.stdout.write(json.dumps([finding.to_json() for finding in findings], indent=1) + "\n")
        elif self.quiet or not findings:
            sys.stdout.write(f"{counted(len(findings), 'finding')}\n")
        else:
            self.printed(findings_view(findings))


def json_text(found: Diagnosis, treatment: Treatment | None, remark: str) -> str:
    """A diagnosis as JSON, or a treatment as {"applied": …, "before": …, "after": …}."""
    content = {"batch": remark, **json.loads(found.to_json())}
    if treatment is not None:
        applied = [str(remedy) for remedy in treatment.applied]
        content = {"applied": applied, "before": content, "after": json.loads(treatment.after.to_json())}
    return json.dumps(content, indent=1) + "\n"


def prepared(text: str, question: Question) -> tuple[LoadedModel, Any, str]:
    """The model, its example and targets, and the origin of the batch in words."""
    import torch

    from skipway.hardware.device import choose_device
    from skipway.zoo import ModelRequest, load_model, source_of

    torch.manual_seed(question.seed)
    device = choose_device(question.device)
    source, name = source_of(text)
    classes = question.classes
    if classes is None and question.batch is not None and "classes" in source.takes and not question.batch.is_file():
        classes = len(class_names(question.batch, question.outside))
    request = ModelRequest(depth=question.depth, scheme=question.scheme, classes=classes, shape=question.shape)
    loaded = load_model(text, request)
    tokenizer = Path(name, "tokenizer.json")
    batch, remark = batch_for(loaded, question, tokenizer if tokenizer.is_file() else None)
    loaded.model.to(device)
    return loaded, to_device(batch, device), remark


def to_device(batch: Any, device: Any) -> Any:
    """The tensors of a batch on a device."""
    from skipway.tracing.containers import map_tensors

    return map_tensors(lambda tensor: tensor.to(device), batch)


def batch_for(loaded: LoadedModel, question: Question, tokenizer: Path | None) -> tuple[tuple[Any, Any], str]:
    """Example and targets: windows of a text, images of a folder, the batch of the model's file, or random samples; and
    which of them.
    """
    if question.batch is not None and question.batch.is_file() and loaded.vocabulary is not None:
        from skipway.cli.text_batch import text_batch

        example, remark = text_batch(loaded, question.batch, question.samples, question.seed, tokenizer)
        return (example, None), remark
    if question.batch is not None:
        images, labels, bad = images_of(question, question.batch, loaded.shape)
        damaged = f"; {bad[0][0]} cannot be read, {bad[0][1]}" if bad else ""
        remark = f"{len(labels)} images of {question.batch} with their labels{damaged}"
        return (loaded.call_with(images), labels), printable(remark)
    if loaded.batch is not None:
        return inputs_and_targets(loaded.model, loaded.batch), "given by the model's file"
    size = "x".join(map(str, loaded.shape))
    what = "random normal samples" if loaded.vocabulary is None else "random token sequences"
    tokens = loaded.vocabulary is not None
    others = ", ".join(map(str, loaded.others)) or ("no labels" if tokens else "random labels")
    labels, real = "the tokens as labels" if loaded.labels else others, "FILE" if tokens else "FOLDER"
    remark = f"{question.samples} {what} of {size} with {labels}; use --batch {real} for real ones"
    return (loaded.random(question.samples), None), remark


def inputs_and_targets(model: Any, batch: Any) -> tuple[Any, Any]:
    """What a file gives beside a model: inputs, or (inputs, targets); two are inputs if forward needs both."""
    import inspect

    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return batch, None
    needed = [each for each in inspect.signature(model.forward).parameters.values() if each.default is each.empty]
    positional = [each for each in needed if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return (tuple(batch), None) if len(positional) == 2 and not isinstance(batch[0], tuple) else tuple(batch)


def image_side(shape: tuple[int, ...]) -> int:
    """The side length of images of a shape, which have to be square."""
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2]:
        raise SkipwayError(
            f"--batch: the rule is square images, grey or colour, and the model takes {','.join(map(str, shape))}; "
            "set --input 3,224,224, or leave --batch away"
        )
    return shape[1]


def class_names(folder: Path, outside: bool) -> tuple[str, ...]:
    """The class names of a folder of images."""
    from skipway.data import list_splits

    return list_splits(folder, outside=outside).classes


def images_of(question: Question, folder: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
    """Random images of a folder with their labels, normalised by their own mean and deviation, and those that cannot be
    read with the reasons.

    Raises:
        DataError: the folder holds no images by class, or none of the drawn ones can be read.
    """
    import torch

    from skipway.data import list_splits
    from skipway.data.image_dataset import decode_files
    from skipway.data.loader import statistics
    from skipway.data.randomness import permutation
    from skipway.errors import DataError

    size = image_side(shape)
    splits = list_splits(folder, validation=0.0, outside=question.outside)
    order = permutation(len(splits.train), question.seed, 0)[: question.samples].tolist()
    chosen = [splits.train[number] for number in order]
    part, bad = decode_files(folder, chosen, channels=shape[0], size=size, workers=0)
    if not len(part):
        raise DataError(
            f"--batch {folder}: none of the {len(bad)} drawn images can be read; the first: {bad[0][0]}: {bad[0][1]}"
        )
    mean, std = (torch.tensor(values) for values in statistics(part.images))
    return ((part.images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous(), part.labels, bad


def diagnose_loaded(loaded: LoadedModel, batch: Any, question: Question) -> Diagnosis:
    """Diagnose the model, and name the option behind an error."""
    from skipway.diagnosis import diagnose as diagnose_model

    try:
        example, targets = batch
        return diagnose_model(
            loaded.model,
            example,
            targets=targets,
            optimizer=question.optimizer,
            lr=question.lr,
            weight_decay=question.weight_decay,
            warmup=question.warmup,
            steps=question.steps,
            training=not question.eval_mode,
            thorough=question.thorough,
            seed=question.seed,
        )
    except SkipwayError as error:
        if error.__cause__ is None or question.input is not None:
            raise
        shape = "x".join(map(str, loaded.shape))
        raise SkipwayError(f"{error}; the samples had shape {shape}: set another one by --input") from error


def lint_model(loaded: LoadedModel, batch: Any, output: Output) -> int:
    """Print the findings of the linter; return exit status 1 where one is fatal."""
    from skipway.diagnosis.lint import lint

    findings = lint(loaded.model, batch[0])
    output.linted(findings)
    return WILL_NOT_TRAIN if any(finding.level == "fatal" for finding in findings) else 0


def save_weights(model: Any, path: Path) -> str:
    """Write the weights of a model as safetensors, and return the path."""
    from skipway.checkpoint.files import write_tensors

    write_tensors(path, model.state_dict(), {})
    return str(path)
