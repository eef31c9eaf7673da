"""Reading a forward pass: what was computed from what, and which additions are residual connections."""

from skipway.tracing.example import Example, as_batch, as_example, call_model
from skipway.tracing.program import Program, Value
from skipway.tracing.residual_adds import REASONS, Refusal, Scale, Sum, read_sums
from skipway.tracing.watch import untouched, unwrapped, watch

__all__ = [
    "REASONS",
    "Example",
    "Program",
    "Refusal",
    "Scale",
    "Sum",
    "Value",
    "as_batch",
    "as_example",
    "call_model",
    "read_sums",
    "untouched",
    "unwrapped",
    "watch",
]
