"""`skipway diagnose`: will a network train, what is at fault, what to do; which of several to train."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from skipway.cli.option_names import option_spelling, option_view, option_words, print_note
from skipway.errors import CheckpointError, MissingExtraError, SkipwayError, printable, similar_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from skipway.diagnosis import Comparison, Diagnosis, Finding, Treatment
    from skipway.zoo import LoadedModel

__all__ = ["Question", "diagnose"]

OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"]
Flag = Annotated[bool, Parameter(negative=())]
MODEL, BATCH, TRAINING, DIAGNOSIS, MACHINE, OUTPUT = (
    Group(name, sort_key=number)
    for number, name in enumerate(("Model", "Batch", "Training", "Diagnosis", "Machine", "Output"))
)
WILL_NOT_TRAIN, UNDECIDED = 1, 4
NOTHING_TO_FIX = "nothing to fix"
ROUNDING = 1e-5
"""Difference over the largest output up to which two networks with equal weights are the same."""
NOT_SAVED = "not saved: nothing was mended"
MORE_THAN_WEIGHTS = (
    "more than weights was changed: the file, loaded into the network as it was, does not make the mended one; in "
    "Python, torch.save(skipway.diagnose(…).fix().model, FILE) saves all of it"
)
OF_RUNS = frozenset({"certainty", "allowance", "thorough", "fix", "device"})
"""Options that a run folder leaves open; the others are those of its recipe."""


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
    """Images as for `train`, digits, or a text: every trial step takes a fresh batch. [random]"""

    outside: Annotated[bool, Parameter(negative=(), group=BATCH)] = False
    """Follow links out of the folder of images."""

    columns: Annotated[str | None, Parameter(group=BATCH)] = None
    """Columns of a list, or of the text in a table."""

    optimizer: Annotated[OptimizerName, Parameter(group=TRAINING)] = "sgd"
    """Optimizer used for training; sgd with momentum 0.9."""

    lr: Annotated[float | None, Parameter(group=TRAINING)] = None
    """Learning rate. [sgd 0.1, adam 0.001]"""

    weight_decay: Annotated[float, Parameter(group=TRAINING)] = 0.0
    """Weight decay."""

    warmup: Annotated[int, Parameter(group=TRAINING)] = 0
    """Steps of learning rate warm-up."""

    schedule: Annotated[str, Parameter(group=TRAINING)] = "constant"
    """Learning rate after warm-up: constant, cosine, linear."""

    steps: Annotated[int, Parameter(group=TRAINING)] = 1000
    """Planned steps of training."""

    eval_mode: Annotated[Flag, Parameter(group=TRAINING)] = False
    """Measure in evaluation mode."""

    certainty: Annotated[float, Parameter(group=DIAGNOSIS)] = 0.95
    """Share of right verdicts wanted, between 0.5 and 1; calibrated up to 0.95."""

    allowance: Annotated[float, Parameter(group=DIAGNOSIS)] = 0.03
    """Share of the training that trial steps may cost."""

    thorough: Annotated[Flag, Parameter(group=DIAGNOSIS)] = False
    """Also measure largest singular values."""

    fix: Annotated[Flag, Parameter(group=DIAGNOSIS)] = False
    """Apply remedies; compare before and after."""

    lint: Annotated[Flag, Parameter(group=DIAGNOSIS)] = False
    """Only check for known mistakes; takes a few seconds."""

    device: Annotated[str, Parameter(group=MACHINE)] = "auto"
    """auto, cpu, cuda or cuda:1."""

    seed: Annotated[int, Parameter(group=MACHINE)] = 0
    """Seed of weights, samples and dropout."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 8), ("warmup", 0), ("steps", 1), ("weight_decay", 0), ("classes", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                option = name.replace("_", "-")
                raise SkipwayError(f"--{option} {value}: the rule is {option} >= {least}")
        if self.lr is not None and not self.lr > 0:
            raise SkipwayError(f"--lr {self.lr}: the rule is lr > 0")
        if not 0.5 < self.certainty < 1:
            raise SkipwayError(f"--certainty {self.certainty}: the rule is 0.5 < certainty < 1")
        if not 0 <= self.allowance <= 1:
            raise SkipwayError(f"--allowance {self.allowance}: the rule is a share of the training, 0 to 1")
        if self.lint and (self.fix or self.thorough):
            raise SkipwayError("--lint runs no pass, so it excludes --fix and --thorough; leave them out")
        if self.columns is not None and self.batch is None:
            raise SkipwayError(f"--columns {self.columns} has no effect without --batch; leave it out")
        if self.shape is not None and self.batch is not None:
            from skipway.cli.diagnosis_batch import image_side

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
    *others: str,
    question: Annotated[Question, Parameter(name="*")] = Question(),
    out: Annotated[list[Path] | None, Parameter(group=OUTPUT, negative=())] = None,
    save_model: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    json: Annotated[Flag, Parameter(group=OUTPUT)] = False,
    quiet: Annotated[Flag, Parameter(group=OUTPUT)] = False,
) -> int:
    """Tell from its first steps whether a training will learn, what is at fault, and which of several to train.

    Exit status 0: it trains (of several, one does; with --fix, the mended one); 1: it will not train; 4: undecided.

    Args:
        model: A Skipway model, timm:NAME, torchvision:NAME, hf:CLASS, FILE.py:NAME of a module or its factory, or a run
            folder for its own recipe.
        others: Further ones to compare it with, on the same batches.
        question: The options.
        out: Save as .json, .html, .png, .svg or .pdf; repeatable.
        save_model: Save the mended weights (with --fix), as safetensors.
        json: Print JSON instead of a table.
        quiet: Print the verdict only.
    """
    names = (model, *others)
    check_outputs(question, out or (), save_model, names)
    # waiting threads sleep; see `skipway train`
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    output = Output(json=json, quiet=quiet)
    if question.lint:
        with output.working(f"loading {model}"):
            loaded, (example, _, _) = prepared(model, question)
        return lint_model(loaded, example, output, command_of(names, dataclasses.replace(question, lint=False)))
    if others:
        return compare_models(names, question, out or (), output)
    diagnosis = diagnose_text(model, question, output)  # says on a terminal how long it takes
    treatment = None
    if question.fix and diagnosis.verdict != "trains" and diagnosis.remedies:
        with output.progress():
            treatment = diagnosis.fix()
    last = diagnosis if treatment is None else treatment.after
    unsaved = None if save_model is None or treatment is None else save_weights(treatment.model, save_model)
    wrote = save_model if treatment is not None and unsaved is None else None
    weights = {} if save_model is None else {"saved": None if wrote is None else str(wrote)}
    output.diagnosed(diagnosis, treatment, wanted=question.fix, further=weights)
    save_reports(treatment or diagnosis, names, question, out or (), output)
    if unsaved is not None:  # told at the end, so that the diagnosis is not lost
        raise SkipwayError(str(unsaved)) from unsaved
    if save_model is not None:
        output.saved(save_model, treatment)
    return 0 if last.trains else UNDECIDED if last.verdict == "undecided" else WILL_NOT_TRAIN


