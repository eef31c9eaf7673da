"""Rules on the optimizer: its parameter groups, weight decay and learning rates, and frozen parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from skipway.diagnosis.findings import Level, format_number
from skipway.diagnosis.lint.rule import Hit, lint_rule
from skipway.diagnosis.lint.survey import Survey
from skipway.errors import counted
from skipway.nn import Role

__all__ = ["decayed", "fast_scalars", "frozen_in_branch", "left_out"]

DECAYED: tuple[tuple[Level, tuple[str, ...], str], ...] = (
    ("serious", ("scale",), "scales"),
    ("note", ("norm", "bias"), "norm weights and biases"),
)


@lint_rule(
    "P4",
    "weight decay on scales, norms and biases",
    "serious",
    why="Weight decay pulls a scale towards 0, which switches its branch off; norms and biases have no reason to be "
    "small. Group by role (skipway.param_groups), not by shape or name.",
    source="Goyal et al. 2017, sec. 5.1: https://arxiv.org/abs/1706.02677; timm's and ConvNeXt's optimizer groups",
)
def decayed(survey: Survey) -> Iterator[Hit]:
    """Serious for scales of any shape, a note for norms and biases; decay that a scheme asks for (Fixup) is right."""
    decays = {name: float(group.get("weight_decay") or 0.0) for name, group in survey.groups.items()}
    unasked = [name for name in decays if (role := own_role(survey.owner(name))) is None or not role.decay]
    for level, roles, title in DECAYED:
        found = [name for name in unasked if decays[name] > 0 and survey.roles[name] in roles]
        if found:
            decay = max(decays[name] for name in found)
            yield Hit(
                what=f"{len(found)} {title} have weight decay {format_number(decay)}; set it to 0",
                where=tuple(found),
                evidence={"weight decay": decay, "parameters": len(found)},
                level=level,
            )


def own_role(module: nn.Module) -> Role | None:
    """The role that a Skipway module states, else None."""
    role = getattr(module, "role", None)
    return role if isinstance(role, Role) else None


@lint_rule(
    "P4",
    "parameters missing from the optimizer",
    "serious",
    why="They keep their initial values. Parameter groups by name miss new parameters, and an optimizer that was made "
    "earlier misses the parameters of replaced modules.",
    source="torch.optim: an optimizer updates the parameters that it was given: "
    "https://docs.pytorch.org/docs/stable/optim.html#constructing-it",
)
def left_out(survey: Survey) -> Iterator[Hit]:
    """Trainable parameters in no group; fatal where the optimizer holds none of the model's parameters."""
    if survey.optimizer is None:
        return
    trainable = [name for name, value in survey.parameters.items() if value.requires_grad]
    missing = [name for name in trainable if name not in survey.groups]
    if not missing:
        return
    scales = sum(survey.roles[name] == "scale" for name in missing)
    yield Hit(
        what=f"{len(missing)} of {len(trainable)} trainable parameters are in no group of the optimizer"
        + (f", {counted(scales, 'scale')} among them" if scales else "")
        + "; make the optimizer after the last change of the model",
        where=tuple(missing),
        evidence={"left out": len(missing), "trainable": len(trainable), "scales left out": scales},
        level="serious" if survey.groups else "fatal",
    )


@lint_rule(
    "P5",
    "scalars of a norm-free network at the full learning rate",
    "serious",
    why="A scalar multiplies a whole branch, and its gradient is a sum over all activations there. At the full rate "
    "Fixup diverges half-way through training; its authors train scalars at a tenth of the rate.",
    source="https://github.com/hongyi-zhang/Fixup/issues/6; https://github.com/majumderb/rezero/issues/17",
)
def fast_scalars(survey: Survey) -> Iterator[Hit]:
    """Serious under Fixup (last maps 0 and scalars on the branch, or a role with a rate of its own), else a note.

    Half of the weights' rate is low enough where no role asks for another.
    """
    rates = {name: rate(group) for name, group in survey.groups.items()}
    scalars = [name for name in rates if survey.parameters[name].numel() == 1]
    scales = [name for name in scalars if survey.roles[name] == "scale"]
    weights = [value for name, value in rates.items() if survey.roles[name] == "weight"]
    if not scales or not weights or not survey.bare:
        return
    full = max(weights)
    fixup = all(survey.zeros(link)[0] for link in survey.links)
    roles = {name: own_role(survey.owner(name)) for name in (scalars if fixup else scales)}  # biases are part of Fixup
    fast = [name for name, role in roles.items() if rates[name] > full * (role.rate if role else 0.5) * 1.01]
    if fast:
        fastest = max(rates[name] for name in fast)
        yield Hit(
            what=f"{counted(len(fast), 'scalar')} at learning rate {format_number(fastest)}, weights at "
            f"{format_number(full)}; set the scalars' to {format_number(full / 10)}",
            where=tuple(fast),
            evidence={"rate of scalars": fastest, "rate of weights": full},
            level="serious" if fixup or any(roles[name] is not None for name in fast) else "note",
        )


def rate(group: dict[str, Any]) -> float:
    """The learning rate of a group before any schedule."""
    return float(group.get("initial_lr", group["lr"]))


@lint_rule(
    "frozen",
    "frozen parameters in branches",
    "note",
    why="A frozen parameter keeps its value; a scale that is frozen at 0 switches its branch off for good.",
    source="torch.nn.Parameter.requires_grad: https://docs.pytorch.org/docs/stable/notes/autograd.html"
    "#setting-requires-grad",
)
def frozen_in_branch(survey: Survey) -> Iterator[Hit]:
    """Serious where a branch is frozen at zero."""
    inside = {path for link in survey.links for path in (*link.modules, *link.maps, link.closing)}
    scales = {name for link in survey.links for name in link.scales}
    still = [
        name
        for name, value in survey.parameters.items()
        if not value.requires_grad and (name in scales or name.rpartition(".")[0] in inside)
    ]
    off = [name for name in still if name in scales and survey.is_zero(name)]
    if still:
        yield Hit(
            what=f"{counted(len(still), 'parameter')} in branches frozen"
            + (f", {counted(len(off), 'scale')} at 0" if off else ""),
            where=tuple(off or still),
            evidence={"frozen": len(still), "scales frozen at 0": len(off)},
            level="serious" if off else "note",
        )
