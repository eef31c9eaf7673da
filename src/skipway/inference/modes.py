"""Evaluation mode for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["eval_mode"]

LOCK = threading.Lock()
OPEN: dict[nn.Module, list[list[tuple[nn.Module, bool]]]] = {}
"""For each network the modes that the contexts that are open found, those of the first one first."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode within the context; afterwards every module has its own mode again, as those of a
    frozen part have another one than the rest. Of the contexts of several threads the last one that ends restores them.

    >>> model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
    >>> with eval_mode(model):
    ...     assert not model.training
    >>> [module.training for module in model.modules()]
    [True, False, True]
    """
    with LOCK:
        found = [(module, module.training) for module in model.modules()]
        OPEN.setdefault(model, []).append(found)
        model.eval()
    try:
        yield
    finally:
        with LOCK:
            waiting = OPEN[model]
            at = next(number for number, each in enumerate(waiting) if each is found)
            del waiting[at]
            if at == 0 and waiting:  # what this one found, not the eval mode of it, is what the next one comes back to
                waiting[0][:] = found
            else:
                for module, mode in found:
                    if module.training != mode:  # to set it costs much more than to look
                        module.training = mode
            if not waiting:
                del OPEN[model]
