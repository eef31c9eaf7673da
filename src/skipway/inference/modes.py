"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["eval_mode"]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode within the context; afterwards every module has its own mode again, as those of a
    frozen part have another one than the rest.

    >>> model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
    >>> with eval_mode(model):
    ...     assert not model.training
    >>> [module.training for module in model.modules()]
    [True, False, True]
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            if module.training != mode:  # to set it costs much more than to look
                module.training = mode
