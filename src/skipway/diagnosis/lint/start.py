"""Rules on the start of branches and norms: zeros, sizes, Fixup's factor."""

from __future__ import annotations

from collections.abc import Iterator

from skipway.diagnosis.findings import format_number
from skipway.diagnosis.lint.rule import Hit, lint_rule
from skipway.diagnosis.lint.survey import DEEP, Link, Survey
from skipway.diagnosis.remedies import Damp, Revive
from skipway.errors import counted

__all__ = ["closing_norms", "loud_branches", "own_index", "two_zero_factors", "wiped_stream"]


@lint_rule(
    "P13",
    "two zero factors in one branch",
    "fatal",
    why="The gradient of each factor is a multiple of the other, so both stay zero and the branch never learns. "
    "One zero is enough for a silent start.",
    source="product rule: ∂(ab)/∂a = b; for a single zero Zhang et al. 2019, Goyal et al. 2017",
)
def two_zero_factors(survey: Survey) -> Iterator[Hit]:
    """Two of last map, closing norm and scale are 0, and no bias between them carries a gradient."""
    dead: list[Link] = []
    maps: list[str] = []
    for link in survey.links:
        last, closing, scale = survey.zeros(link)
        silent_map = last and survey.is_absent(f"{link.last}.bias")
        silent_norm = closing and survey.is_absent(f"{link.closing}.bias")
        if (silent_map and (closing or scale)) or (silent_norm and scale):
            dead.append(link)
            maps.extend([link.last] if last and link.last is not None else [])
    if dead:
        advice = "" if maps else "; start the closing norms' weights at 1, or the scales above 0"
        yield Hit(
            what=f"{len(dead)} of {len(survey.links)} branches have two factors that are 0{advice}",
            where=tuple(link.name for link in dead),
            evidence={"branches with two zeros": len(dead), "branches": len(survey.links)},
            remedies=(Revive(tuple(maps)),) if maps else (),
        )


@lint_rule(
    "P8",
    "zeroed norms after the additions",
    "fatal",
    why="A norm after the addition is on the stream: with weight 0 it passes on nothing but its bias.",
    source="He et al. 2016, 'Identity Mappings', fig. 4b: https://arxiv.org/abs/1603.05027",
)
def wiped_stream(survey: Survey) -> Iterator[Hit]:
    """Norms of post-norm networks, as opposed to norms at the ends of branches."""
    closing = {link.closing for link in survey.links}  # norms of an outer branch, which may start at 0
    after = dict.fromkeys(path for link in survey.links for path in link.after if path not in closing)
    wiped = [path for path in after if survey.is_zero(f"{path}.weight")]
    if wiped:
        yield Hit(
            what=f"{counted(len(wiped), 'norm')} after additions with weight 0, which wipes out the stream; start at 1",
            where=tuple(wiped),
            evidence={"zero norms on the stream": len(wiped)},
        )


@lint_rule(
    "P8",
    "residual post-norm that starts at full size",
    "note",
    why="With norms at the ends of the branches only, every branch adds a variance of 1 to the stream from the start. "
    "The authors of Swin V2 start the weights of these norms at 0.",
    source="Liu et al. 2022, 'Swin Transformer V2', https://arxiv.org/abs/2111.09883, and the authors' code",
)
def loud_branches(survey: Survey) -> Iterator[Hit]:
    """The placement of Swin V2, in networks with attention and from a variance of 2 on; ConvMixer trains with it."""
    if survey.pretrained or not any(link.kind == "attention" for link in survey.links):
        return
    placed = [link for link in survey.links if link.norms == ("end",) and link.identity]
    added: dict[str, float] = {}
    for link in placed:
        weight = survey.value(f"{link.closing}.weight")
        factor = survey.link_factor(link) if link.scales else 1.0
        if weight is not None and factor is not None and not survey.zeros(link)[0]:
            added[link.name] = (factor * link.constant) ** 2 * float(weight.float().square().mean())
    total = sum(added.values())
    if total > 2:
        yield Hit(
            what=f"the norms at the ends of {len(added)} branches do not start at 0 and add a variance of "
            f"{format_number(total)} to the stream; start their weights at 0",
            where=tuple(name for name, variance in added.items() if variance > 0),
            evidence={"branches": len(added), "variance added": total},
            remedies=(Damp(0.0),) if len(placed) == len(survey.links) else (),
            level="serious" if total > DEEP else "note",
        )


@lint_rule(
    "P1",
    "Fixup's factor from the branch's own index",
    "serious",
    why="In Fixup's L^(-1/(2m-2)), L is the number of branches of the whole network. With the index of each branch "
    "instead, all but the last start too large.",
    source="https://github.com/ajbrock/BoilerPlate/issues/1; Zhang et al. 2019, sec. 3: https://arxiv.org/abs/1901.09321",
)
def own_index(survey: Survey) -> Iterator[Hit]:
    """No norms, last maps 0, and the first maps' deviations over He's follow l^(-1/(2m-2)) for l = 1, 2, … L.

    Reported only where the law fits every branch to 25 % and their deviations differ by more than 60 %.
    """
    links = survey.links
    lengths = {len(link.maps) for link in links}
    if len(links) < 4 or len(lengths) != 1 or min(lengths) < 2 or not survey.bare:
        return
    weights = [survey.value(f"{link.maps[0]}.weight") for link in links]
    known = [weight.float() for weight in weights if weight is not None and weight.ndim > 1 and weight.numel() >= 512]
    if len(known) != len(links) or not all(survey.zeros(link)[0] for link in links):
        return
    power = 1 / (2 * lengths.pop() - 2)
    for axis in (0, 1):  # He's fan in, then fan out: the weights at one index of the axis
        ratios = [float(weight.std()) * (weight.select(axis, 0).numel() / 2) ** 0.5 for weight in known]
        straight = [ratio * index**power for index, ratio in enumerate(ratios, start=1)]
        if min(ratios) > 0 and max(ratios) > 1.6 * min(ratios) and max(straight) < 1.25 * min(straight):
            yield Hit(
                what=f"the first maps start at {format_number(ratios[0])} of He's deviation in branch 1, and at "
                f"{format_number(ratios[-1])} in branch {len(links)}: l^(-{format_number(power)}) for branch l; "
                f"multiply all by {len(links)}^(-{format_number(power)}) instead",
                where=tuple(link.maps[0] for link in links),
                evidence={"first over He": ratios[0], "last over He": ratios[-1], "branches": len(links)},
            )
            return


@lint_rule(
    "P19",
    "start of the closing norms, to be stated",
    "note",
    why="Libraries differ (0 in timm's ResNet, mmpretrain and fastai, 1 in torchvision), and the accuracy at large "
    "batches depends on it: state it with a baseline.",
    source="Goyal et al. 2017, sec. 5.1: https://arxiv.org/abs/1706.02677",
)
def closing_norms(survey: Survey) -> Iterator[Hit]:
    """One finding per network of convolutions that starts from scratch."""
    closed = [link for link in survey.links if link.closing is not None and link.kind == "conv"]
    if survey.pretrained or not closed or any(survey.value(f"{link.closing}.weight") is None for link in closed):
        return
    zeros = sum(survey.zeros(link)[1] for link in closed)
    yield Hit(
        what=f"{zeros} of {len(closed)} branches start with a closing norm of weight 0; state it with your results",
        where=tuple(link.name for link in closed),
        evidence={"zero closing norms": zeros, "closing norms": len(closed)},
    )
