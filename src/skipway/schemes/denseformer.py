from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skipway.errors import SkipwayError, counted
from skipway.nn import DenseResidual, LastExit
from skipway.nn.kit import Kit
from skipway.nn.site import Site
from skipway.schemes.scheme import Scheme
from skipway.validation import check_positive_int

__all__ = ["DenseFormer"]


def earlier_blocks(site: Site) -> int:
    """The blocks before the one that a branch is in: of one convolutional branch, or of an attention and an MLP.

    Raises:
        SkipwayError: the branch is no part of such a block, as in a chain of MLPs alone.

    >>> earlier_blocks(Site(dim=8, index=3, since=3, depth=4, kind="mlp"))
    1
    """
    if site.kind == "conv":
        return site.outputs
    blocks, second = divmod(site.outputs, 2)
    if second != (site.kind == "mlp"):
        raise SkipwayError(
            f"kind={site.kind!r} behind {counted(site.outputs, 'branch', 'branches')} of its shape: a block is an "
            "attention and the MLP after it, so that an even number of branches precedes an attention and an odd one "
            "an MLP; kind='conv' makes a block of each branch"
        )
    return blocks


def mixed_outputs(site: Site, dilation: int, period: int) -> tuple[int, ...]:
    """Indices of the block outputs X that are mixed after a connection, X₀ what the blocks began with; none where no
    block ends, the period leaves the block out, or shapes change.
    """
    block = earlier_blocks(site) + 1
    if site.kind == "attention" or site.entry != site.dim or block % period:
        return ()
    return tuple(range(block % dilation, block + 1, dilation))


@dataclass(frozen=True)
class DenseFormer(Scheme):
    """After a block, a learned mixture of all earlier ones: y = Σⱼ aⱼ Xⱼ, X₀ the stem's output, Xⱼ that of block j.

    Args:
        dilation: k, only every k-th output before the newest is read.
        period: p, only every p-th block is followed by a mixture.

    Depth: a block is two branches of a transformer (attention and MLP) or one of a convolutional network. Mixtures end
    with a stage, since other shapes cannot be added.

    Decay and learning rate: a is not decayed, which would shrink the stream at each block (the authors' code has it in
    a linear map, which most optimizers decay).

    Theory at the start: a = (0, …, 0, 1): the network of the family. Its depth mixing matrix is then that of a plain
    one, and afterwards a product of the mixtures.

    Source: Pagliardini et al. 2024, "DenseFormer: Enhancing Information Flow in Transformers via Depth Weighted
    Averaging", and the authors' `denseformer` package (`DWAModules`). "Attention Residuals" (2026, table 4) finds no
    gain beside a pre-norm network.

    >>> DenseFormer(dilation=2).streams(Site(dim=8, index=3, since=3, depth=4, kind="mlp")).reads
    (0, 2)
    """

    dilation: int = 1
    period: int = 1

    equation: ClassVar[str] = "y = Σⱼ aⱼ Xⱼ after each block, Xⱼ the output of block j"
    when: ClassVar[str] = "to let late blocks read early ones at next to no cost"
    source: ClassVar[str] = "Pagliardini et al. 2024"

    def __post_init__(self) -> None:
        check_positive_int("dilation", self.dilation)
        check_positive_int("period", self.period)

    def streams(self, site: Site, kit: Kit | None = None) -> DenseResidual:
        reads = mixed_outputs(site, self.dilation, self.period)
        return DenseResidual(reads, ends=site.kind != "attention", spatial=site.spatial)

    def restart(self, dim: int, spatial: int) -> LastExit:
        return LastExit()

    def close(self, dim: int, spatial: int, kit: Kit | None = None) -> LastExit:
        return LastExit()
