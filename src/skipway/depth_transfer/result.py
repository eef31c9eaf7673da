"""What a sweep over depths and rates found: whether the best rate carries, and which rates to use."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from skipway.depth_transfer.coordinates import Coordinate, CoordinateRow
from skipway.depth_transfer.design import OWN
from skipway.depth_transfer.regression import Estimate, Line, fit_line
from skipway.depth_transfer.search import BestRate
from skipway.json_values import finite

__all__ = ["Answer", "DepthTransfer", "RateRow", "SchemeRates"]

Answer = Literal["carries", "does not carry", "undecided"]
OCTAVE = 1.0
"""Octaves by which the best rate may differ between the shallowest and the deepest network: a factor of 2."""
FARTHER = (2, 4)
"""Multiples of the largest depth that rates are extrapolated to."""


@dataclass(frozen=True)
class RateRow:
    """A row of the table of rates to use.

    Args:
        depth: as it was asked for.
        lr: with its 95 % interval.
        measured: whether this depth was trained; else the line through the measured ones is continued.
    """

    depth: int
    lr: Estimate
    measured: bool


@dataclass(frozen=True)
class SchemeRates:
    """The best rates of one scheme over depth.

    Args:
        scheme: its spec string; "own" for the network as it is made.
        code: Python that makes the network with it.
        rates: by increasing depth.
    """

    scheme: str
    code: str
    rates: tuple[BestRate, ...]

    @property
    def network(self) -> str:
        """The network with this scheme, in words."""
        return "the network as it is made" if self.scheme == OWN else f"the network with {self.scheme}"

    @cached_property
    def line(self) -> Line | None:
        """log₂ of the best rate over log₂ of the branches; None where it is known at fewer than two depths."""
        known = [each for each in self.rates if each.known]
        if len({each.branches for each in known}) < 2:
            return None
        x = [math.log2(each.branches) for each in known]
        y = [math.log2(each.lr.value) for each in known]
        errors = [octaves(each.lr).error for each in known]
        return fit_line(x, y, errors)

    @property
    def power(self) -> Estimate | None:
        """p of lr* ∝ L^p, L the residual branches, with its 95 % interval."""
        return None if self.line is None else self.line.slope

    @property
    def shift(self) -> Estimate | None:
        """Octaves by which the line's rate at the largest depth is above that at the smallest."""
        ratio = math.log2(self.rates[-1].branches / self.rates[0].branches)
        return None if self.power is None else self.power.times(ratio)

    @property
    def answer(self) -> Answer:
        """Whether the best rate of the shallowest network is that of the deepest within a factor of 2.

        "carries" where the whole interval of their ratio lies within it, "does not carry" where the interval does not
        and excludes 1, or where the deepest network diverges at that rate.
        """
        if not math.isfinite(self.rates[-1].lost.value):
            return "does not carry"
        shift = self.shift
        if shift is None:
            return "undecided"
        if max(-shift.low, shift.high) <= OCTAVE:
            return "carries"
        return "undecided" if shift.holds(0) else "does not carry"

    @property
    def rows(self) -> list[RateRow]:
        """Rates to use: measured ones, and where the line is known, extrapolated ones."""
        rows = [RateRow(each.depth, each.lr, measured=True) for each in self.rates]
        deepest, line = self.rates[-1], self.line
        if line is None:
            return rows
        for factor in FARTHER:
            found = line.at(math.log2(factor * deepest.branches))
            lr = Estimate(*(2.0**value for value in (found.value, found.low, found.high)))
            rows.append(RateRow(factor * deepest.depth, lr, measured=False))
        return rows

    @property
    def fitted(self) -> list[tuple[int, float]]:
        """Depth and rate along the line, at the depths of `rows`; empty where there is no line."""
        if self.line is None:
            return []
        inside = [(each.depth, 2.0 ** self.line.at(math.log2(each.branches)).value) for each in self.rates]
        return inside + [(row.depth, row.lr.value) for row in self.rows if not row.measured]

    def sentences(self, unit: str) -> Iterator[str]:
        """What was found, in words.

        Args:
            unit: of the loss.
        """
        shallow, deep = self.rates[0], self.rates[-1]
        if self.power is None:
            yield "A best rate was found at fewer than two depths, so nothing can be said about its change."
        else:
            first, *_, last = (each for each in self.rates if each.known)
            yield (
                f"The best rate goes as L^{self.power.value:.2f} ({self.power.low:.2f} to {self.power.high:.2f}), "
                f"L the residual branches: {first.lr.value:.3g} at depth {first.depth}, {last.lr.value:.3g} at "
                f"depth {last.depth}."
            )
        words = loss_words(deep, unit)
        yield f"At depth {deep.depth} the rate of depth {shallow.depth}, {deep.shallow_lr:.3g}, {words}."


