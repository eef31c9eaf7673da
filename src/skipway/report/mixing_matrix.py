"""Heat maps of a depth mixing matrix: who reads whom, forward, and where the gradient comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.probes.mixing_matrix import DepthMixing, depth_mixing
from skipway.probes.objective import Loss
from skipway.report.chart import HeatCell, Heatmap
from skipway.tracing import Example

__all__ = ["depth_mixing_figures", "measured_mixing", "without_common_part"]

MOST_MIXED = 64
"""Connections up to which a page shows the depth mixing matrix, whose time grows with their square."""

MOST_ROWS = 40
"""Rows of a heat map; those of deeper networks are an even choice."""


def measured_mixing(
    model: nn.Module, connections: int, example: Example, targets: object, *, loss: Loss | None = None
) -> tuple[list[Heatmap], str]:
    """The heat maps of a network, which is left as it is, or why there are none, in words."""
    if not 0 < connections <= MOST_MIXED:
        return [], f"Depth mixing is measured for 1 to {MOST_MIXED} connections; here are {connections}."
    try:
        return depth_mixing_figures(depth_mixing(model, example, targets, loss=loss)), ""
    except SkipwayError as error:  # of a loss that needs the whole batch, or a network that is random in each pass
        return [], f"Depth mixing could not be measured: {error}."


def depth_mixing_figures(mixing: DepthMixing) -> list[Heatmap]:
    """The shares of all sources in what each connection carries, and of all readers in the gradient at each source.

    Coefficients are in what a cell says when it is pointed at.
    """
    size = len(mixing.readers)
    step = math.ceil(size / MOST_ROWS)
    chosen = sorted({*range(0, size, step), size - 1})
    some = f" Every {step}th row and column is shown." if step > 1 else ""

    def forward(row: int, column: int) -> str:
        factor = float(mixing.coefficients[row, column])
        number = "" if math.isnan(factor) else f", coefficient {factor:.3g}"
        return f"{mixing.sources[column]} in {mixing.readers[row]}: {percent(mixing.shares, row, column)}{number}"

    def backward(row: int, column: int) -> str:
        share = percent(mixing.gradient_shares, row, column)
        return f"gradient at {mixing.sources[column]} through {mixing.readers[row]}: {share}"

    return [
        heatmap(
            "What each connection carries, by source",
            mixing,
            mixing.shares,
            chosen,
            forward,
            note=f"Stronger colour: a larger share of what is carried; a row adds up to 1 over linear skips.{some}",
        ),
        heatmap(
            "Where the gradient at each source comes from",
            mixing,
            mixing.gradient_shares,
            chosen,
            backward,
            note=f"Stronger colour: a larger share of the gradient; a column adds up to 1.{some}",
        ),
    ]


def heatmap(
    title: str,
    mixing: DepthMixing,
    shares: Tensor,
    chosen: Sequence[int],
    words: Callable[[int, int], str],
    note: str,
) -> Heatmap:
    """A heat map of shares; negative ones have the other colour, and cells above the diagonal are empty."""
    return Heatmap(
        title=title,
        rows=without_common_part([mixing.readers[row] for row in chosen]),
        columns=without_common_part([mixing.sources[column] for column in chosen]),
        row_title="reader",
        column_title="source",
        cells=tuple(
            tuple(
                HeatCell(
                    min(1.0, abs(share)) if math.isfinite(share) else 0.0,
                    words(row, column),
                    "miss" if share < 0 else "hit",
                )
                for column in chosen
                if column <= row
                for share in [float(shares[row, column])]
            )
            for row in chosen
        ),
        note=note,
    )


def without_common_part(names: Sequence[str]) -> tuple[str, ...]:
    """Names without the path that those of all connections begin with.

    >>> without_common_part(["stem", "vit.blocks.0", "vit.blocks.1"])
    ('stem', '0', '1')
    """
    paths = [name.split(".") for name in names if "." in name]
    shared = 0
    while len(paths) > 1 and len({tuple(path[: shared + 1]) for path in paths}) == 1 and len(paths[0]) > shared + 1:
        shared += 1
    return tuple(name.split(".", shared)[-1] if "." in name else name for name in names)


def percent(shares: Tensor, row: int, column: int) -> str:
    """A share in words."""
    share = float(shares[row, column])
    return "not known" if math.isnan(share) else f"{100 * share:.1f} %"
