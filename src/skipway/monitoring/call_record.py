"""The last call of a network in a training: its arguments, its precision, and the gradient of what it returned."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
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

__all__ = ["Call", "LastCall"]

ROOM = 16 << 20
"""Bytes of an output's gradient that are kept of every step; of a larger one only where a sample is due."""


@dataclass
class Call:
    """One call of a network.

    Args:
        args, kwargs: that it was called with.
        autocast: kinds of devices whose autocast was on, with its dtype.
        gradients: of the output's tensors, by their place; whole, or of the first samples where their axis is known.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[tuple[str, torch.dtype], ...]
    gradients: dict[int, Tensor] = field(default_factory=dict)

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
        self.own_losses: list[Tensor] = []
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
        losses = [each for each in tensors if each.requires_grad and each.numel() == 1]
        loss = getattr(output, "loss", losses[0] if len(losses) == 1 else None)
        if isinstance(loss, Tensor):
            self.own_losses.append(loss.detach().reshape(-1).mean())
        for place, tensor in enumerate(tensors):
            if tensor.requires_grad and (self.due or tensor.numel() * tensor.element_size() <= ROOM):
                tensor.register_hook(GradientReceiver(self, call, place))

    def part(self, tensor: Tensor) -> Tensor:
        """The first samples of a tensor of the output; all of it where the axis is unknown."""
        axis = None if self.axes is None or tensor.ndim == 0 else axis_of(tensor, self.axes.size, self.axes.axis)
        return tensor if axis is None else tensor.narrow(axis, 0, min(self.count, tensor.shape[axis]))


@dataclass
class GradientReceiver:
    """Keeps the gradient of a tensor of the output."""

    recorder: LastCall
    call: Call
    place: int

    def __call__(self, gradient: Tensor) -> None:
        self.call.gradients[self.place] = self.recorder.part(gradient.detach()).clone()
