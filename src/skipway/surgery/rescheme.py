"""`rescheme(model, example, scheme)`: dress the connections of anybody's network in a scheme."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from skipway.errors import SkipwayError, counted
from skipway.nn import DropPath, Gain, Multiply
from skipway.nn.site import Site
from skipway.nn.warmup import ResidualWarmup
from skipway.schemes.scheme import Scheme, has_streams, members_of, parse_scheme
from skipway.surgery.block_numbers import with_block_numbers
from skipway.surgery.checks import CHECKS, EQUAL
from skipway.surgery.insertion import STREAMED, carries_streams, disable_fused_path, place_like_maps
from skipway.surgery.insertion_point import InsertionPoint, adding_module, find_insertion_points, insert_at
from skipway.surgery.operation import Operation, abbreviate
from skipway.surgery.preconditions import require_operable
from skipway.surgery.sample_axes import find_output_axes
from skipway.surgery.stream_transfer import StreamDressing
from skipway.surgery.transaction import Transaction, transaction
from skipway.surgery.transfer import (
    BlendedNorm,
    branch_parts,
    has_global_start,
    insert_parts,
    start_network,
    start_norms,
)
from skipway.surgery.verification import forward_hooks
from skipway.tracing import Example, Program, as_example, watch
from skipway.tracing.chain import Chain, WatchedConnection, chain_from_program
from skipway.validation import check_call, check_choice, check_tolerance

__all__ = ["Start", "rescheme"]

Start = Literal["identity", "divide", "scheme"]


@check_call
def rescheme(
    model: nn.Module,
    example: Example,
    scheme: str | Scheme,
    *,
    start: Start = "identity",
    tolerance: float = 1e-5,
) -> Operation:
    """Dress the residual connections of any network in a scheme, as far as that is possible from outside, in place.

    At each connection y = x + F(x) the scheme's scale s is inserted after the module that returns F(x):
    y = x + s(F(x)). Of parallel branches that are added to each other first, y = x + (F(x) + G(x)), each gets a scale
    of its own and is dropped by itself; a scale of g(c) F(x) stands behind F or the gate g. The module becomes an
    instance of a subclass of its own class and gets one submodule, `residual_scale`; every key of the state dict stays,
    hooks stay, `torch.compile` goes on working. In the same way

    | capability of the scheme | mechanism | requirement |
    |---|---|---|
    | multiplies or drops the branch | `residual_scale` of a module | a module returns what is added; to drop it, with \
      an axis of one entry for each sample, which passes with other samples find |
    | inserts something before maps (Fixup's biases) | `residual_entry` of the map | torch's own map, run once |
    | multiplies what enters the branch (LayerNormScaling) | `residual_entry` of each map that reads it | such maps, \
      and nothing else that reads it; for a factor that counts blocks, blocks that can be told |
    | standardises weights (NormFree) | `residual_standard` of the map | such a map, no norms, `start` not "scheme" |
    | adds a norm at the end of the branch (PeriNorm) | F + a (norm(F) − F) as `residual_scale`, a = 0 at the start, \
      since no gain of a norm leaves a trained branch as it is | a norm before the branch |
    | switches branches on by a clock (ProRes) | `residual_scale`, at the end of the clock, where it changes nothing | \
      as for a scale |
    | multiplies the skip (DeepNorm's α) | 1/α on the branch | a norm after the addition: norm(αx + F) is \
      norm(x + F/α) but for its ε |
    | carries several streams or earlier outputs (HyperConnections, AttentionResiduals, …) | `residual_streams` of \
      blocks, `residual_entry` before and `residual_scale` behind each branch | blocks that are given x and return it |
    | initialises the whole network (Fixup, DeepNorm) | `start="scheme"` | all connections can be dressed |
    | moves norms, replaces them or cuts skips | none | |

    The initialisation begins with the scheme's distributions if the scheme changes what branches are built from (He's
    for Fixup's convolutions, Xavier's for DeepNorm; biases 0), and with the weights that are there otherwise. Nothing
    is inserted before a projection shortcut.

    Args:
        model: any module that `chain` can read.
        example: what the model is called with.
        scheme: any, or a sum of them, or a spec string; Fixup and NormFree need a network without norms
            (`remove_norm`), DeepNorm one with norms after the additions.
        start: "identity": gains start at 1 and constants are divided out of the preceding map, so that the network
            computes what it did (several streams start equal; up to the ε of the norms with MHC and GatedStreams);
            "divide": gains start at the scheme's value, which is divided out of the preceding map
            as well; "scheme": the scheme's start from scratch, which wipes out what a pretrained network has learned
            (P15).
        tolerance: bound on the difference of the outputs, relative to their largest value, unless `start="scheme"`.

    Returns:
        the operation: what was touched, what was refused and why, what was measured, and `.undo()`.

    Raises:
        SkipwayError: the scheme needs another structure (in words), no connection was found or none can be dressed, or
            the output changed; the model is as before.

    >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True).eval()
    >>> operation = rescheme(layer, torch.randn(2, 5, 16), "layerscale")
    >>> dict(operation.touched)
    {':1': 'dropout1', ':2': 'dropout2'}
    >>> operation.report["difference"]
    0.0
    >>> "dropout1.residual_scale.gain" in layer.state_dict()
    True
    """
    wrapped, model, example = model, require_operable(model), as_example(example)
    check_choice("start", start, get_args(Start))
    check_tolerance("tolerance", tolerance)
    dressing = parse_scheme(scheme)
    program = watch(model, example)
    chain = require_connections(chain_from_program(model, program))
    unfit: dict[str, str] = {}
    if any(member.numbers_blocks for member in members_of(dressing)):
        chain, unfit = with_block_numbers(chain, program, dressing)
    drops = any(dressing.drop(connection.site) is not None for connection in chain)
    axes = drop_axes(chain, program, example) if drops else {}
    with transaction(
        model,
        example,
        title=f"{dressing} on {type(model).__name__}",
        tolerance=None if start == "scheme" else tolerance,
        hint='start="scheme" allows any change',
        checks=CHECKS if drops or start == "scheme" else EQUAL,
        wrapped=wrapped,
    ) as change:
        if has_streams(dressing):
            StreamDressing(change, chain, program, dressing, neutral=start != "scheme").dress()
        else:
            Dressing(change, chain, program, dressing, start, axes, unfit=unfit).dress()
        return change.commit()


def drop_axes(chain: Chain[WatchedConnection], program: Program, example: Example) -> dict[str, int | None]:
    """The axis of the samples in what each slot behind a branch is given, see `find_output_axes`."""
    points: dict[str, InsertionPoint] = {}
    for connection in chain:
        try:
            whole = adding_module(chain.model, program, connection)
            behind = find_insertion_points(chain.model, program, connection)
            points |= {point.slot: point for point in (*behind, *(() if whole is None else (whole,)))}
        except SkipwayError:  # said where it is to be dressed
            continue
    return find_output_axes(chain.model, example, points) if points else {}


def require_connections(chain: Chain[WatchedConnection]) -> Chain[WatchedConnection]:
    """The chain, which must not be empty."""
    if carries_streams(chain.model):
        raise SkipwayError(f"{type(chain.model).__name__}: {STREAMED}")
    if not chain:
        first = f", the first since {chain.refused[0]}" if chain.refused else ""
        raise SkipwayError(
            f"{type(chain.model).__name__} has no residual connection: refused after a look at "
            f"{counted(len(chain.refused), 'addition')}{first}"
        )
    return chain


@dataclass
class Dressing:
    """A scheme that is put on the connections of a network.

    Args:
        change: the transaction.
        chain: connections of the network.
        program: what the network runs on the example.
        scheme: the scheme.
        start: see `rescheme`.
        axes: the axis of the samples in what each slot behind a branch is given, if the scheme drops branches.
        slots: the connection for each path where something was inserted.
        unfit: why a connection cannot be dressed, by its name.
        divided: tells the weights that constants were divided out of, of which connections may share some.
    """

    change: Transaction
    chain: Chain[WatchedConnection]
    program: Program
    scheme: Scheme
    start: Start
    axes: Mapping[str, int | None] = field(default_factory=dict)
    slots: dict[str, str] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    divided: set[Any] = field(default_factory=set)

    @property
    def from_scratch(self) -> bool:
        """Whether the scheme initialises the whole network."""
        return self.start == "scheme" and has_global_start(self.scheme)

    def dress(self) -> None:
        """Dress all connections that can be dressed.

        An inserted module has to run once in a pass. If one does not (a forward that loops over all of its children
        runs it twice), everything is taken back and done again without that connection.
        """
        while True:
            self.dress_each()
            self.check_touched()
            if self.from_scratch:
                start_network(self.change, self.chain, self.scheme)
            runs = self.count_runs()
            repeated = {slot: name for slot, name in self.slots.items() if runs[slot] != 1}
            if not repeated:
                start_norms(self.change, neutral=self.start != "scheme")
                return
            self.change.roll_back()
            for slot, name in repeated.items():
                host = slot.rpartition(".")[0] or "the model"
                self.unfit[name] = f"a module inserted after {host} runs {runs[slot]} times in a pass"

    def dress_each(self) -> None:
        """Dress each connection, or note why it cannot be dressed."""
        self.slots.clear()
        self.divided.clear()
        self.change.touched.clear()
        self.change.refused.clear()
        for connection in self.chain:
            try:
                with self.change.savepoint():
                    self.change.touched[connection.name] = self.dress_connection(connection)
            except SkipwayError as problem:
                self.change.refused[connection.name] = str(problem)

    def dress_connection(self, connection: WatchedConnection) -> str:
        """Insert the scheme's modules into and after one branch; returns the modules that were touched."""
        if connection.name in self.unfit:
            raise SkipwayError(self.unfit[connection.name])
        parts = branch_parts(self.scheme, connection, self.program, from_scratch=self.start == "scheme")
        insert_parts(self.change, connection, parts, divide=self.start != "scheme")
        try:
            points = find_insertion_points(self.change.model, self.program, connection)
            if parts.closes and len(points) > 1:
                whole = adding_module(self.change.model, self.program, connection)
                if whole is None:
                    raise SkipwayError("the norm of a sum of branches is no sum of norms, and no module adds that sum")
                points = (whole,)
            if any(point.axis is None for point in points):
                raise SkipwayError("which axis of what is added holds the channels is said by no weight")
            obstacle, sites = None, [site_at(connection, point) for point in points]
        except SkipwayError as problem:
            obstacle, points, sites = problem, (), [connection.site]
        closing = [BlendedNorm(site.dim, spatial=site.spatial) if parts.closes else None for site in sites]
        inserted = [self.scales(site, norm, parts.skip) for site, norm in zip(sites, closing, strict=True)]
        if not any(inserted):
            if not parts and not self.from_scratch:
                raise SkipwayError(f"{self.scheme} inserts nothing after a branch")
            inside = (*parts.entries, *parts.standardised)
            return ", ".join(connection.seen.maps if self.from_scratch else dict.fromkeys(inside))
        if obstacle is not None:
            raise SkipwayError(str(obstacle))
        modules = [made[0] if len(made) == 1 else nn.Sequential(*made) for made in inserted]
        for point, module in zip(points, modules, strict=True):
            self.place_drops(point, module)
        self.insert_scales(connection, points, modules)
        notes = {note for each in inserted for part in each if (note := getattr(part, "neutral_note", ""))}
        return ", ".join([*map(str, points), *(notes if self.start != "scheme" else ())])

    def scales(self, site: Site, norm: nn.Module | None, skip: float) -> list[nn.Module]:
        """The modules that the scheme puts after a branch, of which each branch of a sum has its own."""
        divided = None if skip == 1 else Multiply(1 / skip)
        modules = (norm, self.scheme.scale(site), divided, self.scheme.drop(site))
        return [module for module in modules if module is not None]

    def place_drops(self, point: InsertionPoint, module: nn.Module) -> None:
        """Let what drops a branch at a point draw once for each sample, in place.

        Raises:
            SkipwayError: no axis there holds one entry for each sample.
        """
        for drop in (each for each in module.modules() if isinstance(each, DropPath)):
            axis = self.axes.get(point.slot)
            if axis is None:
                raise SkipwayError(
                    f"what {point} puts out has no axis with one entry for each sample, so that {self.scheme} would "
                    "drop positions or windows, not samples"
                )
            drop.axis = axis

    def insert_scales(
        self, connection: WatchedConnection, points: Sequence[InsertionPoint], scales: Sequence[nn.Module]
    ) -> None:
        """Let the branch, or each of those that it is a sum of, pass through a scale."""
        for point, scale in zip(points, scales, strict=True):
            place_like_maps(connection.model, point.name, scale)
            host = connection.model.get_submodule(point.name)
            insert_at(self.change, host, point, scale.train(host.training))
            disable_fused_path(self.change, point.slot)
        if self.start != "scheme":
            done = set(self.divided)
            preserve_function(self.change, connection, scales, divide=self.start == "divide", done=done)
            self.divided = done
        self.slots.update((point.slot, connection.name) for point in points)

    def check_touched(self) -> None:
        """Refuse if nothing was dressed, or not everything where the scheme initialises the whole network."""
        kind, refused = type(self.change.model).__name__, self.change.refused
        reasons = abbreviate(list(dict.fromkeys(refused.values())), separator="; ")
        if not self.change.touched:
            raise SkipwayError(f"no connection of {kind} can be dressed: {reasons}")
        if self.from_scratch and refused:
            connections = counted(len(self.chain), "connection")
            raise SkipwayError(
                f"{self.scheme} starts the whole network, and {len(refused)} of {connections} of {kind} cannot be "
                f"dressed: {reasons}"
            )

    def count_runs(self) -> Counter[str]:
        """Compare outputs, and count the runs of each inserted module."""
        runs: Counter[str] = Counter()

        def count(slot: str, *_: Any) -> None:
            runs[slot] += 1

        with forward_hooks(self.change.model, self.slots, enter=count):
            self.change.compare()
        return runs


