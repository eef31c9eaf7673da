"""The last call of a network in a training: its arguments, its precision, and the gradient of what it returned."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.tracing import Example, as_example, unwrap
from skipway.tracing.containers import map_tensors, tensors_in
from skipway.tracing.restoration import TRACELESS
from skipway.tracing.samples import SampleAxes, axis_of

__all__ = ["Call", "LastCall", "computed_from"]

ROOM = 16 << 20
"""Bytes of an output's gradient that are kept of every step; of a larger one only where a sample is due."""


@dataclass
class Call:
    """One call of a network.

    Args:
        args, kwargs: that it was called with.
        autocast: kinds of devices whose autocast was on, with its dtype.
        gradients: of the output's tensors, by their place; whole, or of the first samples where their axis is known.
        numbers: among the output's tensors, by their place.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[tuple[str, torch.dtype], ...]
    gradients: dict[int, Tensor] = field(default_factory=dict)
    numbers: dict[int, Tensor] = field(default_factory=dict)

    def example(self, model: nn.Module) -> Example:
        """The arguments in one of the forms of `as_example`, without the graph that they may come from.

        Raises:
            SkipwayError: positional and keyword arguments that the signature of forward does not name.
        """
        args, kwargs = map_tensors(torch.Tensor.detach, (self.args, self.kwargs))
        if not kwargs:
            return as_example(args[0] if len(args) == 1 else args)
        if args:
            try:
                kwargs = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
            except (TypeError, ValueError) as problem:
                raise SkipwayError(
                    f"{type(model).__name__} is called with arguments without a name: {problem}"
                ) from problem
            for name, parameter in inspect.signature(model.forward).parameters.items():
                if parameter.kind is parameter.VAR_KEYWORD:
                    kwargs |= kwargs.pop(name, {})
                elif parameter.kind is parameter.VAR_POSITIONAL and kwargs.pop(name, ()):
                    raise SkipwayError(f"{type(model).__name__} is called with arguments without a name: *{name}")
        return as_example(kwargs)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Autocast as it was in the call."""
        with ExitStack() as stack:
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            yield


@dataclass
class ReturnedLoss:
    """What a call returned in the place of a loss: it is one if the training minimises it, and nothing else.

    Args:
        value: mean of its elements.
        received: whether a gradient has arrived at it.
        alone: whether none has come to the rest of the output that it is not computed from.
    """

    value: Tensor
    received: bool = False
    alone: bool = True


class ForwardHook:
    """A hook whose copies and pickles, in copies of the model, do nothing."""

    def __init__(self, recorder: LastCall | None = None, end: bool = False) -> None:
        self.recorder, self.end = recorder, end

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        if self.recorder is None or torch.compiler.is_compiling():
            return
        if self.end:
            self.recorder.returned(output[0])
        else:
            self.recorder.called(args, kwargs)

    def __deepcopy__(self, memo: Any) -> ForwardHook:
        return ForwardHook()

    def __reduce__(self) -> Any:
        return ForwardHook, ()


