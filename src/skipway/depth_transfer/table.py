"""A depth transfer on a terminal: `rich` renderables, and the same as plain text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from skipway.depth_transfer.coordinates import COORDINATES
from skipway.depth_transfer.regression import Estimate
from skipway.depth_transfer.result import ANSWER_WORDS, Answer, DepthTransfer, SchemeRates
from skipway.diagnosis.table import as_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["RATE_COLUMNS", "interval_text", "rate_cells", "transfer_text", "transfer_view"]

STYLES: dict[Answer, str] = {"carries": "bold green", "does not carry": "bold red", "undecided": "bold yellow"}
RATE_COLUMNS = ("depth", "branches", "best rate", "95 % interval", "loss", "loss more at the shallow rate")


def transfer_text(found: DepthTransfer) -> str:
    """The result as plain text, 100 columns wide."""
    return as_text(transfer_view(found))


def transfer_view(found: DepthTransfer) -> RenderableType:
    """The answer, a table of rates for each scheme, the coordinate check, how to set the rates, remarks."""
    from rich.console import Group
    from rich.text import Text

    style = STYLES[found.answer] if found.schemes else "bold"
    parts: list[RenderableType] = [Text(found.name, "bold"), Text(found.sentence, style)]
    for each in found.schemes:
        title = f"{each.scheme}: the best rate {ANSWER_WORDS[each.answer]}"
        parts += [Text(), Text(title, STYLES[each.answer]), rate_table(each)]
        parts += [Text(f"depth {rate.depth}: {rate.remark}", "dim") for rate in each.rates if rate.remark]
        parts += [Text(sentence) for sentence in each.sentences(found.unit)]
    if found.advice:
        parts += [Text(), *(Text(sentence, "bold") for sentence in found.advice)]
    if found.coordinates:
        title = f"coordinate check: root mean squares, changes by a few steps at {found.coordinate_lr:.3g}"
        parts += [Text(), Text(title, "bold"), coordinate_table(found)]
    for each in found.schemes:
        parts += [
            Text(),
            Text(f"to train with {each.scheme}", "bold"),
            Text(each.code),
        ]
    parts += [Text(), *(Text(f"note  {remark}", "dim") for remark in found.remarks)]
    return Group(*parts)


def rate_table(rates: SchemeRates) -> Table:
    """The best rate at each depth, and rates for larger ones."""
    table = empty_table(*RATE_COLUMNS)
    for cells in rate_cells(rates):
        table.add_row(*cells)
    return table


def rate_cells(rates: SchemeRates) -> Iterator[tuple[str, ...]]:
    """The cells of the table of rates, as `RATE_COLUMNS`."""
    for each in rates.rates:
        yield (
            str(each.depth),
            str(each.branches),
            "—" if math.isnan(each.lr.value) else f"{each.lr.value:.3g}",
            interval_text(each.lr),
            f"{each.loss:.4g}" if math.isfinite(each.loss) else "diverges",
            "" if each is rates.rates[0] else lost_text(each.lost),
        )
    for row in rates.rows:
        if not row.measured:
            yield (str(row.depth), "", f"{row.lr.value:.3g}", interval_text(row.lr), "extrapolated", "")


def lost_text(lost: Estimate) -> str:
    """By how much more another rate loses, with the interval.

    >>> lost_text(Estimate(0.02, 0.01, 0.03)), lost_text(Estimate(math.inf, -math.inf, math.inf))
    ('+0.02 (0.01 to 0.03)', 'diverges')
    """
    if not math.isfinite(lost.value):
        return "diverges"
    if lost.value == lost.width == 0:
        return "0"
    return f"{lost.value:+.2g}" + (f" ({lost.low:.2g} to {lost.high:.2g})" if math.isfinite(lost.width) else "")


def interval_text(found: Estimate) -> str:
    """The ends of an interval.

    >>> interval_text(Estimate(1.0, 0.5, 2.0)), interval_text(Estimate(1.0, 0.0, math.inf))
    ('0.5 to 2', 'not known')
    """
    if not math.isfinite(found.high) or not math.isfinite(found.low) or math.isnan(found.value):
        return "not known"
    return f"{found.low:.3g} to {found.high:.3g}"


def coordinate_table(found: DepthTransfer) -> Table:
    """How each size goes with depth."""
    schemes = list(dict.fromkeys(each.scheme for each in found.coordinates))
    table = empty_table("size", *schemes)
    for name, words in COORDINATES.items():
        own = {each.scheme: str(each) for each in found.coordinates if each.name == name}
        if own:
            table.add_row(words, *(own.get(scheme, "") for scheme in schemes))
    return table


def empty_table(*columns: str) -> Table:
    """A table with these columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table
