"""`reversible(model, example)`: chains of anybody's blocks on two streams, whose activations are not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from skipway.errors import SkipwayError
from skipway.surgery.admission import SEALED, admitted, refuse_branching
from skipway.surgery.memory import changed, present, saved_bytes, statistics_kept
from skipway.surgery.operation import Operation
from skipway.surgery.verifying import difference, outputs
from skipway.tracing import Example, untouched, watch
from skipway.tracing.watching import call

__all__ = ["reversible"]


def reversible(model: nn.Module, example: Example, *, preserve: bool = True, tolerance: float = 1e-3) -> Operation:
    """Run blocks that follow one another on two streams, and compute their inputs again from their outputs in the
    backward pass, in place: what is kept for it does not grow with the number of blocks.

    With R(x) = block(x) − x, whatever is in the block, and both streams starting as x,

        (u, v) ← (v, u + R(v)) for each block,  y = u + v − x = x + Σ R(v).

    Each step can be inverted, (u, v) = (v' − R(u'), u'), so that only the last two streams are kept. It is RevNet's
    step with whole blocks for F and G: no branch has to be taken apart. **It is another function** than
    x ← x + R(x): a block sees one of the streams, every second branch. Up to the first order in R both agree. Inside
    of the backward pass random numbers are those of the forward pass, and buffers are not updated a second time (P22).

    Streams are kept in float32 at least. `torch.compile` gets the two streams without the inversion (its own
    partitioner decides what it keeps). Forward hooks of the blocks themselves see the chain's input and output; those
    of their parts see every computation, the second one too.

    Args:
        model: any module that `chain` can read, with blocks that carry x itself.
        example: a batch that the model is called with, to find the blocks, and to compare gradients and bytes on.
        preserve: has to be False: there is no reversible form of a one-stream chain that computes the same.
        tolerance: by how much gradients through the inversion may differ from those through the same two streams with
            everything kept, relative to the largest; bfloat16 needs some 1e-2.

    Shapes: as the blocks': each takes and puts out one tensor of one shape.

    Returns:
        the operation: `touched` holds the chains, `refused` the blocks left alone, each with its reason; the report the
        change of the output, the difference of the gradients and the bytes kept before and after.

    Raises:
        SkipwayError: `preserve` is not False, there are no two blocks that follow one another, or gradients differ; the
            model is as before.

    Source: Gomez et al. 2017, "The Reversible Residual Network", eq. 6-8 and algorithm 1; Mangalam et al. 2022,
    "Reversible Vision Transformers", sec. 3.1, https://arxiv.org/abs/2302.04869 (their streams are joined by
    concatenation; ours keep their width).

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    >>> operation = reversible(model, torch.randn(2, 3, 8), preserve=False)
    >>> operation.touched
    {'layers.0': 'two streams through layers.0, layers.1, layers.2, layers.3'}
    >>> operation.report["bytes after"] < 0.4 * operation.report["bytes before"]
    True
    """
    if preserve:
        raise SkipwayError(
            "preserve=True: a chain x + R(x) is not invertible without changing what it computes; reversible(…, "
            "preserve=False) trains another function, and checkpointed(model, example) saves memory and keeps this one"
        )
    model = admitted(model)
    refuse_branching(model, example, "reversible")
    chains, refused = chains_of(model, example)
    if not chains:
        raise SkipwayError(
            f"no two blocks of {type(model).__name__} follow one another: "
            + "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        )
    before, kept = outputs(model, example), saved_bytes(model, example)
    operation = Operation(model, f"{type(model).__name__} made reversible", {}, refused, {})
    try:
        chained = [Chained([model.get_submodule(name) for name in names]) for names in chains]
        for each in chained:
            operation.steps += each.install()
        inverted = gradients(model, example)
        for each in chained:
            each.inverts = False
        gap = difference(gradients(model, example), inverted)
        for each in chained:
            each.inverts = True
        if not gap <= tolerance:
            raise SkipwayError(
                f"gradients through the inversion differ by {gap:.3g} of the largest from those with everything kept, "
                f"more than tolerance={tolerance:g}: blocks are not computed twice alike, or precision is too low"
            )
        operation.report = {
            "difference": difference(before, outputs(model, example)),
            "gradient difference": gap,
            "bytes before": kept,
            "bytes after": saved_bytes(model, example),
        }
    except BaseException:
        operation.undo()
        raise
    operation.touched = {names[0]: f"two streams through {', '.join(names)}" for names in chains}
    return operation


def gradients(model: nn.Module, example: Example) -> list[Tensor]:
    """Those of the mean square of what the model puts out in training mode, all in one row."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with untouched(model), torch.enable_grad():
        leaves = tree_flatten(call(model.train(), example))[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not trained or not tensors:
            return []
        loss = torch.stack([tensor.float().square().mean() for tensor in tensors]).sum()
        found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [torch.cat([gradient.flatten().float() for gradient in found if gradient is not None])]


@dataclass
class Visit:
    """One call of a block: what it was given and put out, and whether it wrote into what it was given."""

    given: Tensor
    version: int
    others: tuple[list[Any], TreeSpec]
    out: Tensor | None = None
    wrote: bool = False


def chains_of(model: nn.Module, example: Example) -> tuple[list[list[str]], dict[str, str]]:
    """Blocks that follow one another directly, two at least, and why the others are in no chain."""
    blocks, program = present(model, example), watch(model, example)
    visits, result = visit(model, example, blocks)
    readers: dict[str, set[str]] = {name: set() for name in blocks}
    for number, makers in program.makers.items():
        for name in readers.keys() & makers:
            readers[name] |= {program[user].owner for user in program.users[number] if program[user].signal}
    chains: list[list[str]] = []
    reasons: dict[str, str] = {}
    for name in visits:
        last = chains[-1][-1] if chains and chains[-1] else None
        if own := objection(model.get_submodule(name), visits[name]):
            reasons[name] = own
            chains.append([])
            continue
        if last is None:
            chains.append([name])
            continue
        following = break_between(visits[last], visits[name], last, name, readers[last], result)
        if following is None:
            chains[-1].append(name)
        else:
            reasons.setdefault(last, following)
            chains.append([name])
    long = [names for names in chains if len(names) > 1]
    member = {name for names in long for name in names}
    return long, {name: reasons.get(name, "no block follows it") for name in visits if name not in member}


def visit(model: nn.Module, example: Example, blocks: Sequence[str]) -> tuple[dict[str, Visit], list[Any]]:
    """Each block's call in a pass in evaluation mode, in order, and what the model puts out."""
    visits: dict[str, Visit] = {}

    def enter(name: str, module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        visits[name] = Visit(given[0], given[0]._version, tree_flatten((given[1:], dict(named))))

    def leave(name: str, module: nn.Module, given: Any, named: Any, out: Any) -> None:
        visits[name].out, visits[name].wrote = out, visits[name].given._version != visits[name].version

    handles: list[Any] = []
    for name in blocks:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(leave, name), with_kwargs=True))
    try:
        with untouched(model), torch.no_grad():
            return visits, tree_flatten(call(model.eval(), example))[0]
    finally:
        for handle in handles:
            handle.remove()


