"""The commands by name. Each is an import path that is followed when the command is called."""

from __future__ import annotations

from cyclopts import App, Parameter

from skipway import __version__
from skipway.cli.help import Columns
from skipway.cli.stored import options_of_a_run

__all__ = ["app"]

app = App(
    name="skipway",
    help="Residual networks at any depth: build, train, look inside.",
    version=__version__,
    help_format="plaintext",
    help_formatter=Columns(),
    # of an option that is given twice the last counts, so that scripts can be called with others
    default_parameter=Parameter(allow_repeating=True),
)
app.command(
    "skipway.cli.train:train",
    name="train",
    help="Train a network on a folder of images; without one, on handwritten digits.",
    usage="skipway train [DATA] [OPTIONS]",
    config=options_of_a_run,
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
app.command("skipway.cli.tables:models", name="models", help="List the models with their parameter counts.")
app.command("skipway.cli.tables:schemes", name="schemes", help="List the residual schemes, or show the card of one.")
