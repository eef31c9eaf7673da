"""`reversible(model, example)`: rows of anybody's blocks on two streams, whose activations are not kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_map_only

from skipway.errors import SkipwayError
from skipway.nn import Residual
from skipway.nn.shortcut import Carry
from skipway.surgery.block_call import BlockCall
from skipway.surgery.block_rows import BlockRow, find_block_rows, run_alone
from skipway.surgery.block_survey import BlockSurvey
from skipway.surgery.fusion import hooked
from skipway.surgery.operation import Operation, abbreviate
from skipway.surgery.padded_batch import padded_example
from skipway.surgery.preconditions import refuse_branching, require_values
from skipway.surgery.recompute import BlockParts, RandomState, as_before, autocasting, precision
from skipway.surgery.saved_tensors import saved_bytes
from skipway.surgery.side_effects import attributes_kept, copy_state
from skipway.surgery.training_pass import training_gradients
from skipway.surgery.transaction import transaction
from skipway.surgery.verification import difference
from skipway.tracing import Example, as_example, watch
from skipway.tracing.arguments import item_at, path_text
from skipway.validation import check_call, check_tolerance

__all__ = ["reversible"]


@check_call
def reversible(model: nn.Module, example: Example, *, tolerance: float = 1e-3) -> Operation:
    """Run blocks that follow one another on two streams, and compute their inputs again from their outputs in the
    backward pass, in place: the memory kept for it does not grow with the number of blocks.

    With R(x) = block(x) − x, whatever is in the block, and both streams starting as x,

        (u, v) ← (v, u + R(v)) for each block,  y = u + v − x = x + Σ R(v).

    Each step can be inverted, (u, v) = (v' − R(u'), u'), so that only the last two streams are kept. It is RevNet's
    step with whole blocks for F and G: no branch has to be taken apart. **The network computes another function** than
    x ← x + R(x): a block sees one of the streams, every second branch. Up to the first order in R both agree.
    (`checkpointed` saves memory and keeps the function.) Inside of the backward pass random numbers are those of the
    forward pass, buffers are not updated a second time (P22), and caches not written into a second time.

    Guarantees: streams are kept in float32 at least (a bfloat16 stream does not invert), whatever the blocks are
    computed in. Inputs do not come back bit for bit: each inversion rounds once, and the error grows with the depth and
    with how much the blocks amplify. The report holds the error of the gradients on the example, and `tolerance` bounds
    it. In the backward pass a branch is computed once, so a step is two forward passes and one backward. All gradients
    of a row arrive together at its end, so that DDP has nothing to overlap with. A block but the first cannot be called
    alone.

    `torch.compile` gets the two streams without the inversion (its own partitioner decides what it keeps). Forward
    hooks of the blocks themselves see the row's input and output; those of their parts see every computation, the
    second one too.

    Args:
        model: any module that `chain` can read, with blocks that carry x itself.
        example: a batch that the model is called with, to find the blocks, and to compare gradients and bytes on, once
            with everything kept: a sample or two do.
        tolerance: by how much gradients through the inversion may differ from those through the same two streams with
            everything kept, relative to the largest; bfloat16 needs some 1e-2.

    Shapes: as the blocks': whatever they are given beside x, and what they hand on of it.

    Returns:
        the operation: `touched` holds the rows, `refused` the blocks left alone, each with its reason; the report the
        change of the output, the difference of the gradients and the bytes kept before and after.

    Raises:
        SkipwayError: there are no two blocks that follow one another, or gradients differ; the model is as before.

    Source: Gomez et al. 2017, "The Reversible Residual Network", eq. 6-8 and algorithm 1; Mangalam et al. 2022,
    "Reversible Vision Transformers", sec. 3.1, https://arxiv.org/abs/2302.04869 (their streams are joined by
    concatenation; ours keep their width).

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    >>> operation = reversible(model, torch.randn(2, 3, 8))
    >>> dict(operation.touched)
    {'layers.0': 'two streams through layers.0, layers.1, layers.2, layers.3'}
    >>> operation.report["bytes after"] < 0.4 * operation.report["bytes before"]
    True
    """
    model, example = require_values(model, "reversible"), as_example(example)
    check_tolerance("tolerance", tolerance)
    rows, refused, survey = reversible_rows(model, example)
    bytes_before = saved_bytes(model, example)
    padded = padded_example(model, example)
    given = [example] if padded is None else [example, padded]
    with transaction(model, example, title=f"{type(model).__name__} made reversible") as change:
        change.refused.update(refused)
        installed = [ReversibleRow.of(model, names, survey) for names in rows]
        for row, names in zip(installed, rows, strict=True):
            row.install(change)
            change.touched[names[0]] = f"two streams through {abbreviate(names)}"
        change.report = {
            "gradient difference": max(inversion_error(model, each, installed) for each in given),
            "bytes before": bytes_before,
            "bytes after": saved_bytes(model, example),
        }
        if not change.report["gradient difference"] <= tolerance:
            raise SkipwayError(
                f"gradients through the inversion differ by {change.report['gradient difference']:.3g} of the largest "
                f"from those with everything kept, more than tolerance={tolerance:g}: blocks are not computed twice "
                "alike (where they read a cache, give an example with use_cache=False), or precision is too low; "
                "checkpointed(model, example) recomputes without inverting"
            )
        return change.commit()


def reversible_rows(model: nn.Module, example: Example) -> tuple[list[list[str]], dict[str, str], BlockSurvey]:
    """Rows of two blocks and more, of which there has to be one, why other blocks are in none, and all blocks."""
    program = watch(model, example)
    rows, reasons, survey = find_block_rows(model, example, program)
    for row in rows:  # all but the last are known to compute x alone
        if beside := survey.calls[row[-1]].computed:
            what = path_text(beside[0], what="output")
            reasons[row.pop()] = f"{what} is computed by it beside x, and there is one output for the two streams"
    longer = [row for row in rows if len(row) > 1]
    members = {name for row in longer for name in row}
    refuse_branching(model, example, "reversible", program, members)
    single = [row[0] for row in rows if len(row) == 1]
    refused = {name: reasons.get(name, "no block follows it") for name in (*reasons, *single) if name not in members}
    if not longer:
        reasons_given = abbreviate([f"{name}: {reason}" for name, reason in refused.items()], separator="; ")
        raise SkipwayError(f"no two blocks of {type(model).__name__} follow one another: {reasons_given}")
    return longer, refused, survey


def inversion_error(model: nn.Module, example: Example, rows: Sequence[ReversibleRow]) -> float:
    """Difference of the gradients with inversion from those with everything kept, over the largest gradient."""
    inverted = training_gradients(model, example, "in which inputs are computed from outputs")
    for row in rows:
        row.inverts = False
    kept = training_gradients(model, example, "on two streams")
    for row in rows:
        row.inverts = True
    return difference(kept, inverted)


@dataclass
class ReversibleRow(BlockRow):
    """Blocks that are run on two streams.

    Args:
        inverts: False keeps all activations of the two streams.
    """

    operation = "reversible"

    inverts: bool = True

    def __post_init__(self) -> None:
        self.parts = [BlockParts(block) for block in self.blocks]

    def run(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = self.run_streams(x, args, kwargs)
        last = self.calls[-1]
        return last.skip(self.forms[-1], *last.given(args, kwargs, y))

    def run_streams(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the two streams, and invert them in the backward pass where there is one."""
        if torch.compiler.is_compiling() or not (self.inverts and torch.is_grad_enabled()):
            return self.run_keeping(x, args, kwargs)
        for parts in self.parts:
            parts.refresh()
        arguments = SharedArguments.of(args, kwargs)
        trained = list(dict.fromkeys(parameter for parts in self.parts for parameter in parts.parameters()))
        if not any(tensor.requires_grad for tensor in (x, *arguments.tensors, *trained)):
            return self.run_keeping(x, args, kwargs)
        indices = {parameter: index for index, parameter in enumerate(trained, len(arguments.tensors))}
        steps = [
            Step(
                parts.block,
                call,
                adds_branch_only(parts.block),
                parts.writers(),
                parts.modules,
                [indices[parameter] for parameter in parts.parameters()],
            )
            for parts, call in zip(self.parts, self.calls, strict=True)
        ]
        return TwoStreams.apply(steps, arguments, x, *arguments.tensors, *trained)

    def run_keeping(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the two streams with everything that autograd keeps."""
        u, v = widened(x), widened(x)
        for block, call in zip(self.blocks, self.calls, strict=True):
            u, v = v, u + Step(block, call, adds_branch_only(block)).residual(v, x.dtype, args, kwargs)
        return (u + v - widened(x)).to(x.dtype)


@dataclass(frozen=True)
class SharedArguments:
    """Arguments that all blocks are given beside x.

    Args:
        given: positional and keyword arguments with None in place of x, into which blocks may write.
        tensors: among them, before anything was written, each once.
    """

    given: tuple[tuple[Any, ...], dict[str, Any]]
    tensors: list[Tensor]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SharedArguments:
        """The arguments of a call."""
        leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        return cls((args, kwargs), list({id(leaf): leaf for leaf in leaves}.values()))

    def kept(self) -> SharedArguments:
        """The arguments with copies of what blocks may write into, as it is now."""
        return SharedArguments(copy_state(self.given), self.tensors)

    def with_tensors(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies of the arguments with other tensors."""
        others = {id(old): new for old, new in zip(self.tensors, tensors, strict=True)}
        return tree_map_only(Tensor, lambda leaf: others.get(id(leaf), leaf), copy_state(self.given))


@dataclass(frozen=True)
class Step:
    """One block of a pass.

    Args:
        block: the module.
        call: how the network calls it.
        branch_only: whether it does nothing but add its branch to x; see `adds_branch_only`.
        writers: modules in it that may write into buffers.
        modules: in it.
        indices: of its parameters among the tensors that the row is given.
    """

    block: Any
    call: BlockCall
    branch_only: bool
    writers: Sequence[nn.Module] = ()
    modules: Sequence[nn.Module] = ()
    indices: Sequence[int] = ()

    def output(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """F(x) of a connection of ours that only adds it, else block(x) = x + R(x)."""
        if self.branch_only:
            return self.block.drop(self.block.scale(self.block.branch(self.block.pre(x))))
        return item_at(run_alone(self.block, *self.call.given(args, kwargs, x)), self.call.output)

    def residual(self, v: Tensor, dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """R(v) = block(v) − v."""
        x = v.to(dtype)
        output = self.output(x, args, kwargs).to(v.dtype)
        return output if self.branch_only else output - x.to(v.dtype)


def widened(x: Tensor) -> Tensor:
    """x in float32 at least, so that adding and subtracting a residual gives back what was there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def adds_branch_only(block: Any) -> bool:
    """Whether a block is a connection of ours that does nothing but add its branch to x, so that R needs no subtraction
    of x: a third of the passes over memory, and not rounded twice.
    """
    kind = type(block)
    if not isinstance(block, Residual) or kind.outside_row.forward is not Residual.forward:  # type: ignore[attr-defined]
        return False
    around = (block.shortcut, block.post)
    return block.join is None and tuple(map(type, around)) == (Carry, nn.Identity) and not any(map(hooked, around))


class TwoStreams(torch.autograd.Function):
    """The row as one step of autograd: keeps the last two streams, the parameters and the shared arguments."""

    @staticmethod
    def forward(ctx: Any, steps: list[Step], arguments: SharedArguments, x: Tensor, *tensors: Tensor) -> Tensor:
        args, kwargs = arguments.given
        ctx.precision = precision(x.device.type)
        u, v, states, last = widened(x), widened(x), [], RandomState.now(x)
        kept: list[SharedArguments] = []
        with autocasting(ctx.precision):
            for step in steps:
                kept.append(arguments.kept())
                u, v = v, u + step.residual(v, x.dtype, args, kwargs)
                now = RandomState.now(x, last)
                states.append(None if now is last else last)  # None where nothing was drawn
                last = now
        ctx.steps, ctx.kept, ctx.states, ctx.dtype = steps, kept, states, x.dtype
        ctx.save_for_backward(u, v, *tensors)
        return (u + v - widened(x)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # type: ignore[bad-override]
        u, v, *tensors = ctx.saved_tensors
        grad_output = grad_outputs[0].to(u.dtype)
        grad_u, grad_v = grad_output, grad_output
        count = len(ctx.kept[0].tensors)
        for index in range(count):
            tensors[index] = tensors[index].detach().requires_grad_(ctx.needs_input_grad[3 + index])
        shared = [index for index in range(count) if tensors[index].requires_grad]
        grads: list[Tensor | None] = [None] * len(tensors)
        for step, state, kept in zip(*map(reversed, (ctx.steps, ctx.states, ctx.kept)), strict=True):
            x = u.to(ctx.dtype).detach().requires_grad_()
            args, kwargs = kept.with_tensors(tensors[:count])
            with as_before(ctx.precision, state, step.writers), attributes_kept(step.modules):
                output = step.output(x, args, kwargs)
            indices = [*shared, *step.indices]
            grad_x, *rest = torch.autograd.grad(
                output, [x, *(tensors[index] for index in indices)], grad_v.to(output.dtype), allow_unused=True
            )
            accumulate(grads, indices, rest)
            residual, grad_residual = output.detach().to(v.dtype), grad_x.to(grad_v.dtype)
            if not step.branch_only:  # R = block − x, in values and in gradients
                residual, grad_residual = residual - x.detach().to(v.dtype), grad_residual - grad_v
            del output  # with its graph, before the next block is computed
            grad_u, grad_v = grad_v, grad_u + grad_residual
            u, v = v - residual, u
        return None, None, (grad_u + grad_v - grad_output).to(ctx.dtype), *grads


def accumulate(totals: list[Tensor | None], indices: Sequence[int], grads: Sequence[Tensor | None]) -> None:
    """Add gradients to their totals; None is no gradient."""
    for index, grad in zip(indices, grads, strict=True):
        if grad is not None:
            total = totals[index]
            totals[index] = grad if total is None else total + grad
