"""`skipway monitor`: the page of a training that `skipway.monitor` watched."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from skipway.cli.option_names import option_words
from skipway.errors import SkipwayError, printable, similar_names

__all__ = ["page"]


def page(file: Path, /, *, out: Annotated[Path | None, Parameter(name="--out")] = None) -> int:
    """Write the page of a training that skipway.monitor watched, while it runs or afterwards.

    Args:
        file: JSON lines, which skipway.monitor(model, optimizer, sink=FILE) wrote.
        out: The page. [FILE with the ending .html]
    """
    from skipway.monitoring import read_history
    from skipway.report.files import save

    if not os.path.lexists(file):
        raise SkipwayError(f"{printable(file)} does not exist{similar_names(file)}")
    command = shlex.join(["skipway", "monitor", str(file), *option_words({"out": out})])
    path = save(read_history(file), out or file.with_suffix(".html"), command=command, name=file.stem)
    sys.stdout.write(f"page   {path}\n")
    return 0
