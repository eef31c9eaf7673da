"""The rule on learned numbers that multiply the stream at every block, which compound with depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from skipway.diagnosis.findings import format_number
from skipway.diagnosis.lint.optimizer import rate
from skipway.diagnosis.lint.rule import Hit, lint_rule
from skipway.diagnosis.lint.survey import Survey
from skipway.tracing import Program, Value
from skipway.tracing.walks import CARRYING

__all__ = ["compounding_scalars"]

LARGE_STEP = 0.5
"""Change of the stream by one step, as a share of it, beyond which training is in danger: nanochat's is 0.1."""


@lint_rule(
    "P36",
    "stream scalars at the rate of additive ones",
    "serious",
    why="Numbers that multiply the stream at every block compound: when Adam moves each of L by lr, the stream changes "
    "by (1 + lr)^L. Numbers that add an earlier tensor to it do not.",
    source="https://github.com/karpathy/nanochat/blob/master/dev/LOG.md",
)
def compounding_scalars(survey: Survey) -> Iterator[Hit]:
    """Scalars that multiply what a connection put out, of an Adam-like optimizer (one that has betas), L · lr > 0.5."""
    if survey.program is None:
        return
    counts = multiplied_by(survey, survey.program)
    fast = {
        name: rate(group)
        for name, group in survey.groups.items()
        if name in counts and "betas" in group and rate(group) > 0
    }
    moved = sum(counts[name] * lr for name, lr in fast.items())
    if moved > LARGE_STEP:
        uses, fastest = sum(counts[name] for name in fast), max(fast.values())
        yield Hit(
            what=f"{uses} numbers multiply the stream one after the other, at a learning rate of "
            f"{format_number(fastest)}: one step may change it by a factor of {format_number((1 + fastest) ** uses)}; "
            "give them a hundredth of it",
            where=tuple(fast),
            evidence={"learning rate": fastest, "numbers": uses},
        )


def multiplied_by(survey: Survey, program: Program) -> Counter[str]:
    """How often each parameter multiplies the sum of an earlier connection by one number, where that goes on as the
    stream: as a term of what the next connection starts from, or on its skip. Of sums with one early tensor,
    r x + m x₀, which are read as x₀ and a branch, it is the branch.
    """
    sums = {each.seen.numbers[2] for each in survey.watched}
    starts = Counter(each.seen.numbers[3] for each in survey.watched)
    found: Counter[str] = Counter()
    seen: set[int] = set()
    for connection in survey.watched:
        skip, branch, _, start = connection.seen.numbers
        waiting = [start, skip, *([branch] if starts[start] > 1 else [])]
        while waiting:
            value = program[waiting.pop()]
            if value.number in seen or value.number in sums:
                continue
            seen.add(value.number)
            name = scalar_of(survey, program, value)
            operands = program.signals(value)
            if name is not None and any(leads_back_to(program, each, sums) for each in operands):
                found[name] += 1
            elif value.part in CARRYING | {"sum"} or value.norm is not None:
                waiting.extend(operands)
    return found


def scalar_of(survey: Survey, program: Program, value: Value) -> str | None:
    """The parameter one number of which multiplies the signal here."""
    constants = [program[operand] for operand in value.operands if not program[operand].signal]
    if value.part != "scale" or value.operator not in ("mul", "mul_") or len(constants) != 1:
        return None
    names = constants[0].parameters & survey.parameters.keys()
    return next(iter(names)) if constants[0].numel == 1 and len(names) == 1 else None


def leads_back_to(program: Program, number: int, ends: set[int]) -> bool:
    """Whether a value is one of some, moved, scaled or normalised."""
    while number not in ends:
        value = program[number]
        operands = program.signals(value)
        if len(operands) != 1 or not (value.part in CARRYING or value.norm is not None):
            return False
        number = operands[0]
    return True