def compare_models(names: Sequence[str], question: Question, out: Sequence[Path], output: Output) -> int:
    """Diagnose every model and print which to train; one that fails is a row with its reason."""
    from skipway.diagnosis.comparison import compare_diagnoses

    outcomes: dict[str, Diagnosis | SkipwayError] = {}
    for name in names:
        try:
            outcomes[name] = diagnose_text(name, question, output, of_several=True)
        except SkipwayError as error:
            outcomes[name] = error
    comparison = compare_diagnoses(outcomes, allowance=question.allowance)
    output.compared(comparison)
    save_reports(comparison, names, question, out, output)
    return 0 if comparison.best else UNDECIDED if comparison.undecided else WILL_NOT_TRAIN


def diagnose_text(text: str, question: Question, output: Output, *, of_several: bool = False) -> Diagnosis:
    """The diagnosis of what a text on the command line names."""
    from skipway.training.run_diagnosis import diagnose_run, is_run

    try:
        if is_run(text):
            if ours := [name for name in given_options(question) if name not in OF_RUNS]:
                options = ", ".join(f"--{name.replace('_', '-')}" for name in ours)
                raise SkipwayError(f"{text} is a run, which is asked about by its own recipe; leave {options} out")
            output.remarks[text] = f"training batches of {text}"
            chosen = {name: getattr(question, name) for name in ("certainty", "allowance", "thorough", "device")}
            with output.progress(text if of_several else ""):
                return diagnose_run(Path(text), **chosen)
        with output.working(f"loading {text}"):
            loaded, batch = prepared(text, question)
        output.remarks[text] = batch[2]
        if loaded.guessed and question.input is None and question.batch is None:
            output.note(f"the input of {text} is taken to be {shape_text(loaded.shape)}; --input gives another")
        with output.progress(text if of_several else ""):
            return diagnose_loaded(loaded, batch, question)
    except CheckpointError as error:  # whose exit status is that of an undecided verdict
        raise SkipwayError(str(error)) from error


