"""`skipway doctor`: what is installed, what is missing and the line that adds it, and what is slow here and why."""

from __future__ import annotations

import json as json_format
import re
import sys
import textwrap
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Annotated, Any

from cyclopts import Parameter

from skipway.cli.option_names import option_spelling
from skipway.cli.usage import version_text
from skipway.errors import counted
from skipway.install_lines import EXTRAS, LIBRARIES, library_line

__all__ = ["doctor"]

Flag = Annotated[bool, Parameter(negative=())]
LABEL, WIDTH = 12, 80


@dataclass(frozen=True)
class Package:
    """An optional package: its extra, or none, its version, or none, its use, and the line that adds it."""

    name: str
    extra: str | None
    version: str | None
    purpose: str
    line: str


def doctor(*, json: Flag = False) -> int:
    """Tell what is installed, what is missing and the line that adds it, and what is slow here and why.

    Measures the processor for about half a second; nothing is changed, and nothing is sent.

    Args:
        json: Print JSON.
    """
    from skipway.hardware.checkup import check_machine

    packages = optional_packages()
    began = time.perf_counter()
    checkup = check_machine()
    seconds = time.perf_counter() - began
    causes = [option_spelling(cause) for cause in checkup.causes()]
    if json:
        content: dict[str, Any] = {"version": version_text().splitlines(), "machine": asdict(checkup), "slow": causes}
        content |= {"packages": [asdict(each) for each in packages], "seconds": seconds}
        sys.stdout.write(json_format.dumps(content, indent=1) + "\n")
        return 0
    speeds = checkup.speeds
    say("version", "; ".join(version_text().splitlines()))
    say("torch", f"built for {checkup.build}, products by {checkup.blas}, {counted(checkup.threads, 'thread')}")
    say("processor", f"{checkup.instructions}{', ' * bool(checkup.precisions)}{', '.join(checkup.precisions)}")
    memory = "unknown" if checkup.memory is None else f"{checkup.memory / 1e9:.1f} GB free"
    load = "" if checkup.load is None else f", load {checkup.load:.1f} on {counted(checkup.machine, 'core')}"
    load += f", of which {checkup.cores} may be used" * (checkup.cores < checkup.machine)
    say("memory", f"{memory}{load}")
    say("GPU", ", ".join(checkup.devices) or "none")
    say("compiler", f"{checkup.compiler or 'none'}{'' if checkup.headers else ', no headers of Python'}")
    say("settings", " ".join(f"{name}={value}" for name, value in checkup.settings.items()) or "none about threads")
    say(
        "measured",
        f"products {speeds.product:.0f} GFLOP/s in float32 ({speeds.one_thread:.0f} on one thread), "
        f"{speeds.bfloat16:.0f} in bfloat16; copies {speeds.copy:.1f} GB/s; {speeds.call:.1f} µs a call "
        f"({seconds:.1f} s of measuring)",
    )
    print_packages(packages)
    sys.stdout.write("\n")
    for cause in causes or ["nothing was found that is slow here"]:
        say("slow" if causes else "", cause)
    return 0


def print_packages(packages: list[Package]) -> None:
    """Print which optional packages there are, and what is missing with the line that adds it."""
    sys.stdout.write("\n")
    there = [f"{each.name} {each.version}" for each in packages if each.version]
    say("installed", ", ".join(dict.fromkeys(there)) or "no optional package")
    for each in packages:
        if not each.version:
            say("missing", f"{each.name}, for {each.purpose}")
            sys.stdout.write(f"{'':<{LABEL}}{each.line}\n")


def optional_packages() -> list[Package]:
    """The packages of the extras, as the installed Skipway names them, and the libraries beside them."""
    try:
        asked = requires("skipway") or []
    except PackageNotFoundError:  # the sources on the path
        asked = []
    found = [re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", each) for each in asked]
    pairs = [(each[1], each[2]) for each in found if each is not None and each[2] in EXTRAS]
    packages = [Package(name, extra, version_of(name), EXTRAS[extra], library_line(extra)) for name, extra in pairs]
    libraries = [Package(name, None, version_of(name), use, library_line(name)) for name, use in LIBRARIES.items()]
    return packages + libraries


def version_of(package: str) -> str | None:
    """The installed version of a package; None: there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def say(label: str, text: str) -> None:
    """Print a label and a text that is wrapped to 80 columns."""
    indent = " " * LABEL
    wrapped = textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    sys.stdout.write(f"{label:<{LABEL}}{wrapped[LABEL:]}\n")