def site_at(connection: WatchedConnection, point: InsertionPoint) -> Site:
    """The place of a connection as a module sees it that is inserted there."""
    assert point.axis is not None
    return replace(connection.site, dim=point.dim, spatial=point.ndim - 1 - point.axis)


def preserve_function(
    change: Transaction,
    connection: WatchedConnection,
    inserted: Sequence[nn.Module],
    *,
    divide: bool,
    done: set[Any],
) -> None:
    """Set the start of what was inserted and the maps before it so that the network computes what it did, in place;
    weights that are among `done` are left alone, and the others are added.
    """
    divisors = {set_start(module, divide=divide) for module in inserted}
    divisor = divisors.pop()
    if divisors:
        raise SkipwayError("the branches that are added start with different factors")
    if divisor == 0:
        raise SkipwayError('a gain that starts at 0 cannot be divided out; start="identity" starts it at 1')
    if divisor != 1:
        for module in connection.end_modules:
            change.keep_module(module)
        connection.multiply_(1 / divisor, done)


def set_start(inserted: nn.Module, *, divide: bool) -> float:
    """Let gains start at 1 unless they are divided out, in place; returns the factor that is left to divide out."""
    divisor = 1.0
    for module in inserted.modules():
        if isinstance(module, Gain) and divide:
            divisor *= module.init * module.factor
        elif isinstance(module, Gain):
            with torch.no_grad():
                module.gain.fill_(1 / module.factor)
            module.init = 1 / module.factor
        elif isinstance(module, ResidualWarmup):
            module.start_neutral_()
        elif isinstance(module, Multiply):
            divisor *= module.factor
    return divisor
