"""Small square matrices of parameters that mix streams, in anybody's network: how the output depends on them.

They are known by what they do, on a copy with random inputs. A matrix of logits (a softmax or Sinkhorn follows) is one
whose gradient sums to 0, since a constant on all logits changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipway.nn import Streams
from skipway.optim.roles import UNKNOWN, role_of
from skipway.tracing import Example, Program, call_model
from skipway.tracing.containers import map_tensors, tensors_in
from skipway.tracing.example import copy_example

__all__ = ["StreamMatrix", "find_stream_matrices", "random_example", "stay_symmetric"]

STREAMS = range(2, 17)
"""Numbers of streams that are looked for; xHC has 16."""
NEAR = 8
"""Operators between a vector of parameters and its view as a square."""
SUMS_TO_ZERO = 1e-3
STEPS = 4
"""Steps after which streams that can become different are different."""
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-9}
"""Difference between weights of streams that is rounding."""


@dataclass(frozen=True)
class StreamMatrix:
    """A square of numbers within a parameter.

    Args:
        name: of the parameter.
        place: which of the squares of the parameter.
        values: now, (n, n).
        gradient: of a random projection of the output by them, on a copy whose streams were made to differ.
        gradient_elsewhere: the same with numbers drawn at random in their place, where no softmax is saturated.
    """

    name: str
    place: int
    values: Tensor
    gradient: Tensor
    gradient_elsewhere: Tensor

    @property
    def is_dead(self) -> bool:
        """Whether nothing that the network puts out depends on them."""
        return not bool(self.gradient.any()) and not bool(self.gradient_elsewhere.any())

    @property
    def is_logits(self) -> bool:
        """Whether they go through a softmax or the like."""
        given = self.gradient_elsewhere
        return bool(given.any()) and float(given.sum().abs()) < SUMS_TO_ZERO * float(given.abs().sum())

    @property
    def is_identity(self) -> bool:
        return torch.equal(self.values, torch.eye(len(self.values), dtype=self.values.dtype))

    @property
    def keeps_streams(self) -> bool:
        """Whether the diagonal is above the rest: a stream goes on mostly as it was."""
        on = torch.eye(len(self.values), dtype=torch.bool)
        return float(self.values[on].min()) > float(self.values[~on].max()) + 0.5

    @property
    def mixes(self) -> bool:
        """Whether it is known to mix: logits, the identity that hyper-connections start from, or one without effect."""
        return self.is_dead or self.is_logits or self.is_identity

    @property
    def response(self) -> float:
        """What a change of the logits does, as a share of what it does where all are equal: mean p (1 − p) of their
        softmax, over that of p = 1 / n.
        """
        count = len(self.values)
        shares = torch.softmax(self.values.double(), dim=-1)
        return float((shares * (1 - shares)).mean()) * count**2 / (count - 1)

    @property
    def asymmetry(self) -> float:
        """Largest distance from one number on the diagonal and one off it, which treat all streams alike."""
        on = torch.eye(len(self.values), dtype=torch.bool)
        parts = (self.values[on], self.values[~on])
        return max(float((part - part.mean()).abs().max()) for part in parts)


def candidates(model: nn.Module, program: Program) -> dict[str, int]:
    """Parameters of unknown modules and of `nn.Streams` that hold a square of numbers, each with its side n."""
    found = {}
    for path, module in model.named_modules():
        if path not in program.runs and path:
            continue
        for own, value in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            known = role_of(module, own) is not UNKNOWN and not isinstance(module, Streams)
            side = None if known or value.is_meta or not value.is_floating_point() else side_of(value)
            if side is not None and (value.squeeze().ndim == 2 or is_viewed_as_square(program, name, side)):
                found[name] = side
    return found


def side_of(value: Tensor) -> int | None:
    """n of n × n, of n × n with one or two columns or rows more (read and write weights), or of as many in one row."""
    shape = sorted(value.squeeze().shape)
    if len(shape) == 2 and shape[0] in STREAMS and shape[1] - shape[0] <= 2:
        return shape[0]
    sides = [n for n in STREAMS if shape in ([n * n], [n * (n + 1)], [n * (n + 2)])]
    return sides[0] if len(sides) == 1 else None


def is_viewed_as_square(program: Program, name: str, side: int) -> bool:
    """Whether what is made of a parameter within a few operators ends in axes (n, n)."""
    waiting = program.leaves.get(name, [])
    for _ in range(NEAR):
        waiting = [user for number in waiting for user in program.users[number]]
        if any(program[number].shape[-2:] == (side, side) for number in waiting):
            return True
    return False


def squares(value: Tensor, side: int) -> Iterator[Tensor]:
    """The views of a tensor that are squares: neighbouring columns, or the parts of a row."""
    value = value.squeeze()
    if value.ndim == 1:
        for first in range(0, value.numel() - side * side + 1, side):
            yield value[first : first + side * side].view(side, side)
        return
    value = value if value.shape[0] == side else value.T
    for first in range(value.shape[1] - side + 1):
        yield value[:, first : first + side]


def find_stream_matrices(model: nn.Module, example: Example, program: Program) -> tuple[StreamMatrix, ...]:
    """The squares of parameters that mix streams; none where the model has no candidates or cannot be differentiated.

    A place is decided for all parameters of one name and shape: the first and the last connection may not show it.
    """
    sides = candidates(model, program)
    if not sides:
        return ()
    trial = copy.deepcopy(model).cpu().eval().requires_grad_(True)
    values = {name: trial.get_parameter(name) for name in sides}
    given = random_example(example, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # what is equal by a start, as the weights of several streams, is to differ
        for name, value in trial.named_parameters():
            if name not in values and value.is_floating_point():
                drawn = torch.randn(value.shape, generator=generator, device="cpu").to(value)
                value.add_((0.1 * value.abs().mean() + 0.05) * drawn)
    now = gradients(trial, given, values, noisy=True)
    with torch.no_grad():
        for name, side in sides.items():
            for square in squares(values[name], side):
                square.copy_(torch.randn(square.shape, generator=generator, device="cpu"))
    elsewhere = gradients(trial, given, values, noisy=True)
    if now is None or elsewhere is None:
        return ()
    places: dict[tuple[str, torch.Size], list[list[StreamMatrix]]] = {}
    for name, side in sides.items():
        tensors = (model.get_parameter(name).detach().cpu(), now[name], elsewhere[name])
        views = zip(*(squares(tensor, side) for tensor in tensors), strict=True)
        key = name.rpartition(".")[2], tensors[0].shape
        places.setdefault(key, []).append([StreamMatrix(name, place, *each) for place, each in enumerate(views)])
    return tuple(each for alike in places.values() for each in chosen_place(alike))


def chosen_place(alike: list[list[StreamMatrix]]) -> tuple[StreamMatrix, ...]:
    """The place of the squares among parameters of one kind: each has the same number of places."""
    found = [place for place in zip(*alike, strict=True) if any(each.mixes for each in place)]

    def rank(place: tuple[StreamMatrix, ...]) -> tuple[bool, bool]:
        return not any(each.is_identity for each in place), not any(each.is_logits for each in place)

    best = min(found, key=rank, default=())
    dead = best and all(each.is_dead for each in best)
    return best if dead or any(each.is_logits or each.is_identity for each in best) else ()


def random_example(example: Example, seed: int, dtype: torch.dtype | None = None) -> Example:
    """An example of the same shapes with numbers drawn at random; indices stay as they are."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator, device="cpu").to(dtype or tensor.dtype)
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.cpu().clone()

    return map_tensors(draw, example)


