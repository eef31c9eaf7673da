"""Signal and gradient at initialisation by depth and scheme: closed forms and exact measurement, no training.

Claim:    without normalisation the variance of a residual network doubles at every branch, 2^l; with normalisation it
          grows as 1 + l, in NormFree as 1 + α² l; with branches scaled by L^-β it explodes for β < ½, reaches a limit
          for ½, and stays at 1 above; schemes that start at zero are the identity at any depth; BatchNorm without skips
          makes the gradient explode by π/(π-1) per layer; the gradient of the last MLP is independent of depth in a
          post-norm transformer and falls with depth in a pre-norm transformer.
Source:   De & Smith 2020, sec. 2; Brock et al. 2021, eq. 1; Marion et al. 2022; Yang et al. 2019; Xiong et al. 2020.
Command:  skipway study propagation
Hardware: two shared cores of a virtual machine, one process each.
Time:     about 10 minutes (254 cells).
Result:   24 November 2026: holds from 10 to 10,000 branches, within a few per cent of the predicted bits; BatchNorm's
          factor of 1.467 per layer from 30 branches on; a plain network of width 128 loses 588 bits over 10,000 blocks,
          as Hanin & Nica predict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from skipway.models import build
from skipway.report.chart import Figure, Series, format_value
from skipway.studies.cell import Budget, Cell, Choices, Row
from skipway.studies.chains import block_chain, cross
from skipway.studies.fit import xavier_
from skipway.studies.statistics import group_values, series_over
from skipway.studies.study import STUDIES, Study, Verdict

__all__ = ["Propagation"]

# BatchNorm after a ReLU: the variance over the batch is 1 - 1/π of the second moment (Yang et al. 2019)
KEPT = 1 - 1 / math.pi
ALPHA = 0.2


@dataclass(frozen=True)
class ChainVariant:
    """A scheme in a chain, with log₂ of the ratio of second moments as a function of depth and width."""

    scheme: str
    norm: str = "none"
    place: str = "pre"
    forward: Callable[[int, int], float] = lambda depth, width: 0.0
    backward: Callable[[int, int], float] | None = None


def product(factor: Callable[[int], float], depth: int) -> float:
    """log₂ Π (1 + factor(l)), l from 0 to L - 1."""
    return sum(math.log2(1 + factor(place)) for place in range(depth))


def power(exponent: float) -> Callable[[int, int], float]:
    """(1 + L^(-2β))^L, forward and backward."""
    return lambda depth, width: depth * math.log2(1 + depth ** (-2 * exponent))


def drift(depth: int, width: int) -> float:
    """log₂ of the typical change of |x|² in a plain ReLU network with two layers per block.

    ln |x|² is normal with mean -β/2 and variance β = 5 · layers / width, so that |x|² keeps its mean while ln |x|²
    falls by 5 / (2 · width) per layer (Hanin & Nica 2019).
    """
    return -5 / (2 * width) * 2 * depth / math.log(2)


VARIANTS = {
    "residual, no norm": ChainVariant("identity", forward=lambda depth, width: float(depth)),
    "residual, LayerNorm": ChainVariant("identity", "layer", forward=lambda depth, width: math.log2(1 + depth)),
    "residual, BatchNorm": ChainVariant(
        "identity",
        "batch",
        forward=lambda depth, width: math.log2(1 + depth),
        backward=lambda depth, width: product(lambda place: 1 / KEPT / (1 + KEPT * place), depth),
    ),
    "plain, no norm": ChainVariant("plain", forward=drift),
    "plain, BatchNorm": ChainVariant(
        "plain", "batch", backward=lambda depth, width: -(2 * depth - 1) * math.log2(KEPT)
    ),
    "L^-1/4": ChainVariant("depthscaled(exponent=0.25)", forward=power(0.25)),
    "L^-1/2": ChainVariant("depthscaled(exponent=0.5)", forward=power(0.5)),
    "L^-1": ChainVariant("depthscaled(exponent=1.0)", forward=power(1.0)),
    "SkipInit 0": ChainVariant("skipinit(init=0.0, norm='remove')"),
    "Fixup": ChainVariant("fixup"),
    "zero-γ, LayerNorm": ChainVariant("zeroinit", "layer"),
    "NormFree": ChainVariant(
        "normfree(gain=1.0)",
        forward=lambda depth, width: math.log2(1 + ALPHA**2 * depth),
        backward=lambda depth, width: product(lambda place: (ALPHA / KEPT) ** 2 / (1 + ALPHA**2 * place), depth),
    ),
    "LayerScale 0.1": ChainVariant(
        "layerscale(init=0.1)", "layer", forward=lambda depth, width: math.log2(1 + 0.01 * depth)
    ),
    "DeepNorm": ChainVariant("deepnorm", "layer", "post"),
}
SILENT = ("SkipInit 0", "Fixup", "zero-γ, LayerNorm")
TRANSFORMERS = {"pre-norm ViT": "pre", "post-norm ViT": "post"}
GRIDS: dict[Budget, tuple[tuple[int, ...], int]] = {
    "cpu": ((10, 30, 100, 300, 1000, 10_000), 128),
    "gpu": ((10, 30, 100, 300, 1000, 3000, 10_000), 256),
    "paper": ((10, 30, 100, 300, 1000, 3000, 10_000), 512),
}
# deeper chains take half a minute each
MOST_SEEDED = 1000
BLOCKS = (6, 12, 24, 48, 96)


class Propagation(Study):
    """Measured and predicted signal and gradient at initialisation."""

    name = "propagation"
    title = "Signal and gradient at initialisation by depth and scheme"
    claim = (
        "At initialisation, variance and gradient follow closed forms at any depth: 2^l without normalisation, 1 + l "
        "with it, 1 + α² l for NormFree, a limit for branches scaled by L^-½, and the identity if branches start at "
        "zero."
    )
    source = (
        "De & Smith 2020, sec. 2; Brock et al. 2021, eq. 1; Marion et al. 2022; Yang et al. 2019; Xiong et al. 2020"
    )
    settings = ("kind", "scheme", "depth", "seed", "width")
    results = ("forward", "forward_theory", "backward", "backward_theory")
    minutes = "10 minutes on two shared cores"

    def cells(self, budget: Budget, choices: Choices) -> list[Cell]:
        depths, width = GRIDS[budget]
        names = choices.schemes or (*VARIANTS, *TRANSFORMERS)
        cells = []
        for name in names:
            kind = "vit" if name in TRANSFORMERS else "chain"
            for depth in choices.depths or (BLOCKS if kind == "vit" else depths):
                for seed in choices.seeds or ((0, 1, 2) if depth <= MOST_SEEDED else (0,)):
                    cells.append(self.cell(kind=kind, scheme=name, depth=depth, seed=seed, width=width))
        return sorted(cells, key=lambda cell: -cell["depth"])

    def measure(self, cell: Cell, device: str = "cpu") -> Row:
        torch.manual_seed(cell["seed"])
        if cell["kind"] == "vit":
            return last_gradient(TRANSFORMERS[cell["scheme"]], cell["depth"], cell["width"])
        known = cell["scheme"] in VARIANTS
        variant = VARIANTS[cell["scheme"]] if known else ChainVariant(cell["scheme"], "layer")
        chain = block_chain(variant.scheme, cell["depth"], width=cell["width"], norm=variant.norm, place=variant.place)
        # the closed form of BatchNorm assumes many samples
        found = cross(chain, batch=256 if variant.norm == "batch" else 16, seed=cell["seed"])
        row: Row = {"forward": found.forward, "backward": found.backward}
        if known:
            size = cell["depth"], cell["width"]
            row["forward_theory"] = variant.forward(*size)
            row["backward_theory"] = (variant.backward or variant.forward)(*size)
        return row

    def conclude(self, rows: Sequence[Row]) -> list[Verdict]:
        return [
            agreement(
                rows, "residual, no norm", "Without normalisation, the variance doubles at every branch: 2^l.", 0.1
            ),
            agreement(rows, "residual, LayerNorm", "With a norm before the branch, the variance grows as 1 + l.", 0.1),
            agreement(rows, "NormFree", "In a NormFree network, the variance grows as 1 + α² l.", 0.1),
            limits(rows),
            silence(rows),
            agreement(
                rows,
                "plain, no norm",
                "A plain network with He initialisation keeps the variance on average, but the logarithm of the "
                "variance falls by 5 / (2 · width) per layer (Hanin & Nica 2019).",
                0.1,
            ),
            agreement(
                rows,
                "plain, BatchNorm",
                "BatchNorm without skips makes the gradient explode by a factor of π/(π-1) = 1.467 per layer.",
                0.1,
                "backward",
            ),
            transformers(rows),
        ]

    def figures(self, rows: Sequence[Row]) -> list[Figure]:
        chains = [row for row in rows if row["kind"] == "chain"]
        growing = ("residual, no norm", "plain, no norm", "plain, BatchNorm", "L^-1/4")
        figures = []
        for value, what in (("forward", "Variance of the stream"), ("backward", "Gradient at the first block")):
            for some, tail in (
                (True, "schemes with fast growth or decay"),
                (False, "schemes with slow growth or none"),
            ):
                chosen = [row for row in chains if (row["scheme"] in growing) == some]
                found = group_values(chosen, ["scheme", "depth"], f"{value}_theory")
                theory = tuple(
                    Series.of(
                        name,
                        sorted((float(depth), each.mean) for (own, depth), each in found.items() if own == name),
                        "theory",
                    )
                    for name in dict.fromkeys(own for own, _ in found)
                )
                figures.append(
                    Figure(
                        name=f"{value}-{'exploding' if some else 'tamed'}",
                        title=f"{what}, {tail}",
                        x_label="blocks L",  # one branch each, but for plain chains, which have none
                        y_label="log₂ of the ratio of second moments",
                        log_x=True,
                        series=(*theory, *series_over(chosen, "depth", value, "scheme")),
                        note="Dashed: closed form. One bit is a factor of 2.",
                    )
                )
        figures.append(
            Figure(
                name="last-gradient",
                title="Gradient of the last MLP weight of a ViT",
                x_label="transformer blocks",
                y_label="norm of the gradient",
                log_x=True,
                series=series_over([row for row in rows if row["kind"] == "vit"], "depth", "last_gradient", "scheme"),
                log_y=True,
                note="Xiong et al. 2020, theorem 1: independent of depth for post-norm, L^-½ for pre-norm.",
            )
        )
        return figures


def agreement(rows: Sequence[Row], scheme: str, claim: str, tolerance: float, value: str = "forward") -> Verdict:
    """Judge whether bits agree with theory within `tolerance` (relative), half a bit, or two standard errors."""
    own = [row for row in rows if row["scheme"] == scheme]
    measured, theory = group_values(own, ["depth"], value), group_values(own, ["depth"], f"{value}_theory")
    if not measured:
        return Verdict(claim, "open", "not measured")
    fits = [
        key
        for key, sample in measured.items()
        if abs(sample.mean - theory[key].mean) <= max(0.5, tolerance * abs(theory[key].mean), 2 * sample.error)
    ]
    words = "; ".join(
        f"L = {key[0]}: {format_value(measured[key].mean)} bits, theory {format_value(theory[key].mean)}"
        for key in sorted(measured, key=lambda key: float(key[0] or 0))
    )
    worst = max(abs(measured[key].mean - theory[key].mean) / float(key[0] or 1) for key in measured)
    text = f"{words}. Largest deviation {format_value(worst)} bits per branch."
    if len(fits) == len(measured):
        return Verdict(claim, "holds", text)
    if not fits:
        return Verdict(claim, "does not hold", text)
    depths = ", ".join(f"{depth:,.0f}" for depth in sorted(float(key[0] or 0) for key in fits))
    reason = f"L is {depths} at width {own[0]['width']}. "
    return Verdict(claim, "holds only when", reason + text)


def limits(rows: Sequence[Row]) -> Verdict:
    """Judge the limits of the variance for branches scaled by L^-β."""
    claim = "With branches scaled by L^-β, the variance explodes for β = ¼, tends to e for β = ½ and to 1 for β = 1."
    found = group_values([row for row in rows if str(row["scheme"]).startswith("L^-")], ["scheme", "depth"], "forward")
    names = ("L^-1/4", "L^-1/2", "L^-1")
    depths = [depth for _, depth in found if all((name, depth) in found for name in names)]
    if not depths:
        return Verdict(claim, "open", "not measured")
    deepest = max(depths)
    quarter, half, whole = (found[name, deepest].mean for name in names)
    expected = power(0.25)(deepest, 0)
    text = (
        f"At L = {deepest:,} the variance grew by 2^{format_value(quarter)} (theory 2^{format_value(expected)}), "
        f"{format_value(2**half)} (theory e = 2.72) and {format_value(2**whole)} (theory 1)."
    )
    holds = quarter > 10 and abs(half - math.log2(math.e)) < 0.75 and abs(whole) < 0.1
    return Verdict(claim, "holds" if holds else "does not hold", text)


def silence(rows: Sequence[Row]) -> Verdict:
    """Judge whether schemes that start at zero are the identity."""
    claim = "If branches start at zero, forward and backward pass are the identity at every depth."
    own = [row for row in rows if row["scheme"] in SILENT]
    off = [abs(float(row[side] or 0.0)) / float(row["depth"] or 1) for row in own for side in ("forward", "backward")]
    if not off:
        return Verdict(claim, "open", "not measured")
    deepest = max(int(row["depth"] or 0) for row in own)
    text = (
        f"{', '.join(SILENT)}: largest deviation {format_value(max(off))} bits per branch up to L = {deepest:,}, where "
        "one rounding in single precision is 1.7e-7."
    )
    return Verdict(claim, "holds" if max(off) < 4e-7 else "does not hold", text)


def transformers(rows: Sequence[Row]) -> Verdict:
    """Judge the exponents of the last gradient as a function of depth."""
    claim = "The gradient of the last MLP is independent of depth for post-norm and falls as L^-½ for pre-norm."
    slopes = {}
    for name in TRANSFORMERS:
        found = group_values([row for row in rows if row["scheme"] == name], ["depth"], "last_gradient")
        points = [(math.log(float(key[0] or 1)), math.log(sample.mean)) for key, sample in found.items()]
        if len(points) < 2:
            return Verdict(claim, "open", "not measured at two depths")
        slopes[name] = slope(points)
    pre, post = slopes.values()
    text = (
        f"Exponent of the depth: pre-norm {format_value(pre)} (theory -0.5), post-norm {format_value(post)} (theory 0)."
    )
    return Verdict(claim, "holds" if abs(pre + 0.5) < 0.15 and abs(post) < 0.15 else "does not hold", text)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the least-squares line through points (x, y).

    >>> slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)])
    2.0
    """
    middle = sum(x for x, _ in points) / len(points)
    return sum((x - middle) * y for x, y in points) / sum((x - middle) ** 2 for x, _ in points)


def last_gradient(place: str, blocks: int, width: int) -> Row:
    """Measure the gradient norm of the last block's second MLP weight in a ViT with Xavier initialisation.

    As in the theorem, the loss is that of one sample, read from one token; the norms of 16 samples are averaged. The
    gradient of a summed loss would grow as the streams of the samples collapse.
    """
    model = build("vit", depth=blocks, dim=width, heads=4, patch=2, image=8, channels=1, classes=10, norm=place)
    xavier_(model)
    inputs, labels = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    last = [module.weight for name, module in model.named_modules() if name.endswith("fc2")][-1]
    losses = F.cross_entropy(model(inputs), labels, reduction="none")
    gradients = [torch.autograd.grad(loss, [last], retain_graph=True)[0] for loss in losses]  # type: ignore[list-item]
    norms = [float(gradient.norm()) for gradient in gradients]
    return {"last_gradient": sum(norms) / len(norms)}


STUDIES.add("propagation", Propagation())
