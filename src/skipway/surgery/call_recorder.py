"""The record of how blocks are called, completed in one pass on real inputs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from skipway.surgery.block_call import BlockCall
from skipway.surgery.side_effects import ObjectStates, version_of
from skipway.surgery.verification import forward_hooks
from skipway.tracing import Example, call_model, preserved_state
from skipway.tracing.arguments import Path, exchange_at, nodes, tensor_paths
from skipway.tracing.containers import ATOMS
from skipway.tracing.example import copy_example

__all__ = ["CallRecorder"]


@dataclass
class CallRecorder:
    """Completes the records of blocks in one pass in evaluation mode, and one in training mode, in which alone dropout
    in place writes.

    Args:
        expected: as far as the program tells, by name.
    """

    expected: Mapping[str, BlockCall]
    finished: dict[str, BlockCall] = field(default_factory=dict)
    forms: dict[str, Any] = field(default_factory=dict)
    others: dict[str, dict[int | str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def watch(self, model: nn.Module, example: Example) -> None:
        """Run the model; it is left alone."""
        self.last: tuple[str, list[tuple[Path, Tensor]]] | None = None
        self.outputs: dict[str, Callable[[], Any]] = {}
        hooks = forward_hooks(model, self.expected, enter=self.enter, leave=self.leave)
        with hooks, preserved_state(model), torch.no_grad():
            returned = [tensor for _, tensor in tensor_paths(call_model(model.eval(), copy_example(example)), depth=3)]
        for name, output in self.outputs.items():
            if any(tensor is output() for tensor in returned):
                self.finished[name] = replace(self.finished[name], returned=True)
        self.last = None
        self.versions: dict[str, int] = {}
        hooks = forward_hooks(model, self.finished, enter=self.note_version, leave=self.compare_version)
        # what fails in training is told by those who need it
        with hooks, preserved_state(model), torch.no_grad(), suppress(Exception):
            call_model(model.train(), copy_example(example))

    def note_version(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note how often x was written into before the block."""
        self.versions[name] = version_of(self.finished[name].take(args, kwargs))

    def compare_version(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Enter whether the block has written into x."""
        call = self.finished[name]
        if version_of(call.take(args, kwargs)) != self.versions[name]:
            self.finished[name] = replace(call, writes_stream=True)

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the state of everything that the block is given."""
        call = self.expected[name]
        self.threads, self.before = [], None
        if self.last is not None:
            previous, outputs = self.last
            arguments = [*tensor_paths(args), *tensor_paths(kwargs)]
            for argument, tensor in arguments:
                for path, output in outputs:
                    if tensor is output and argument == call.locate(call.stream, args, kwargs):
                        self.before = previous if path == self.expected[previous].output else None
                    elif tensor is output:
                        self.threads.append((argument, path))
        self.x = call.take(args, kwargs)
        self.version = version_of(self.x)
        self.others[name] = call.beside(args, kwargs)
        self.state: ObjectStates | None = ObjectStates(module, args, kwargs, call.names, self.x)

    def leave(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Compare with what is there afterwards."""
        call, x, state = self.expected[name], self.x, self.state
        stream = next((tensor for path, tensor in tensor_paths(output) if path == call.output), None)
        if stream is None or state is None or stream.shape != x.shape or stream.dtype != x.dtype:
            became = "nothing" if stream is None else f"{tuple(stream.shape)} of {stream.dtype}"
            self.refused[name] = f"it makes {became} of {tuple(x.shape)} of {x.dtype}"
            return
        passed = dict(handed_on(call, args, kwargs, output))
        known = {call.output, *passed}
        tensors = [path for path, _ in tensor_paths(output)]
        computed = tuple(path for path in tensors if not any(path[: len(outer)] == outer for outer in known))
        self.finished[name] = replace(
            call,
            threads=tuple(self.threads),
            passed=tuple(passed.items()),
            computed=computed,
            writes=ObjectStates(module, args, kwargs, call.names, x).changes_since(state),
            writes_stream=version_of(x) != self.version,
            before=self.before,
        )
        form = output
        for path in (call.output, *passed, *computed):
            form = exchange_at(form, path, None)
        self.forms[name] = form
        self.outputs[name] = weakref.ref(stream)
        self.last, self.state = (name, list(tensor_paths(output))), None


def handed_on(
    call: BlockCall, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Iterator[tuple[Path, Path]]:
    """Outputs of a block, other than x, that are its arguments: tensors, and objects such as caches."""
    arguments = [each for given in (args, kwargs) for each in nodes(given) if each[0]]
    found: list[Path] = []
    for path, node in nodes(output):
        known = any(path[: len(outer)] == outer for outer in found)
        if known or isinstance(node, ATOMS) or path == call.output[: len(path)]:
            continue
        own = next((where for where, argument in arguments if argument is node), None)
        if own is not None:
            found.append(path)
            yield path, own