class NoisyCopies(TorchFunctionMode):
    """Context in which copies and maps are a little off, so that equal streams differ and no zero hides what depends
    on what.
    """

    NOISY = frozenset({"expand", "repeat", "stack", "cat", "linear", "repeat_interleave", "tile"})

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        noisy = getattr(func, "__name__", "") in self.NOISY and isinstance(result, Tensor)
        if not noisy or not result.is_floating_point() or result.ndim < 2:
            return result
        size = 0.1 * result.detach().square().mean().sqrt() + 0.01
        if not bool(size < 1e3):  # a mask, which holds what is lowest
            return result
        return result + size * torch.randn(result.shape, generator=self.generator, device="cpu").to(result.dtype)


def gradients(
    model: nn.Module, example: Example, values: Mapping[str, Tensor], *, noisy: bool = False
) -> dict[str, Tensor] | None:
    """The gradient of a random projection of all outputs by some parameters; None where there is none."""
    generator = torch.Generator().manual_seed(2)
    try:
        with torch.enable_grad(), NoisyCopies() if noisy else nullcontext():
            output = call_model(model, copy_example(example))
        outputs = [each for each in tensors_in(output) if each.is_floating_point()]
        drawn = (torch.randn(each.shape, generator=generator, device="cpu").to(each) for each in outputs)
        loss = sum((each * weights).sum() for each, weights in zip(outputs, drawn, strict=True))
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return None
        found = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
    except Exception:  # a foreign model may raise anything on random numbers
        return None
    pairs = zip(values.items(), found, strict=True)
    return {name: torch.zeros_like(value) if each is None else each for (name, value), each in pairs}


def stay_symmetric(model: nn.Module, example: Example, matrices: Sequence[StreamMatrix]) -> bool:
    """Whether matrices still treat all streams alike after a few steps of training on noise.

    Streams that are equal and weighed alike stay so for ever, since their gradients are the same. In float64, where the
    model works in it, which tells that from a small difference.
    """
    for dtype, rounding in ROUNDING.items():
        trial = copy.deepcopy(model).cpu().eval().to(dtype).requires_grad_(True)
        values = [
            (each, list(squares(trial.get_parameter(each.name).detach(), len(each.values)))[each.place])
            for each in matrices
        ]
        for step in range(STEPS):
            if not take_step(trial, random_example(example, step, dtype)):
                break
            if any(replace(each, values=square).asymmetry > rounding for each, square in values):
                return False
        else:
            return True
    return False


def take_step(model: nn.Module, example: Example) -> bool:
    """Move all parameters along the gradient, a distance of 1; False where there is none."""
    parameters = dict(model.named_parameters())
    found = gradients(model, example, parameters)
    if found is None:
        return False
    size = float(torch.stack([each.square().sum() for each in found.values()]).sum().sqrt())
    with torch.no_grad():
        for name, value in parameters.items():
            value.sub_(found[name], alpha=1 / max(size, 1e-12))
    return True
