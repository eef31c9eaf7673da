"""Reading a forward pass: what was computed from what, and which additions are residual connections."""

from skipway.tracing.classifier import find_residual_adds
from skipway.tracing.example import Example, as_batch, as_example, call_model
from skipway.tracing.program import Program, Value
from skipway.tracing.residual_adds import REASONS, BranchScale, Refusal, ResidualAdd
from skipway.tracing.restoration import preserved_state
from skipway.tracing.watch import unwrap, watch

__all__ = [
    "REASONS",
    "BranchScale",
    "Example",
    "Program",
    "Refusal",
    "ResidualAdd",
    "Value",
    "as_batch",
    "as_example",
    "call_model",
    "find_residual_adds",
    "preserved_state",
    "unwrap",
    "watch",
]