def save_reports(
    result: Diagnosis | Treatment | Comparison,
    names: Sequence[str],
    question: Question,
    out: Sequence[Path],
    output: Output,
) -> None:
    """Write the reports, and say where they are."""
    from skipway.report import save

    for path in out:
        written = save(result, path, command=command_of(names, question), name=" or ".join(names))
        output.labelled("report", str(written))


def command_of(names: Sequence[str], question: Question) -> str:
    """The command line of a diagnosis, with every option that is not the default.

    >>> command_of(["resnet20"], Question(input="3,32,32", fix=True))
    'skipway diagnose resnet20 --input 3,32,32 --fix'
    """
    return shlex.join(["skipway", "diagnose", *names, *option_words(given_options(question))])


def given_options(question: Question) -> dict[str, Any]:
    """The options that are not the default."""
    values = {field.name: (getattr(question, field.name), field.default) for field in dataclasses.fields(question)}
    return {name: value for name, (value, default) in values.items() if value != default}


def check_outputs(question: Question, out: Sequence[Path], save_model: Path | None, names: Sequence[str]) -> None:
    """Refuse, before anything is measured, outputs that cannot be written."""
    from skipway.report.files import BY_MATPLOTLIB, ENDINGS

    for path in out:
        if path.suffix not in ENDINGS:
            raise SkipwayError(f"--out {path}: the rule is one of the endings {' '.join(ENDINGS)}")
        if path.suffix in BY_MATPLOTLIB and find_spec("matplotlib") is None:
            raise MissingExtraError("matplotlib", "plot", f"--out {path}")
    if len(set(names)) < len(names):
        raise SkipwayError(f"{max(names, key=names.count)} is given twice; the rule is models with different names")
    if len(names) > 1 and (question.fix or question.lint):
        option, does = ("--fix", "mends") if question.fix else ("--lint", "checks")
        raise SkipwayError(f"{option} {does} one model, and {len(names)} are given; give one, or leave {option} out")
    if save_model is not None and not question.fix:
        raise SkipwayError("--save-model saves the mended model; give --fix with it")
    if save_model is not None and not save_model.parent.is_dir():
        folder = printable(save_model.parent)
        raise SkipwayError(
            f"--save-model {printable(save_model)}: there is no folder {folder}{similar_names(save_model.parent)}"
        )
    if save_model is not None and save_model.is_dir():
        raise SkipwayError(f"--save-model {printable(save_model)} is a folder; the rule is a file to be written")
    if question.lint and out:
        raise SkipwayError("--lint writes no report, so it excludes --out; use --json and redirect the output")


