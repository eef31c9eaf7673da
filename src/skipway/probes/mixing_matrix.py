"""`depth_mixing(model, example)`: what each connection of any network reads of the stem and of the branches before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from skipway.errors import SkipwayError, counted
from skipway.hardware.precision import widest
from skipway.nn import Carry, Residual
from skipway.probes.measures import is_inexact, real_parts
from skipway.probes.objective import Loss, compute_loss
from skipway.probes.observer import unseen
from skipway.probes.source_cutters import JoinCutter, MixedSource, SourceCutter, StreamCutter, WatchedStreamCutter
from skipway.probes.stream_taps import StreamTaps
from skipway.tracing import Example, as_batch, call_model, preserved_state, unwrap, watch
from skipway.tracing.chain import Connection, chain, chain_from_program
from skipway.tracing.containers import map_tensors
from skipway.tracing.example import copy_example
from skipway.tracing.watch import address

__all__ = ["DepthMixing", "depth_mixing"]

UNREAD = 1e-3
"""Coefficient of a source in what is read, below which nobody reads it."""
SHOWN = 12
"""Rows that a printed table has at most."""


@dataclass(frozen=True)
class DepthMixing:
    """The depth mixing matrix of a network: h_l = Σ_i M[l, i] v_i.

    v_0 is the stream before the first connection and v_i what the branch of connection i adds; h_l is what connection l
    carries to its addition, of several streams what it reads of them; the last row is the stream after all connections.
    Entries with i ≥ l are zero. Where weights depend on the input (dynamic hyper-connections), M is the local Jacobian.

    Args:
        readers: names of the rows: the connections in order, and "output".
        sources: names of the columns: "stem", and the connections in order.
        coefficients: M, (L + 1, L + 1): the factor of v_i in h_l, averaged over all its numbers; nan where the two have
            different shapes. Norms on the way of the stream divide by what they found in this pass, if they are
            torch's (layer, RMS, batch, group and instance norm, `F.normalize`); one that a network writes out by hand
            is differentiated.
        shares: ⟨M[l, i] v_i, h_l⟩ / |h_l|², (L + 1, L + 1): what source i makes of h_l. Where the skips are linear, a
            row sums to 1, at any shapes.
        gradient_shares: what reader l, through its branch or, in the last row, through the head, makes of the gradient
            of the loss at source i; a column sums to 1. nan where there is no gradient, and for the stem where the
            first skip is none of x itself.
        loss: of the pass, nan without one.
    """

    readers: tuple[str, ...]
    sources: tuple[str, ...]
    coefficients: Tensor = field(repr=False)
    shares: Tensor = field(repr=False)
    gradient_shares: Tensor = field(repr=False)
    loss: float = math.nan

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the coefficients' normalised singular values, 1 to L + 1; nan where shapes differ.

        Source: Roy and Vetterli 2007, "The effective rank", eq. 1-3.
        """
        if not bool(self.coefficients.isfinite().all()):
            return math.nan
        values = torch.linalg.svdvals(self.coefficients)
        shares = values[values > 0] / values.sum()
        return float(torch.exp(-(shares * shares.log()).sum()))

    @property
    def newest(self) -> Tensor:
        """The share of the newest source in what each reader carries, (L + 1): it falls as 1/l where branches add up
        undiminished, which is called dilution.
        """
        return self.shares.diagonal()

    @property
    def unread(self) -> list[str]:
        """Sources whose coefficient is below 0.001 in everything that is carried after them."""
        most = self.coefficients.abs().nan_to_num(1.0).amax(0)
        return [name for name, factor in zip(self.sources, most.tolist(), strict=True) if factor < UNREAD]

    def __str__(self) -> str:
        rank = "" if math.isnan(self.effective_rank) else f", effective rank {self.effective_rank:.1f}"
        lines = [f"{counted(len(self.readers), 'reader')} of {counted(len(self.sources), 'source')}{rank}"]
        step = max(1, math.ceil(len(self.readers) / SHOWN))
        width = max(map(len, self.readers))
        lines.append(f"{'share in what is carried':{max(width, 24)}}  {'stem':>7}  {'newest':>7}  {'largest':>7}")
        chosen = sorted({*range(0, len(self.readers), step), len(self.readers) - 1})
        for row in chosen:
            shares = self.shares[row, : row + 1]
            largest = self.sources[int(shares.abs().nan_to_num(0.0).argmax())]
            name = self.readers[row]
            lines.append(f"{name:{max(width, 24)}}  {shares[0]:7.3f}  {shares[row]:7.3f}  {largest}")
        if self.unread:
            lines.append(f"read by nobody: {', '.join(self.unread[:SHOWN])}")
        return "\n".join(lines)


class FrozenNorms(TorchFunctionMode):
    """Context in which norms divide by a constant, so that what they put out is a linear map of their input."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        frozen = FROZEN.get(func)
        return (func if frozen is None else frozen)(*args, **(kwargs or {}))


def divide(x: Tensor, axes: tuple[int, ...], eps: float | None, *, centred: bool = True) -> Tensor:
    """x less its mean over its deviation, which is a constant to the graph; its root mean square, if not `centred`. In
    float32 at least, whose ε counts where none is given.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares of 16 bits overflow
    off = wide - wide.mean(axes, keepdim=True) if centred else wide
    square = off.detach().square().mean(axes, keepdim=True)
    return off / (square + (torch.finfo(wide.dtype).eps if eps is None else eps)).sqrt()


