"""The Markdown card of each scheme and a page that compares them, from the docstrings and fields of the schemes."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

from skipway.schemes.scheme import REGISTRY, Scheme

__all__ = ["card", "overview", "write_cards"]

INTRODUCTION = """# Schemes

A scheme decides what each residual connection of a network looks like and how it starts. Any scheme goes with any
family and depth: `sw.build("resnet", depth=110, scheme="fixup")`, `skipway train photos/ --scheme layerscale`. Each has
a card with its equation, arguments, conversion of depth, optimizer rule, theory and source, which
`skipway schemes NAME` prints.

"""
COMBINATION = """
Schemes add up, as objects or in one text: `sw.LayerScale(1e-5) + sw.StochasticDepth(0.1)`,
`scheme="preactivation + skipinit(init=0.0, norm='remove') + stochasticdepth(0.1)"`. Two schemes that each start the
branch at zero are refused: neither factor would get a gradient.

A scheme of your own is one dataclass with one to four methods: see [the architecture](../architecture.md) for the
hooks. What the schemes do on small networks, side by side: [the study](../studies/schemes.html).
"""


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


def overview() -> str:
    """The page that compares all schemes: equation, normalisation, and when to use each.

    >>> [line for line in overview().splitlines() if "ReZero" in line]
    ['| [ReZero](rezero.md) | y = x + α F(x), α₀ = 0 | keeps or removes it | fast first epochs at any depth; ...
    """
    rows = [
        f"| [{kind.__name__}]({name}.md) | {kind.equation} | {kind.norm_note} | {kind.when} |"
        for name, kind in REGISTRY.entries.items()
    ]
    head = ["| scheme | connection | normalisation | use it for |", "|---|---|---|---|"]
    return INTRODUCTION + "\n".join([*head, *rows]) + "\n" + COMBINATION


def write_cards(folder: Path) -> None:
    """Write the cards of all schemes into `folder`, one file each, and `index.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.md").write_text(overview(), encoding="utf-8")
    for name in REGISTRY:
        (folder / f"{name}.md").write_text(card(name), encoding="utf-8")
