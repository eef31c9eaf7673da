"""The command line. Commands load what they need when they run: `skipway --help` loads neither torch nor numpy."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

# what a shell reports for a process that Ctrl-C ended
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0 done, 1 the system failed (a full disk, say) or a diagnosis says that the network will not train, 2 wrong usage,
    3 images that cannot be trained on, 4 weights or a run that cannot be used, 5 diverged, 130 after
    Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1.
    """
    from cyclopts import CycloptsError

    from skipway.cli.app import app
    from skipway.cli.help import EVERYTHING, Columns
    from skipway.errors import SkipwayError

    given = list(sys.argv[1:] if arguments is None else arguments)
    Columns.everything = EVERYTHING in given
    try:
        result = app(given, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        command = f" {given[0]}" if given and not given[0].startswith("-") else ""
        return failed(f"{error}\nSee: skipway{command} --help", 2)
    except SkipwayError as error:
        return failed(str(error), error.exit_status)
    except KeyboardInterrupt as error:
        # `Stopping` says which signal it was
        return failed("stopped", 128 + error.args[0] if error.args else INTERRUPTED)
    except BrokenPipeError:
        # whoever read the output has gone, `skipway models | head` for instance
        sys.stderr.close()
        return 0
    except OSError as error:
        return failed(str(error), 1)
    return result if isinstance(result, int) else 0


def failed(message: str, status: int) -> int:
    """Write a message to standard error and hand the exit status on."""
    print(f"skipway: {message.strip()}", file=sys.stderr)
    return status