def affine(divided: Tensor, x: Tensor, weight: Any, bias: Any) -> Tensor:
    """What a norm returns for x, in its shape and type, whatever those of γ and β: γ times what was divided plus β."""
    y = divided.view_as(x)
    return (y * (1 if weight is None else weight) + (0 if bias is None else bias)).to(x.dtype)


def layer_norm(x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any):
    return affine(divide(x, tuple(range(x.ndim - len(shape), x.ndim)), eps), x, weight, bias)


def rms_norm(x: Tensor, shape: Sequence[int], weight: Any = None, eps: float | None = None, **_: Any):
    return affine(divide(x, tuple(range(x.ndim - len(shape), x.ndim)), eps, centred=False), x, weight, None)


def batch_norm(
    x: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5,
):  # fmt: skip
    if not training:  # a linear map already
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return affine(divide(x, (0, *range(2, x.ndim)), eps), x, by_channel(x, weight), by_channel(x, bias))


def group_norm(x: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any):
    groups = x.unflatten(1, (num_groups, -1))
    return affine(divide(groups, tuple(range(2, groups.ndim)), eps), x, by_channel(x, weight), by_channel(x, bias))


def instance_norm(
    x: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
):  # fmt: skip
    if not use_input_stats:  # a linear map already
        return F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return affine(divide(x, tuple(range(2, x.ndim)), eps), x, by_channel(x, weight), by_channel(x, bias))


def normalize(x: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, **_: Any):
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return x / wide.norm(p, dim, keepdim=True).clamp_min(eps).to(x.dtype)


def by_channel(x: Tensor, factors: Any) -> Any:
    """Weights or biases of the channels of x, which are on axis 1, in a shape that multiplies x."""
    return None if factors is None else factors.view(1, -1, *(1,) * (x.ndim - 2))


