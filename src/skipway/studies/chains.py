"""Chains of fully connected residual blocks with any scheme, thousands of blocks deep, and the signal through them.

Schemes are applied by the same hooks as in every model family, so that the measured blocks are those of real networks.
Sizes are kept as logarithms, so that nothing overflows at any depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.nn import Linear, Residual
from skipway.nn.history import State, as_sources
from skipway.nn.initial import HeNormal
from skipway.nn.kit import Kit
from skipway.nn.placement import POST_NORM, PRE_NORM, Placement
from skipway.nn.site import Site
from skipway.nn.tokens import Mlp
from skipway.schemes import Scheme, parse_scheme
from skipway.schemes.initialisation import initialise_

__all__ = ["Crossing", "DetachedBranch", "block_chain", "cross"]

# with He initialisation norm, act, linear, norm, act, linear preserves the second moment, and a transformer's norm,
# linear, act, linear doubles it
PLACEMENTS = {"pre": Placement(pre=("norm", "act"), inside=("norm",)), "post": POST_NORM, "transformer": PRE_NORM}
NORMS = {"none": None, "layer": partial(nn.LayerNorm, eps=1e-12), "batch": partial(nn.BatchNorm1d, eps=1e-12)}

# large, that maps which are bounded are told from linear ones, and a power of two, that rounding is the same
FACTOR = 2.0**20


@dataclass(frozen=True)
class Crossing:
    """Change of signal and gradient across a chain.

    Args:
        forward: log₂ of the ratio of the stream's second moments after the last and before the first block.
        backward: log₂ of the ratio of the gradient's second moments before the first and after the last block.
    """

    forward: float
    backward: float


def block_chain(
    scheme: str | Scheme, depth: int, *, width: int = 64, norm: str = "none", place: str = "pre"
) -> nn.Sequential:
    """Build `depth` blocks y = x + W₂ relu(norm(W₁ relu(norm(x)))) with a scheme, initialised.

    Several streams, and earlier outputs, begin and end within the chain: one more module in front of the blocks, behind
    them, or both.

    Args:
        scheme: a scheme or its spec string.
        depth: number of residual branches L.
        width: of the stream.
        norm: none, layer or batch.
        place: pre; post: y = norm(x + W₂ relu(W₁ x)); or transformer: y = x + W₂ relu(W₁ norm(x)).

    >>> round(cross(block_chain("rezero", 50)).forward, 3), round(cross(block_chain("fixup", 9)).backward, 3)
    (0.0, 0.0)
    """
    chosen = parse_scheme(scheme)
    linear = partial(Linear, initial=HeNormal("fan_in"))
    kit = Kit(conv=linear, linear=linear, norm=NORMS[norm], act=nn.ReLU)
    with torch.device("meta"):
        blocks = []
        for index in range(depth):
            site = Site(dim=width, index=index, depth=depth, since=index, spatial=0, kind="mlp")
            branch = lambda kit, placement: Mlp(width, width, kit=kit, placement=placement)  # noqa: E731
            blocks.append(
                Residual(**chosen.slots(site, branch=branch, shortcut=None, kit=kit, placement=PLACEMENTS[place]))
            )
        ends = chosen.open(), chosen.close(width, 0, chosen.kit(None, kit))
        opened, closed = ([] if each is None else [each] for each in ends)
        chain = nn.Sequential(*opened, *blocks, *closed)
    return initialise_(chain, chosen, device="cpu")  # type: ignore[return-value]


def cross(chain: nn.Sequential, *, batch: int = 16, seed: int = 0) -> Crossing:
    """Send normal inputs forward and a normal gradient backward through a chain, block by block.

    The backward pass is linear in the gradient, which is therefore rescaled to size 1 after every block, and the
    logarithm of its size added up. So is the stream where all blocks are homogeneous, f(c x) = c f(x) for c > 0 (no
    norms, no bounded maps; biases are 0 at initialisation), as comparing both sides shows. The parameters of `chain`
    are set to require no gradient, in place.

    Args:
        chain: of `block_chain`; several streams are opened by its first module and closed by its last one.
        batch: number of samples.
        seed: of input, gradient, and branches that are dropped.

    Raises:
        SkipwayError: the stream or the gradient vanishes or is not finite, so that its size has no logarithm.
    """
    generator = torch.Generator().manual_seed(seed)
    width = next(module.weight.shape[-1] for module in chain.modules() if isinstance(module, nn.Linear))
    stream, gradient = (torch.randn(batch, width, generator=generator) for _ in range(2))
    chain.requires_grad_(False)
    with torch.random.fork_rng(devices=()):
        states, forward = pass_forward(chain, stream / size(stream), seed)
        gradients, backward = [gradient / size(gradient)], 0.0
        for number in reversed(range(len(chain))):
            before = [each.detach().requires_grad_() for each in as_sources(states[number])]
            state = before[0] if isinstance(states[number], Tensor) else tuple(before)
            after = as_sources(run_block(chain, number, state, seed))
            found = torch.autograd.grad(after, before, gradients, materialize_grads=True)
            total = size(torch.cat(found))
            backward += bits_of(total, f"the gradient before block {number}", chain)
            gradients = [each / total for each in found]
    return Crossing(forward, backward)


def pass_forward(
    chain: nn.Sequential, stream: Tensor, seed: int, *, homogeneous: bool = True
) -> tuple[list[State], float]:
    """The states before all blocks, and log₂ of the growth; begun anew where a block is not homogeneous after all."""
    states, forward, state = list[State](), 0.0, cast(State, stream)
    for number in range(len(chain)):
        states.append(state)
        with torch.no_grad():
            after = run_block(chain, number, state, seed)
            if homogeneous and not scales(chain, number, state, after, seed):
                return pass_forward(chain, stream, seed, homogeneous=False)
        if homogeneous:
            assert isinstance(after, Tensor)
            forward += bits_of(size(after), f"the stream after block {number}", chain)
            after = after / size(after)
        state = after
    if not homogeneous:
        forward = bits_of(size(torch.cat(as_sources(state))), "the stream after the last block", chain)
    return states, forward


def scales(chain: nn.Sequential, number: int, state: State, after: State, seed: int) -> bool:
    """Whether a block is homogeneous, f(c x) = c f(x): exactly, since c is a power of two."""
    if not isinstance(state, Tensor) or not isinstance(after, Tensor):  # a history, which would be copied at each block
        return False
    larger = run_block(chain, number, FACTOR * state, seed)
    return isinstance(larger, Tensor) and torch.equal(larger, FACTOR * after)


def run_block(chain: nn.Sequential, number: int, state: State, seed: int) -> State:
    """A block's output, with the same random numbers at every call."""
    torch.default_generator.manual_seed(seed + number)
    return chain[number](state)


class DetachedBranch(nn.Module):
    """A branch through which no gradient passes: what remains went along the skip."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x).detach()


def size(x: Tensor) -> Tensor:
    """Root mean square."""
    return x.double().square().mean().sqrt().float()


def bits_of(size: Tensor, what: str, chain: nn.Sequential) -> float:
    """log₂ of the second moment that belongs to a root mean square."""
    if not 0 < float(size) < math.inf:
        raise SkipwayError(
            f"{what} of {len(chain)} has the size {float(size):g}, of which there is no logarithm; take fewer or wider "
            "blocks, or a scheme that keeps its size"
        )
    return 2 * math.log2(float(size))