class LastCall:
    """Remembers the last call with gradients of a model, until it is closed.

    The hooks stand outside of what `torch.compile` compiles, change nothing that is computed, and copy no input. Of a
    model that is compiled in place (`model.compile()`), whose hooks would be compiled, the compiled call is wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.last: Call | None = None
        self.returned_losses: list[ReturnedLoss] = []
        self.minimised: bool | None = None  # whether the gradient at them is positive; known from the first one on
        self.ends: dict[tuple[int, ...], set[int]] = {}  # places of outputs from which no other one is computed
        self.fresh = self.due = False
        self.axes: SampleAxes | None = None
        self.count = 0
        self.open: Call | None = None
        self.devices = tuple({parameter.device.type for parameter in model.parameters()} | {"cpu"})
        self.stack = ExitStack()
        inner = unwrap(model)
        compiled = [each for each in dict.fromkeys((model, inner)) if each._compiled_call_impl is not None]
        if compiled:
            self.wrap_compiled_call(compiled[0])
        else:
            begin, end = ForwardHook(self), ForwardHook(self, end=True)
            self.stack.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
            self.stack.callback(model.register_forward_hook(end, with_kwargs=True).remove)

    def wrap_compiled_call(self, model: nn.Module) -> None:
        """Record around the compiled call of a model, and put it back at the end."""
        original = model._compiled_call_impl
        assert original is not None

        def record(*args: Any, **kwargs: Any) -> Any:
            self.called(args, kwargs)
            output = original(*args, **kwargs)
            self.returned(output)
            return output

        model._compiled_call_impl = record

        def put_back() -> None:
            if model._compiled_call_impl is record:
                model._compiled_call_impl = original

        self.stack.callback(put_back)

    def close(self) -> None:
        """Remove the hooks, and forget the call."""
        self.stack.close()
        self.last = self.open = None

    def called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins."""
        if TRACELESS.get() or not torch.is_grad_enabled():  # a pass of this monitor, of another one, of a diagnosis
            return
        kinds = [kind for kind in self.devices if torch.is_autocast_enabled(kind)]
        self.open = Call(args, kwargs, tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds))

    def returned(self, output: Any) -> None:
        """A forward pass has ended: listen to the gradients of its output."""
        call, self.open = self.open, None
        if call is None or TRACELESS.get():
            return
        self.last, self.fresh = call, True
        tensors = list(tensors_in(output))
        # a parameter that is returned as it is would keep its hooks
        computed = {place: tensor for place, tensor in enumerate(tensors) if tensor.grad_fn is not None}
        self.listen_for_loss(loss_in(output, tensors), computed)
        call.numbers = {place: each.detach().clone() for place, each in computed.items() if each.numel() == 1}
        for place, tensor in computed.items():
            if self.due or tensor.numel() * tensor.element_size() <= ROOM:
                tensor.register_hook(GradientReceiver(self, call, place))

    def listen_for_loss(self, loss: Tensor | None, computed: dict[int, Tensor]) -> None:
        """Take down what was returned in the place of a loss, and listen to how the training uses the output."""
        if loss is None:
            return
        record = ReturnedLoss(loss.detach().reshape(-1).mean())
        self.returned_losses.append(record)

        # of several tensors that one operator returns, those that are not used receive None
        def take(gradient: Tensor | None) -> None:
            if gradient is None:
                return
            record.received = True
            if self.minimised is None and ((slope := float(gradient.sum())) > 0 or slope < 0):
                self.minimised = slope > 0

        def take_other(gradient: Tensor | None) -> None:
            record.alone &= gradient is None

        loss.register_hook(take)
        others = {place: each for place, each in computed.items() if each is not loss}
        key = tuple(others)
        if key not in self.ends:  # the graph is walked once
            inner = computed_from([*others.values(), loss])
            self.ends[key] = {place for number, place in enumerate(key) if number not in inner}
        for place in self.ends[key]:
            others[place].register_hook(take_other)

    @property
    def own_losses(self) -> list[Tensor]:
        """The losses that the model itself returned since the last step, where the training minimises them alone."""
        return [each.value for each in self.returned_losses if each.received and each.alone] if self.minimised else []

    def forget_losses(self) -> None:
        """What was returned belongs to a step that is taken."""
        self.returned_losses, self.fresh = [], False

    def part(self, tensor: Tensor) -> Tensor:
        """The first samples of a tensor of the output; all of it where the axis is unknown."""
        axis = None if self.axes is None or tensor.ndim == 0 else axis_of(tensor, self.axes.size, self.axes.axis)
        return tensor if axis is None else tensor.narrow(axis, 0, min(self.count, tensor.shape[axis]))


def loss_in(output: Any, tensors: list[Tensor]) -> Tensor | None:
    """What may be a loss in an output: `loss` where its parts have names, else a number that is first or alone."""
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    numbers = [each for each in tensors if each.numel() == 1 and each.ndim < 2 and each.grad_fn is not None]
    first = numbers and (len(numbers) == 1 or numbers[0] is tensors[0])
    found = named if isinstance(named, Tensor) else numbers[0] if first else None
    return None if found is None or found.grad_fn is None else found


def computed_from(tensors: list[Tensor]) -> set[int]:
    """The numbers of those tensors that others of them are computed from."""
    nodes = [tensor.grad_fn for tensor in tensors]
    if len(tensors) < 2:
        return set()
    found: set[int] = set()
    for start in nodes:
        seen, left = (
            set(),
            [node for node, _ in (start.next_functions if start is not None else ()) if node is not None],
        )
        while left:
            node = left.pop()
            if node not in seen:
                seen.add(node)
                left += [each for each, _ in node.next_functions if each is not None]
        found |= {number for number, node in enumerate(nodes) if node in seen}
    return found


@dataclass
class GradientReceiver:
    """Keeps the gradient of a tensor of the output."""

    recorder: LastCall
    call: Call
    place: int

    def __call__(self, gradient: Tensor | None) -> None:
        if gradient is None:  # one of several tensors of one operator, of which another was used
            return
        self.call.gradients[self.place] = self.recorder.part(gradient.detach()).clone()
