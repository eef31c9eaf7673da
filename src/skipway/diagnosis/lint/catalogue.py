"""All rules in their order, and the function that asks them."""

from __future__ import annotations

import torch
from torch import nn

from skipway.diagnosis.findings import LEVELS, Finding
from skipway.diagnosis.lint.drops import by_python, in_evaluation, odd_rates, without_skip
from skipway.diagnosis.lint.modules import batch_of_one, hooked
from skipway.diagnosis.lint.optimizer import decayed, fast_scalars, frozen, left_out
from skipway.diagnosis.lint.rule import Rule
from skipway.diagnosis.lint.scales import (
    forgetful_scales,
    idle_scales,
    unequal_scales,
    unusual_scales,
    wiped_features,
)
from skipway.diagnosis.lint.start import closing_norms, loud_branches, own_index, two_zeros, wiped_stream
from skipway.diagnosis.lint.survey import Survey
from skipway.tracing import Example, unwrap

__all__ = ["RULES", "lint"]

RULES: tuple[Rule, ...] = (
    # the start
    two_zeros,
    wiped_stream,
    loud_branches,
    idle_scales,
    unequal_scales,
    unusual_scales,
    wiped_features,
    forgetful_scales,
    own_index,
    closing_norms,
    # the optimizer
    decayed,
    left_out,
    fast_scalars,
    frozen,
    # stochastic depth
    in_evaluation,
    by_python,
    without_skip,
    odd_rates,
    # other modules
    hooked,
    batch_of_one,
)
"""All rules in the order in which `lint` gives findings of one level: by theme, as a training meets them."""


def lint(
    model: nn.Module,
    example: Example | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    pretrained: bool = False,
) -> list[Finding]:
    """Known mistakes in a model and its optimizer, the worst first; nothing is trained, nothing is changed.

    Call it before training: most rules are about the start and read the values that the parameters have now. All rules
    are in docs/lint.md.

    Args:
        model: any module; rules that read values are silent on the meta device.
        example: what it is called with; only shapes matter. With it the connections of any network are watched on the
            meta device; without it those of `skipway.nn.Residual` are read by type, and other networks' optimizers and
            modules only (a scale that is a parameter of the block itself, as ConvNeXt's, is then not known as one).
        optimizer: that will train it; its groups are checked.
        pretrained: the weights were trained before, so rules about a start from scratch do not apply.

    Raises:
        SkipwayError: the model fails on the example.

    >>> import skipway as sw
    >>> model = sw.build("resnet20", scheme="skipinit")
    >>> for finding in lint(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)):
    ...     print(finding.level, finding.rule, finding.place)
    serious P4 stages.0.0.scale.gain … stages.2.2.scale.gain (9)
    note P19 stages.0.0 … stages.2.2 (9)
    note P4 stem.norm.weight … head.classifier.bias (39)
    """
    survey = Survey(unwrap(model), example, optimizer, pretrained)
    findings = [finding for rule in RULES for finding in rule.findings(survey)]
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))
