"""`skipway diagnose`."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from skipway.errors import SkipwayError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from skipway.diagnosis import Diagnosis, Finding, Treatment
    from skipway.zoo import LoadedModel

__all__ = ["ENDINGS", "Optimizer", "Question", "diagnose"]

Optimizer = Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"]
Flag = Annotated[bool, Parameter(negative=())]
MODEL, BATCH, TRAINING, DIAGNOSIS, MACHINE, OUTPUT = (
    Group(name, sort_key=number)
    for number, name in enumerate(("Model", "Batch", "Training", "Diagnosis", "Machine", "Output"))
)
# what `Diagnosis.save` writes, asked for before anything is measured
ENDINGS = (".json", ".html", ".htm", ".png", ".svg", ".pdf")
WILL_NOT_TRAIN = 1


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a model. The line under each field is its help on the command line."""

    scheme: Annotated[str | None, Parameter(group=MODEL)] = None
    """Residual scheme. [the model's]"""

    depth: Annotated[int | None, Parameter(group=MODEL)] = None
    """Weight layers, for a family. [the model's]"""

    classes: Annotated[int | None, Parameter(group=MODEL)] = None
    """Outputs. [the model's, or --batch's]"""

    input: Annotated[str | None, Parameter(group=BATCH)] = None
    """Shape of one sample, 3,224,224. [the model's]"""

    samples: Annotated[int, Parameter(group=BATCH)] = 32
    """Samples of the batch."""

    batch: Annotated[Path | None, Parameter(group=BATCH)] = None
    """Folder of images in class folders. [random]"""

    optimizer: Annotated[Optimizer, Parameter(group=TRAINING)] = "sgd"
    """That will train it."""

    lr: Annotated[float | None, Parameter(group=TRAINING)] = None
    """Learning rate. [sgd 0.1, the Adams 0.001]"""

    weight_decay: Annotated[float, Parameter(group=TRAINING)] = 0.0
    """Decay of the weights."""

    warmup: Annotated[int, Parameter(group=TRAINING)] = 0
    """Steps over which the rate rises."""

    steps: Annotated[int, Parameter(group=TRAINING)] = 1000
    """Steps planned."""

    eval_mode: Annotated[Flag, Parameter(group=TRAINING)] = False
    """Measure in evaluation mode."""

    thorough: Annotated[Flag, Parameter(group=DIAGNOSIS)] = False
    """Also the largest singular values."""

    fix: Annotated[Flag, Parameter(group=DIAGNOSIS)] = False
    """Apply the remedies; show before and after."""

    lint: Annotated[Flag, Parameter(group=DIAGNOSIS)] = False
    """Only look for known mistakes; run nothing."""

    device: Annotated[str, Parameter(group=MACHINE)] = "auto"
    """auto, cpu, cuda, cuda:1."""

    seed: Annotated[int, Parameter(group=MACHINE)] = 0
    """Of weights, samples and dropout."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 8), ("warmup", 0), ("steps", 1), ("weight_decay", 0), ("classes", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise SkipwayError(f"{name}={value}: the rule is {name} >= {least}")
        if self.lr is not None and not self.lr > 0:
            raise SkipwayError(f"lr={self.lr}: the rule is lr > 0")
        if self.lint and (self.fix or self.thorough):
            raise SkipwayError("--lint runs no training step; give it without --fix and --thorough")
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
    """Say whether a network will train, what is at fault and what to do, from one batch before training.

    Ends with 1 where the verdict is "will not train" (of the mended model with --fix), else with 0.

    Args:
        model: A name of ours, timm:NAME, torchvision:NAME, hf:CLASS, or FILE.py:NAME: a module, or what makes one.
        question: What is asked.
        out: Also write .json, .html, .png, .svg, .pdf; repeatable.
        save_model: With --fix: its weights, as safetensors.
        json: Write JSON instead of a table.
        quiet: Write the verdict only.
    """
    check_outputs(question, out or (), save_model)
    # threads that wait should sleep; see `skipway train`
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    screen = Screen(json=json, quiet=quiet)
    with screen.working(f"looking at {model}"):
        loaded, batch, remark = prepared(model, question)
        screen.remark = remark
        if question.lint:
            return linted(loaded, batch, screen)
        found = examined(loaded, batch, question)
        treatment = found.fix() if question.fix and found.verdict != "trains" and found.remedies else None
    shown = found if treatment is None else treatment.after
    screen.show(found, treatment, nothing_to_do=question.fix and treatment is None)
    for path in out or ():
        screen.say("report", str(shown.save(path)))
    if save_model is not None:
        screen.say("weights", saved(treatment.model if treatment is not None else loaded.model, save_model))
    return 0 if shown.trains else WILL_NOT_TRAIN


def check_outputs(question: Question, out: Sequence[Path], save_model: Path | None) -> None:
    """What is to be written has to make sense before anything is measured."""
    for path in out:
        if path.suffix not in ENDINGS:
            raise SkipwayError(f"--out {path}: the rule is one of the endings {' '.join(ENDINGS)}")
    if save_model is not None and not question.fix:
        raise SkipwayError("--save-model is for the mended model; give --fix with it")
    if question.lint and out:
        raise SkipwayError("--lint has no report to write; leave --out away, or pipe what it prints")


class Screen:
    """Where the answer is written: a terminal in colours, a pipe in plain text, JSON, or one line.

    Args:
        json: as JSON, to be read by a program.
        quiet: the verdict only.
    """

    def __init__(self, *, json: bool, quiet: bool) -> None:
        self.json, self.quiet, self.remark = json, quiet, ""

    def working(self, what: str) -> AbstractContextManager[Any]:
        """A line on the terminal while the passes run."""
        if self.quiet or not sys.stderr.isatty():
            return nullcontext()
        from rich.console import Console

        return Console(stderr=True).status(what)

    def say(self, label: str, text: str) -> None:
        """One line with a label, where a person reads."""
        if not (self.json or self.quiet):
            sys.stdout.write(f"{label:<10}{text}\n")

    def show(self, found: Diagnosis, treatment: Treatment | None, *, nothing_to_do: bool) -> None:
        """A diagnosis, and what came of its remedies."""
        from skipway.diagnosis.table import side_by_side, table, verdict_text

        last = found if treatment is None else treatment.after
        if self.json:
            sys.stdout.write(json_text(found, treatment, self.remark))
        elif self.quiet:
            sys.stdout.write(f"{' '.join([verdict_text(last), '; '.join(last.conditions)]).strip()}\n")
        else:
            self.say("batch", self.remark)
            self.print(found, lambda: table(found))
            if treatment is not None:
                sys.stdout.write("\n")
                self.print(treatment, lambda: side_by_side(treatment))
            elif nothing_to_do:
                sys.stdout.write("\nnothing to mend\n")

    def print(self, shown: Any, text: Any) -> None:
        """In colours on a terminal, else as plain text."""
        if not sys.stdout.isatty():
            sys.stdout.write(text().rstrip() + "\n")
            return
        from rich.console import Console

        from skipway.diagnosis.table import render

        render(shown, Console())

    def list(self, findings: Sequence[Finding]) -> None:
        """Findings alone."""
        from skipway.diagnosis.table import counted, findings_text

        if self.json:
            sys.stdout.write(json.dumps([finding.to_json() for finding in findings], indent=1) + "\n")
        elif self.quiet or not findings:
            sys.stdout.write(f"{counted(len(findings), 'finding')}\n")
        else:
            self.print(findings, lambda: findings_text(findings))


def json_text(found: Diagnosis, treatment: Treatment | None, remark: str) -> str:
    """A diagnosis as JSON; with a treatment {"applied": …, "before": …, "after": …}."""
    content = {"batch": remark, **json.loads(found.to_json())}
    if treatment is not None:
        applied = [str(remedy) for remedy in treatment.applied]
        content = {"applied": applied, "before": content, "after": json.loads(treatment.after.to_json())}
    return json.dumps(content, indent=1) + "\n"


def prepared(text: str, question: Question) -> tuple[LoadedModel, Any, str]:
    """The model, the batch, and in words where the batch is from."""
    import torch

    from skipway.hardware.device import choose_device
    from skipway.zoo import ModelRequest, load_model, source_of

    torch.manual_seed(question.seed)
    device = choose_device(question.device)
    source, _ = source_of(text)
    classes = question.classes
    if classes is None and question.batch is not None and "classes" in source.takes:
        classes = len(class_names(question.batch))
    wanted = ModelRequest(depth=question.depth, scheme=question.scheme, classes=classes, shape=question.shape)
    loaded = load_model(text, wanted)
    batch, remark = batch_for(loaded, question)
    loaded.model.to(device)
    return loaded, moved(batch, device), remark


def moved(batch: Any, device: Any) -> Any:
    """A batch on a device."""
    from torch import Tensor
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def batch_for(loaded: LoadedModel, question: Question) -> tuple[tuple[Any, Any], str]:
    """Example and targets: images of a folder, what the model's file brought along, or random samples; and which."""
    if question.batch is not None:
        images, labels = images_of(question.batch, loaded.shape, question.samples, question.seed)
        return (loaded.call_with(images), labels), f"{len(labels)} images of {question.batch} with their labels"
    if loaded.batch is not None:
        paired = isinstance(loaded.batch, tuple | list) and len(loaded.batch) == 2
        return tuple(loaded.batch) if paired else (loaded.batch, None), "from the model's file"
    size = "x".join(map(str, loaded.shape))
    what = "random normal samples" if loaded.vocabulary is None else "random rows of tokens"
    labels = "their own labels" if loaded.labels else "random labels"
    remark = f"{question.samples} {what} of {size} with {labels}; real ones: --batch FOLDER"
    return (loaded.random(question.samples), None), remark


