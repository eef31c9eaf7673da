"""All lint rules in order, and `lint`, which applies them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from skipway.diagnosis.findings import LEVELS, Finding
from skipway.diagnosis.lint.depth import constant_of_other_depth, depth_twice, equal_warmup, flipped_exponent
from skipway.diagnosis.lint.drops import by_python, in_evaluation, odd_rates, without_skip
from skipway.diagnosis.lint.gates import half_open_gates
from skipway.diagnosis.lint.modules import batch_of_one, hooks_beside_inplace
from skipway.diagnosis.lint.optimizer import decayed, fast_scalars, frozen_in_branch, left_out
from skipway.diagnosis.lint.rule import LintRule
from skipway.diagnosis.lint.scales import (
    forgetful_scales,
    idle_scales,
    unequal_scales,
    unusual_scales,
    wiped_features,
)
from skipway.diagnosis.lint.sources import drawn_queries, unsafe_depth_weights
from skipway.diagnosis.lint.start import closing_norms, loud_branches, own_index, two_zero_factors, wiped_stream
from skipway.diagnosis.lint.stream_scalars import compounding_scalars
from skipway.diagnosis.lint.streams import (
    decayed_streams,
    half_writes,
    identical_streams,
    identity_as_logits,
    saturated_mixing,
    unused_mixing,
)
from skipway.diagnosis.lint.survey import Survey
from skipway.diagnosis.settings import require_optimizers
from skipway.tracing import Example, unwrap

__all__ = ["RULES", "lint"]

RULES: tuple[LintRule, ...] = (
    # the start
    two_zero_factors,
    wiped_stream,
    loud_branches,
    idle_scales,
    unequal_scales,
    unusual_scales,
    wiped_features,
    forgetful_scales,
    own_index,
    closing_norms,
    # factors that follow from depth
    constant_of_other_depth,
    flipped_exponent,
    depth_twice,
    equal_warmup,
    # gates, streams, earlier outputs
    half_open_gates,
    unused_mixing,
    saturated_mixing,
    identity_as_logits,
    half_writes,
    identical_streams,
    drawn_queries,
    unsafe_depth_weights,
    # the optimizer
    decayed,
    decayed_streams,
    left_out,
    fast_scalars,
    compounding_scalars,
    frozen_in_branch,
    # stochastic depth
    in_evaluation,
    by_python,
    without_skip,
    odd_rates,
    # other modules
    hooks_beside_inplace,
    batch_of_one,
)
"""All rules by theme: the order of findings of one level."""


def lint(
    model: nn.Module,
    example: Example | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    pretrained: bool = False,
) -> list[Finding]:
    """Find known mistakes in a model and its optimizer, the worst first. Both are left as they are; nothing is trained.

    Call it before training: most rules are about the start, and read the present values of the parameters. All rules
    are in docs/lint.md.

    Args:
        model: any module; rules that read values are silent on the meta device.
        example: what the model is called with; only its shapes matter. With it the connections of any network are
            traced on the meta device. None: only connections of `skipway.nn.Residual` are known, and a scale that is a
            parameter of the block itself (as in ConvNeXt) is not recognised.
        optimizer: used for training, or several for parts of the model; their parameter groups are checked.
        pretrained: the weights are trained, so rules about a start from scratch do not apply.

    Raises:
        SkipwayError: the model fails on the example; `optimizer` is none.

    >>> import skipway as sw
    >>> model = sw.build("resnet20", scheme="skipinit")
    >>> for finding in lint(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)):
    ...     print(finding.level, finding.rule, finding.place)
    serious P4 stages.{0..2}.{0..2}.scale.gain (9)
    note P19 stages.{0..2}.{0..2} (9)
    note P4 stem.norm.weight, stem.norm.bias, … head.classifier.bias (39)
    """
    model = unwrap(model)
    if optimizer is not None:
        optimizer = require_optimizers(optimizer)
    survey = Survey(model, example, optimizer, pretrained)
    findings = [finding for rule in RULES for finding in rule.findings(survey)]
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))
