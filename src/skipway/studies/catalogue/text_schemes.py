"""What schemes bring in a small decoder: each beside the plain pre-norm one, at its best learning rate.

Claim:    learned gains, several streams, earlier outputs and their kin lower the loss of a language model at the same
          number of steps (each paper of its own).
Source:   the cards of the schemes, `skipway schemes NAME`.
Rule:     a difference counts if the 95 % interval of its mean over paired seeds excludes 0, each at the better of the
          rates. Fixed before the run. Steps, not seconds, are the same: `python -m benchmarks.scheme_cost` has what a
          step costs.
Command:  skipway study text-schemes
Hardware: two shared cores of a virtual machine, one process each.
Time:     34 minutes on a heavily loaded machine (72 cells).
Result:   29 November 2026, bytes of Python's standard library, 4 blocks, 200 steps, 3 seeds: hyper-connections
          (-0.175 ± 0.165), attention residuals (-0.099 ± 0.080) and DenseFormer (-0.034 ± 0.017) lower the test loss;
          the other eight, mHC among them (-0.07 ± 0.15), are not told apart from plain pre-norm.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from skipway.report.chart import Figure
from skipway.studies.cell import Row
from skipway.studies.statistics import series_over
from skipway.studies.study import STUDIES, Verdict
from skipway.studies.text import TextGrid, TextStudy
from skipway.studies.variants import NetworkVariant, differences_from, lowest_rate_rows

__all__ = ["TextSchemes"]

PLAIN = "plain pre-norm"
SCHEMES = (
    *("depthscaled(how='init')", "layerscale(init=0.1)", "perinorm", "hyperconnections(n=4)", "mhc"),
    *("attentionresiduals", "denseformer", "x0residual", "valueresiduals", "laurel", "orthogonal"),
)


class TextSchemes(TextStudy):
    """Losses of a small decoder in every scheme that is said to help."""

    name = "text-schemes"
    title = "What schemes bring in a small decoder"
    claim = "Gains, several streams and earlier outputs lower the loss of a small language model at equal steps."
    source = "the schemes' papers"
    minutes = "34 minutes on two shared cores under heavy load"
    variants: ClassVar = {PLAIN: NetworkVariant(), **{scheme: NetworkVariant(scheme) for scheme in SCHEMES}}
    text_grids: ClassVar = {
        "cpu": TextGrid(depths=(4,), rates=(4e-3, 8e-3), steps=200),
        "gpu": TextGrid(depths=(12,), rates=(1e-3, 2e-3, 4e-3), width=384, context=256, steps=5000),
        "paper": TextGrid(depths=(12, 24), rates=(6e-4, 1.2e-3), width=768, context=1024, steps=50_000),
    }

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [lowers_the_loss(rows)]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        """Differences, since they are small beside the losses."""
        found = differences_from(lowest_rate_rows(rows), PLAIN)
        names = sorted(found, key=lambda name: found[name].compared.mean)
        shown: list[Row] = [
            {"place": place, "difference": value, "scheme": f"minus {PLAIN}"}
            for place, name in enumerate(names, start=1)
            for value in found[name].differences.values
        ]
        return [
            Figure(
                name="differences",
                title=f"Test loss beside that of {PLAIN}, each at its better rate",
                x_label="scheme",
                y_label="difference, nats per byte",
                categories=tuple(map(short, names)),
                series=series_over(shown, "place", "difference", "scheme"),
                note=f"In order: {', '.join(names)}.",
            )
        ]


def short(name: str) -> str:
    """The name of a variant without the arguments of its scheme.

    >>> short("layerscale(init=0.1)"), short("hyperconnections(n=4), 12 blocks")
    ('layerscale', 'hyperconnections, 12 blocks')
    """
    return re.sub(r"\(.*\)", "", name)


def lowers_the_loss(rows: Sequence[Row]) -> Verdict:
    """Judge which schemes have a lower test loss than the plain network."""
    claim = "These schemes lower the test loss."
    found = differences_from(lowest_rate_rows(rows), PLAIN)
    if not found:
        return Verdict(claim, "open", "not measured with two seeds")
    better, worse, same = ([name for name, each in found.items() if each.sign == wanted] for wanted in (-1, 1, 0))

    def listed(names: Sequence[str]) -> str:
        pairs = ((name, found[name]) for name in names)
        return "; ".join(f"{name} {each}" for name, each in pairs) or "none"

    text = (
        f"Test loss minus that of {PLAIN}. Lower: {listed(better)}. Higher: {listed(worse)}. "
        f"Not told apart: {listed(same)}."
    )
    if better and len(better) < len(found):
        names = ", ".join(map(short, better))
        return Verdict(claim, "holds only when", f"the scheme is {names}. {text}")
    return Verdict(claim, "holds" if better else "does not hold" if worse else "open", text)


STUDIES.add("text-schemes", TextSchemes())
