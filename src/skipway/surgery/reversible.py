"""`reversible(model, example)`: chains of anybody's blocks on two streams, whose activations are not kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from skipway.errors import SkipwayError
from skipway.nn import Residual
from skipway.nn.shortcut import Carry
from skipway.surgery.block_rows import Chained, plain, rows_of
from skipway.surgery.operation import Operation
from skipway.surgery.preconditions import admitted, refuse_branching
from skipway.surgery.recompute import Draws, Parts, again, autocasting, precision
from skipway.surgery.saved_tensors import saved_bytes
from skipway.surgery.verification import difference, outputs
from skipway.tracing import Example, preserved_state, watch
from skipway.tracing.example import call_model

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

    What is guaranteed: streams are kept in float32 at least (a bfloat16 stream does not invert), whatever the blocks
    are computed in. Inputs do not come back bit for bit: each inversion rounds once, and what that amounts to grows
    with the depth and with how much the blocks amplify. The report holds what it does to the gradients on the example,
    and `tolerance` bounds it. In the backward pass a branch is computed once, so a step is two forward passes and one
    backward. All gradients of a chain arrive together at its end, so that DDP has nothing to overlap with. A block but
    the first cannot be called alone.

    `torch.compile` gets the two streams without the inversion (its own
    partitioner decides what it keeps). Forward hooks of the blocks themselves see the chain's input and output; those
    of their parts see every computation, the second one too.

    Args:
        model: any module that `chain` can read, with blocks that carry x itself.
        example: a batch that the model is called with, to find the blocks, and to compare gradients and bytes on, once
            with everything kept: a sample or two do.
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
    program = watch(model, example)
    refuse_branching(model, example, "reversible", program)
    rows, reasons = rows_of(model, example, program)
    chains = [row for row in rows if len(row) > 1]
    member = {name for names in chains for name in names}
    alone = [row[0] for row in rows if len(row) == 1]
    refused = {name: reasons.get(name, "no block follows it") for name in (*reasons, *alone) if name not in member}
    if not chains:
        raise SkipwayError(
            f"no two blocks of {type(model).__name__} follow one another: "
            + "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        )
    before, kept = outputs(model, example), saved_bytes(model, example)
    operation = Operation(model, f"{type(model).__name__} made reversible", {}, refused, {})
    try:
        chained = [Reversed([model.get_submodule(name) for name in names]) for names in chains]
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
    with preserved_state(model), torch.enable_grad():
        leaves = tree_flatten(call_model(model.train(), example))[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not trained or not tensors:
            return []
        loss = torch.stack([tensor.float().square().mean() for tensor in tensors]).sum()
        found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [torch.cat([gradient.flatten().float() for gradient in found if gradient is not None])]


@dataclass
class Reversed(Chained):
    """Blocks that are run on two streams.

    Args:
        inverts: False keeps all activations, the plain two streams.
    """

    word = "reversible"

    inverts: bool = True

    def __post_init__(self) -> None:
        self.parts = [Parts(block) for block in self.blocks]

    def run(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        leaves, spec = tree_flatten((others, named))
        beside = Beside(leaves, spec, [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)])
        if torch.compiler.is_compiling() or not (self.inverts and torch.is_grad_enabled()):
            return self.kept(x, others, named)
        own = []
        for parts in self.parts:
            parts.refresh()
            own.append(parts.parameters())
        trained = list(dict.fromkeys(parameter for parameters in own for parameter in parameters))
        if not any(tensor.requires_grad for tensor in (x, *beside.tensors, *trained)):
            return self.kept(x, others, named)
        places = {parameter: place for place, parameter in enumerate(trained, len(beside.tensors))}
        steps = [
            Step(parts.block, adds_alone(parts.block), parts.writers(), [places[parameter] for parameter in parameters])
            for parts, parameters in zip(self.parts, own, strict=True)
        ]
        return TwoStreams.apply(steps, beside, x, *beside.tensors, *trained)

    def kept(self, x: Tensor, others: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
        """The two streams with all that autograd keeps."""
        u, v = wide(x), wide(x)
        for block in self.blocks:
            u, v = v, u + change(Step(block, adds_alone(block)), v, x.dtype, others, named)
        return (u + v - wide(x)).to(x.dtype)


@dataclass(frozen=True)
class Beside:
    """What all blocks are given beside x.

    Args:
        leaves: of the arguments.
        spec: how they are put together.
        places: of the tensors among them.
    """

    leaves: list[Any]
    spec: TreeSpec
    places: list[int]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.leaves[place] for place in self.places]

    def filled(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments by place and by name, with other tensors."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class Step:
    """One block of a pass.

    Args:
        block: the module.
        alone: whether it does nothing but add its branch to x; see `adds_alone`.
        writers: modules in it that may write into buffers.
        places: where its parameters stand among the tensors that the chain is given.
    """

    block: nn.Module
    alone: bool
    writers: Sequence[nn.Module] = ()
    places: Sequence[int] = ()


def wide(x: Tensor) -> Tensor:
    """In float32 at least, so that adding and taking away again gives back what was there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def change(step: Step, v: Tensor, dtype: torch.dtype, others: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    """R(v) = block(v) − v."""
    given = v.to(dtype)
    if step.alone:
        return added(step.block, given).to(v.dtype)
    return plain(step.block, given, others, named).to(v.dtype) - given.to(v.dtype)


def adds_alone(block: Any) -> bool:
    """Whether a block is a connection of ours that does nothing but add its branch to x, so that what it adds need not
    be had by taking x away again: a third of the passes over memory, and not rounded twice.
    """
    if not isinstance(block, Residual) or type(block).plain.forward is not Residual.forward:  # type: ignore[attr-defined]
        return False
    silent = (block.shortcut, block.post)
    return tuple(map(type, silent)) == (Carry, nn.Identity) and not any(
        module._forward_hooks or module._forward_pre_hooks for module in silent
    )


def added(block: Any, x: Tensor) -> Tensor:
    """F(x) of a connection of ours."""
    return block.drop(block.scale(block.branch(block.pre(x))))


class TwoStreams(torch.autograd.Function):
    """The chain in one step: keeps the last two streams, the parameters and what all blocks are given beside x."""

    @staticmethod
    def forward(ctx: Any, steps: list[Step], beside: Beside, x: Tensor, *tensors: Tensor) -> Tensor:
        others, named = beside.filled(tensors[: len(beside.places)])
        ctx.precision = precision(x.device.type)
        u, v, draws, last = wide(x), wide(x), [], Draws.now(x)
        with autocasting(ctx.precision):
            for step in steps:
                u, v = v, u + change(step, v, x.dtype, others, named)
                here = Draws.now(x, last)
                draws.append(None if here is last else last)
                last = here
        ctx.steps, ctx.beside, ctx.draws, ctx.dtype = steps, beside, draws, x.dtype
        ctx.save_for_backward(u, v, *tensors)
        return (u + v - wide(x)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # type: ignore[bad-override]
        u, v, *tensors = ctx.saved_tensors
        count = len(ctx.beside.places)
        gradient = grad_outputs[0].to(u.dtype)
        to_u, to_v = gradient, gradient
        found: list[Tensor | None] = [None] * len(tensors)
        beside = [
            tensor.detach().requires_grad_(ctx.needs_input_grad[3 + n]) for n, tensor in enumerate(tensors[:count])
        ]
        arguments = ctx.beside.filled(beside)
        asked = [place for place, tensor in enumerate(beside) if tensor.requires_grad]
        sources = [*beside, *tensors[count:]]
        for step, draws in zip(reversed(ctx.steps), reversed(ctx.draws), strict=True):
            given = u.to(ctx.dtype).detach().requires_grad_()
            with again(ctx.precision, draws, step.writers):
                out = added(step.block, given) if step.alone else plain(step.block, given, *arguments)
            wanted = [*asked, *step.places]
            given_to, *rest = torch.autograd.grad(
                out, [given, *(sources[place] for place in wanted)], to_v.to(out.dtype), allow_unused=True
            )
            for place, part in zip(wanted, rest, strict=True):
                if part is not None:
                    old = found[place]
                    found[place] = part if old is None else old + part
            through, moved = given_to.to(to_v.dtype), out.detach().to(v.dtype)
            if not step.alone:  # R = block − x, and so are its values and the gradient through it
                through, moved = through - to_v, moved - given.detach().to(v.dtype)
            del out  # and with it the graph, before the next block is computed
            to_u, to_v = to_v, to_u + through
            u, v = v - moved, u
        return None, None, (to_u + to_v - gradient).to(ctx.dtype), *found
