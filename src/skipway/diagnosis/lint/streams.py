"""Rules on hyper-connections: the matrices that mix several streams, and the weights that write into them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from skipway.diagnosis.findings import format_number
from skipway.diagnosis.lint.means import MeasuredProgram
from skipway.diagnosis.lint.rule import Hit, lint_rule
from skipway.diagnosis.lint.stream_matrices import StreamMatrix, stay_symmetric
from skipway.diagnosis.lint.survey import Survey
from skipway.errors import counted

__all__ = [
    "decayed_streams",
    "half_writes",
    "identical_streams",
    "identity_as_logits",
    "saturated_mixing",
    "unused_mixing",
]

SATURATED = 0.02
"""Response of logits below which they do not learn: 0.003 at -8, 0.07 at a diagonal of 4 and two streams."""
NEAR_IDENTITY = 0.3
"""Response of logits below which their softmax is near the identity."""
NEAR = 6
"""Operators between a sigmoid and where it multiplies a branch."""


@lint_rule(
    "P26",
    "mixing of streams that is never applied",
    "serious",
    why="The matrix is computed or held, and what the network puts out does not depend on it: the streams are carried "
    "unmixed, and the matrix never learns.",
    source="https://github.com/tokenbender/mHC-manifold-constrained-hyper-connections/issues/3; "
    "https://github.com/lucidrains/hyper-connections/issues/8",
)
def unused_mixing(survey: Survey) -> Iterator[Hit]:
    """Squares of parameters with a gradient of exactly 0, all streams and all other weights moved a little."""
    dead = [matrix for matrix in survey.stream_matrices if matrix.is_dead]
    alive = {key_of(matrix) for matrix in survey.stream_matrices if not matrix.is_dead}
    dead = [matrix for matrix in dead if key_of(matrix) not in alive]
    if dead:
        yield Hit(
            what=f"{counted(len(dead), 'matrix', 'matrices')} of {len(dead[0].values)} × {len(dead[0].values)} have no "
            "effect on the output; carry the mixed streams on",
            where=tuple(matrix.name for matrix in dead),
            evidence={"matrices": len(dead), "streams": len(dead[0].values)},
        )


def key_of(matrix: StreamMatrix) -> tuple[str, int]:
    """What the matrices of all connections have in common."""
    return matrix.name.rpartition(".")[2], len(matrix.values)


def logits(survey: Survey) -> list[StreamMatrix]:
    """The matrices in use that a softmax or Sinkhorn follows, as they are at a start from scratch."""
    kinds = {key_of(matrix) for matrix in survey.stream_matrices if matrix.is_logits}
    found = [matrix for matrix in survey.stream_matrices if key_of(matrix) in kinds and not matrix.is_dead]
    return [] if survey.pretrained else found


@lint_rule(
    "P27",
    "mixing of streams that hardly learns",
    "serious",
    why="Off-diagonal logits of -8 are weights of e^-8, and so are their gradients and those of the diagonal, a "
    "thousandth of the others': the streams are never mixed.",
    source="https://github.com/tokenbender/mHC-manifold-constrained-hyper-connections/issues/2",
)
def saturated_mixing(survey: Survey) -> Iterator[Hit]:
    """The softmax of the logits responds less than a fiftieth of what it does where all are equal."""
    still = [matrix for matrix in logits(survey) if matrix.response < SATURATED]
    if still:
        least = min(matrix.response for matrix in still)
        spread = max(float(matrix.values.max() - matrix.values.min()) for matrix in still)
        yield Hit(
            what=f"{counted(len(still), 'matrix', 'matrices')} of logits {format_number(spread)} apart respond to "
            f"training {format_number(least)} times as much as equal ones; start them 4 apart",
            where=tuple(matrix.name for matrix in still),
            evidence={"logits apart": spread, "response": least},
        )


@lint_rule(
    "P28",
    "the identity given as logits of the mixing",
    "serious",
    why="The identity of hyper-connections is a matrix; taken as logits, the softmax makes weights of 0.48 and 0.17 of "
    "it for four streams, and what they differ by shrinks to 0.3 at every connection.",
    source="as in https://github.com/lucidrains/x-transformers/blob/main/x_transformers/x_transformers.py; "
    "Zhu et al. 2025, eq. 14: https://arxiv.org/abs/2409.19606",
)
def identity_as_logits(survey: Survey) -> Iterator[Hit]:
    """An exact identity whose gradient sums to 0, as a softmax's does, and whose softmax is far from the identity."""
    found = [matrix for matrix in logits(survey) if matrix.is_identity and matrix.response > NEAR_IDENTITY]
    if found:
        mixing = torch.softmax(found[0].values.double(), dim=-1)
        kept = float(mixing[0, 0] - mixing[0, 1])
        yield Hit(
            what=f"{counted(len(found), 'matrix', 'matrices')} of logits start as the identity, of which the softmax "
            f"keeps {format_number(kept)} of what streams differ by; start the diagonal at 4",
            where=tuple(matrix.name for matrix in found),
            evidence={"kept by a connection": kept, "kept by four": kept**4},
        )


