"""The command line. A command imports what it needs when it runs: `skipway --help` imports neither torch nor numpy."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

__all__ = ["main"]

# the exit status that shells report after Ctrl-C
INTERRUPTED = 130
# when the command began, on the clock of `time.monotonic`
BEGAN = [time.monotonic()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0 success, 1 system failure (a full disk, for instance), a diagnosis that predicts failure, or rates that do not
    carry over, 2 wrong usage, 3 unusable images, 4 unusable weights or run, or a question that stays undecided,
    5 divergence, 130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1.
    """
    if arguments is not None:  # called from Python, perhaps long after the import
        BEGAN[0] = time.monotonic()
    from cyclopts import CycloptsError

    from skipway.cli.app import app
    from skipway.cli.help import HELP_ALL, HelpFormatter
    from skipway.cli.option_names import option_spelling
    from skipway.cli.usage import see_help, start_text, usage_text
    from skipway.errors import SkipwayError
    from skipway.hardware.limits import limit_threads

    limit_threads()
    given = list(sys.argv[1:] if arguments is None else arguments)
    HelpFormatter.show_all = HELP_ALL in given
    if not given:
        sys.stdout.write(start_text())
        return 0
    commands = [name for name in app if not name.startswith("-")]
    try:
        result = app(given, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return print_error(usage_text(error, given, commands), 2)
    except SkipwayError as error:
        usage = f"\n{see_help(given[0])}" if error.exit_status == 2 else ""
        return print_error(f"{option_spelling(str(error))}{usage}", error.exit_status)
    except KeyboardInterrupt as error:
        # `StopSignal` passes the number of the signal
        return print_error("stopped", 128 + error.args[0] if error.args else INTERRUPTED)
    except BrokenPipeError:
        # the reader of the output has exited, as in `skipway models | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        return print_error(str(error), 1)
    return result if isinstance(result, int) else 0


def print_error(message: str, status: int) -> int:
    """Print a message to standard error and return the exit status."""
    print(f"skipway: {message.strip()}", file=sys.stderr)
    return status
