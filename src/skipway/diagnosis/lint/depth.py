"""Rules on factors and starts that follow from depth: DeepNorm's two constants, and LayerNorm Scaling."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

from skipway.diagnosis.findings import format_number
from skipway.diagnosis.lint.rule import Hit, lint_rule
from skipway.diagnosis.lint.survey import Link, Survey
from skipway.errors import counted
from skipway.nn.warmup import ResidualWarmup, find_warmups

__all__ = ["constant_of_other_depth", "depth_twice", "equal_warmup", "flipped_exponent"]


def strong_skip(survey: Survey) -> float | None:
    """The constant above 1 on all skips of a post-norm network without other norms (DeepNorm's kind), else None."""
    factors = {link.carry for link in survey.links if "post" in link.norms and "pre" not in link.norms}
    alike = len(factors) == 1 and len({link.carry for link in survey.links}) == 1
    factor = factors.pop() if alike else 1.0
    return factor if factor > 1 else None


@lint_rule(
    "P25",
    "a skip constant that belongs to another depth",
    "serious",
    why="DeepNorm's α = (2N)^(1/4) bounds a step of a network of N layers; copied from another network, it is too weak "
    "for a deeper one, and holds back the branches of a shallower one.",
    source="Wang et al. 2022, 'DeepNet', fig. 2: https://arxiv.org/abs/2203.00555; "
    "the literal of 32 layers: https://github.com/pixeli99/MixLN",
)
def constant_of_other_depth(survey: Survey) -> Iterator[Hit]:
    """α⁴ is a whole number to 1e-4, and not the number of branches; a note where α itself is whole, as 2 may mean 2."""
    factor, branches = strong_skip(survey), len(survey.links)
    if factor is None or factor == branches:
        return
    other = round(factor**4)
    if other != branches and abs(factor**4 - other) < 1e-4 * other:
        right = branches**0.25
        yield Hit(
            what=f"the skips are multiplied by {format_number(factor)} = {other}^(1/4), and there are "
            f"{counted(branches, 'branch', 'branches')}; use {format_number(right)}",
            where=tuple(link.name for link in survey.links),
            evidence={"skip constant": factor, "branches it belongs to": other, "branches": branches},
            level="note" if factor.is_integer() else "serious",
        )


@lint_rule(
    "P25",
    "DeepNorm's start with the sign of the exponent flipped",
    "serious",
    why="β = (8N)^(-1/4) makes branches start small. With the exponent 1/4 each map starts √(8N) too large, which is "
    "what post-norm networks diverge of.",
    source="Wang et al. 2022, 'DeepNet', fig. 2: https://arxiv.org/abs/2203.00555; "
    "as published baselines have it: https://github.com/pixeli99/MixLN",
)
def flipped_exponent(survey: Survey) -> Iterator[Hit]:
    """Skips multiplied by a constant, and the last maps at Xavier's deviation times (8N)^(1/4), all of them to 10 %."""
    factor = strong_skip(survey)
    if survey.pretrained or factor is None:
        return
    large = (4 * len(survey.links)) ** 0.25
    ratios = [deviation(survey, link.last) for link in survey.links]
    known = [ratio for ratio in ratios if ratio is not None]
    if known and len(known) == len(ratios) and all(0.9 * large < ratio < 1.1 * large for ratio in known):
        mean = math.fsum(known) / len(known)
        yield Hit(
            what=f"the last maps start at {format_number(mean)} of Xavier's deviation, which is (8N)^(1/4) for these "
            f"{counted(len(known), 'branch', 'branches')}; use (8N)^(-1/4) = {format_number(1 / large)}",
            where=tuple(link.last for link in survey.links if link.last is not None),
            evidence={"over Xavier": mean, "right": 1 / large},
        )


def deviation(survey: Survey, path: str | None) -> float | None:
    """The deviation of a map's weight over Xavier's; None where there is too little of it to tell."""
    weight = survey.value(f"{path}.weight")
    if weight is None or weight.ndim != 2 or weight.numel() < 256:
        return None
    return float(weight.float().std()) / math.sqrt(2 / sum(weight.shape))


@lint_rule(
    "P34",
    "LayerNorm Scaling with a start that falls with depth, too",
    "note",
    why="Two factors that fall with depth leave deep branches nearly silent, and with last maps of 0 the factor is not "
    "seen at the start: the effect of LayerNorm Scaling is gone.",
    source="Sun et al. 2025, README of the authors: https://github.com/lmsdss/LayerNorm-Scaling; "
    "no effect with projections of 0: https://github.com/karpathy/nanochat",
)
def depth_twice(survey: Survey) -> Iterator[Hit]:
    """What enters the branches falls as 1/√b, b = 1, 2, … or 1, 1, 2, 2, …; their last maps start at 0, or at 1/√L of
    the first ones.
    """
    links = survey.links
    if survey.pretrained or len(links) < 4 or not falls_as_root(links):
        return
    zeros = sum(survey.zeros(link)[0] for link in links)
    ratios = [ratio for link in links if (ratio := last_over_first(survey, link)) is not None]
    scaled = len(ratios) == len(links) and all(abs(r * len(links) ** 0.5 - 1) < 0.15 for r in ratios)
    if zeros == len(links) or (scaled and not zeros):
        start = "0" if zeros else f"1/√{len(links)} of the first"
        yield Hit(
            what=f"what enters branch l is divided by the root of its layer's number, and the last maps start at "
            f"{start}; start them as the others, from one deviation",
            where=tuple(link.last for link in links if link.last is not None),
            evidence={"branches": len(links), "last maps at 0": zeros},
        )


def falls_as_root(links: tuple[Link, ...]) -> bool:
    """Whether the entries of the branches are to one another as 1/√b, with b counting branches or pairs of them."""
    if not links[0].entry:
        return False
    ratios = [link.entry / links[0].entry for link in links]
    laws = ([(number // per + 1) ** -0.5 for number in range(len(links))] for per in (1, 2))
    return any(all(abs(r - x) < 1e-3 for r, x in zip(ratios, law, strict=True)) for law in laws)


def last_over_first(survey: Survey, link: Link) -> float | None:
    """The deviation of a branch's last map over that of its first; None where they cannot be compared."""
    first = survey.value(f"{link.maps[0]}.weight") if link.maps else None
    last = survey.value(f"{link.last}.weight")
    if first is None or last is None or link.maps[0] == link.last or not bool(first.any()):
        return None
    return float(last.float().std() / first.float().std())


@lint_rule(
    "P37",
    "one warm-up for all branches of a post-norm network",
    "serious",
    why="Under post-norm, with one factor that rises for all blocks, the authors' trainings diverged; with factors "
    "that rise block by block they were the best.",
    source="Chen et al. 2026, table 6: https://arxiv.org/abs/2603.05369",
)
def equal_warmup(survey: Survey) -> Iterator[Hit]:
    """All residual warm-ups rise together, and a norm follows every addition; those of Skipway and of `rescheme`."""
    warmups = list(find_warmups(survey.model))
    curves = {curve(each) for each in warmups}
    post_norm = bool(survey.links) and all("post" in link.norms for link in survey.links)
    if len(warmups) > 2 and len(curves) == 1 and post_norm:
        yield Hit(
            what=f"{len(warmups)} branches are warmed up together; take schedule='linear-square'",
            where=tuple(link.name for link in survey.links),
            evidence={"branches": len(warmups)},
        )


def curve(warmup: ResidualWarmup) -> tuple[float, ...]:
    """The factors of a warm-up at every tenth of it, measured on a copy."""
    twin = copy.deepcopy(warmup).cpu()
    twin.end.fill_(10)
    return tuple(float((twin.step.fill_(step), twin.factor())[1]) for step in range(10))
