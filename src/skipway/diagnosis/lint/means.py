"""What a network computes on random inputs, as the mean of each value of its program."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipway.diagnosis.lint.stream_matrices import random_example
from skipway.tracing import Example, Program
from skipway.tracing.watch import Recorder, record_program

__all__ = ["MeasuredProgram", "measured_program"]


@dataclass
class MeasuredProgram(Program):
    """A program with the means of its values, by their numbers, as far as a tensor holds them."""

    means: dict[int, float] = field(default_factory=dict)

    def same(self, number: int) -> list[int]:
        """The operands that depend on the input; of a view of a storage that was written into elsewhere, the one with
        its values.
        """
        signals = self.signals(self[number])
        if self[number].operator == "alias":
            signals = [each for each in signals if self.means.get(each) == self.means.get(number)] or signals
        return signals

    def gate_of(self, number: int) -> int | None:
        """The sigmoid that a value is, moved, shifted and scaled; None for other values."""
        while (value := self[number]).operator.strip("_") != "sigmoid":
            signals = self.same(number)
            if value.part not in {"carry", "slice", "shift", "scale"} or len(signals) != 1:
                return None
            (number,) = signals
        return number


class MeanRecorder(Recorder):
    """A recorder that works on real values and keeps their means."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        self.means: dict[int, float] = {}
        super().__init__(model, example)
        self.program = MeasuredProgram(**vars(self.program), means=self.means)

    def note(self, tensor: Tensor, *args: Any, **more: Any) -> int:
        number = super().note(tensor, *args, **more)
        if tensor.is_floating_point() and tensor.numel():
            with torch.utils._python_dispatch._disable_current_modes():
                self.means[number] = float(tensor.detach().float().mean())
        return number


def measured_program(model: nn.Module, example: Example) -> MeasuredProgram | None:
    """The program that a copy of the model runs on random inputs; None where it has no values, or fails on them."""
    if any(each.is_meta for each in model.parameters()):
        return None
    try:
        trial = copy.deepcopy(model).cpu().eval()
        program = record_program(trial, random_example(example, 0), MeanRecorder)
    except Exception:  # a foreign model may raise anything on random numbers
        return None
    assert isinstance(program, MeasuredProgram)
    return program