def loss_words(deep: BestRate, unit: str) -> str:
    """What the rate of the shallowest network costs in words."""
    lost, unit = deep.lost, f" {unit}".rstrip()
    if not math.isfinite(lost.value):
        return "diverges"
    if lost.value == lost.width == 0:
        return "is the best of those that were tried"
    if not math.isfinite(lost.width):
        return f"loses {lost.value:.3g}{unit} (one seed)"
    if lost.holds(0):
        return f"loses {lost.value:.2g}{unit}, which cannot be told from noise ({lost.low:.2g} to {lost.high:.2g})"
    return f"loses {lost.value:.3g}{unit} ({lost.low:.3g} to {lost.high:.3g})"


def octaves(lr: Estimate) -> Estimate:
    """The base-2 logarithm of a rate."""
    return Estimate(*(math.log2(value) for value in (lr.value, lr.low, lr.high)))


@dataclass(frozen=True)
class DepthTransfer:
    """The result of `skipway.transfer`.

    Args:
        name: of the design.
        settings: of the trainings in words, by name.
        schemes: best rates, of the network as it is made first, if it was swept; empty where rates were not.
        coordinates: how sizes go with depth.
        sizes: that they rest on.
        coordinate_lr: the rate of the coordinate check.
        unit: of the loss.
        remarks: what a reader has to know.
        seconds: that it took, stored runs not counted.
    """

    name: str
    settings: dict[str, str]
    schemes: tuple[SchemeRates, ...]
    coordinates: tuple[Coordinate, ...]
    sizes: tuple[CoordinateRow, ...]
    coordinate_lr: float
    unit: str
    remarks: tuple[str, ...]
    seconds: float

    @property
    def answer(self) -> Answer:
        """Whether the rate of the first scheme carries; see `SchemeRates.answer`."""
        return self.schemes[0].answer if self.schemes else "undecided"

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        if not self.schemes:
            return "Coordinate check only: rates were not swept."
        first = self.schemes[0]
        shallow, deep = first.rates[0].depth, first.rates[-1].depth
        return {
            "carries": f"The best rate carries from depth {shallow} to depth {deep}, within a factor of 2.",
            "does not carry": f"The best rate does not carry from depth {shallow} to depth {deep}.",
            "undecided": f"Whether the best rate carries from depth {shallow} to depth {deep} cannot be told yet.",
        }[first.answer]

    @property
    def advice(self) -> list[str]:
        """What follows, in sentences."""
        return list(advice(self.schemes, self.unit))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; numbers that are not finite are None."""
        schemes = [
            {
                "scheme": each.scheme,
                "answer": each.answer,
                "power": None if each.power is None else asdict(each.power),
                "code": each.code,
                "rates": [asdict(rate) for rate in each.rates],
                "table": [asdict(row) for row in each.rows],
            }
            for each in self.schemes
        ]
        coordinates = [{**asdict(each), "growth": each.growth} for each in self.coordinates]
        found = {
            "name": self.name,
            "answer": self.answer,
            "sentence": self.sentence,
            "advice": self.advice,
            "settings": self.settings,
            "unit": self.unit,
            "schemes": schemes,
            "coordinate_lr": self.coordinate_lr,
            "coordinates": coordinates,
            "sizes": [asdict(row) for row in self.sizes],
            "remarks": list(self.remarks),
            "seconds": self.seconds,
        }
        return finite(found)

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        from skipway.depth_transfer.table import transfer_text

        return transfer_text(self)


def advice(schemes: Sequence[SchemeRates], unit: str) -> Iterator[str]:
    """What the schemes change beside the first one, and which to take."""
    for each in schemes[1:]:
        own, deep = schemes[0].rates[-1], each.rates[-1]
        lower = own.loss - deep.loss
        compared = (
            f"{abs(lower):.3g}{f' {unit}'.rstrip()} {'lower' if lower > 0 else 'higher'} than {schemes[0].network}"
        )
        if not math.isfinite(lower):
            compared = f"no loss to compare with {schemes[0].network}"
        power = "" if each.power is None else f" (L^{each.power.value:.2f})"
        yield (
            f"With {each.scheme} the best rate {ANSWER_WORDS[each.answer]}{power}; at depth {deep.depth} its loss at "
            f"its best rate is {deep.loss:.4g}, {compared}."
        )
    if not schemes:
        return
    good = [each for each in schemes if each.answer == "carries"]
    if schemes[0].answer == "undecided":
        rate = f"the rate of {schemes[0].network}"
        yield f"More seeds, more steps, or depths further apart would tell whether {rate} carries."
    elif schemes[0].answer == "does not carry" and good:
        yield f"To choose the rate at a small depth and keep it, take {good[0].scheme}."
    elif schemes[0].answer == "does not carry" and any(each.answer == "undecided" for each in schemes):
        candidate = next(each for each in schemes if each.answer == "undecided")
        yield f"With {candidate.scheme} it may carry; more seeds, more steps, or depths further apart would tell."
    elif schemes[0].answer == "does not carry":
        others = "No scheme that was tried makes the rate carry" if schemes[1:] else "No other scheme was tried"
        yield f"{others}; choose the rate anew at each depth, or take it from the table."


ANSWER_WORDS = {"carries": "carries", "does not carry": "does not carry", "undecided": "may or may not carry"}
