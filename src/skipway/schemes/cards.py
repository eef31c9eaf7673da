"""The Markdown card of each scheme and a page that compares them, from the docstrings and fields of the schemes."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

from skipway.schemes.scheme import REGISTRY, Scheme

__all__ = ["card", "overview", "raised", "write_cards"]

POWER = re.compile(r"\^(?:\(((?:[^()]|\([^()]*\))*)\)|([-−]?[^\W_]+(?:[./][^\W_]+)?))")
"""x^(…) and x^…"""
INDEX = re.compile(r"(?<!\w)([^\W\d_])_(?:\(([^()]*)\)|([^\W_]{1,2})(?!\w))")
"""x_(…) and x_i, of a single letter"""

INTRODUCTION = """# Schemes

A scheme decides what each residual connection of a network looks like and how it starts. Schemes go with any
family and depth, but for five that refuse convolutions: `sw.build("resnet", depth=110, scheme="fixup")`,
`skipway train photos/ --scheme layerscale`. Each has a card with its equation, arguments, conversion of depth,
optimizer rule, theory and source, which `skipway schemes NAME` prints.

"""
COMBINATION = """
Schemes add up, as objects or in one text: `sw.LayerScale(1e-5) + sw.StochasticDepth(0.1)`,
`scheme="preactivation + skipinit(init=0.0, norm='remove') + stochasticdepth(0.1)"`. Two schemes that each start the
branch at zero are refused: neither factor would get a gradient.

A scheme of your own is one dataclass with a few methods: see [the architecture](../architecture.md) for the
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
            f"| spec | `{kind.__name__.lower()}({arguments})` |",
            "|---|---|",
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
    **Options:**
    <BLANKLINE>
    * `init`: the start of α.
    <BLANKLINE>
    **Source:** a paper.
    """
    text = re.sub(r"\n {8}(?=\S)", " ", docstring)
    # a heading of their own, or a list of rules before them would go on with them
    text = re.sub(r"^ {4}(\w+): ", r"* `\1`: ", text, flags=re.MULTILINE).replace("Args:\n", "**Options:**\n\n")
    labels = r"^(Depth|Decay and learning rate|Theory at the start[^:]*|Source):"
    return re.sub(labels, r"**\1:**", text, flags=re.MULTILINE)


def raised(text: str) -> str:
    """Write powers and indices as HTML, which Markdown takes, too; code is left as it is.

    >>> raised("L^(-1/(2m-2)), (1 - t)^L and `2^l`")
    'L<sup>-1/(2m-2)</sup>, (1 - t)<sup>L</sup> and `2^l`'
    >>> raised("grows as L^0.37. Then falls as L^-1/2, 2^-L.")
    'grows as L<sup>0.37</sup>. Then falls as L<sup>-1/2</sup>, 2<sup>-L</sup>.'
    >>> raised("Var(x_l) = Var(x_(l-1)), test_error")
    'Var(x<sub>l</sub>) = Var(x<sub>l-1</sub>), test_error'
    """
    parts = re.split(r"(`[^`]*`|^ {4}.*$)", text, flags=re.MULTILINE)
    for place in range(0, len(parts), 2):
        parts[place] = POWER.sub(lambda match: f"<sup>{match[1] or match[2]}</sup>", parts[place])
        parts[place] = INDEX.sub(lambda match: f"{match[1]}<sub>{match[2] or match[3]}</sub>", parts[place])
    return "".join(parts)


def overview() -> str:
    """The page that compares all schemes: equation, normalisation, and when to use each.

    >>> [line for line in overview().splitlines() if "ReZero" in line]
    ['| [ReZero](rezero.md) | y = x + α F(x), α₀ = 0 | keeps or removes it | fast first epochs at any depth; ...
    """
    rows = [
        f"| [{kind.__name__}]({name}.md) | {table_text(kind.equation)} | {table_text(kind.norm_note)} "
        f"| {table_text(kind.when)} |"
        for name, kind in REGISTRY.entries.items()
    ]
    head = ["| scheme | connection | normalisation | use it for |", "|---|---|---|---|"]
    return INTRODUCTION + "\n".join([*head, *rows]) + "\n" + COMBINATION


def table_text(text: str) -> str:
    """Text in a cell of a Markdown table: a bar would end the cell.

    >>> table_text("x / |x|")
    'x / \\\\|x\\\\|'
    """
    return text.replace("|", "\\|")


def write_cards(folder: Path) -> None:
    """Write the cards of all schemes into `folder`, one file each, and `index.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.md").write_text(overview(), encoding="utf-8")
    for name in REGISTRY:
        (folder / f"{name}.md").write_text(raised(card(name)), encoding="utf-8")
