"""The commands by name. Each is an import path that is followed when the command is called."""

from __future__ import annotations

from dataclasses import fields

from cyclopts import App, Parameter

from skipway._version import __version__
from skipway.cli.help import EVERYTHING, Columns
from skipway.cli.run_options import options_of_a_run

__all__ = ["app"]


def seldom_options() -> frozenset[str]:
    """The options of a recipe that its help leaves to `--help-all`."""
    from skipway.recipe import Recipe

    return frozenset(f"--{field.name.replace('_', '-')}" for field in fields(Recipe) if field.metadata.get("more"))


app = App(
    name="skipway",
    help="Residual networks at any depth: build, train, look inside.",
    version=__version__,
    help_format="plaintext",
    help_flags=("--help", "-h", EVERYTHING),
    help_formatter=Columns(),
    # of an option that is given twice the last counts, so that scripts can be called with others
    default_parameter=Parameter(allow_repeating=True),
    # `main` turns it into the exit status of the signal; cyclopts would end every one with 130
    suppress_keyboard_interrupt=False,
)
app.command(
    "skipway.cli.train:train",
    name="train",
    help="Train a network on a folder of images; without one, on handwritten digits.",
    usage="skipway train [DATA] [OPTIONS]",
    config=options_of_a_run,
    help_formatter=Columns(seldom_options()),
    help_epilogue=f"{EVERYTHING} shows the options that are seldom needed, too.",
    sort_key=0,
)
app.command(
    "skipway.cli.diagnose:diagnose",
    name="diagnose",
    help="Say whether a network will train, what is at fault and what to do.",
    usage="skipway diagnose MODEL [OPTIONS]",
    sort_key=1,
)
app.command(
    "skipway.cli.rescheme:rescheme",
    name="rescheme",
    help="Dress the residual connections of a network in a scheme, in place.",
    usage="skipway rescheme MODEL --scheme SCHEME --out OUT [OPTIONS]",
    sort_key=2,
)
app.command(
    "skipway.cli.predict:predict",
    name="predict",
    help="Say what images show, by a trained run.",
    usage="skipway predict RUN IMAGES… [OPTIONS]",
    sort_key=3,
)
app.command(
    "skipway.cli.evaluate:evaluate",
    name="evaluate",
    help="Test a trained run on its own test images, or on others.",
    usage="skipway evaluate RUN [DATA] [OPTIONS]",
    sort_key=4,
)
app.command(
    "skipway.cli.export:export",
    name="export",
    help="Write a trained run as ONNX, as a program of torch.export, or for the Hugging Face hub.",
    usage="skipway export RUN [OPTIONS]",
    sort_key=5,
)
app.command(
    "skipway.cli.study:study",
    name="study",
    help="Test what the literature says about residual learning, by a grid of small runs.",
    usage="skipway study NAME|all [OPTIONS]",
    sort_key=6,
)
app.command(
    "skipway.cli.report:report",
    name="report",
    help="Write the pages of all studies in a folder, and an index over them.",
    usage="skipway report FOLDER",
    sort_key=7,
)
app.command("skipway.cli.catalogue:models", name="models", help="List the models with their parameter counts.")
app.command("skipway.cli.catalogue:schemes", name="schemes", help="List the residual schemes, or show the card of one.")
