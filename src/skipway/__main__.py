"""`python -m skipway`, and `torchrun -m skipway` for several processes."""

from __future__ import annotations

import atexit
import os
import sys

from skipway.cli import main

__all__: list[str] = []


def end(status: int) -> None:
    """End the process with its exit status; under torchrun without taking the interpreter down.

    Threads of Gloo may still hold tensors then. When one of them asks for the interpreter's lock while the interpreter
    goes down, the process aborts, and torchrun reports a finished training as failed (pytorch/pytorch#179291).
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        atexit._run_exitfuncs()  # `os._exit` calls none of them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    end(main())
