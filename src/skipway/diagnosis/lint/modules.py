"""Rules on other modules: backward hooks next to in-place activations, BatchNorm on one sample."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm

from skipway.diagnosis.lint.rule import Hit, lint_rule
from skipway.diagnosis.lint.survey import Survey
from skipway.errors import counted
from skipway.tracing.containers import tensors_in

__all__ = ["batch_of_one", "hooks_beside_inplace"]


@lint_rule(
    "P21",
    "backward hooks next to in-place activations",
    "note",
    why="A full backward hook turns the module's output into a view, which in-place operations may not change: the "
    "forward pass raises, or the hook reads changed values. Put hooks on tensors, and remove them after use.",
    source="https://github.com/pytorch/pytorch/issues/61519",
)
def hooks_beside_inplace(survey: Survey) -> Iterator[Hit]:
    """Modules with full backward hooks, in a model with in-place modules."""
    hooks, in_place = [], []
    for path, module in survey.model.named_modules():
        if module._backward_pre_hooks or (module._backward_hooks and module._is_full_backward_hook):
            hooks.append(path)
        if getattr(module, "inplace", False) is True:
            in_place.append(path)
    if hooks and in_place:
        yield Hit(
            what=f"{counted(len(hooks), 'module')} with full backward hooks, and {len(in_place)} that work in place",
            where=tuple(hooks),
            evidence={"hooked": len(hooks), "in place": len(in_place)},
        )


@lint_rule(
    "batch-of-one",
    "BatchNorm on a batch of one",
    "note",
    why="The statistics of a batch of one are those of a single image; after global pooling there is one value per "
    "channel, and training raises an error.",
    source="Wu & He 2018, 'Group Normalization', fig. 1: https://arxiv.org/abs/1803.08494",
)
def batch_of_one(survey: Survey) -> Iterator[Hit]:
    """The first axis of the example has length 1; harmless where training uses other batches."""
    tensors = [leaf for leaf in tensors_in(survey.example) if leaf.ndim > 1]
    norms = [path for path, module in survey.model.named_modules() if isinstance(module, _BatchNorm)]
    if tensors and norms and tensors[0].shape[0] == 1:
        yield Hit(
            what=f"the example holds one sample, and {counted(len(norms), 'norm')} use the statistics of the batch",
            where=tuple(norms),
            evidence={"samples": 1, "batch norms": len(norms)},
        )
