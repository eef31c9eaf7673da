"""The commands by name. Each is an import path that is resolved when the command is called."""

from __future__ import annotations

from dataclasses import fields

from cyclopts import App, Parameter

from skipway.cli.help import HELP_ALL, HelpFormatter
from skipway.cli.run_options import check_whole_numbers, fill_from_preset, fill_from_run
from skipway.cli.usage import version_text

__all__ = ["TRAIN_HEADINGS", "app"]

# the option of `skipway train` that begins each section of its help
TRAIN_HEADINGS = {
    "--data": "Data",
    "--model": "Model",
    "--epochs": "Optimization",
    "--device": "Hardware",
    "--out": "Run",
}


def advanced_options() -> frozenset[str]:
    """The options of a recipe that only `--help-all` shows."""
    from skipway.recipe import Recipe

    return frozenset(f"--{field.name.replace('_', '-')}" for field in fields(Recipe) if field.metadata.get("advanced"))


app = App(
    name="skipway",
    help="Residual networks at any depth: build, diagnose, modify, train and study them.",
    version=version_text,
    help_format="plaintext",
    help_flags=("--help", "-h", HELP_ALL),
    help_formatter=HelpFormatter(),
    config=check_whole_numbers,
    # the last of a repeated option counts, so that scripts can append options
    default_parameter=Parameter(allow_repeating=True),
    # `main` turns it into the exit status of the signal; cyclopts would always exit with 130
    suppress_keyboard_interrupt=False,
)
app.command(
    "skipway.cli.train:train",
    name="train",
    help="Train a network on images or text, by default on handwritten digits.",
    usage="skipway train [DATA] [OPTIONS]",
    config=(fill_from_preset, fill_from_run, check_whole_numbers),
    help_formatter=HelpFormatter(TRAIN_HEADINGS, advanced_options()),
    help_epilogue=f"{HELP_ALL} also shows the advanced options.",
    sort_key=0,
)
app.command(
    "skipway.cli.diagnose:diagnose",
    name="diagnose",
    help="Predict whether a network will train; name causes and remedies.",
    usage="skipway diagnose MODEL [MODEL …] [OPTIONS]",
    sort_key=1,
)
app.command(
    "skipway.cli.transfer:transfer",
    name="transfer",
    help="Measure whether the learning rate of a shallow network suits a deep one.",
    usage="skipway transfer MODEL --depths 4,8,16 [OPTIONS]",
    sort_key=2,
)
app.command(
    "skipway.cli.rescheme:rescheme",
    name="rescheme",
    help="Apply a residual scheme to the connections of a network.",
    usage="skipway rescheme MODEL --scheme SCHEME --out OUT [OPTIONS]",
    sort_key=3,
)
app.command(
    "skipway.cli.predict:predict",
    name="predict",
    help="Classify images with a trained run.",
    usage="skipway predict RUN IMAGES… [OPTIONS]",
    sort_key=4,
)
app.command(
    "skipway.cli.generate:generate",
    name="generate",
    help="Continue a text with a trained language model.",
    usage="skipway generate RUN [PROMPT] [OPTIONS]",
    sort_key=5,
)
app.command(
    "skipway.cli.evaluate:evaluate",
    name="evaluate",
    help="Evaluate a trained run on its own test split, or on other data.",
    usage="skipway evaluate RUN [DATA] [OPTIONS]",
    sort_key=6,
)
app.command(
    "skipway.cli.export:export",
    name="export",
    help="Export a trained run to ONNX, torch.export, or the Hugging Face hub.",
    usage="skipway export RUN [TARGET] [OPTIONS]",
    sort_key=7,
)
app.command(
    "skipway.cli.bench:bench",
    name="bench",
    help="Time a network on this machine on every backend and in every precision.",
    usage="skipway bench MODEL [OPTIONS]",
    sort_key=8,
)
app.command(
    "skipway.cli.study:study",
    name="study",
    help="Test a published claim about residual learning with a grid of small runs.",
    usage="skipway study NAME|all [OPTIONS]",
    sort_key=9,
)
app.command(
    "skipway.cli.report:report",
    name="report",
    help="Write the pages of all studies in a folder, and an index.",
    usage="skipway report FOLDER",
    sort_key=10,
)
app.command(
    "skipway.cli.doctor:doctor",
    name="doctor",
    help="Tell what is installed, what is missing, and what is slow here.",
    usage="skipway doctor [--json]",
    sort_key=14,
)
app.command(
    "skipway.cli.monitor:page",
    name="monitor",
    help="Write the page of a training that skipway.monitor watched.",
    usage="skipway monitor FILE [OPTIONS]",
    sort_key=11,
)
app.command(
    "skipway.cli.catalogue:models",
    name="models",
    help="List the models with their parameter counts.",
    usage="skipway models [--json]",
    sort_key=12,
)
app.command(
    "skipway.cli.catalogue:schemes",
    name="schemes",
    help="List the residual schemes, or show the card of one.",
    usage="skipway schemes [NAME] [--json]",
    sort_key=13,
)
app.register_install_completion_command(help="Install completion for this shell.")
