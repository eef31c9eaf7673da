"""Residual branches of convolutions. A branch declares its path: the linear maps that its signal crosses, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import nn

from skipway.nn.kit import Kit
from skipway.nn.maps import LinearMap
from skipway.nn.placement import Part

__all__ = ["Branch", "Conv", "ConvBranch"]


class Branch(nn.Module):
    """Abstract base of residual branches. Subclasses define `path` and, if a norm closes the branch, `closing_norm`.

    `closing` and `fills` let `skipway.fuse` multiply a branch's scale into its weights.
    """

    fills: ClassVar[bool] = True
    """True if all of the output has passed through the last map; False if it is padded with zeros."""

    def path(self) -> list[LinearMap]:
        """The linear maps that the signal crosses, first to last; its length is Fixup's m."""
        raise NotImplementedError

    def closing_norm(self) -> nn.Module | None:
        """The norm after the last map, whose gain can silence the branch, or None."""
        return None

    def closing(self) -> Sequence[nn.Module] | None:
        """The modules after the last map, in order, with nothing else in between; None if unknown."""
        return None


class Conv(NamedTuple):
    """One convolution of a branch: (N, in_channels, H, W) → (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉)."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    groups: int = 1


class ConvBranch(Branch, nn.Sequential):
    """conv1 → norm1 → act1 → conv2 → … → conv_m → closing parts → gate, each part from the kit.

    Args:
        convs: the convolutions in order.
        kit: what to build from; parts that it lacks are left out.
        end: parts after the last convolution: ("norm",), ("norm", "act") or ().

    >>> from skipway.models.resnet.blocks import CONV_KIT
    >>> branch = ConvBranch([Conv(16, 16, 3), Conv(16, 16, 3)], CONV_KIT, end=("norm",))
    >>> [name for name, _ in branch.named_children()]
    ['conv1', 'norm1', 'act1', 'conv2', 'norm2']
    >>> len(branch.path())
    2
    """

    def __init__(self, convs: Sequence[Conv], kit: Kit, end: tuple[Part, ...]) -> None:
        super().__init__()
        self.length = len(convs)
        for number, conv in enumerate(convs, start=1):
            last = number == len(convs)
            before = kit.before if number > 1 else None
            parts = {
                "before": None if before is None else before(),
                "conv": kit.conv(*conv),
                **kit.parts(end if last else ("norm", "act"), conv.out_channels, fresh=True),
                "gate": kit.gate(conv.out_channels) if last and kit.gate is not None else None,
            }
            for name, module in parts.items():
                if module is not None:
                    self.add_module(f"{name}{number}" if name != "gate" else name, module)

    def path(self) -> list[LinearMap]:
        return [LinearMap(self.get_submodule(f"conv{number}")) for number in range(1, self.length + 1)]

    def closing_norm(self) -> nn.Module | None:
        norm = self._modules.get(f"norm{self.length}")
        return None if isinstance(norm, nn.Identity) else norm  # folded away

    def closing(self) -> Sequence[nn.Module]:
        names = list(self._modules)
        return [self.get_submodule(name) for name in names[names.index(f"conv{self.length}") + 1 :]]