def image_side(shape: tuple[int, ...]) -> int:
    """The side of square images of a shape."""
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2]:
        raise SkipwayError(
            f"--batch gives square images, grey or colour, and the model takes {','.join(map(str, shape))}; "
            "set --input 3,224,224, or leave --batch away"
        )
    return shape[1]


def class_names(folder: Path) -> tuple[str, ...]:
    """The classes of a folder of images."""
    from skipway.data import list_folder

    return list_folder(folder).classes


def images_of(folder: Path, shape: tuple[int, ...], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of a folder with their labels, drawn without regard to class, normalised by their own statistics.

    Raises:
        DataError: the folder is not one of images in class folders, or none of those drawn can be read.
    """
    import torch

    from skipway.data import list_folder
    from skipway.data.loader import statistics
    from skipway.data.parts import read_all
    from skipway.data.randomness import permutation
    from skipway.errors import DataError

    size = image_side(shape)
    listing = list_folder(folder)
    order = permutation(len(listing.train), seed, 0)[:count].tolist()
    chosen = [listing.train[number] for number in order]
    part, bad = read_all(folder, chosen, channels=shape[0], size=size, workers=0)
    if not len(part):
        raise DataError(f"none of {len(bad)} images of {folder} can be read; the first: {bad[0][0]}: {bad[0][1]}")
    mean, std = (torch.tensor(values) for values in statistics(part.images))
    return ((part.images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous(), part.labels


def examined(loaded: LoadedModel, batch: Any, question: Question) -> Diagnosis:
    """The diagnosis."""
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
        raise SkipwayError(f"{error}; a sample was of shape {shape} here, --input sets another") from error
    except IndexError as error:
        # what cross-entropy says to a label beyond the outputs
        raise SkipwayError(f"{error}: the model has fewer outputs than the batch has classes") from error


def linted(loaded: LoadedModel, batch: Any, screen: Screen) -> int:
    """What the linter finds; 1 where something of it is fatal."""
    from skipway.diagnosis.lint import lint

    findings = lint(loaded.model, batch[0])
    screen.list(findings)
    return WILL_NOT_TRAIN if any(finding.level == "fatal" for finding in findings) else 0


def saved(model: Any, path: Path) -> str:
    """Write a model's weights; says where they are."""
    from skipway.checkpoint.files import write_tensors

    write_tensors(path, model.state_dict(), {})
    return str(path)