def objection(block: nn.Module, seen: Visit) -> str | None:
    """Why a block can be part of no chain."""
    if "forward" in block.__dict__:
        return f"the forward of this {type(block).__name__} was replaced on the instance"
    return "it writes into what it is given, which the inversion needs" if seen.wrote else None


def break_between(
    before: Visit, after: Visit, name: str, other: str, readers: set[str], result: list[Any]
) -> str | None:
    """Why two blocks that run one after the other are not run as one."""
    if after.given is not before.out:
        return f"what it puts out is not what {other} is given: something is done with it in between"
    if any(leaf is before.out for leaf in result):
        return "what it puts out is put out by the model too"
    if strangers := sorted(reader for reader in readers if not f"{reader}.".startswith(f"{other}.")):
        return f"what it puts out is read by {strangers[0] or 'the model'}, not by {other} alone"
    same = before.others[1] == after.others[1] and all(map(alike, before.others[0], after.others[0]))
    return None if same else f"{other} is given other arguments than {name}"


def alike(one: Any, other: Any) -> bool:
    """Whether two arguments are the same object, or equal values that are no tensors."""
    return one is other or (not (isinstance(one, Tensor) or isinstance(other, Tensor)) and bool(one == other))


@dataclass
class Chained:
    """Blocks that are run as one.

    Args:
        blocks: in order.
        inverts: False keeps all activations, the plain two streams.
    """

    blocks: list[nn.Module] = field(repr=False)
    inverts: bool = True

    def install(self) -> list[Callable[[], None]]:
        """Let the first block run all, and the others pass on what they are given; what takes it back."""
        first, *others = self.blocks
        steps = [changed(first, leading(type(first))), partial(delattr, first, "chained")]
        first.chained = self  # type: ignore[assignment]
        return steps + [changed(block, passing(type(block))) for block in others]

    def __call__(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        leaves, spec = tree_flatten((others, named))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[place] for place in places]

        def arguments(given: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            filled = list(leaves)
            for place, tensor in zip(places, given, strict=True):
                filled[place] = tensor
            return tree_unflatten(filled, spec)

        trained = [p for p in dict.fromkeys(p for b in self.blocks for p in b.parameters()) if p.requires_grad]
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors, *trained))
        if not self.inverts or not differentiated or torch.compiler.is_compiling():
            u, v = wide(x), wide(x)
            for block in self.blocks:
                u, v = v, u + change(block, v, x.dtype, others, named)
            return (u + v - wide(x)).to(x.dtype)
        return TwoStreams.apply(self.blocks, arguments, len(tensors), x, *tensors, *trained)


