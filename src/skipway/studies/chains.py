"""Chains of fully connected residual blocks with any scheme, thousands of blocks deep, and the signal through them.

Schemes are applied by the same hooks as in every model family, so that the measured blocks are those of real networks.
Sizes are kept as logarithms, so that nothing overflows at any depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from skipway.nn import Linear, Residual
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
        chain = nn.Sequential(*blocks)
    return initialise_(chain, chosen, device="cpu")  # type: ignore[return-value]


def cross(chain: nn.Sequential, *, batch: int = 16, seed: int = 0, homogeneous: bool | None = None) -> Crossing:
    """Send normal inputs forward and a normal gradient backward through a chain, block by block.

    Without norms a block is homogeneous, f(c x) = c f(x) for c > 0 (biases are 0 at initialisation), so the stream is
    rescaled to size 1 after every block and the logarithm of its size added up. The backward pass is linear in the
    gradient, which is therefore always rescaled. The parameters of `chain` are set to require no gradient, in place.

    Args:
        batch: number of samples.
        seed: of input and gradient.
        homogeneous: whether the blocks are homogeneous; None means that there are no norms.
    """
    if homogeneous is None:
        homogeneous = not any(isinstance(module, nn.LayerNorm | nn.BatchNorm1d) for module in chain.modules())
    generator = torch.Generator().manual_seed(seed)
    width = next(module.weight.shape[-1] for module in chain.modules() if isinstance(module, nn.Linear))
    stream = torch.randn(batch, width, generator=generator)
    stream = stream / size(stream)
    streams, forward = [], 0.0
    with torch.no_grad():
        for block in chain:
            streams.append(stream)
            stream = block(stream)
            if homogeneous:
                forward += log_size(stream)
                stream = stream / size(stream)
    if not homogeneous:
        forward = log_size(stream)
    gradient = torch.randn(batch, width, generator=generator)
    gradient, backward = gradient / size(gradient), 0.0
    chain.requires_grad_(False)
    for block, before in zip(reversed(chain), reversed(streams), strict=True):
        before = before.requires_grad_()
        (gradient,) = torch.autograd.grad(block(before), before, gradient)
        backward += log_size(gradient)
        gradient = gradient / size(gradient)
    return Crossing(forward, backward)


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


def log_size(x: Tensor) -> float:
    """log₂ of the second moment."""
    return math.log2(max(float(x.double().square().mean()), 1e-300))
