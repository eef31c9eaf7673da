"""Stage maps: where the stages of a network end, and how the stream there becomes an image map for dense tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["ChannelsFirst", "ChannelsLast", "StageMap", "TokenGrid"]


class ChannelsFirst:
    """A stream that is a map already: (N, C, H, W) → (N, C, H, W)."""

    def __call__(self, stream: Tensor, image: Tensor) -> Tensor:
        return stream


class ChannelsLast:
    """A map with its channels last: (N, H, W, C) → (N, C, H, W), a view."""

    def __call__(self, stream: Tensor, image: Tensor) -> Tensor:
        return stream.movedim(-1, 1)


@dataclass(frozen=True)
class TokenGrid:
    """Patch tokens in row-major order after `prefix` other tokens: (N, prefix + H·W, C) → (N, C, H, W), a view.

    H and W are the image's sides over `patch`, so an image of another shape than in training is no exception.

    >>> import torch
    >>> TokenGrid(patch=4, prefix=1)(torch.zeros(2, 7, 8), torch.zeros(2, 3, 8, 12)).shape
    torch.Size([2, 8, 2, 3])
    """

    patch: int
    prefix: int = 0

    def __call__(self, stream: Tensor, image: Tensor) -> Tensor:
        rows, columns = (side // self.patch for side in image.shape[-2:])
        return stream[:, self.prefix :].transpose(1, 2).unflatten(2, (rows, columns))


@dataclass(frozen=True)
class StageMap:
    """One entry of what a network answers to `stage_maps()`, in the order of the stages.

    Args:
        path: of the submodule whose output is the stream at the end of the stage.
        channels: C of the map.
        reduction: pixels of the image along one side of a pixel of the map.
        to_map: (stream, image) → (N, C, H, W).
    """

    path: str
    channels: int
    reduction: int
    to_map: Callable[[Tensor, Tensor], Tensor] = ChannelsFirst()  # noqa: RUF009 - it has no state
