"""Rules on other modules: hooks beside in-place activations, BatchNorm on one sample."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten

from skipway.diagnosis.lint.rule import Hit, rule
from skipway.diagnosis.lint.survey import Survey

__all__ = ["batch_of_one", "hooked"]


@rule(
    "P21",
    "backward hooks beside in-place activations",
    "note",
    why="A full backward hook makes a module's output a view, which an in-place operation may not change: the forward "
    "pass raises, or the hook reads changed values. Use hooks on tensors, and remove them.",
    source="https://github.com/pytorch/pytorch/issues/61519",
)
def hooked(survey: Survey) -> Iterator[Hit]:
    """Modules with full backward hooks in a model that holds in-place modules."""
    hooks, in_place = [], []
    for path, module in survey.model.named_modules():
        if module._backward_pre_hooks or (module._backward_hooks and module._is_full_backward_hook):
            hooks.append(path)
        if getattr(module, "inplace", False) is True:
            in_place.append(path)
    if hooks and in_place:
        yield Hit(
            what=f"{len(hooks)} modules have full backward hooks and {len(in_place)} work in place",
            where=tuple(hooks),
            evidence={"hooked": len(hooks), "in place": len(in_place)},
        )


@rule(
    "batch-of-one",
    "BatchNorm on a batch of one",
    "note",
    why="The statistics of a batch of one are those of one image; behind global pooling there is but one value and "
    "training raises.",
    source="Wu & He 2018, 'Group Normalization', fig. 1: https://arxiv.org/abs/1803.08494",
)
def batch_of_one(survey: Survey) -> Iterator[Hit]:
    """The example's first axis is 1; of no matter where it only lends its shape."""
    tensors = [leaf for leaf in tree_flatten(survey.example)[0] if isinstance(leaf, Tensor) and leaf.ndim > 1]
    norms = [path for path, module in survey.model.named_modules() if isinstance(module, _BatchNorm)]
    if tensors and norms and tensors[0].shape[0] == 1:
        yield Hit(
            what=f"the example holds one sample, and {len(norms)} norms take their statistics from the batch",
            where=tuple(norms),
            evidence={"samples": 1, "batch norms": len(norms)},
        )
