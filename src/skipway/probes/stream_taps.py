"""Where modules hand over what a connection over several streams reads, and what its branch puts out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.tracing import Program
from skipway.tracing.arguments import Path, exchange_at, item_at
from skipway.tracing.chain import WatchedConnection
from skipway.tracing.stream_paths import StreamJudge

__all__ = ["ModuleTensor", "StreamTaps"]


@dataclass(frozen=True)
class ModuleTensor:
    """A tensor among the arguments or the outputs of a module.

    Args:
        module: its path.
        path: of the tensor; of an argument by position or name.
        given: whether it is an argument.
    """

    module: str
    path: Path
    given: bool

    def hook(self, model: nn.Module, receive: Callable[[Tensor], Tensor | None]) -> Callable[[], None]:
        """Call `receive` with the tensor in each pass, which may return another one in its place; what takes the hook
        away is returned.
        """
        module = model.get_submodule(self.module)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            key, *rest = self.path
            receive(item_at(args[key] if isinstance(key, int) else kwargs[key], tuple(rest)))

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            other = receive(item_at(output, self.path))
            return None if other is None else exchange_at(output, self.path, other)

        if self.given:
            return module.register_forward_pre_hook(enter, with_kwargs=True).remove
        return module.register_forward_hook(leave).remove


@dataclass(frozen=True)
class StreamTaps:
    """The taps of a network with several streams.

    Args:
        reads, branches: for each connection over several streams, by its name.
        stem: of what the streams were opened with; None where no module puts it out.
        last: of what is read of the streams after all connections; None likewise.
    """

    reads: dict[str, ModuleTensor]
    branches: dict[str, ModuleTensor]
    stem: ModuleTensor | None
    last: ModuleTensor | None

    @classmethod
    def of(cls, program: Program, connections: tuple[WatchedConnection, ...]) -> StreamTaps:
        """The taps of connections, of which at least one is over several streams.

        Raises:
            SkipwayError: what a branch reads or puts out is in no module's hands, or that module ran several times.
        """
        several = [(each, each.seen.streams) for each in connections if each.seen.streams is not None]
        reads, branches = {}, {}
        for connection, streams in several:
            read = find_tap(program, forms(program, streams.read, like=streams.branch))
            branch = find_tap(program, iter([streams.branch]), returned=True)
            for tap, what in ((read, "reads of its streams"), (branch, "puts out")):
                if tap is None:
                    raise SkipwayError(
                        f"connection {connection.name!r}: what its branch {what} is neither an argument nor an output "
                        "of a module that runs once, so it cannot be taken apart in a running network; put "
                        "nn.Identity() there"
                    )
            reads[connection.name], branches[connection.name] = read, branch  # type: ignore[assignment]
        judge = StreamJudge(program, {}, {})
        origin = judge.origin_of_streams(several[0][1].state)
        output = next(iter(program.returned.get("", {}).values()), None)
        last = None if output is None else judge.read(several[-1][0].seen.numbers[2], output, set())
        stem = find_tap(program, iter([origin, judge.put_out(origin)]))
        return cls(reads, branches, stem, None if last is None else find_tap(program, forms(program, last[0])))


def forms(program: Program, number: int, like: int | None = None) -> Iterator[int]:
    """A value and those that hold the same numbers in another form, first those of the shape of another value."""
    found = [number]
    for here in found:
        users = (program[user] for user in program.users[here])
        found += [each.number for each in users if each.part == "carry" and each.numel == program[here].numel]
    shape = None if like is None else program[like].shape
    return iter(sorted(found, key=lambda each: program[each].shape != shape))


def find_tap(program: Program, numbers: Iterator[int], *, returned: bool = False) -> ModuleTensor | None:
    """Where a module that runs once puts out one of the values, or is given it; the outermost that puts it out."""
    tables = (program.returned,) if returned else (program.returned, program.given)
    for number in numbers:
        for table in tables:
            holders = [
                ModuleTensor(name, path, given=table is program.given)
                for name, held in table.items()
                if name and program.runs[name] == 1
                for path, value in held.items()
                if value == number
            ]
            if holders:
                return min(holders, key=lambda tap: tap.module.count("."))
    return None
