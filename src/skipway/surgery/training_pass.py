"""One training pass with gradients, repeatable to the bit."""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skipway.errors import SkipwayError
from skipway.surgery.side_effects import version_of
from skipway.surgery.verification import aligned
from skipway.tracing import Example, call_model, preserved_state
from skipway.tracing.containers import map_tensors, tensors_in
from skipway.tracing.example import copy_example
from skipway.tracing.restoration import generator_devices, generator_states, own_tensors, restored, seed_generators

__all__ = ["DrawsByShape", "TrainingPass", "run_training_pass", "training_gradients"]


class DrawsByShape(TorchDispatchMode):
    """Within it, random numbers depend on the operator and on what it is given, but not on what was drawn before.

    A module that draws numbers of its own does not change those of others, so that a network can be compared with
    itself before and after something was added to it.

    Args:
        devices: other than the CPU, whose random numbers do so.

    >>> with DrawsByShape():
    ...     one, _, other = torch.rand(2), torch.rand(3), torch.rand(2)
    >>> torch.equal(one, other)
    True
    """

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        super().__init__()
        self.devices = devices

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            given = [tuple(each.shape) if isinstance(each, Tensor) else each for each in args]
            seed_generators(self.devices, zlib.crc32(repr((str(func), given)).encode()))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class TrainingPass:
    """What one training pass computes.

    Args:
        outputs: tensors in the output, as they are after the backward pass.
        inputs: gradients of the inputs that have one, in order.
        parameters: those that are trained, by name.
        versions: how often each of these was written into.
        gradients: by name; None where the outputs do not depend on a parameter.
        buffers: their values after the pass, by module and name.
    """

    outputs: list[Tensor]
    inputs: list[Tensor | None]
    parameters: dict[str, nn.Parameter]
    versions: dict[str, int]
    gradients: dict[str, Tensor | None]
    buffers: dict[tuple[nn.Module, str], Tensor]


def run_training_pass(
    model: nn.Module, example: Example, before: TrainingPass | None = None, *, draws_by_shape: bool = False
) -> TrainingPass | None:
    """Run a model in training mode, forward and backward; the model is left alone, gradients included. None if no
    output has a gradient.

    What is differentiated is the sum of all outputs but caches, each value multiplied by a random constant: neither the
    norm at the end of a network nor a symmetric loss makes gradients vanish. Inputs have gradients unless the network
    does not run then (some set `requires_grad` themselves).

    Args:
        model: any module.
        example: what it is called with.
        before: another pass that this one is compared with: gradients are those of the outputs that agree best with its
            outputs, and of the inputs if they have one there.
        draws_by_shape: see `DrawsByShape`; otherwise random numbers begin at the same place in every pass.
    """
    if before is not None:
        return differentiate(model, example, before, draws_by_shape, inputs=bool(before.inputs))
    try:
        return differentiate(model, example, None, draws_by_shape, inputs=True)
    except Exception:  # whatever a network raises
        return differentiate(model, example, None, draws_by_shape, inputs=False)


def differentiate(
    model: nn.Module, example: Example, before: TrainingPass | None, draws_by_shape: bool, *, inputs: bool
) -> TrainingPass | None:
    """One pass of `run_training_pass`, with gradients of the inputs or without."""
    leaves: list[Tensor] = []
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    devices = generator_devices((*own_tensors(model), *tensors_in(example)))
    draws = DrawsByShape(devices) if draws_by_shape else nullcontext()
    kept = restored(generator_states(devices))  # those of the example, too
    with torch.inference_mode(False), preserved_state(model), kept, torch.enable_grad(), draws:
        seed_all(devices)
        given = copy_example(example)
        output = call_model(model.train(), map_tensors(partial(as_leaf, leaves), given) if inputs else given)
        put_out = list(tensors_in(output))
        compared = put_out if before is None else aligned(before.outputs, put_out)
        direct = {id(leaf) for leaf in tree_leaves(output)} & set(map(id, put_out)) or set(map(id, put_out))
        direct |= {id(each) for each in compared} - set(map(id, put_out))  # entries of outputs that became longer
        tensors = [each for each in compared if each.requires_grad and each.numel() and id(each) in direct]
        if not tensors:
            return None
        loss = torch.stack([weighted_sum(tensor) for tensor in tensors]).sum()
        wanted: list[Tensor] = [*leaves, *trained.values()]
        found = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()
        return TrainingPass(
            [tensor.detach().clone() for tensor in tensors_in(output)],
            list(found[: len(leaves)]),
            trained,
            {name: version_of(parameter) for name, parameter in trained.items()},
            dict(zip(trained, found[len(leaves) :], strict=True)),
            {
                (module, name): buffer.clone()
                for module in model.modules()
                for name, buffer in module._buffers.items()
                if buffer is not None
            },
        )


def as_leaf(leaves: list[Tensor], tensor: Tensor) -> Tensor:
    """An input that has a gradient; the network is given no leaf, since some begin with an operator in place."""
    if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):  # a mask is no signal
        return tensor
    leaves.append(tensor.requires_grad_())
    return tensor.clone()


def weighted_sum(tensor: Tensor) -> Tensor:
    """The sum of the values of an output, each times a random constant."""
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    generator = torch.Generator().manual_seed(values.numel())
    weights = torch.randn(values.shape, generator=generator, device="cpu").to(values.device)
    return (values.float() * weights).sum().cpu()


def seed_all(devices: Sequence[torch.device]) -> None:
    """Let random numbers of the CPU and of these devices begin at the same place every time."""
    seed_generators(devices, 0)
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)


def training_gradients(model: nn.Module, example: Example, how: str) -> list[Tensor]:
    """All gradients of a training pass in one vector, an empty list if there is none; the model is left alone.

    Args:
        model: any module.
        example: what it is called with.
        how: the pass in words, for the message.

    Raises:
        SkipwayError: the pass fails; says with what.
    """
    try:
        found = run_training_pass(model, example)
    except Exception as problem:  # whatever somebody's network raises
        raise SkipwayError(
            f"a training pass {how} fails: {problem}. Blocks that write into what they are given, or read what they "
            "wrote into their own attributes, cannot be run twice: where that is a cache, give use_cache=False"
        ) from problem
    gradients = [] if found is None else [*found.inputs, *found.gradients.values()]
    known = [gradient.flatten().float() for gradient in gradients if gradient is not None]
    return [torch.cat(known)] if known else []