def wide(x: Tensor) -> Tensor:
    """In float32 at least, so that adding and taking away again gives back what was there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def change(block: nn.Module, v: Tensor, dtype: torch.dtype, others: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    """R(v) = block(v) − v."""
    given = v.to(dtype)
    return type(block).plain.forward(block, given, *others, **named).to(v.dtype) - given.to(v.dtype)  # type: ignore[attr-defined]


class TwoStreams(torch.autograd.Function):
    """The chain in one step: keeps the last two streams, the parameters and what all blocks are given beside x."""

    @staticmethod
    def forward(ctx: Any, blocks: list[nn.Module], arguments: Any, count: int, x: Tensor, *tensors: Tensor) -> Tensor:
        others, named = arguments(tensors[:count])
        ctx.precision = precision(x.device.type)
        u, v, draws = wide(x), wide(x), []
        with autocasting(ctx.precision):
            for block in blocks:
                before = Draws.now(x)
                u, v = v, u + change(block, v, x.dtype, others, named)
                draws.append(None if before.same(Draws.now(x)) else before)
        ctx.blocks, ctx.arguments, ctx.count, ctx.draws, ctx.dtype = blocks, arguments, count, draws, x.dtype
        ctx.places = {id(tensor): place for place, tensor in enumerate(tensors) if place >= count}
        ctx.save_for_backward(u, v, *tensors)
        return (u + v - wide(x)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # type: ignore[bad-override]
        u, v, *tensors = ctx.saved_tensors
        gradient = grad_outputs[0].to(u.dtype)
        to_u, to_v = gradient, gradient
        needed = ctx.needs_input_grad[4:]
        found: list[Tensor | None] = [None] * len(tensors)
        for block, draws in zip(reversed(ctx.blocks), reversed(ctx.draws), strict=True):
            given = u.detach().requires_grad_()
            beside = [t.detach().requires_grad_(needed[place]) for place, t in enumerate(tensors[: ctx.count])]
            others, named = ctx.arguments(beside)
            with torch.enable_grad(), autocasting(ctx.precision), replaying(draws), statistics_kept(block):
                out = change(block, given, ctx.dtype, others, named)
            own = {ctx.places[id(p)]: p for p in block.parameters() if id(p) in ctx.places}
            wanted = {**{place: t for place, t in enumerate(beside) if t.requires_grad}, **own}
            to_given, *rest = torch.autograd.grad(out, [given, *wanted.values()], to_v, allow_unused=True)
            for place, part in zip(wanted, rest, strict=True):
                if part is not None:
                    old = found[place]
                    found[place] = part if old is None else old + part
            u, v = v - out.detach(), given.detach()
            to_u, to_v = to_v, to_u + to_given
        return None, None, None, (to_u + to_v - gradient).to(ctx.dtype), *found


@dataclass(frozen=True)
class Draws:
    """Where the random numbers stand, on the CPU and on the devices that a tensor is on."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]
    kind: str

    @classmethod
    def now(cls, x: Tensor) -> Draws:
        """Where they stand now."""
        devices, states = get_device_states(x)
        return cls(torch.get_rng_state(), devices, states, x.device.type if devices else "cuda")

    def same(self, other: Draws) -> bool:
        """Whether nothing was drawn in between."""
        mine, others = (self.cpu, *self.states), (other.cpu, *other.states)
        return all(torch.equal(one, two) for one, two in zip(mine, others, strict=True))


@contextmanager
def replaying(draws: Draws | None) -> Iterator[None]:
    """The random numbers from where they stood then; afterwards they go on from where they stand now."""
    if draws is None:
        yield
        return
    with torch.random.fork_rng(devices=draws.devices, device_type=draws.kind):
        torch.set_rng_state(draws.cpu)
        set_device_states(draws.devices, draws.states, device_type=draws.kind)
        yield


def precision(kind: str) -> list[tuple[str, bool, torch.dtype]]:
    """What autocast does now, on the CPU and on a kind of device."""
    kinds = [each for each in dict.fromkeys(("cpu", kind)) if torch.amp.is_autocast_available(each)]
    return [(each, torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in kinds]


@contextmanager
def autocasting(settings: list[tuple[str, bool, torch.dtype]]) -> Iterator[None]:
    """Autocast as it was; weights cast without gradients must not be taken from its cache later."""
    with ExitStack() as stack:
        for kind, enabled, dtype in settings:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


@cache
def leading(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `kind` that runs its whole chain."""

    def forward(self: nn.Module, x: Tensor, *others: Any, **named: Any) -> Tensor:
        return self.chained(x, *others, **named)  # type: ignore[operator]

    return reversed_kind(kind, f"{kind.__name__}Reversible", forward)


@cache
def passing(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `kind` that was run already, and passes on what it is given."""

    def forward(self: nn.Module, x: Tensor, *others: Any, **named: Any) -> Tensor:
        return x

    return reversed_kind(kind, f"{kind.__name__}Passing", forward)


def reversed_kind(kind: type[nn.Module], name: str, forward: Callable[..., Tensor]) -> type[nn.Module]:
    body: dict[str, Any] = {"forward": forward, "__module__": kind.__module__, "plain": kind, SEALED: "reversible"}
    return type(name, (kind,), body)
