"""Rules on the values of scales: LayerScale, SkipInit, ReZero and other factors of a branch."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from skipway.diagnosis.findings import format_number
from skipway.diagnosis.lint.rule import Hit, lint_rule
from skipway.diagnosis.lint.survey import DEEP, Survey
from skipway.diagnosis.remedies import Damp
from skipway.errors import counted

__all__ = ["forgetful_scales", "idle_scales", "unequal_scales", "unusual_scales", "wiped_features"]

DEEP_WITH_NORMS = 40
"""Connections up to which a network with norms may have scales of 1: XCiT-12 has as many by design."""


@lint_rule(
    "P6",
    "scales that start at 1 in a deep network",
    "note",
    why="A scale of 1 does nothing: the network starts like one without scales, which they are there to tame. "
    "DINOv2's 1.0 belongs to its pretrained weights, ConvNeXt's to its detection configurations.",
    source="https://github.com/huggingface/pytorch-image-models/issues/1823; "
    "1.0 in XCiT-12, 1e-5 in XCiT-24: https://github.com/facebookresearch/xcit/blob/main/xcit.py",
)
def idle_scales(survey: Survey) -> Iterator[Hit]:
    """From scratch, beyond 24 connections without norms or 40 with norms, in branches that nothing else silences
    (Fixup's multiplier starts at 1).
    """
    if survey.pretrained or len(survey.links) <= (DEEP if survey.bare else DEEP_WITH_NORMS):
        return
    idle = [link for link in survey.links if survey.link_factor(link) == 1.0 and not any(survey.zeros(link))]
    if not idle:
        return
    small = "0, or 1/√L" if survey.bare else "1e-4 or smaller per channel"
    yield Hit(
        what=f"{len(idle)} of {len(survey.links)} branches start with a scale of exactly 1; use {small}",
        where=tuple(name for link in idle for name in link.scales),
        evidence={"scales at 1": len(idle), "branches": len(survey.links)},
        remedies=(Damp(),) if survey.bare else (),
        level="serious" if survey.bare else "note",
    )


@lint_rule(
    "P2",
    "scales that start at different values",
    "note",
    why="LayerScale's value follows from the depth of the whole network, not from a layer's place in it.",
    source="https://github.com/facebookresearch/deit/issues/122; "
    "Touvron et al. 2021, sec. 2: https://arxiv.org/abs/2103.17239",
)
def unequal_scales(survey: Survey) -> Iterator[Hit]:
    """Only per-channel scales whose channels are still equal, so that training cannot have changed them."""
    named = ((name, survey.factor(name)) for name in survey.branch_scales if survey.parameters[name].numel() > 1)
    values = {name: value for name, value in named if value is not None}
    counts = Counter(values.values())
    if len(counts) < 2:
        return
    low, high = min(map(abs, counts)), max(map(abs, counts))
    usual = counts.most_common(1)[0][0]
    common = [f"{format_number(value)} ({count})" for value, count in counts.most_common(4)]
    shown = ", ".join([*common[:3], "…"] if len(common) > 3 else common)
    yield Hit(
        what=f"per-channel scales start at {len(counts)} different values: {shown}; use one",
        where=tuple(name for name, value in values.items() if value != usual),
        evidence={"smallest": low, "largest": high, "values": len(counts)},
        level="serious" if high > 10 * low else "note",
    )


@lint_rule(
    "P2",
    "a scale far from the published value for this depth",
    "note",
    why="The authors of CaiT found that 0.1 works up to 18 blocks, 1e-5 up to 24 and 1e-6 beyond.",
    source="Touvron et al. 2021, sec. 2: https://arxiv.org/abs/2103.17239; "
    "https://github.com/facebookresearch/deit/issues/122",
)
def unusual_scales(survey: Survey) -> Iterator[Hit]:
    """Per channel, from scratch, beyond 24 blocks, 100 times off 1e-6; scales of 1 and 0 have rules of their own."""
    if survey.pretrained or survey.blocks <= 24:
        return
    far = {
        name: value
        for name, value in survey.factors.items()
        if survey.parameters[name].numel() > 1 and value not in (0.0, 1.0) and not 0.99e-8 <= abs(value) <= 1.01e-4
    }
    if far:
        first = next(iter(far.values()))
        yield Hit(
            what=f"{counted(len(far), 'scale')} at {format_number(first)} in {format_number(survey.blocks)} blocks; "
            "the published value is 1e-06",
            where=tuple(far),
            evidence={"scale": first, "published scale": 1e-6, "blocks": survey.blocks},
        )


@lint_rule(
    "P15",
    "freshly initialised scales in a pretrained network",
    "note",
    why="A scale that is tiny and equal on all channels was never trained, and multiplies away what its branch has "
    "learned. Insert scales into a trained network at 1, or divide the last weights by them.",
    source="https://github.com/czczup/ViT-Adapter/issues/157",
)
def wiped_features(survey: Survey) -> Iterator[Hit]:
    """Uniform and below 1e-3, 0 included. New branches (adapters) may start that way: serious only where all do."""
    if not survey.pretrained:
        return
    tiny = {
        name: value
        for name, value in survey.factors.items()
        if value == 0.0 or (abs(value) < 1e-3 and survey.parameters[name].numel() > 1)
    }
    if tiny:
        first = next(iter(tiny.values()))
        yield Hit(
            what=f"{len(tiny)} of {len(survey.links)} branches of the pretrained network have a scale of "
            f"{format_number(first)}",
            where=tuple(tiny),
            evidence={"scale": first, "branches": len(tiny)},
            level="serious" if len(tiny) == len(survey.links) else "note",
        )


@lint_rule(
    "P7",
    "scales that reset_parameters changes",
    "serious",
    why="A model built on the meta device, or re-initialised module by module, starts differently from this one.",
    source="https://github.com/huggingface/pytorch-image-models/issues/2605; "
    "https://github.com/facebookresearch/dinov2/issues/476",
)
def forgetful_scales(survey: Survey) -> Iterator[Hit]:
    """Calls reset_parameters on a copy of the module that owns the scale, where it is a leaf.

    Only for scales that cannot have been trained: equal on all channels, and a scalar equal to another scalar.
    """
    if survey.pretrained:
        return
    values = {name: survey.factor(name) for name in survey.branch_scales}
    counts = Counter(values.values())
    changed: dict[str, tuple[float, float]] = {}
    for name, value in values.items():
        now = survey.parameters[name].detach()
        if value is None or (now.numel() == 1 and counts[value] == 1 and len(values) > 1):
            continue
        anew = parameter_after_reset(survey.owner(name), name.rpartition(".")[2])
        if anew is not None and not torch.allclose(anew, now, rtol=1e-3, atol=0.0):
            changed[name] = value, float(anew.float().mean())
    if changed:
        before, after = next(iter(changed.values()))
        yield Hit(
            what=f"reset_parameters changes {counted(len(changed), 'scale')} from {format_number(before)} to "
            f"{format_number(after)}; reset to the value that the scale was made with",
            where=tuple(changed),
            evidence={"now": before, "after reset_parameters": after},
        )


def parameter_after_reset(module: nn.Module, name: str) -> Tensor | None:
    """A parameter after `reset_parameters` on a copy; None where that is missing or fails, or there are children."""
    if not callable(getattr(module, "reset_parameters", None)) or list(module.children()):
        return None
    twin = copy.copy(module)
    twin._parameters = {
        key: None if value is None else nn.Parameter(value.detach().clone(), value.requires_grad)
        for key, value in module._parameters.items()
    }
    twin._buffers = {key: None if value is None else value.clone() for key, value in module._buffers.items()}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            twin.reset_parameters()  # type: ignore[operator]
    except Exception:  # any error of a foreign reset_parameters
        return None
    after = twin._parameters.get(name)
    return None if after is None or after.is_meta else after.detach()
