"""How a network calls a block: which argument is the stream, what else it is given, writes into and returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from skipway.surgery.class_factory import own_class
from skipway.tracing.arguments import Path, exchange_at, item_at

__all__ = ["CONTAINERS", "BlockCall", "forward_names", "has_module", "parameter_names"]

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class BlockCall:
    """How a network calls a block.

    Args:
        stream: path of x in the arguments: the position or keyword of an argument, then positions or keys in it.
        output: path of what x became in the output; () is the output itself.
        names: parameters of the block's forward, in order.
        threads: other arguments that are outputs of the block before, by their paths: argument and output.
        passed: outputs that are arguments of the block, by their paths: output and argument.
        computed: paths of the other tensors in the output.
        writes: arguments and attributes, other than x, that the block writes into, in words.
        writes_stream: whether it writes into x, in either mode.
        before: the block whose very output x is, if there is one.
        returned: whether the network returns the block's own output.
    """

    stream: Path
    output: Path
    names: tuple[str, ...] = ()
    threads: tuple[tuple[Path, Path], ...] = ()
    passed: tuple[tuple[Path, Path], ...] = ()
    computed: tuple[Path, ...] = ()
    writes: tuple[str, ...] = ()
    writes_stream: bool = False
    before: str | None = None
    returned: bool = False

    @property
    def written_arguments(self) -> tuple[str, ...]:
        """Arguments other than x that the block writes into, in words."""
        return tuple(what for what in self.writes if not what.startswith("its attribute"))

    def locate(self, path: Path, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Path:
        """The path of an argument in this call, which may give it by keyword or by position."""
        first, *rest = path
        if isinstance(first, int) and first >= len(args) and first < len(self.names):
            first = self.names[first]
        elif isinstance(first, str) and first not in kwargs and first in self.names:
            first = self.names.index(first)
        return (first, *rest)

    def argument(self, path: Path, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The argument at a path."""
        path = self.locate(path, args, kwargs)
        return item_at(kwargs if isinstance(path[0], str) else args, path)

    def exchange(
        self, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with another value at a path."""
        path = self.locate(path, args, kwargs)
        if isinstance(path[0], str):
            return args, exchange_at(kwargs, path, value)
        return exchange_at(args, path, value), kwargs

    def take(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The stream among the arguments."""
        return self.argument(self.stream, args, kwargs)

    def beside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, Any]:
        """The arguments by position or keyword, with None in place of the stream."""
        args, kwargs = self.exchange(self.stream, args, kwargs, None)
        return {**dict(enumerate(args)), **kwargs}

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with another stream."""
        return self.exchange(self.stream, args, kwargs, x)

    def follow(self, output: Any, twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a copy of the block on what the block put out, with the block's own other arguments; returns the block's
        output with the copy's stream in it.
        """
        args, kwargs = self.given(args, kwargs, item_at(output, self.output))
        for argument, source in self.threads:
            args, kwargs = self.exchange(argument, args, kwargs, item_at(output, source))
        after = twin(*args, **kwargs)
        for path in (self.output, *(source for _, source in self.threads)):
            output = exchange_at(output, path, item_at(after, path))
        return output

    def skip(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the network gets of a block that is left out: an output of the recorded form with x in it."""
        for path, argument in self.passed:
            output = exchange_at(output, path, self.argument(argument, args, kwargs))
        return exchange_at(output, self.output, self.take(args, kwargs))


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module's forward that can be given by position; those of the class that an
    operation derived the module's class from.
    """
    return forward_names(own_class(module))


def forward_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the parameters of a class's forward that can be given by position."""
    try:
        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return ()
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(each.name for each in parameters if each.kind in by_position)


def has_module(block: nn.Module, path: str) -> bool:
    """Whether a block has a module at a path."""
    for part in filter(None, path.split(".")):
        if part not in block._modules:
            return False
        block = block.get_submodule(part)
    return True
