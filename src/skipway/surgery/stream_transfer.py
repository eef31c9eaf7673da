"""Several streams put into somebody's network: rows of its blocks, between which n streams travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from skipway.errors import SkipwayError
from skipway.nn.history import History
from skipway.nn.site import Site
from skipway.nn.streams import StreamEntry, Streams
from skipway.schemes.scheme import Scheme, has_streams, members_of
from skipway.surgery.block_call import CONTAINERS
from skipway.surgery.block_rows import block_readers, direct_row_end
from skipway.surgery.block_survey import BlockSurvey, carried, require_blocks
from skipway.surgery.checks import EQUAL, rounding_of
from skipway.surgery.insertion import ARGUMENT, INPUT, OUTPUT, STREAMS, disable_fused_path, insert, place_like_maps
from skipway.surgery.operation import abbreviate
from skipway.surgery.packed_history import pack_histories
from skipway.surgery.stream_points import StreamPoints, find_stream_points
from skipway.surgery.stream_slots import StreamedBlock, StreamRead, StreamWrite
from skipway.surgery.transaction import Transaction, transaction
from skipway.surgery.transfer import has_global_start, start_network
from skipway.tracing import Program
from skipway.tracing.chain import Chain, WatchedConnection

__all__ = ["StreamDressing"]

TRIED = 1e-3
"""Bound on the difference of outputs when connections are tried one by one; a mistake makes a larger one."""


@dataclass(frozen=True)
class StreamSite:
    """A connection on several streams: one of the network's, or all those of a block as one.

    Args:
        block: the block that it is in.
        connections: of the network.
        points: where streams are read and written; None where the block as a whole is the branch.
        reason: why the connections of a block are not dressed one by one.
    """

    block: str
    connections: tuple[WatchedConnection, ...]
    points: StreamPoints | None = None
    reason: str = ""

    def __str__(self) -> str:
        return str(self.points or f"{self.block}, as one branch: {self.reason}")


@dataclass
class StreamDressing:
    """A scheme with several streams that is put on the connections of a network.

    Streams are opened before the first block of a row and closed behind its last one; a row ends where something else
    reads or changes what is handed on. Where a module alone reads x for each branch and one returns what is added,
    connections are dressed one by one; else each block of the row is one branch, block(x) − x, which needs nothing from
    inside. So is every block if the network does not run, or computes something else, with the former.

    Args:
        change: the transaction.
        chain: connections of the network.
        program: what the network runs on the example.
        scheme: the scheme.
        neutral: whether the network has to compute what it did.
    """

    change: Transaction
    chain: Chain[WatchedConnection]
    program: Program
    scheme: Scheme
    neutral: bool
    survey: BlockSurvey = field(init=False)

    def dress(self) -> None:
        """Dress all connections that can be dressed.

        Raises:
            SkipwayError: none can, or the network would compute something else.
        """
        if len(members := members_of(self.scheme)) > 1:
            several = next(str(member) for member in members if has_streams(member))
            raise SkipwayError(
                f"{self.scheme} on a network that exists already: give {several!r} alone, and the others in a rescheme "
                "of their own, before it"
            )
        assert self.change.example is not None
        self.survey = require_blocks(self.change.model, self.change.example, self.program)
        rows = [self.sites_of(row) for row in self.rows()]
        if any(site.points for row in rows for site in row) and (obstacle := self.try_neutral(rows)):
            rows = [self.sites_of(row, reason=f"dressed one by one, {obstacle}") for row in self.rows()]
        limits = (self.streams_for(row[1], 1, 2).neutral_limit for row in rows if len(row) > 1)
        if self.neutral and (limit := next(limits, "")):
            self.change.hint = f"{limit}; {self.change.hint}"
        self.dress_rows(rows)

    def try_neutral(self, rows: Sequence[Sequence[StreamSite]]) -> str:
        """Why rows cannot be dressed, with a start that changes nothing; nothing if they can.

        It does not depend on the tolerance of the operation, so that weights are loaded into what they were made in.
        """
        model, example, title = self.change.model, self.change.example, self.change.title
        tolerance = max(TRIED, rounding_of(model.parameters()))
        with transaction(model, example, title=title, tolerance=tolerance, checks=EQUAL) as trial:
            attempt = replace(self, change=trial, neutral=True)
            attempt.survey = self.survey
            try:
                attempt.dress_rows(rows)
                trial.verify()
            except SkipwayError as problem:
                return str(problem)
            except Exception as problem:  # whatever a network raises that is given other shapes than it expects
                return f"{type(problem).__name__}: {problem}"
        return ""

    def rows(self) -> Iterator[list[str]]:
        """Blocks each of which alone is given what the one before put out."""
        readers = block_readers(self.survey, self.program)
        row: list[str] = []
        for name in self.survey.calls:
            if row and direct_row_end(self.survey, row[-1], name, readers[row[-1]]) is not None:
                yield row
                row = []
            row.append(name)
        yield row

    def sites_of(self, row: Sequence[str], reason: str = "") -> list[StreamSite]:
        """The connections on several streams of a row of blocks; with a reason, each block as one."""
        sites: list[StreamSite] = []
        for block in () if reason else row:
            try:
                if self.survey.calls[block].writes_stream:
                    raise SkipwayError("it writes into x")
                if self.keeps_outputs and not self.sums_alone(block):
                    raise SkipwayError("a norm or something else follows an addition, and would change earlier outputs")
                for each in self.survey.connections[block]:
                    points = find_stream_points(self.change.model, self.program, each, block)
                    sites.append(StreamSite(block, (each,), points))
            except SkipwayError as problem:
                reason = f"{block}: {problem}"
                break
        whole = [StreamSite(block, tuple(self.survey.connections[block]), reason=reason) for block in row]
        return whole if reason else sites

    @property
    def keeps_outputs(self) -> bool:
        """Whether the scheme carries earlier outputs."""
        site = replace(self.chain[0].site, kind="conv")  # a block of its own, whichever branches follow
        return isinstance(self.scheme.streams(site), History)

    def sums_alone(self, block: str) -> bool:
        """Whether nothing but the additions of its connections is done to x in a block, views apart."""
        numbers = [each.seen.numbers for each in self.survey.connections[block]]
        given, returned = self.program.given[block].values(), self.program.returned[block].values()
        followed = zip([total for _, _, total, _ in numbers], [start for _, _, _, start in numbers[1:]], strict=False)
        return (
            not carried(self.program, numbers[0][3]).isdisjoint(given)
            and any(numbers[-1][2] in carried(self.program, number) for number in returned)
            and all(total in carried(self.program, start) for total, start in followed)
        )

    def dress_rows(self, rows: Sequence[Sequence[StreamSite]]) -> None:
        """Dress rows, and note which connections are dressed and why others are not."""
        self.change.touched.clear()
        self.change.refused.clear()
        for row in rows:
            if len(row) > 1:
                self.dress_row(row)
                continue
            reason = "nothing follows directly on it, so that streams would be opened and closed at once"
            self.change.refused.update((each.name, reason) for site in row for each in site.connections)
        for connection in self.chain:
            if connection.name not in self.change.touched | self.change.refused:
                self.change.refused[connection.name] = self.survey.refused.get(
                    connection.seen.owner, "it is in no block that carries x itself, or within the branch of another"
                )
        if not self.change.touched:
            reasons = abbreviate(list(dict.fromkeys(self.change.refused.values())), separator="; ")
            raise SkipwayError(f"no connection of {type(self.change.model).__name__} can be dressed: {reasons}")
        if not self.neutral and has_global_start(self.scheme):
            start_network(self.change, self.chain, self.scheme)

    def dress_row(self, row: Sequence[StreamSite]) -> None:
        """Open streams before a row, carry them through it, and close them behind it."""
        blocks = list(dict.fromkeys(site.block for site in row))
        wholes: dict[str, Streams] = {}
        first, states, last = self.parts_for(row)
        for site, streams in zip(row, states, strict=True):
            if site.points is None:
                wholes[site.block] = streams
            else:
                self.dress_branch(site.points, streams)
            self.change.touched.update((each.name, str(site)) for each in site.connections)
        for block in dict.fromkeys((blocks[0], *wholes, blocks[-1])):
            run = StreamedBlock(
                self.survey.calls[block],
                first=first if block == blocks[0] else None,
                last=last if block == blocks[-1] else None,
                connection=wholes.get(block),
            )
            self.insert(block, STREAMS, run)

    def parts_for(self, row: Sequence[StreamSite]) -> tuple[nn.Module, Sequence[Streams], nn.Module]:
        """What opens the streams of a row, carries them through each connection, and closes them."""
        states = [self.streams_for(site, index, len(row)) for index, site in enumerate(row)]
        dim, spatial = channels(row[-1])
        first, last = self.scheme.open(), self.scheme.close(dim, spatial)
        assert isinstance(last, StreamEntry)
        if self.neutral:
            last.start_neutral_()
        histories = [each for each in states if isinstance(each, History)]
        if histories:
            return pack_histories(histories, last, dim)
        assert first is not None
        return first, states, last

    def streams_for(self, site: StreamSite, index: int, depth: int) -> Streams:
        """How the streams of a connection are read, mixed and written."""
        dim, spatial = channels(site)
        kind = site.connections[-1].site.kind if site.points is not None or "conv" not in self.scheme.kinds else "conv"
        where = Site(dim=dim, index=index, since=index, depth=depth, spatial=spatial, kind=kind)
        if where.kind not in self.scheme.kinds:
            raise SkipwayError(f"{self.scheme}: {self.scheme.refusal}")
        streams = self.scheme.streams(where)
        hooks = (self.scheme.scale, self.scheme.drop, self.scheme.enter, self.scheme.join)
        if streams is None or any(hook(where) is not None for hook in hooks):
            raise SkipwayError(f"{self.scheme} means more than several streams, which cannot be put in together")
        if streams.refusal:
            raise SkipwayError(f"{self.scheme} means {streams.refusal}")
        if type(streams).call is not Streams.call:
            raise SkipwayError(
                f"{self.scheme} reads what is inside of a branch, which is written in somebody's forward"
            )
        if self.neutral:
            streams.start_neutral_(index % streams.count)
        return streams

    def dress_branch(self, points: StreamPoints, streams: Streams) -> None:
        """Read streams before the first module of a branch, and write them behind the last one."""
        read = StreamRead(streams)
        self.insert(points.first, INPUT, read)
        if points.call.stream != (0,):
            self.change.set_attribute(self.change.model.get_submodule(points.first), ARGUMENT, points.call)
        self.insert(points.last, OUTPUT, StreamWrite(read))

    def insert(self, name: str, slot: str, inserted: nn.Module) -> None:
        """Insert a module into a slot of another one."""
        host = self.change.model.get_submodule(name)
        if isinstance(host, CONTAINERS):
            raise SkipwayError(f"{name} is a container, which would run what is inserted as one of its children")
        place_like_maps(self.change.model, name, inserted)
        insert(self.change, host, slot, inserted.train(host.training))
        disable_fused_path(self.change, name)


def channels(site: StreamSite) -> tuple[int, int]:
    """How many channels the stream has, and how many axes follow on theirs."""
    known = [each for each in site.connections if each.seen.channel is not None]
    if not known:
        raise SkipwayError(f"{site.connections[0].name}: which axis of x holds the channels is said by no weight")
    return known[-1].site.dim, known[-1].site.spatial