class Output:
    """The command's output: colours on a terminal, plain text in a pipe, JSON, or one line.

    Args:
        json: JSON, for programs.
        quiet: the verdict only.
    """

    def __init__(self, *, json: bool, quiet: bool) -> None:
        self.json, self.quiet = json, quiet
        self.remarks: dict[str, str] = {}
        """Where the batch of each model is from."""

    def working(self, message: str) -> AbstractContextManager[Any]:
        """A status line on the terminal while the passes run."""
        if self.quiet or not sys.stderr.isatty():
            return nullcontext()
        from rich.console import Console

        return Console(stderr=True).status(message)

    def progress(self, name: str = "") -> AbstractContextManager[None]:
        """Within it the progress of a diagnosis is shown on a terminal and, for people, as plain lines in a pipe."""
        from skipway.diagnosis.progress import progress_shown

        return progress_shown("nowhere" if self.quiet else "terminal" if self.json else "anywhere", name)

    def note(self, sentence: str) -> None:
        """Print what people have to know before they wait."""
        if not (self.json or self.quiet):
            print_note(sentence)

    def labelled(self, label: str, text: str) -> None:
        """Print one line with a label, for people only."""
        if not (self.json or self.quiet):
            sys.stdout.write(f"{label:<10}{text}\n")

    def saved(self, path: Path, treatment: Treatment | None) -> None:
        """Tell where the mended weights are, and what they are good for; programs get a note where that is not all."""
        if treatment is None:
            earlier = f"; {printable(path)} was there before" if path.exists() else ""
            label, text = "weights", f"{NOT_SAVED}{earlier}"
        else:
            self.labelled("weights", str(path))
            if makes_mended_network(treatment):
                return
            label, text = "note", MORE_THAN_WEIGHTS
        self.labelled(label, text)
        if self.json or self.quiet:
            print_note(text)

    def diagnosed(
        self, diagnosis: Diagnosis, treatment: Treatment | None, *, wanted: bool, further: Mapping[str, Any]
    ) -> None:
        """Print a diagnosis, and the result of its remedies or, where they were wanted, why none was applied.

        Args:
            diagnosis: of the network as it is.
            treatment: of it.
            wanted: whether remedies were to be applied.
            further: entries of the JSON.
        """
        from skipway.diagnosis.table import verdict_sentence

        last = diagnosis if treatment is None else treatment.after
        if self.json:
            sys.stdout.write(json_text(diagnosis, treatment, self.remark, further))
        elif self.quiet:
            sys.stdout.write(f"{option_spelling(verdict_sentence(last.verdict, last.grounds))}\n")
        else:
            self.labelled("batch", self.remark)
            self.printed(diagnosis)
            if treatment is not None:
                sys.stdout.write("\n")
                self.printed(treatment)
            elif wanted:
                sys.stdout.write(f"\n{NOTHING_TO_FIX if diagnosis.trains else nothing_applied(diagnosis)}\n")

    @property
    def remark(self) -> str:
        """Where the batches are from, once where all are the same."""
        if len(set(self.remarks.values())) < 2:
            return next(iter(self.remarks.values()), "")
        return "; ".join(f"{name}: {remark}" for name, remark in self.remarks.items())

    def compared(self, comparison: Comparison) -> None:
        """Print a comparison."""
        if self.json:
            content = {"batch": self.remark, **json.loads(comparison.to_json())}
            sys.stdout.write(json.dumps(content, indent=1) + "\n")
        elif self.quiet:
            sys.stdout.write(f"{comparison.answer}\n")
        else:
            self.labelled("batch", self.remark)
            self.printed(comparison)

    def printed(self, view: Any) -> None:
        """Print a result in colours on a terminal, up to 100 columns wide, else as plain text."""
        from skipway.diagnosis.table import WIDTH, as_text

        view = option_view(view)
        if not sys.stdout.isatty():
            sys.stdout.write(as_text(view) + "\n")
            return
        from rich.console import Console

        console = Console()
        console.print(view, width=min(WIDTH, console.width))

    def linted(self, findings: Sequence[Finding], command: str) -> None:
        """Print the findings of the linter, and the command that measures what it does not look at."""
        from skipway.diagnosis.table import findings_view
        from skipway.errors import counted

        if self.json:
            sys.stdout.write(json.dumps([finding.to_json() for finding in findings], indent=1) + "\n")
        elif self.quiet:
            sys.stdout.write(f"{counted(len(findings), 'finding')}\n")
        else:
            self.printed(findings_view(findings) if findings else counted(0, "finding"))
            sys.stdout.write(f"lint reads the network and does not measure its signal; {command} does\n")


def nothing_applied(diagnosis: Diagnosis) -> str:
    """Why nothing was applied, and what is left to do."""
    blamed = any(finding.level != "note" for finding in diagnosis.findings)
    left = "; the findings above say what to change" if blamed else ""
    return f"nothing was applied: {diagnosis.why_no_offer}{left}"


def json_text(found: Diagnosis, treatment: Treatment | None, remark: str, further: Mapping[str, Any]) -> str:
    """A diagnosis as JSON, or a treatment as {"applied": …, "before": …, "after": …}, with further entries."""
    content = {"batch": remark, **json.loads(found.to_json())}
    if treatment is not None:
        applied = [str(remedy) for remedy in treatment.applied]
        content = {"applied": applied, "before": content, "after": json.loads(treatment.after.to_json())}
    return json.dumps({**content, **further}, indent=1) + "\n"


