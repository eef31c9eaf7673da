"""What an operation on a network did, and how to take it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from skipway.errors import SkipwayError

__all__ = ["Operation", "undo"]


@dataclass
class Operation:
    """An operation that was carried out in place.

    Args:
        model: the network.
        title: what was done, in words.
        touched: names of connections and the modules that were changed for each.
        refused: names of connections that were left alone, and why.
        report: what was measured on the example.
        steps: what takes it back, last one first.
    """

    model: nn.Module = field(repr=False)
    title: str
    touched: Mapping[str, str]
    refused: Mapping[str, str]
    report: Mapping[str, float]
    steps: list[Callable[[], None]] = field(repr=False, default_factory=list)
    undone: bool = False

    def undo(self) -> nn.Module:
        """Put everything back: outputs, keys of the state dict and classes are exactly as before.

        Raises:
            SkipwayError: it was undone already.
        """
        if self.undone:
            raise SkipwayError(f"{self.title!r} was undone already")
        while self.steps:
            self.steps.pop()()
        self.undone = True
        return self.model

    def __str__(self) -> str:
        measured = ", ".join(f"{name} {value:.3g}" for name, value in self.report.items())
        lines = [f"{self.title}: {len(self.touched)} connections; {measured}"]
        lines += [f"  left alone: {name or 'the model'}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def undo(operation: Operation) -> nn.Module:
    """Take an operation back; see `Operation.undo`."""
    return operation.undo()
