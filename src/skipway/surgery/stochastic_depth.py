"""`skip_compute(model, example, rate)`: stochastic depth that does not compute what it drops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.surgery.block_axes import BlockAxes, find_block_axes
from skipway.surgery.block_call import BlockCall
from skipway.surgery.block_survey import require_blocks
from skipway.surgery.class_factory import class_factory
from skipway.surgery.operation import Operation
from skipway.surgery.padded_batch import padded_example
from skipway.surgery.preconditions import refuse_branching, require_values
from skipway.surgery.training_pass import training_gradients
from skipway.surgery.transaction import transaction
from skipway.tracing import Example, Program, as_example, watch
from skipway.tracing.arguments import Path, exchange_at, item_at, path_text, tensor_paths
from skipway.validation import check_call, check_flag, check_rule, is_real

__all__ = ["skip_compute"]


@check_call
def skip_compute(model: nn.Module, example: Example, rate: float, *, rising: bool = True) -> Operation:
    """Let blocks of any network skip a share of the samples in training, in place: stochastic depth that saves time.

    In training a block sees only k = ⌈n(1 − p)⌉ of the n samples, drawn anew in each pass, and the others carry x:
    y = x, and on the drawn ones y = x + (n/k)(block(x) − x), so that the expectation is the block's own output. k does
    not depend on what is drawn, and is at least 1: shapes stay static for `torch.compile`, and every parameter has a
    gradient for DDP. In evaluation the block is what it was. Stochastic depth of the block's own is best switched off.

    Which axis holds the samples, of x and of every other argument (masks, positions, conditioning, encoder states), is
    found by passes with more and with other samples, so that sequence-first networks drop samples and not positions.
    A network that takes an `attention_mask` is looked at with padding, too. Another argument that the example does not
    have is cut on the only axis that is as long as there are samples. Beside x, a tensor that a block is given and
    hands to the next one in another state stays, for the others, what the block was given; a block that computes such a
    tensor of the samples itself, or of another shape, is left alone. Other tensors in a block's output are 0 there.

    Args:
        model: any module that `chain` can read, with blocks that carry x itself.
        example: what the model is called with.
        rate: p of the last block, 0 < p < 1.
        rising: p_l = p · l/L, as in Huang et al. 2016 (https://arxiv.org/abs/1603.09382, eq. 4); else p everywhere.

    Raises:
        SkipwayError: the rate is not between 0 and 1, the model has no such block, or none but such as later ones need
            for every sample, its samples have an influence on one another (edge lists), or a training pass fails; the
            model is as before.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    >>> model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    >>> operation = skip_compute(model, torch.randn(8, 3, 8), rate=0.5)
    >>> [round(block.skipped, 3) for block in model.layers]
    [0.125, 0.25, 0.375, 0.5]
    """
    model, example = require_values(model, "skip_compute"), as_example(example)
    fits = is_real(rate, 0) and 0 < rate < 1
    check_rule("rate", rate, fits, "a share of samples between 0 and 1, 0.1 for example")
    check_flag("rising", rising)
    title = f"{type(model).__name__} skips up to {rate:g} of its blocks' samples"
    program = watch(model, example)
    calls = require_blocks(model, example, program).calls
    refuse_branching(model, example, "skip_compute", program, calls)
    padded = padded_example(model, example)
    axes = find_block_axes(model, example, calls)
    if padded is not None:
        with_mask = find_block_axes(model, padded, calls)
        axes = {name: axes[name].joined(with_mask[name]) for name in calls}
    with transaction(model, example, title=title) as change:
        later = [*list(calls)[1:], None]
        for number, ((name, call), follower) in enumerate(zip(calls.items(), later, strict=True), start=1):
            try:
                handed_on = threaded_outputs(program, calls, axes, name, follower)
            except SkipwayError as problem:
                change.refused[name] = str(problem)
                continue
            block, own = model.get_submodule(name), rate * (number / len(calls) if rising else 1)
            change.set_class(block, skipping(type(block)))
            change.set_attribute(block, "skipped", own)
            change.set_attribute(block, "drawing", SampleDraw(call, axes[name], handed_on))
            change.touched[name] = f"rate {own:.3g}, samples on axis {axes[name].stream}"
        if not change.touched:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in change.refused.items())
            raise SkipwayError(f"{type(model).__name__} has no block that can skip samples: {reasons}")
        training_gradients(model, example, "with a share of the samples")
        if padded is not None:
            training_gradients(model, padded, "with a share of the samples and padding")
        return change.commit()


@dataclass(frozen=True)
class SampleDraw:
    """How a block is computed for some of the samples.

    Args:
        call: how the block is called.
        axes: of the samples.
        handed_on: outputs beside x that the next block reads, see `threaded_outputs`.
    """

    call: BlockCall
    axes: BlockAxes
    handed_on: tuple[tuple[Path, Path | None], ...] = ()

    def run(self, compute: Callable[..., Any], rate: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a block that is computed for k = ⌈n(1 − rate)⌉ of n samples, x for the others."""
        call, axis = self.call, self.axes.stream
        x = call.take(args, kwargs)
        count = x.shape[axis]
        kept = max(1, int(-(-count * (1 - rate) // 1)))
        drawn = torch.randperm(count, device=x.device)[:kept]
        known = {call.locate(path, args, kwargs): own for path, own in self.axes.arguments}
        some_args, some_kwargs = args, kwargs
        for path, tensor in (*tensor_paths(args), *tensor_paths(kwargs)):
            own = known[path] if path in known else self.guess(path, tensor, count)
            if own is not None and tensor.shape[own] % count == 0:
                part = tensor.index_select(own, entries(drawn, tensor.shape[own] // count))
                some_args, some_kwargs = call.exchange(path, some_args, some_kwargs, part)
        before = call.take(some_args, some_kwargs)
        if call.writes_stream:
            some_args, some_kwargs = call.given(some_args, some_kwargs, before.clone())
        output = compute(*some_args, **some_kwargs)
        change = item_at(output, call.output) - before
        handed_on = dict(self.handed_on)
        for path in call.computed:
            part, source = item_at(output, path), handed_on.get(path)
            if source is not None:
                given, own = self.handed(source, args, kwargs), known[call.locate(source, args, kwargs)]
                assert own is not None  # see `threaded_outputs`
                part = given.index_copy(own, entries(drawn, given.shape[own] // count), part.to(given.dtype))
                output = exchange_at(output, path, part)
            elif path not in handed_on:
                output = exchange_at(output, path, spread(part, axis, drawn, count))
        for path, argument in call.passed:
            output = exchange_at(output, path, call.argument(argument, args, kwargs))
        return exchange_at(output, call.output, x.index_add(axis, drawn, (change * (count / kept)).to(x.dtype)))

    def handed(self, source: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The tensor that the block is given in the place of one that it hands on.

        Raises:
            SkipwayError: it is given none.
        """
        try:
            given = self.call.argument(source, args, kwargs)
        except (AttributeError, LookupError, TypeError):  # nothing is where it was in the example
            given = None
        if not isinstance(given, Tensor):
            raise SkipwayError(
                f"{path_text(source, self.call.names)} was in the example of skip_compute and is not given now, so "
                "that nothing stands in its place for samples that are skipped; undo the operation and give an example "
                "without it"
            )
        return given

    def guess(self, path: Path, tensor: Tensor, count: int) -> int | None:
        """The axis of the samples in an argument that the example did not have: the only one that is as long.

        Raises:
            SkipwayError: several are.
        """
        fitting = [axis for axis, size in enumerate(tensor.shape) if size == count]
        if len(fitting) > 1 or (fitting and not (tensor.is_floating_point() or tensor.dtype == torch.bool)):
            raise SkipwayError(
                f"{path_text(path, self.call.names)} of shape {tuple(tensor.shape)} was not in the example of "
                f"skip_compute, so that its axis of the {count} samples is not known; undo the operation and give an "
                "example with it"
            )
        return fitting[0] if fitting else None


def entries(drawn: Tensor, each: int) -> Tensor:
    """The entries of some samples on an axis that holds so many of each, sample by sample."""
    return drawn if each == 1 else (drawn[:, None] * each + torch.arange(each).to(drawn)).flatten()


def threaded_outputs(
    program: Program, calls: Mapping[str, BlockCall], axes: Mapping[str, BlockAxes], name: str, follower: str | None
) -> tuple[tuple[Path, Path | None], ...]:
    """The outputs of a block, beside x, that the next block is given, or that stand for such an output of the one
    before, each with the block's own argument in its place; None for what is the same for all samples.

    Raises:
        SkipwayError: such an output is computed for each sample, and the block was given nothing of its shape in its
            place.
    """
    call, known = calls[name], dict(axes[name].arguments)
    own = {source: argument for argument, source in call.threads}
    read: dict[Path, Path] = {}
    later: dict[Path, int | None] = {}
    if follower is not None:
        read = {source: argument for argument, source in calls[follower].threads}
        later = dict(axes[follower].arguments)
    found: list[tuple[Path, Path | None]] = []

    def shape(table: Mapping[str, Mapping[Path, int]], path: Path) -> tuple[int, ...] | None:
        number = table.get(name, {}).get(path)
        return None if number is None else program[number].shape

    for path in call.computed:
        argument = own.get(path, read.get(path))
        if argument is None:
            continue
        if (later if path in read else known).get(read.get(path, argument)) is None:
            found.append((path, None))
        elif known.get(argument) is not None and shape(program.given, argument) == shape(program.returned, path):
            found.append((path, argument))
        else:
            raise SkipwayError(
                f"it computes {path_text(path, what='output')} of each sample for {follower or 'what follows'}, and is "
                "given nothing of that shape that could stand in its place for samples that it skips"
            )
    return tuple(found)


def spread(part: Tensor | None, axis: int, drawn: Tensor, count: int) -> Tensor | None:
    """Another output of a block for all samples: 0 for those that were not drawn."""
    if part is None or part.ndim <= axis or part.shape[axis] != len(drawn):
        return part
    shape = (*part.shape[:axis], count, *part.shape[axis + 1 :])
    return part.new_zeros(shape).index_add(axis, drawn, part)


@class_factory
def skipping(kind: type[nn.Module]) -> tuple[str, dict[str, Any]]:
    """A subclass of `kind` that computes only some of the samples in training."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return kind.forward(self, *args, **kwargs)
        return self.drawing.run(partial(kind.forward, self), self.skipped, args, kwargs)

    return f"{kind.__name__}Skipping", {"forward": forward, "without_skipping": kind}