FROZEN = {
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.batch_norm: batch_norm,
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.normalize: normalize,
}
"""Norms whose deviation is a constant to the graph, so that what they put out is a linear map of their input."""


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Context in which all parameters of a model, frozen ones too, take part in the graph."""
    frozen = [each for each in model.parameters() if is_inexact(each) and not each.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def saved_as_copies(model: nn.Module) -> saved_tensors_hooks:
    """Context in which what the graph saves are copies, but for parameters, so that a network may write into it."""
    own = {address(parameter)[0] for parameter in model.parameters()}
    return saved_tensors_hooks(lambda saved: saved if address(saved)[0] in own else saved.clone(), lambda saved: saved)


def as_inputs(example: Example) -> Example:
    """Inputs in whose graph what is computed from them stands, copies that in-place operators may write into."""

    def as_input(tensor: Tensor) -> Tensor:
        return tensor.requires_grad_() * 1 if is_inexact(tensor) else tensor

    return map_tensors(as_input, copy_example(example))


def depth_mixing(
    model: nn.Module,
    example: Example,
    targets: object = None,
    *,
    loss: Loss | None = None,
) -> DepthMixing:
    """Measure the depth mixing matrix of any network, and the gradient's; the model is left unchanged.

    The network runs with every branch's output cut from the graph, so that what is carried depends on the sources
    through the skips alone, and a row is two products with their Jacobian. The gradient follows by the chain rule from
    the last reader back. What a connection adds that is not `observable` counts as carried. Time: 4 L products with
    Jacobians of at most L connections each.

    Args:
        model: any module that `chain` can read.
        example: a batch.
        targets: for the gradient, as in `diagnose`; None takes those that the model's own loss or a stand-in has.
        loss: how output and targets become a loss, as in `probe`.

    Raises:
        SkipwayError: the model has no residual connection, or does something else in each pass, or adds only where
            nothing can be observed; of several streams, what a branch reads or puts out is in no module's hands.

    Source: Kimi Team 2026, "Attention Residuals", sec. 6.2 and table 5; Zhu et al. 2025, "Hyper-Connections", fig. 13.

    >>> import skipway as sw
    >>> model = sw.build("vit-tiny-16", depth=2, dim=8, heads=2, patch=4, image=8, classes=2)
    >>> mixing = depth_mixing(model, torch.randn(2, 3, 8, 8))
    >>> mixing.readers[:2], mixing.sources[:2]
    (('blocks.0.attention', 'blocks.0.mlp'), ('stem', 'blocks.0.attention'))
    >>> bool((mixing.coefficients - torch.ones(5, 5).tril()).abs().max() < 1e-5)
    True
    """
    example, targets = as_batch(example, targets)
    names, cutter, stem_is_read = choose_cutter(model, example)

    def mix(saving: AbstractContextManager[Any]) -> tuple[Tensor, Tensor, Tensor, float]:
        with preserved_state(model), differentiable(model), torch.enable_grad(), saving:
            with FrozenNorms(), cutter:  # the outer of the two, whose own additions the cutter must not see
                call_model(cutter.model, as_inputs(example))
                assert cutter.last is not None
                coefficients, shares = read_forward([*cutter.carried, cutter.last], cutter.sources)
            with cutter:
                value = compute_loss(call_model(cutter.model, as_inputs(example)), targets, loss, example)
                gradients = read_backward(value, cutter.branches, cutter.sources)
        return coefficients, shares, gradients, float(value.detach())

    try:
        coefficients, shares, gradients, value = mix(nullcontext())
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        coefficients, shares, gradients, value = mix(saved_as_copies(model))
    if not stem_is_read:
        gradients[:, 0] = math.nan
    return DepthMixing((*names, "output"), ("stem", *names), coefficients, shares, gradients, value)


def connections_by_type(model: nn.Module) -> Sequence[Connection]:
    """The connections of a network of ours; none of another."""
    own = any(isinstance(module, Residual) for module in model.modules())
    return chain(unwrap(model)) if own else ()


def choose_cutter(model: nn.Module, example: Example) -> tuple[tuple[str, ...], SourceCutter | StreamCutter, bool]:
    """Names of the connections, what cuts their sources, and whether the first branch reads what is the first source:
    not so where the first skip is more than x itself.

    Raises:
        SkipwayError: there is no connection, or none whose addition can be observed.
    """
    own = connections_by_type(model)
    names = tuple(connection.name for connection in own)
    if own and all(connection.residual.streams is not None for connection in own):
        return names, StreamCutter(model, own), True
    if own and all(connection.residual.join is not None for connection in own):
        return names, JoinCutter(model, own), isinstance(own[0].residual.shortcut, Carry)
    program = watch(model, example)
    found = tuple(chain_from_program(unwrap(model), program))
    if not found:
        raise SkipwayError("the model has no residual connection that chain(model, example) finds, so nothing is mixed")
    hidden, found = found[0], tuple(each for each in found if each.observable)
    if not found:
        raise unseen(hidden)
    if any(each.seen.streams is not None for each in found):
        cutter = WatchedStreamCutter(model, found, StreamTaps.of(program, found))
        return tuple(connection.name for connection in found), cutter, found[0].seen.streams is not None
    first = found[0].seen
    plain = first.skip == "identity" and not first.carry and first.weights[0] == 1
    return tuple(connection.name for connection in found), SourceCutter(model, found), plain


def read_forward(carried: list[Tensor], sources: list[MixedSource]) -> tuple[Tensor, Tensor]:
    """Coefficients and shares of the sources in what is carried.

    With J the Jacobian of what is carried, h, by a source v, the coefficient is the mean of J's diagonal, ⟨J u, u⟩ over
    the numbers in random signs u (exact where J is a multiple of the identity), and the share is ⟨J v, h⟩ / |h|².
    """
    coefficients, shares = (torch.zeros(len(carried), len(sources)) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for row, read in enumerate(carried):
        given, before = read.detach(), sources[: row + 1]
        size = inner(given, given) or math.nan
        signs = (torch.randint(2, given.shape, generator=generator, device="cpu") * 2 - 1).to(given)
        for column, (source, product) in enumerate(zip(before, products(read, before, given), strict=True)):
            shares[row, column] = inner(product, source.value) / size
        for column, product in enumerate(products(read, before, signs)):
            fits = product.shape == given.shape
            coefficients[row, column] = inner(product, signs) / signs.numel() if fits else math.nan
    return coefficients, shares


def read_backward(value: Tensor, branches: list[Tensor], sources: list[MixedSource]) -> Tensor:
    """What each reader makes of the gradient at each source.

    The gradient at source i is the sum over its readers l > i of the gradient at what branch l puts out, taken through
    branch l and the skips; the head is the last reader. First the gradients, from the end, then each reader's part.
    """
    found = torch.zeros(len(sources), len(sources))
    if not value.requires_grad:
        return found.fill_(math.nan)
    total = products(value, sources, torch.ones_like(value))
    for number in reversed(range(len(branches))):
        for column, part in enumerate(products(branches[number], sources[: number + 1], total[number + 1])):
            total[column] = total[column] + part
    for row in range(len(sources)):
        last = row == len(branches)
        read, given = (value, torch.ones_like(value)) if last else (branches[row], total[row + 1])
        for column, part in enumerate(products(read, sources[: row + 1], given)):
            size = inner(total[column], total[column])
            found[row, column] = inner(part, total[column]) / size if size else math.nan
    return found


def products(read: Tensor, sources: list[MixedSource], given: Tensor) -> list[Tensor]:
    """The transposed Jacobian of `read` by each source, times `given`; zeros where it does not depend on one."""
    if not read.requires_grad:
        return [torch.zeros_like(source.value) for source in sources]
    found = torch.autograd.grad(read, [source.edge for source in sources], given, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(source.value) if each is None else each for each, source in zip(found, sources, strict=True)
    ]


def inner(first: Tensor, second: Tensor) -> float:
    """The inner product of two tensors of one shape; of complex ones its real part."""
    first, second = real_parts(first, second)
    return float((widest(first) * widest(second)).sum())
