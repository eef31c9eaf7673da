"""The passes of a diagnosis, each a function of a subject: noise, Jacobians, shattering, curvature."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from skipway.diagnosis.subject import Gradients, Subject
from skipway.hardware.precision import widest
from skipway.kernels.cast import at_least_float32
from skipway.probes import Observer
from skipway.probes.differentiation import GradientFlags
from skipway.tracing.chain import WatchedConnection
from skipway.tracing.containers import map_tensors, tensors_in
from skipway.tracing.example import call_model

__all__ = ["Curvature", "Jacobians", "Noise", "curvature", "is_narrow", "jacobians", "noise"]


def dot(first: Gradients, second: Gradients) -> float:
    """⟨first, second⟩ over all parameters, in double precision where single overflows."""
    flat = ([at_least_float32(each).flatten() for each in side] for side in (first, second))
    pairs = list(zip(*flat, strict=True))
    single = float(torch.stack([torch.dot(a, b).float() for a, b in pairs]).sum()) if pairs else 0.0
    return single if math.isfinite(single) else float(sum(torch.dot(widest(a), widest(b)) for a, b in pairs))


@dataclass(frozen=True)
class Noise:
    """Agreement of the gradients of two chunks of the batch.

    Args:
        agreement: cosine between the two gradients.
        scale: noise scale tr Σ / |G|², the batch size at which noise and gradient are equally large (McCandlish et al.
            2018, https://arxiv.org/abs/1812.06162, eq. 2.9), estimated from the two chunks; inf where they disagree.
    """

    agreement: float
    scale: float


def noise(subject: Subject) -> tuple[Noise, Gradients, float]:
    """Gradient noise between two chunks, and gradient and loss of the first, which later passes reuse."""
    size = subject.chunk
    loss, first = subject.gradients(subject.part(0, size))
    _, second = subject.gradients(subject.part(size, 2 * size))
    product, sizes = dot(first, second), (dot(first, first), dot(second, second))
    length = math.sqrt(sizes[0] * sizes[1])
    agreement = product / length if length > 0 else 0.0
    scale = size * ((sizes[0] + sizes[1]) / 2 - product) / product if product > 0 else math.inf
    return Noise(agreement, scale), first, float(loss.detach())


class Edges(NamedTuple):
    """The edges of the gradient graph at which the stream enters and leaves a connection."""

    before: GradientEdge
    after: GradientEdge
    shape: torch.Size


class EdgeObserver(Observer):
    """Records the edges of every connection during a pass, for Jacobians."""

    def start(self) -> None:
        self.spans: dict[str, Edges] = {}
        self.before: GradientEdge | None = None

    def operands(self, connection: WatchedConnection, skip: Tensor, branch: Tensor) -> None:
        apart = connection.seen.skip == "mixed"  # the branch does not read what is carried
        self.before = get_gradient_edge(skip) if skip.requires_grad and torch.is_grad_enabled() and not apart else None

    def stream(self, connection: WatchedConnection, stream: Tensor) -> None:
        if self.before is not None and stream.requires_grad:
            self.spans[connection.name] = Edges(self.before, get_gradient_edge(stream), stream.shape)


@dataclass(frozen=True)
class Jacobians:
    """Singular values of the Jacobians of connections and of the whole network, from random projections.

    Args:
        mean_square: E σ² = |J|²_F / n of the map from x to y of each connection, by name.
        whole: the same of the map from input to output, per output element.
        largest: largest singular value of the map of each connection; empty unless asked for.
        whole_largest: the same of the map from input to output.
        shattering: correlation of the input's gradient with the one at a neighbouring input (Balduzzi et al. 2017,
            https://arxiv.org/abs/1702.08591): 1 is smooth, 0 is white noise. None for integer inputs.
    """

    mean_square: dict[str, float] = field(repr=False)
    whole: float | None
    largest: dict[str, float] = field(repr=False)
    shattering: float | None
    whole_largest: float | None = None


def jacobians(subject: Subject, *, distance: float = 0.01, iterations: int = 0) -> Jacobians:
    """Vector–Jacobian products with a random vector: at each connection, and through the whole network at the example
    and at a neighbour, `distance` away relative to the example's deviation.
    """
    part = subject.probed_part
    share = subject.share(part)
    clean, real = with_gradients(subject)
    mean_square: dict[str, float] = {}
    largest: dict[str, float] = {}
    with subject.running():
        with EdgeObserver(subject.model, subject.chain) as observer, GradientFlags():
            output = subject.signal(call_model(subject.model, clean), part)
        cotangent = torch.randn_like(output)
        first = gradient_of(output, real, cotangent, retain_graph=True)
        subject.spend(share)
        pending = squared(observer.spans, output)
        subject.spend(share * 2 / 3)
        mean_square = dict(zip(pending, torch.stack(list(pending.values())).tolist() if pending else [], strict=True))
        if iterations:
            whole_edges = {}
            if first is not None and real is not None:
                whole_edges[WHOLE] = Edges(get_gradient_edge(real), get_gradient_edge(output), output.shape)
            largest = largest_values({**observer.spans, **whole_edges}, output, iterations)
            del whole_edges
            subject.spend(2 * iterations * share)
        del output
        while observer.spans:  # from the end on: a deep graph that is dropped as a whole may overflow the stack
            observer.spans.popitem()
    shattering = whole = None
    if first is not None:
        whole = float(first.float().square().sum() / cotangent.float().square().sum())
        shattering = neighbour_correlation(subject, first, cotangent, distance)
    return Jacobians(mean_square, whole, largest, shattering, whole_largest=largest.pop(WHOLE, None))


WHOLE = " the whole"
"""Key of the whole network among the connections; no module has this name."""


def squared(edges: dict[str, Edges], output: Tensor) -> dict[str, Tensor]:
    """|Jᵀv|² / |v|² for a random v at each connection."""
    found: dict[str, Tensor] = {}
    for name, edge in edges.items():
        vector = torch.randn(edge.shape, device=output.device, dtype=output.dtype)
        (pulled,) = torch.autograd.grad(edge.after, edge.before, vector, retain_graph=True, allow_unused=True)
        if pulled is not None:
            found[name] = pulled.float().square().sum() / vector.float().square().sum()
    return found


def neighbour_correlation(subject: Subject, first: Tensor, cotangent: Tensor, distance: float) -> float:
    """Mean cosine, over samples, between the gradients at the input and at a neighbouring one."""
    moved, real = with_gradients(subject, distance)
    with subject.running(), GradientFlags():
        output = subject.signal(call_model(subject.model, moved), subject.probed_part)
        second = gradient_of(output, real, cotangent)
    subject.spend(subject.share(subject.probed_part))
    if second is None or not bool(first.any()) or not bool(second.any()):
        return math.nan
    count = subject.count(subject.probed_part)
    first, second = (subject.samples.samples_first(each, count).flatten(1) for each in (first, second))
    return float(torch.cosine_similarity(widest(first), widest(second)).mean())


def largest_values(edges: dict[str, Any], output: Tensor, iterations: int) -> dict[str, float]:
    """Power iteration on JᵀJ of each connection; J itself is the derivative of the vector–Jacobian product."""
    found: dict[str, float] = {}
    for name, edge in edges.items():
        vector = torch.randn(edge.shape, device=output.device, dtype=output.dtype)
        size = math.nan
        for _ in range(iterations):
            dummy = vector.clone().requires_grad_()
            (pulled,) = torch.autograd.grad(edge.after, edge.before, dummy, create_graph=True, allow_unused=True)
            if pulled is None:
                break
            direction = pulled.detach() / pulled.detach().norm().clamp_min(1e-30)
            (vector,) = torch.autograd.grad(pulled, dummy, direction, retain_graph=True)
            size = float(vector.norm())
            vector = vector / vector.norm().clamp_min(1e-30)
        if not math.isnan(size):
            found[name] = size
    return found


def with_gradients(subject: Subject, distance: float = 0.0) -> tuple[Any, Tensor | None]:
    """Copies of the probed inputs, the first real one with a sample axis shifted by `distance`; and the leaf that
    receives the gradient of that one. The leaf itself is not among the inputs, since the model may write into them.
    """
    real: list[Tensor] = []
    sampled = iter([id(each) in subject.samples.axes for each in tensors_in(subject.inputs)])

    def prepare(tensor: Tensor) -> Tensor:
        if not next(sampled) or not tensor.is_floating_point() or real:
            return tensor.clone()
        moved = tensor.detach().clone()
        if distance:
            generator = torch.Generator(device=moved.device).manual_seed(1)
            step = torch.randn(moved.shape, generator=generator, device=moved.device, dtype=moved.dtype)
            moved += distance * moved.std() * step
        real.append(moved.requires_grad_())
        return moved.clone()

    prepared = map_tensors(prepare, subject.probed_part[0])
    return prepared, real[0] if real else None


def gradient_of(output: Tensor, real: Tensor | None, cotangent: Tensor, **how: bool) -> Tensor | None:
    """The gradient of ⟨output, cotangent⟩ with respect to the input, None where there is none."""
    if real is None or not output.requires_grad:
        return None
    (found,) = torch.autograd.grad(output, real, cotangent, allow_unused=True, **how)
    return found


@dataclass(frozen=True)
class Curvature:
    """Curvature of the loss.

    Args:
        sharpness: largest eigenvalue of the Hessian, by power iteration from the gradient; NaN where it was not
            measured.
        along_gradient: gᵀHg / |g|², the curvature in the direction of steepest descent.
    """

    sharpness: float
    along_gradient: float

    @property
    def largest_rate(self) -> float:
        """2/λ, the learning rate above which gradient descent on a quadratic diverges."""
        return math.inf if self.sharpness <= 0 else 2 / self.sharpness


def curvature(subject: Subject, gradient: Gradients, *, iterations: int = 2, reach: float = 1e-3) -> Curvature:
    """Hessian-vector products on the first chunk of the batch, as differences of gradients so that kernels need no
    second derivative: Hv ≈ (∇L(w + εv) − ∇L(w)) / ε, with |εv| = `reach` |w|. Weights of 16 bits cannot take such a
    step: their rounding is as large.
    """
    parameters = list(subject.parameters.values())
    if is_narrow(parameters):
        return Curvature(math.nan, math.nan)
    part = subject.part(0, subject.chunk)
    weight = math.sqrt(sum(float(widest(parameter.detach()).square().sum()) for parameter in parameters))
    size = math.sqrt(dot(gradient, gradient))
    if not 0 < size < math.inf or weight == 0:
        return Curvature(math.nan if size != 0 else 0.0, math.nan if size != 0 else 0.0)
    direction = [g / size for g in gradient]
    values: list[float] = []
    for _ in range(iterations):
        step = reach * weight
        with shifted_parameters(parameters, direction, step):
            _, ahead = subject.gradients(part)
        product = [(a - g) / step for a, g in zip(ahead, gradient, strict=True)]
        values.append(dot(product, direction))
        length = math.sqrt(dot(product, product))
        if not 0 < length < math.inf:
            break
        direction = [p / length for p in product]
    return Curvature(max(values, key=abs), values[0])


def is_narrow(parameters: Iterable[Tensor]) -> bool:
    """Whether some parameters have fewer than 32 bits."""
    return any(each.dtype.itemsize < torch.float32.itemsize for each in parameters)


@contextmanager
def shifted_parameters(parameters: Sequence[Tensor], direction: Gradients, step: float) -> Iterator[None]:
    """Parameters a step away inside the context, put back exactly afterwards."""
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, change in zip(parameters, direction, strict=True):
                parameter.add_(change, alpha=step)
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, kept, strict=True):
                parameter.copy_(old)
