"""The branch of a depthwise convolution and a perceptron at every pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from skipway.nn.branch import Branch
from skipway.nn.kit import Kit
from skipway.nn.maps import LinearMap
from skipway.nn.placement import Placement
from skipway.nn.sequence import sequence

__all__ = ["DepthwiseMlp"]


class DepthwiseMlp(Branch):
    """ConvNeXt's branch: F(h) = W₂ r(act(W₁ norm(D h))), D a depthwise convolution, W₁ and W₂ maps of one pixel.

    D alone mixes space, W₁ and W₂ alone mix channels. r is the identity in v1, global response normalisation in v2.

    Shapes: (N, dim, H, W) → (N, dim, H, W); between the maps channels are last, (N, H, W, hidden).

    Args:
        dim: channels.
        hidden: channels between W₁ and W₂.
        kit: what to build from; its gate closes the branch.
        placement: its `inside` and `end` parts follow D and W₂.
        kernel_size: of the depthwise convolution D; odd.
        response: makes r from `hidden`; None for none.

    Source: Liu et al. 2022, "A ConvNet for the 2020s", fig. 4; Woo et al. 2023, "ConvNeXt V2", fig. 5.

    >>> from skipway.models.convnext import CONVNEXT_KIT
    >>> from skipway.nn.placement import INSIDE_NORM
    >>> branch = DepthwiseMlp(8, 32, kit=CONVNEXT_KIT, placement=INSIDE_NORM)
    >>> len(branch.path()), branch.inside.norm
    (3, LayerNorm2d((8,), eps=1e-06, elementwise_affine=True...))
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        kit: Kit,
        placement: Placement,
        kernel_size: int = 7,
        response: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.conv = kit.conv(dim, dim, kernel_size, groups=dim)
        self.inside = sequence(**kit.parts(placement.inside, dim))
        self.before1 = nn.Identity() if kit.before is None else kit.before()
        self.fc1 = kit.linear(dim, hidden)
        self.act = kit.act()
        self.response = nn.Identity() if response is None else response(hidden)
        self.before2 = nn.Identity() if kit.before is None else kit.before()
        self.fc2 = kit.linear(hidden, dim)
        self.end = sequence(**kit.parts(placement.end, dim))
        self.gate = nn.Identity() if kit.gate is None else kit.gate(dim)

    def path(self) -> list[LinearMap]:
        return [LinearMap(self.conv), LinearMap(self.fc1), LinearMap(self.fc2)]

    def closing_norm(self) -> nn.Module | None:
        return getattr(self.end, "norm", None)

    def closing(self) -> Sequence[nn.Module]:
        return [self.end, self.gate]

    def forward(self, h: Tensor) -> Tensor:
        pixels = self.before1(self.inside(self.conv(h)).movedim(1, -1))
        pixels = self.fc2(self.before2(self.response(self.act(self.fc1(pixels)))))
        return self.gate(self.end(pixels.movedim(-1, 1)))
