"""The libraries that we compare with, imported where they are installed (docs/install.md)."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor, nn

import skipway as sw
from skipway.zoo import import_library

__all__ = ["difference", "import_timm", "import_torchvision", "import_transformers", "randomise_"]


def imported(package: str) -> ModuleType:
    """A library, also beside a torchvision whose compiled half does not fit this torch.

    Raises:
        ImportError: it is not installed.
    """
    if find_spec(package) is None:
        raise ImportError(f"{package} is not installed")
    return import_library(package)


def import_torchvision() -> ModuleType:
    """torchvision."""
    return imported("torchvision")


def import_timm() -> ModuleType:
    """timm, which imports torchvision."""
    return imported("timm")


def import_transformers() -> ModuleType:
    """Hugging Face transformers, which imports torchvision where it is installed."""
    return imported("transformers")


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
