"""The signal along the depth: a row for each connection or layer, for the table, the picture and the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from skipway.diagnosis.findings import Finding
from skipway.diagnosis.measurement import Measurement
from skipway.tracing.chain import Chain, WatchedConnection

__all__ = ["SignalRow", "folded", "signal_rows"]

ALL_SHOWN = 40
"""Rows up to which a table shows all of them."""
STRETCHES = SPACED = 8
SHORTEST_FOLD = 3


@dataclass(frozen=True, kw_only=True)
class SignalRow:
    """The signal at one residual connection, or at one layer of a network without connections.

    Args:
        name: of the connection or module.
        form: kind of the branch, and of the skip where it is not the identity; "layer" for a layer.
        norms: places of the branch's norms.
        skip, branch: root mean squares of x and F(x).
        forward: root mean square of the stream after the addition; standard deviation of a layer's output.
        backward: root mean square of the loss's gradient with respect to it.
        through: root mean square of the gradient's part that comes through the branch.
        distinct: 1 − mean cosine between samples.
        marks: numbers of the findings that point to it, from 1.
    """

    name: str
    form: str
    norms: str = ""
    skip: float = math.nan
    branch: float = math.nan
    forward: float = math.nan
    backward: float = math.nan
    through: float = math.nan
    distinct: float = math.nan
    marks: tuple[int, ...] = ()

    @property
    def ratio(self) -> float:
        """|F(x)| / |x|."""
        return self.branch / self.skip if self.skip else math.nan


def signal_rows(
    measured: Measurement, chain: Chain[WatchedConnection], findings: Sequence[Finding]
) -> tuple[SignalRow, ...]:
    """The rows of a measurement in order: its connections, or its layers where it has none."""
    marks = marks_by_row(measured, chain, findings)
    if not measured.connections:
        return tuple(
            SignalRow(
                name=layer.name,
                form="layer",
                forward=layer.std,
                backward=layer.gradient,
                distinct=layer.distinct,
                marks=marks.get(layer.name, ()),
            )
            for layer in measured.layers
        )
    return tuple(
        SignalRow(
            name=signal.name,
            form=connection.seen.kind + ("" if connection.seen.skip == "identity" else f" {connection.seen.skip}"),
            norms="+".join(connection.seen.norms) or "none",
            skip=signal.skip,
            branch=signal.branch,
            forward=signal.stream,
            backward=signal.gradient_after,
            through=signal.gradient_branch,
            distinct=signal.distinct,
            marks=marks.get(signal.name, ()),
        )
        for connection, signal in zip(chain, measured.connections, strict=True)
    )


def marks_by_row(
    measured: Measurement, chain: Chain[WatchedConnection], findings: Sequence[Finding]
) -> dict[str, tuple[int, ...]]:
    """The numbers of the findings that point to a row, or to something inside of it, by the row's name."""
    owners = row_owners(measured, chain)
    marks: dict[str, list[int]] = {}
    for count, finding in enumerate(findings, 1):
        named = (owners.get(where) or owners.get(where.rpartition(".")[0]) for where in finding.where)
        for name in dict.fromkeys(name for name in named if name is not None):
            marks.setdefault(name, []).append(count)
    return {name: tuple(numbers) for name, numbers in marks.items()}


def row_owners(measured: Measurement, chain: Chain[WatchedConnection]) -> dict[str, str]:
    """The row to which each connection, module and parameter belongs, by their names."""
    if not measured.connections:
        return {layer.name: layer.name for layer in measured.layers}
    owners = {connection.name: connection.name for connection in chain}
    for connection in chain:
        scale = () if connection.seen.scale is None else connection.seen.scale.parameters
        for inner in (*connection.seen.maps, *scale, *connection.seen.shortcut):
            owners.setdefault(inner, connection.name)
    # a module in which several branches run, a stage or the model itself, belongs to none of them
    users: dict[str, set[str]] = {}
    for connection in chain:
        for inner in connection.seen.modules:
            users.setdefault(inner, set()).add(connection.name)
    for inner, names in users.items():
        if inner and len(names) == 1:
            owners.setdefault(inner, *names)
    return owners


def folded(rows: Sequence[SignalRow]) -> list[SignalRow | list[SignalRow]]:
    """Rows for a screen: all of up to 40, else about 20 of them with lists of the hidden rows in between.

    Shown are the first and last row, some evenly spaced ones, and the first row of each stretch to which the same
    findings point; of many stretches, the first row of each combination of findings.
    """
    if len(rows) <= ALL_SHOWN:
        return list(rows)
    starts = [index for index, row in enumerate(rows) if index == 0 or row.marks != rows[index - 1].marks]
    if len(starts) > STRETCHES:
        firsts = {rows[index].marks: index for index in reversed(starts)}
        starts = sorted(firsts.values())[:STRETCHES]
    last = len(rows) - 1
    shown = sorted({0, last, *starts, *(round(step * last / SPACED) for step in range(SPACED))})
    return list(with_folds(rows, shown))


def with_folds(rows: Sequence[SignalRow], shown: Sequence[int]) -> Iterable[SignalRow | list[SignalRow]]:
    """The shown rows, and what is between two of them as a list, or as it is where that is as short."""
    for start, stop in zip(shown, [*shown[1:], len(rows)], strict=True):
        yield rows[start]
        hidden = list(rows[start + 1 : stop])
        if len(hidden) < SHORTEST_FOLD:
            yield from hidden
        else:
            yield hidden
