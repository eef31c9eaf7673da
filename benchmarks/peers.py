"""The libraries that we compare with, imported where they are installed (`pip install 'skipway[parity]'`)."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor, nn

import skipway as sw

__all__ = ["MISSING_OPERATORS", "difference", "import_timm", "import_torchvision", "import_transformers", "randomise_"]

MISSING_OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def define_missing_operators() -> None:
    """torchvision registers shape functions for two operators of its compiled half at import; on a torch without that
    half their schemas are absent, and with them defined its Python models import.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in MISSING_OPERATORS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    define_missing_operators.library = library  # type: ignore[attr-defined] - a library lives as long as its object


def import_torchvision() -> ModuleType:
    """torchvision, with its models importable on a CPU-only torch."""
    define_missing_operators()
    import torchvision

    return torchvision


def import_timm() -> ModuleType:
    """timm, which imports torchvision."""
    import_torchvision()
    import timm

    return timm


def import_transformers() -> ModuleType:
    """Hugging Face transformers, which imports torchvision where it is installed."""
    if find_spec("torchvision") is not None:
        import_torchvision()
    import transformers

    return transformers


@torch.no_grad()
def randomise_(model: nn.Module) -> nn.Module:
    """Move all parameters and statistics away from their initial values, in place: no tiny gain may hide anything."""
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model


@torch.no_grad()
def difference(ours: nn.Module, theirs: nn.Module, names: str, inputs: Tensor) -> float:
    """Largest difference of the logits over the largest logit, with their weights loaded strictly into ours."""
    sw.load(ours, theirs.state_dict(), names=names)
    ours.eval()
    theirs.eval()
    expected = theirs(inputs)
    expected = getattr(expected, "logits", expected)
    return ((ours(inputs) - expected).abs().max() / expected.abs().max()).item()
