"""The rule on gates between a stream and its branch, as in Highway networks and GTrXL: they start at the identity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from skipway.diagnosis.findings import format_number
from skipway.diagnosis.lint.means import MeasuredProgram
from skipway.diagnosis.lint.rule import Hit, lint_rule
from skipway.diagnosis.lint.survey import Survey
from skipway.errors import counted
from skipway.tracing import Program, Value
from skipway.tracing.walks import CARRYING

__all__ = ["half_open_gates"]

OPEN = 0.7
"""Share of the stream that a gate is to carry at the start: a bias of 2 carries 0.88, one of 1 carries 0.73."""


@lint_rule(
    "P32",
    "gates that start off the identity",
    "serious",
    why="A gate with bias 0 carries half of the stream, so that 2^-L of it arrives after L connections. Start the bias "
    "so that the stream is carried: -2 on the share of the branch.",
    source="Parisotto et al. 2019, sec. 3.2: https://arxiv.org/abs/1910.06764; "
    "Srivastava et al. 2015, sec. 3: https://arxiv.org/abs/1505.00387",
)
def half_open_gates(survey: Survey) -> Iterator[Hit]:
    """y = c x + …, where c is a sigmoid's and depends on x, which nothing else of y comes before: mean c < 0.7.

    Cells of a network over time (modules that run several times, torch's recurrent layers) are none of depth.
    """
    if survey.pretrained or survey.program is None or not gated_sums(survey, survey.program):
        return
    program = survey.measured
    gates = [] if program is None else list(stream_gates(survey, program))
    shared = Counter(gate.stream for gate in gates)
    weak = [gate for gate in gates if gate.carried < OPEN and shared[gate.stream] == 1]
    if weak:
        least = min(gate.carried for gate in weak)
        yield Hit(
            what=f"{counted(len(weak), 'gate')} start by carrying {format_number(least)} of the stream",
            where=tuple(dict.fromkeys(gate.owner for gate in weak)),
            evidence={"gates": len(weak), "carried": least},
        )


@dataclass(frozen=True)
class StreamGate:
    """A gate on a stream.

    Args:
        owner: path of the module that adds.
        stream: number of the value that is carried.
        carried: the factor of it in the sum, from the means of the gates.
    """

    owner: str
    stream: int
    carried: float


def gated_sums(survey: Survey, program: Program) -> list[Value]:
    """The sums of a program with a product of two signals, element by element, among their terms, those over time left
    out.
    """
    recurrent = {path for path, module in survey.model.named_modules() if isinstance(module, nn.RNNBase)}
    return [
        value
        for value in program.values
        if value.part == "sum"
        and value.norm is None
        and program.runs.get(value.owner, 1) == 1
        and value.owner not in recurrent
        and any(is_gating(program[each]) for each in value.operands)
    ]


def is_gating(value: Value) -> bool:
    return value.part == "product" and value.operator.strip("_") == "mul"


def stream_gates(survey: Survey, program: MeasuredProgram) -> Iterator[StreamGate]:
    """The sums that carry a stream through a gate, in order."""
    for value in gated_sums(survey, program):
        shares: Counter[int] = Counter()
        gates: set[int] = set()
        collect(program, value.number, 1.0, shares, gates)
        streams = [
            each
            for each in shares
            if all(program.depends(gate, each) for gate in gates)
            and all(program.depends(other, each) for other in shares if other != each)
        ]
        if gates and len(shares) > 1 and len(streams) == 1:
            yield StreamGate(value.owner, streams[0], float(shares[streams[0]]))


def collect(program: MeasuredProgram, number: int, factor: float, shares: Counter[int], gates: set[int]) -> None:
    """The factors of what a value is a sum of, back to work that is not linear, or to what a gate depends on."""
    value, signals = program[number], program.same(number)
    if any(program.depends(gate, number) for gate in gates):
        shares[number] += factor  # type: ignore[assignment]
    elif value.part == "sum":
        for operand in sorted(value.operands, key=lambda each: not is_gating(program[each])):
            collect(program, operand, factor, shares, gates)
    elif is_gating(value) and len(signals) == 2 and (found := gate_and_gated(program, signals)) is not None:
        sigmoid, gate, gated = found
        gates.add(sigmoid)
        mean = program.means.get(gate, 0.5)
        # the first product of torch.lerp, x (1 - gate), is no tensor of its own
        collect(program, gated, factor * (mean if number in program.means else 1 - mean), shares, gates)
    elif len(signals) == 1 and (value.part in CARRYING - {"scale"} or value.factor != 1):
        collect(program, signals[0], factor * value.factor, shares, gates)
    else:
        shares[number] += factor  # type: ignore[assignment]


def gate_and_gated(program: MeasuredProgram, factors: list[int]) -> tuple[int, int, int] | None:
    """The sigmoid, what was made of it, and what that multiplies; None where neither factor is a sigmoid's."""
    for gate, gated in (factors, factors[::-1]):
        sigmoid = program.gate_of(gate)
        if sigmoid is not None:
            return sigmoid, gate, gated
    return None
