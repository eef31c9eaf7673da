"""`Observer`: sees the residual connections and chosen modules of any network while the network runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from skipway.errors import SkipwayError
from skipway.nn import History
from skipway.tracing import unwrap
from skipway.tracing.chain import WatchedConnection
from skipway.tracing.reentrant_checkpoints import without_reentry
from skipway.tracing.restoration import without_fused_layers
from skipway.tracing.sums import REDUCTIONS, is_addition, slices_of, terms_of

__all__ = ["Observer"]

RECTIFIERS = frozenset({"relu", "relu_", "relu6", "threshold", "threshold_"})


class Observer(TorchFunctionMode):
    """Context manager around forward passes that calls its own methods with the tensors it meets; abstract.

    A torch function mode sees the additions y = x + F(x) that `chain(model, example)` has numbered, so the network may
    be anybody's; forward hooks see the listed modules, and the slots of connections of ours that join by more than an
    addition. Subclasses override the methods `start`, `operands`, `stream`, `rectified`, `module_input` and
    `module_output`. The network computes what it would compute without an observer, bit for bit. On exit all hooks are
    removed, those on tensors included.

    Additions that no call of Python makes (by a product with a stack, in TorchScript) are not seen; their connections
    are not `observable`. Additions outside the model's `__call__` (in the loss, in augmentation, when checkpointing
    recomputes) do not count. Compiled parts of the network run eagerly inside the context, and torch's fused
    transformer layers are off.

    Args:
        model: the network; `torch.compile` and `DistributedDataParallel` wrappers are looked through.
        connections: of `chain(model, example)`.
        modules: paths of modules whose inputs and outputs are wanted.
    """

    def __init__(self, model: nn.Module, connections: Iterable[WatchedConnection], modules: Iterable[str] = ()) -> None:
        super().__init__()
        self.model = unwrap(model)
        self.additions: dict[int, list[WatchedConnection]] = {}
        self.slots: list[WatchedConnection] = []
        self.skips: dict[str, Tensor] = {}
        for each in connections:
            if each.seen.slots:
                self.slots.append(each)
            elif each.seen.call is not None:
                self.additions.setdefault(each.seen.call, []).append(each)
        self.modules = tuple(modules)
        self.calls = self.passes = 0
        self.running = self.in_place = False
        self.cleanup = ExitStack()
        self.edges: list[GradientEdge] = []

    def start(self) -> None:
        """A forward pass begins."""

    def operands(self, connection: WatchedConnection, skip: Tensor, branch: Tensor) -> tuple[Tensor, Tensor] | None:
        """The connection is about to add; with `self.in_place` the sum overwrites one of the two.

        Returns:
            what is added instead, skip and branch; None leaves the network to compute what it does. Where slots of ours
            hand them over, another skip has no effect.
        """

    def stream(self, connection: WatchedConnection, stream: Tensor) -> None:
        """The connection has added."""

    def rectified(self, output: Tensor) -> None:
        """A ReLU has run."""

    def module_input(self, name: str, value: Any) -> None:
        """A listed module is called; `value` is its first argument."""

    def module_output(self, name: str, value: Any) -> None:
        """A listed module returns `value`."""

    def listen(self, tensor: Tensor, receive: Callable[[Tensor], None]) -> None:
        """Call `receive` with the gradient of `tensor` when a backward pass inside the context computes it: not within
        an `autograd.Function`, whose own tensors have none.
        """
        if tensor.requires_grad and torch.is_grad_enabled():
            self.edges.append(get_gradient_edge(tensor))
            self.cleanup.callback(tensor.register_hook(receive).remove)

    def __enter__(self):
        with ExitStack() as stack:
            hooks = [self.model.register_forward_pre_hook(self.begin, prepend=True)]
            for name in self.modules:
                module = self.model.get_submodule(name)
                hooks.append(module.register_forward_pre_hook(partial(self.enter_module, name), with_kwargs=True))
                hooks.append(module.register_forward_hook(partial(self.leave_module, name)))
            for each in self.slots:
                owner = each.residual
                assert owner is not None
                hooks.append(owner.shortcut.register_forward_hook(partial(self.take_skip, each)))
                hooks.append(owner.drop.register_forward_hook(partial(self.take_branch, each)))
                hooks.append(owner.post.register_forward_pre_hook(partial(self.take_state, each)))
            hooks.append(self.model.register_forward_hook(self.end))
            for hook in hooks:
                stack.callback(hook.remove)
            stack.enter_context(without_fused_layers())
            stack.enter_context(without_reentry())
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self.cleanup = stack.pop_all()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        self.running = False
        self.cleanup.close()
        while self.edges:  # from the end on: a graph with hooks that is dropped as a whole may overflow the stack
            self.edges.pop()

    def begin(self, module: nn.Module, args: Any) -> None:
        self.calls, self.running = 0, True
        self.passes += 1
        self.start()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running = False
        missed = [each for call, connections in self.additions.items() if call >= self.calls for each in connections]
        if missed:
            raise changed(missed[0])

    def enter_module(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.running:
            with self.paused():
                self.module_input(name, next(iter((*args, *kwargs.values())), None))

    def leave_module(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.running:
            with self.paused():
                self.module_output(name, output)

    def take_skip(self, connection: WatchedConnection, module: nn.Module, args: Any, skip: Tensor) -> None:
        if self.running:
            self.skips[connection.name] = skip

    def take_branch(self, connection: WatchedConnection, module: nn.Module, args: Any, branch: Tensor) -> Tensor | None:
        skip = self.skips.pop(connection.name, None)
        if not self.running or skip is None:
            return None
        with self.paused():
            self.in_place = False
            replaced = self.operands(connection, skip, branch)
        return None if replaced is None else replaced[1]

    def take_state(self, connection: WatchedConnection, module: nn.Module, args: tuple[Any, ...]) -> None:
        residual = connection.residual
        if not self.running or residual is None:
            return
        with self.paused():
            streams = residual.streams
            self.stream(connection, streams.sum_of(args[0]) if isinstance(streams, History) else args[0])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Additions in here are the subclass's own."""
        self.running = False
        try:
            yield
        finally:
            self.running = True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "") if self.running else ""
        if name and is_addition(func, args, kwargs):
            connections = self.additions.get(self.calls)
            self.calls += 1
            if connections is not None:
                return self.observe(connections, func, args, kwargs)
        result = func(*args, **kwargs)
        if name in RECTIFIERS and isinstance(result, Tensor):
            self.rectified(result)
        return result

    def observe(
        self,
        connections: list[WatchedConnection],
        func: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Run one numbered addition, which of a stack of several tensors is several connections."""
        name = func.__name__
        terms = slices_of(name, *args, **kwargs) if name in REDUCTIONS else terms_of(name, args, kwargs)
        last = connections[-1]
        if len(terms) <= last.seen.term:
            raise changed(last)
        written = name.endswith("_") and (name.startswith("__i") or not name.startswith("__"))
        target = args[0] if written else kwargs.get("out")
        self.in_place = target is not None
        total, done, replaced = terms[0].value(), 1, None
        for connection in connections:
            for term in terms[done : connection.seen.term]:
                total = total + term.value()
            done, addend = connection.seen.term + 1, terms[connection.seen.term].value()
            skip, branch = (total, addend) if connection.seen.skip_first else (addend, total)
            replaced = self.operands(connection, skip, branch)
            if replaced is not None:
                total = replaced[0] + replaced[1]
            elif connection is not last:
                total = total + addend
            if connection is not last:
                self.stream(connection, total)
        if replaced is None:
            result = func(*args, **kwargs)
        else:
            result = sum((term.value() for term in terms[done:]), total)
            if target is not None:
                result = target.copy_(result)
        shape, seen = result.shape, last.seen.shape
        # batch, resolution and length may be other than the example's, the number of channels may not
        if len(shape) != len(seen) or (shape[1:2] != seen[1:2] and shape[-1:] != seen[-1:]):
            raise changed(last)
        self.stream(last, result)
        return result


def unseen(connection: WatchedConnection) -> SkipwayError:
    """The error for a connection whose addition no observer sees."""
    return SkipwayError(
        f"connection {connection.name!r} is added by no addition that Python calls (by a product with a stack, or in "
        "TorchScript), so what it adds cannot be observed; write it as x + f(x)"
    )


def changed(connection: WatchedConnection) -> SkipwayError:
    """The error for a forward pass whose additions are other than those of the chain."""
    return SkipwayError(
        f"the additions of this pass are not those that were watched (at connection {connection.name!r}): the model "
        "does something else each time it runs, or in this mode, so its connections cannot be measured; make its "
        "forward depend on shapes only, or measure it in evaluation mode: model.eval(), diagnose(..., training=False)"
    )