def prepared(text: str, question: Question) -> tuple[LoadedModel, tuple[Any, Any, str]]:
    """The model on its device, and its example, targets and the origin of the batch in words."""
    import torch

    from skipway.cli.diagnosis_batch import class_names, example_for
    from skipway.hardware.device import choose_device
    from skipway.tracing.containers import map_tensors
    from skipway.tracing.example import batches_of
    from skipway.zoo import ModelRequest, load_model, source_of

    torch.manual_seed(question.seed)
    device = choose_device(question.device)
    source, name = source_of(text)
    request = ModelRequest(depth=question.depth, scheme=question.scheme, classes=question.classes, shape=question.shape)
    batch = question.batch if question.classes is None and "classes" in source.takes else None
    # a file is a text for a network of tokens, and a list or a shard of images for another
    loaded = load_model(text, request) if batch is None or batch.is_file() else None
    if batch is not None and (loaded is None or loaded.vocabulary is None):
        torch.manual_seed(question.seed)
        request = dataclasses.replace(request, classes=len(class_names(batch, question.outside, question.columns)))
        loaded = load_model(text, request)
    assert loaded is not None
    tokenizer = Path(name, "tokenizer.json")
    example, targets, remark = example_for(
        loaded,
        folder=question.batch,
        samples=question.samples,
        seed=question.seed,
        outside=question.outside,
        columns=question.columns,
        tokenizer=tokenizer if tokenizer.is_file() else None,
    )
    loaded.model.to(device)
    if batches_of(example) is None:  # of a loader, the diagnosis moves them
        example, targets = (map_tensors(lambda tensor: tensor.to(device), each) for each in (example, targets))
    return loaded, (example, targets, remark)


def diagnose_loaded(loaded: LoadedModel, batch: tuple[Any, Any, str], question: Question) -> Diagnosis:
    """Diagnose the model, and name the option behind an error."""
    from skipway.diagnosis import diagnose as diagnose_model

    try:
        example, targets, _ = batch
        return diagnose_model(
            loaded.model,
            example,
            targets=targets,
            optimizer=question.optimizer,
            lr=question.lr,
            weight_decay=question.weight_decay,
            warmup=question.warmup,
            schedule=question.schedule,
            steps=question.steps,
            certainty=question.certainty,
            allowance=question.allowance,
            training=not question.eval_mode,
            thorough=question.thorough,
            seed=question.seed,
        )
    except SkipwayError as error:
        if error.__cause__ is None or question.input is not None:
            raise
        shape = shape_text(loaded.shape)
        raise SkipwayError(f"{error}; the samples had shape {shape}: set another one by --input") from error


def shape_text(shape: Sequence[int]) -> str:
    """The shape of a sample in words."""
    return "x".join(map(str, shape))


def lint_model(loaded: LoadedModel, example: Any, output: Output, command: str) -> int:
    """Print the findings of the linter; return exit status 1 where one is fatal. The command is that without --lint."""
    from skipway.diagnosis.lint import lint
    from skipway.tracing import as_batch
    from skipway.tracing.containers import map_tensors

    device = next((parameter.device for parameter in loaded.model.parameters()), None)
    findings = lint(loaded.model, map_tensors(lambda tensor: tensor.to(device), as_batch(example)[0]))
    output.linted(findings, command)
    return WILL_NOT_TRAIN if any(finding.level == "fatal" for finding in findings) else 0


def save_weights(model: Any, path: Path) -> CheckpointError | None:
    """Write the weights of a model as safetensors; return why that failed, else None."""
    from skipway.checkpoint.files import write_tensors

    try:
        write_tensors(path, model.state_dict(), {})
    except CheckpointError as error:
        return error
    return None


def makes_mended_network(treatment: Treatment) -> bool:
    """Whether the weights of a mended network, loaded into the network as it was, make it. They do not where modules
    were added or replaced, or a switch such as `norm_first` was turned.
    """
    from skipway.surgery.verification import output_gap, outputs
    from skipway.tracing.module_state import copy_module

    subject = treatment.before.subject
    again = copy_module(subject.model)
    try:
        again.load_state_dict(treatment.model.state_dict())
    except RuntimeError:
        return False
    mended, with_weights = (outputs(model, subject.inputs) for model in (treatment.model, again))
    return output_gap(mended, with_weights) < ROUNDING