@lint_rule(
    "P29",
    "branches written into the streams at half",
    "note",
    why="mHC writes with 2σ(·), which is 1 at the start, as in a network of one stream; without the 2 every branch is "
    "halved.",
    source="Xie et al. 2025, eq. 8: https://arxiv.org/abs/2512.24880; https://github.com/marin-community/marin/issues/2321",
)
def half_writes(survey: Survey) -> Iterator[Hit]:
    """Beside a matrix of logits, a sigmoid of mean 0.4 to 0.6 spreads a branch over the streams without a factor."""
    matrices = logits(survey)
    program = survey.measured if matrices else None
    if program is None:
        return
    gates: dict[str, list[int]] = {}
    for value in program.values:
        if value.operator.strip("_") == "sigmoid":
            gates.setdefault(value.owner, []).append(value.number)
    half: dict[str, float] = {}
    for matrix in matrices:
        path, count = matrix.name.rpartition(".")[0], len(matrix.values)
        for gate in gates.get(path, ()):
            mean = program.means.get(gate, 0.0)
            if 0.4 < mean < 0.6 and write_factor(program, gate, count) == 1.0:
                half[path] = mean
    if half:
        mean = sum(half.values()) / len(half)
        yield Hit(
            what=f"{counted(len(half), 'connection')} write branches with σ(·) = {format_number(mean)}; multiply by 2",
            where=tuple(half),
            evidence={"write weight": mean, "connections": len(half)},
        )


def write_factor(program: MeasuredProgram, number: int, count: int) -> float | None:
    """The constant that a sigmoid is multiplied by where it spreads one tensor over so many streams; None where it
    does not.
    """
    waiting = [(number, 1.0)]
    for _ in range(NEAR):
        following = []
        for before, factor in waiting:
            for user in program.users[before]:
                value = program[user]
                others = [each for each in value.operands if each != before and program[each].signal]
                if others and value.part in {"product", "scale", "map"}:
                    if any(value.numel == count * program[each].numel for each in others):
                        return factor * value.factor * after(program, user)
                elif value.part in {"carry", "slice", "scale", "shift"}:
                    following.append((user, factor * value.factor))
        waiting = following
    return None


def after(program: MeasuredProgram, number: int) -> float:
    """The constant that the only reader of a value multiplies it by, views of it aside."""
    while len(users := program.users[number]) == 1 and program[users[0]].part == "carry":
        (number,) = users
        if program[number].factor != 1:
            return program[number].factor
    return 1.0


@lint_rule(
    "P38",
    "streams that stay identical for ever",
    "serious",
    why="Streams begin as copies. Where every weight treats them alike, so does every gradient: n streams compute what "
    "one does, at n times the memory. Let the map of the dynamic weights start at random, or each connection read "
    "another stream.",
    source="Zhu et al. 2025, eq. 14: https://arxiv.org/abs/2409.19606, reads stream k mod n; the symmetry is ours",
)
def identical_streams(survey: Survey) -> Iterator[Hit]:
    """All matrices have one number on their diagonals and one off them, still so after four steps on noise."""
    matrices = logits(survey)
    if not matrices or survey.example is None or any(matrix.asymmetry > 0 for matrix in matrices):
        return
    if stay_symmetric(survey.model, survey.example, matrices):
        yield Hit(
            what=f"{len(matrices[0].values)} streams are equal in all {counted(len(matrices), 'connection')}, and "
            "training keeps them so",
            where=tuple(matrix.name for matrix in matrices),
            evidence={"streams": len(matrices[0].values), "connections": len(matrices)},
        )


@lint_rule(
    "P30",
    "weight decay on static weights of streams",
    "serious",
    why="The mixing is the skip. Decay takes lr · wd of it at every step and connection, (1 - lr wd)^(tL) over depth; "
    "a ViT went to NaN of it. Only the map of the dynamic weights is decayed.",
    source="Zhu et al. 2025, sec. 4: https://arxiv.org/abs/2409.19606; "
    "https://github.com/lucidrains/hyper-connections/issues/4",
)
def decayed_streams(survey: Survey) -> Iterator[Hit]:
    """Parameters that hold a matrix of mixing, and those as small beside them, in groups with weight decay."""
    decays = {name: float(group.get("weight_decay") or 0.0) for name, group in survey.groups.items()}
    found = [name for name in survey.static_weights if decays.get(name, 0.0) > 0]
    if found:
        decay = max(decays[name] for name in found)
        yield Hit(
            what=f"{counted(len(found), 'static weight')} of streams have weight decay {format_number(decay)}; set it "
            "to 0",
            where=tuple(found),
            evidence={"weight decay": decay, "parameters": len(found)},
        )
