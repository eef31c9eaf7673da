"""The references made from the program when the site is built: `docs/commands.md` and `docs/reference.md`."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docstring_parser import DocstringStyle, parse

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("commands.md", "reference.md")
WIDTH = 100


def commands_page() -> str:
    """Every command with all of its options, as `--help-all` shows them, and the exit statuses."""
    from skipway.cli import main
    from skipway.cli.app import app

    names = [name for name in app if not name.startswith("-")]
    parts = [
        "# Command line",
        "Made from the program. `skipway COMMAND --help` shows the usual options, `--help-all` all of them.",
        inspect.cleandoc((inspect.getdoc(main) or "").partition("\n")[2]),
    ]
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        for name in names:
            shown = io.StringIO()
            with contextlib.redirect_stdout(shown):
                main([name, "--help-all"])
            parts += [f"## {name}", f"```text\n{shown.getvalue().strip()}\n```"]
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.__setitem__("COLUMNS", before)
    return "\n\n".join(parts) + "\n"


def public_names() -> dict[str, dict[str, Any]]:
    """The public names by the room that defines them; rooms, which are modules, apart."""
    import skipway as sw

    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for name in sorted(dir(sw), key=str.lower):
        value = getattr(sw, name)
        if callable(value):
            found[value.__module__.split(".")[1]][name] = value
    return dict(sorted(found.items()))


def reference_page() -> str:
    """Every public name with its signature and docstring."""
    import skipway

    parts = [
        "# Reference",
        "The names of `import skipway as sw`, made from docstrings, by the room that defines them.",
    ]
    for room, names in public_names().items():
        about = (inspect.getdoc(getattr(skipway, room)) or "").partition("\n\n")[0]
        parts += [f"## {room}", " ".join(about.split()), ", ".join(f"[{name}](#{name.lower()})" for name in names)]
        for name, value in names.items():
            parts += [
                f"### {name}",
                f"```python\n{signature(name, value)}\n```",
                *described(inspect.getdoc(value) or ""),
            ]
    return "\n\n".join(part for part in parts if part) + "\n"


def signature(name: str, value: Any) -> str:
    """How a name is called, one argument a line where it is long."""
    try:
        found = inspect.signature(value)
    except ValueError:
        return f"sw.{name}"
    plain = [each.replace(annotation=str(each.annotation).strip("'")) for each in found.parameters.values()]
    words, starred = [], False
    for each in plain:
        if each.kind is each.KEYWORD_ONLY and not starred:
            words.append("*")
        starred = starred or each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        star = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        default = "" if each.default is each.empty else f"={each.default!r}" if not callable(each.default) else "=…"
        words.append(f"{star}{each.name}{default}")
    line = f"sw.{name}({', '.join(words)})"
    return line if len(line) <= WIDTH else f"sw.{name}(\n    " + ",\n    ".join(words) + ",\n)"


def described(text: str) -> Iterator[str]:
    """A docstring as Markdown: text, arguments, result, errors, examples."""
    from skipway.schemes.cards import raised

    plain, examples = [], []
    for block in re.split(r"\n{2,}", text):
        (examples if block.lstrip().startswith(">>>") else plain).append(block)
    # a placeholder such as <number> is no tag of HTML
    words = re.split(r"(`[^`]*`)", "\n\n".join(plain))
    words[::2] = [re.sub(r"<(?=[a-z/])", "&lt;", each) for each in words[::2]]
    found = parse(raised("".join(words)), DocstringStyle.GOOGLE)
    yield from filter(None, (found.short_description, found.long_description))
    rows = [f"* `{each.arg_name}`: {' '.join((each.description or '').split())}" for each in found.params]
    if rows:
        yield "**Arguments**\n\n" + "\n".join(rows)
    if found.returns is not None and found.returns.description:
        yield f"**Returns** {' '.join(found.returns.description.split())}"
    rows = [f"* `{each.type_name}`: {' '.join((each.description or '').split())}" for each in found.raises]
    if rows:
        yield "**Raises**\n\n" + "\n".join(rows)
    for example in examples:
        yield f"```pycon\n{inspect.cleandoc(example)}\n```"


def write() -> None:
    """Write both pages; `scripts/docs` removes them after the build."""
    for name, page in zip(PAGES, (commands_page(), reference_page()), strict=True):
        (DOCS / name).write_text(page, "utf-8")


if __name__ == "__main__":
    write()
