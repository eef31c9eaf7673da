"""`rescheme(model, scheme, example)`: dress the connections of anybody's network in a scheme, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.nn import Gain, Multiply
from skipway.schemes.scheme import Scheme
from skipway.schemes.scheme import parse_scheme as read_scheme
from skipway.surgery.insertion import behind, on_slow_path
from skipway.surgery.insertion_point import Place, place_behind
from skipway.surgery.operation import Operation
from skipway.surgery.preconditions import admitted
from skipway.surgery.transfer import Inside, inside_of, put_inside, step_over, takes_step
from skipway.surgery.verification import difference, outputs
from skipway.tracing import Example, Program, watch
from skipway.tracing.chain import Chain, WatchedConnection, chain_from_program

__all__ = ["rescheme"]

Preserve = Literal["one", "divide"]


def rescheme(
    model: nn.Module,
    scheme: str | Scheme,
    example: Example,
    *,
    preserve: bool | Preserve = True,
    tolerance: float = 1e-5,
) -> Operation:
    """Dress the residual connections of any network in a scheme, as far as that can be had from outside, in place.

    At each connection y = x + F(x) what the scheme puts behind the branch is put behind the module that puts out F(x):
    y = x + s(F(x)). The module becomes an instance of a subclass of its own class and gets one submodule,
    `residual_scale`; every key of the state dict stays, hooks stay, `torch.compile` goes on working. In the same way

    | the scheme | is had | where |
    |---|---|---|
    | multiplies or drops the branch | behind the branch | a module puts out what is added |
    | puts something in front of maps (Fixup's biases) | `residual_entry` of the map | a plain map that runs once |
    | standardises weights (NormFree) | `residual_standard` of the map | such a map, no norms, `preserve` |
    | multiplies the skip (DeepNorm's α) | 1/α on the branch | a norm behind the addition: norm(αx + F) is \
      norm(x + F/α) but for its ε |
    | takes a step over the whole network (Fixup, DeepNorm) | with `preserve=False` | all connections can be dressed |
    | moves norms, replaces them or cuts skips | not at all | |

    The step begins with the scheme's distributions where it changes what branches are built from (He's for Fixup's
    convolutions, Xavier's for DeepNorm; biases 0), and with the weights that are there otherwise. A projection shortcut
    gets nothing in front.

    Args:
        model: any module that `chain` can read.
        scheme: any, or a sum of them, or a spec string; Fixup and NormFree want a network without norms
            (`remove_norm`), DeepNorm one with norms behind the additions.
        example: what the model is called with.
        preserve: True or "one": learned gains start at 1, constants are divided out of the map in front, so that the
            network computes what it did; "divide": gains start at the scheme's value, and the map in front is divided
            by it; False: the scheme's value, from scratch, which wipes out what a pretrained network knows (P15).
        tolerance: with `preserve`, by how much the output may differ, relative to its largest value; beyond it
            everything is put back.

    Returns:
        the operation: what was touched, what was refused and why, what was measured, and `.undo()`.

    Raises:
        SkipwayError: the scheme needs another structure (in words), no connection was found or none can be dressed, or
            the output changed; the model is as before.

    >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True).eval()
    >>> operation = rescheme(layer, "layerscale", torch.randn(2, 5, 16))
    >>> operation.touched
    {':1': 'dropout1', ':2': 'dropout2'}
    >>> operation.report["difference"]
    0.0
    >>> "dropout1.residual_scale.gain" in layer.state_dict()
    True
    """
    dressing = read_scheme(scheme)
    model = admitted(model)
    program = watch(model, example)
    chain = chain_from_program(model, program)
    if not chain:
        raise SkipwayError(
            f"{type(model).__name__} has no residual connection: of its additions {len(chain.refused)} were looked at "
            f"and refused{', the first since ' + str(chain.refused[0]) if chain.refused else ''}"
        )
    places = {connection.name: place_behind(model, program, connection) for connection in chain}
    before = outputs(model, example)
    operation = Operation(model, f"{dressing} on {type(model).__name__}", {}, {}, {})
    try:
        after = dressed_outputs(operation, chain, places, program, dressing, preserve, example)
        operation.report = {"difference": difference(before, after)}
        if preserve and not operation.report["difference"] <= tolerance:
            raise SkipwayError(
                f"the output changed by {operation.report['difference']:.3g} of its largest value, more than "
                f"tolerance={tolerance:g}, and was put back; preserve=False does not ask for that"
            )
    except BaseException:
        operation.undo()
        raise
    return operation


def dressed_outputs(
    operation: Operation,
    chain: Chain[WatchedConnection],
    places: dict[str, Place | str],
    program: Program,
    scheme: Scheme,
    preserve: bool | Preserve,
    example: Example,
) -> list[Tensor]:
    """Dress what can be dressed, and return what the model puts out then.

    What was put behind a module has to run once in a pass. Where it does not (a forward that loops over all of its
    children runs it twice), everything is taken back and done again without that connection.
    """
    while True:
        inserted = dress(operation, chain, places, program, scheme, preserve)
        if not operation.touched:
            reasons = "; ".join(dict.fromkeys(operation.refused.values()))
            raise SkipwayError(f"no connection of {type(operation.model).__name__} can be dressed: {reasons}")
        if preserve is False and takes_step(scheme):
            if operation.refused:
                reasons = "; ".join(dict.fromkeys(operation.refused.values()))
                raise SkipwayError(
                    f"{scheme} starts the whole network, and {len(operation.refused)} of {len(chain)} connections of "
                    f"{type(operation.model).__name__} cannot be dressed: {reasons}"
                )
            operation.steps.append(step_over(chain, scheme))
        with counting(inserted) as runs:
            after = outputs(operation.model, example)
        wrong = {name: count for name, count in runs.items() if count != 1}
        if not wrong:
            return after
        while operation.steps:
            operation.steps.pop()()
        for name, count in wrong.items():
            places[name] = f"what is put behind {operation.touched[name]} runs {count} times in a pass"


@contextmanager
def counting(inserted: dict[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Within it, how often each module runs."""
    runs = dict.fromkeys(inserted, 0)

    def count(name: str, *_: Any) -> None:
        runs[name] += 1

    handles = [module.register_forward_pre_hook(partial(count, name)) for name, module in inserted.items()]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def dress(
    operation: Operation,
    chain: Chain[WatchedConnection],
    places: dict[str, Place | str],
    program: Program,
    scheme: Scheme,
    preserve: bool | Preserve,
) -> dict[str, nn.Module]:
    """Put what the scheme makes behind each branch, where there is a place; returns it by the connections' names."""
    made: dict[str, nn.Module] = {}
    touched: dict[str, str] = {}
    refused: dict[str, str] = {}
    for connection in chain:
        place = places[connection.name]
        inside = inside_of(scheme, connection, program, preserve=preserve is not False)
        if isinstance(inside, str):
            refused[connection.name] = f"{scheme} means {inside}, which cannot be put on from outside"
            continue
        done = len(operation.steps)
        try:
            inserted, where = put_on(operation, connection, place, scheme, inside, preserve)
            if inserted is not None:
                made[connection.name] = inserted
            touched[connection.name] = where
        except SkipwayError as problem:
            refused[connection.name] = str(problem)
            while len(operation.steps) > done:
                operation.steps.pop()()
    operation.touched, operation.refused = touched, refused
    return made


def put_on(
    operation: Operation,
    connection: WatchedConnection,
    place: Place | str,
    scheme: Scheme,
    inside: Inside,
    preserve: bool | Preserve,
) -> tuple[nn.Module | None, str]:
    """Put what the scheme makes into and behind one branch; each step is noted as soon as it is taken.

    Returns what was put behind the branch, and behind which module.
    """
    put_inside(connection, inside, operation.steps, preserve=preserve is not False)
    site = connection.site
    if isinstance(place, Place) and place.axis is not None:
        site = replace(site, dim=place.dim, spatial=place.ndim - 1 - place.axis)
    skip = None if inside.skip == 1 else Multiply(1 / inside.skip)
    parts = [part for part in (scheme.scale(site), skip, scheme.drop(site)) if part is not None]
    if not parts:
        if not inside and (preserve is not False or not takes_step(scheme)):
            raise SkipwayError(f"{scheme} puts nothing behind a branch")
        return None, ", ".join(connection.seen.maps)
    if isinstance(place, str):
        raise SkipwayError(place)
    if place.axis is None:
        raise SkipwayError("no axis of what is added is as long as the stream is wide")
    target = operation.model.get_submodule(place.name)
    inserted = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    like = next((p for p in connection.owner.parameters() if p.is_floating_point()), None)
    if like is not None:
        inserted.to(like.device, like.dtype)
    operation.steps.append(behind(target, inserted.train(target.training)))
    operation.steps += on_slow_path(operation.model, place.name)
    operation.steps += settle(connection, inserted, preserve)
    return inserted, place.name


def settle(connection: WatchedConnection, inserted: nn.Module, preserve: bool | Preserve) -> list[Callable[[], None]]:
    """Choose the start of what was inserted so that the network computes what it did; returns what takes it back."""
    if preserve is False:
        return []
    steps: list[Callable[[], None]] = []
    divisor = 1.0
    for module in inserted.modules():
        if isinstance(module, Gain) and preserve == "divide":
            divisor *= module.init * module.factor
        elif isinstance(module, Gain):
            with torch.no_grad():
                module.gain.fill_(1 / module.factor)
            module.init = 1 / module.factor
        elif isinstance(module, Multiply):
            divisor *= module.factor
    if divisor == 0:
        raise SkipwayError("a gain that starts at 0 cannot be divided out; preserve=True starts it at 1")
    if divisor != 1:
        name = connection.seen.closing or connection.seen.last
        parameters = [] if name is None else connection.model.get_submodule(name).parameters()
        kept = [(parameter, parameter.detach().clone()) for parameter in parameters]
        connection.multiply_(1 / divisor)

        @torch.no_grad()
        def put_back() -> None:
            for parameter, old in kept:
                parameter.copy_(old)

        steps.append(put_back)
    return steps
