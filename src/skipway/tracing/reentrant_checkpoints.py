"""Re-entrant checkpoints of torch run as the other kind, so that gradients can be asked for and seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint

__all__ = ["NonReentrant", "without_reentry"]


@contextmanager
def without_reentry() -> Iterator[None]:
    """Context in which re-entrant checkpoints of torch are of the other kind, which computes the same gradients.

    A re-entrant one allows neither `torch.autograd.grad` nor hooks on what is computed inside.
    """
    held = torch.utils.checkpoint.CheckpointFunction
    torch.utils.checkpoint.CheckpointFunction = NonReentrant  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = held  # type: ignore[misc]


class NonReentrant:
    """Takes the place of torch's autograd function of re-entrant checkpoints.

    Attributes:
        calls: how often it did; who wants to know whether a model has such checkpoints compares before and after.
    """

    calls = 0

    @classmethod
    def apply(cls, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Run the function, and recompute its activations in the backward pass."""
        cls.calls += 1
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve, determinism_check="none"
        )
