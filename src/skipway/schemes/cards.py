"""A scheme's card: what it is, from its own docstring and fields."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

from skipway.schemes.scheme import REGISTRY, Scheme

__all__ = ["card", "write_cards"]


def card(scheme: str | type[Scheme]) -> str:
    """The Markdown card of a scheme: equation, arguments with defaults, normalisation, use, source, and its docstring.

    >>> print(card("zeroinit").splitlines()[0])
    # ZeroInit
    """
    kind = REGISTRY[scheme] if isinstance(scheme, str) else scheme
    arguments = ", ".join(f"{f.name}={f.default!r}" for f in fields(kind))  # type: ignore[arg-type]
    body, _, example = inspect.cleandoc(kind.__doc__ or "").partition(">>> ")
    return "\n".join(
        [
            f"# {kind.__name__}",
            "",
            f"    {kind.equation}",
            "",
            "| | |",
            "|---|---|",
            f"| spec | `{kind.__name__.lower()}({arguments})` |",
            f"| normalisation | {kind.norm_note} |",
            f"| use it for | {kind.when} |",
            f"| source | {kind.source} |",
            "",
            as_markdown(body.strip()),
            *(["", "```python", f">>> {example.strip()}", "```"] if example else []),
            "",
        ]
    )


def as_markdown(docstring: str) -> str:
    """A docstring's `Args:` as a list, and its labels in bold.

    >>> print(as_markdown("Args:\\n    init: the start\\n        of α.\\n\\nSource: a paper."))
    * `init`: the start of α.
    <BLANKLINE>
    **Source:** a paper.
    """
    text = re.sub(r"\n {8}(?=\S)", " ", docstring)
    text = re.sub(r"^ {4}(\w+): ", r"* `\1`: ", text, flags=re.MULTILINE).replace("Args:\n", "")
    labels = r"^(Depth|Decay and learning rate|Theory at the start[^:]*|Source):"
    return re.sub(labels, r"**\1:**", text, flags=re.MULTILINE)


def write_cards(folder: Path) -> None:
    """Write the cards of all schemes into `folder`, one file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in REGISTRY:
        (folder / f"{name}.md").write_text(card(name), encoding="utf-8")
