"""The measurement of a model at its start: signals of connections and layers, and the results of all passes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from skipway.diagnosis.asked_classes import AskedClasses, answer_in_sight
from skipway.diagnosis.passes import (
    Curvature,
    Jacobians,
    Noise,
    curvature,
    jacobians,
    noise,
)
from skipway.diagnosis.subject import Gradients, Subject
from skipway.diagnosis.trial import LookAhead
from skipway.hardware.precision import widest
from skipway.probes.measures import distinctness, rms
from skipway.tracing.chain import Chain, WatchedConnection

__all__ = ["ConnectionSignal", "LayerSignal", "Measurement", "measure"]

NAN = math.nan


@dataclass(frozen=True)
class ConnectionSignal:
    """The signal at one residual connection y = x + F(x). Sizes are root mean squares.

    Args:
        name: of the connection.
        skip: size of x.
        branch: size of F(x).
        stream: size of y.
        variance_before, variance_branch, variance_after: of x, F(x) and y.
        cosine: between x and F(x); near 0 the variances add.
        dead: largest share of channels of a rectifier in the branch that are 0 for every sample.
        distinct: 1 − mean cosine between the streams of different samples; 0 is collapse.
        tokens_distinct: the same between the positions of one sample.
        overflow: largest magnitude of x and F(x) over float16's largest number, 65504; above 1 it overflows.
        swallowed: share of elements at which bfloat16 rounds the branch away.
        gradient_after: size of ∂loss/∂y.
        gradient_before: size of ∂loss/∂x; measured where the branch reads the tensor that is added.
        gradient_branch: size of the part of ∂loss/∂x that comes through the branch.
        weights: |gradient| / |weight| over the branch's maps.
        jacobian: mean squared singular value of ∂y/∂x.
        jacobian_largest: largest singular value of ∂y/∂x; measured only if `thorough`.
    """

    name: str
    skip: float = NAN
    branch: float = NAN
    stream: float = NAN
    variance_before: float = NAN
    variance_branch: float = NAN
    variance_after: float = NAN
    cosine: float = NAN
    dead: float = NAN
    distinct: float = NAN
    tokens_distinct: float = NAN
    overflow: float = NAN
    swallowed: float = NAN
    gradient_after: float = NAN
    gradient_before: float = NAN
    gradient_branch: float = NAN
    weights: float = NAN
    jacobian: float = NAN
    jacobian_largest: float = NAN

    @property
    def ratio(self) -> float:
        """|F(x)| / |x|."""
        return self.branch / self.skip if self.skip else math.inf

    @property
    def growth(self) -> float:
        """|∂loss/∂x| / |∂loss/∂y|, above 1 where the gradient grows backward."""
        return self.gradient_before / self.gradient_after if self.gradient_after else NAN

    @property
    def through_branch(self) -> float:
        """Share of the squared gradient that comes through the branch."""
        skip, branch = self.gradient_after**2, self.gradient_branch**2
        return branch / (skip + branch) if skip + branch else NAN


@dataclass(frozen=True)
class LayerSignal:
    """The output of one module with a linear map.

    Args:
        name: path of the module.
        std: standard deviation of its output.
        distinct: 1 − mean cosine between the outputs of different samples.
        tokens_distinct: the same between the positions of one sample; 1 where there are none.
        gradient: root mean square of the loss's gradient with respect to its output.
        weight: |gradient| / |weight| of its weight.
    """

    name: str
    std: float = NAN
    distinct: float = NAN
    tokens_distinct: float = NAN
    gradient: float = NAN
    weight: float = NAN


@dataclass(frozen=True)
class Measurement:
    """The measurement of a model at its start, on one batch, with one optimizer.

    Args:
        loss: at the start.
        logits: root mean square of the output.
        distinct: 1 − mean cosine between the outputs of different samples.
        connections: residual connections, in order.
        layers: modules with linear maps, in order.
        gradient: |∇loss| over all parameters.
        weight: |w| over all parameters.
        noise: gradient noise between two chunks of the batch.
        jacobians: of connections and of the whole network.
        curvature: of the loss.
        ahead: trial steps of the optimizer; None where none was taken, as where the loss is not finite.
        still: names of the parameters whose gradient is exactly 0.
        asked: what the loss asks for, where it is a cross-entropy of one output.
        passes: forward-backward passes that the measurement took.
    """

    loss: float
    logits: float
    distinct: float
    connections: tuple[ConnectionSignal, ...] = field(repr=False)
    layers: tuple[LayerSignal, ...] = field(repr=False)
    gradient: float
    weight: float
    noise: Noise
    jacobians: Jacobians
    curvature: Curvature
    ahead: LookAhead | None
    still: tuple[str, ...] = field(default=(), repr=False)
    asked: AskedClasses | None = None
    passes: float = field(default=0.0)

    @property
    def effective_path(self) -> float:
        """Expected number of branches on a path of the gradient: the sum of the shares that come through the branches,
        if paths are many and independent (Veit et al. 2016, https://arxiv.org/abs/1605.06431).
        """
        shares = [c.through_branch for c in self.connections if not math.isnan(c.through_branch)]
        return sum(shares) if shares else NAN

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient)


def measure(subject: Subject, *, iterations: int = 0) -> Measurement:
    """Make all passes over a subject but the trial steps; the model, its gradients and buffers and the random state
    stay as they are.
    """
    subject.passes = 0.0
    chain = subject.chain
    loss, output, gradients, readings = subject.probed()
    asked = None
    if subject.asked is not None:
        asked = replace(subject.asked[0], ahead=answer_in_sight(subject, subject.asked[1]))
    relative = relative_gradients(subject, gradients)
    size = norm(gradients)
    halves, first, _ = noise(subject)
    found = jacobians(subject, iterations=iterations)
    bend = curvature(subject, first)
    return Measurement(
        loss=float(loss),
        logits=float(rms(output)),
        distinct=float(distinctness(output)),
        connections=tuple(connection_signals(chain, readings.connections, relative, found)),
        layers=tuple(
            layer_signal(name, readings.modules.get(name, {}), relative.get(name, NAN)) for name in subject.layers
        ),
        gradient=size,
        weight=norm([parameter.detach() for parameter in subject.parameters.values()]),
        noise=halves,
        jacobians=found,
        curvature=bend,
        ahead=None,
        still=tuple(n for n, g in zip(subject.parameters, gradients, strict=True) if not bool(g.any())),
        asked=asked,
        passes=subject.passes,
    )


def norm(tensors: Gradients) -> float:
    """Euclidean norm of all tensors together."""
    return math.sqrt(sum(float(widest(tensor).square().sum()) for tensor in tensors))


def relative_gradients(subject: Subject, gradients: Gradients) -> dict[str, float]:
    """|∂loss/∂W| / |W| of each module, over its parameters with two or more axes."""
    sizes: dict[str, list[float]] = {}
    for (name, parameter), gradient in zip(subject.parameters.items(), gradients, strict=True):
        if parameter.ndim < 2:
            continue
        row = sizes.setdefault(name.rpartition(".")[0], [0.0, 0.0])
        row[0] += float(widest(gradient).square().sum())
        row[1] += float(widest(parameter.detach()).square().sum())
    return {name: math.sqrt(g / w) if w else (math.inf if g else 0.0) for name, (g, w) in sizes.items()}


def layer_signal(name: str, row: dict[str, float], weight: float) -> LayerSignal:
    """What was read at the output of a linear map."""
    return LayerSignal(
        name,
        std=math.sqrt(row.get("variance_after", NAN)),
        distinct=row.get("distinct", NAN),
        tokens_distinct=row.get("tokens_distinct", NAN),
        gradient=row.get("gradient_after", NAN),
        weight=weight,
    )


def connection_signals(
    chain: Chain[WatchedConnection], rows: dict[str, Any], relative: dict[str, float], found: Jacobians
) -> list[ConnectionSignal]:
    """The signals of each connection, with its relative gradient and its Jacobian."""
    signals = []
    for connection in chain:
        name = connection.name
        gradients = [relative[owner] for owner in connection.seen.maps if owner in relative]
        signals.append(
            ConnectionSignal(
                name,
                **rows.get(name, {}),
                weights=math.sqrt(sum(value**2 for value in gradients) / len(gradients)) if gradients else NAN,
                jacobian=found.mean_square.get(name, NAN),
                jacobian_largest=found.largest.get(name, NAN),
            )
        )
    return signals
