"""The published members of the Swin family and the depth dial."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from skipway.errors import SkipwayError
from skipway.models.family import FAMILIES, Family, Variant
from skipway.models.swin.aliases import ALIASES
from skipway.models.swin.config import SwinConfig
from skipway.models.swin.network import Swin
from skipway.schemes import parse_scheme

__all__ = ["V1", "V2", "swin_config"]

# Liu et al. 2021, sec. 3.3: channels, blocks per stage; heads are 32 channels wide
V1 = {
    "tiny": SwinConfig(dim=96, heads=3, blocks=(2, 2, 6, 2)),
    "small": SwinConfig(dim=96, heads=3, blocks=(2, 2, 18, 2)),
    "base": SwinConfig(dim=128, heads=4, blocks=(2, 2, 18, 2)),
    "large": SwinConfig(dim=192, heads=6, blocks=(2, 2, 18, 2)),
}

# Liu et al. 2022, sec. 3.2-3.3 and the same sizes. The norms that close the branches start at 0: the authors' code
V2 = {
    size: replace(config, attention="cosine", norm="respost", window=8, image=256, scheme=parse_scheme("zeroinit"))
    for size, config in V1.items()
} | {
    "large": replace(
        V1["large"], attention="cosine", norm="respost", window=16, image=256, scheme=parse_scheme("zeroinit")
    )
}

# Parameters at 1000 classes. V1 (windows of 7): torchvision's documentation and, large, timm's results table. V2: the
# authors' code and timm's results table; torchvision counts a bias of the keys too, which it sets to 0 in every forward
# (4,416 numbers more in tiny, 9,024 in small, 12,032 in base).
PARAMETERS = {
    "swin": {"tiny": 28_288_354, "small": 49_606_258, "base": 87_768_224, "large": 196_532_476},
    "swinv2": {"tiny": 28_347_154, "small": 49_728_418, "base": 87_918_816, "large": 196_739_932},
}
NAMES = {"swin": V1, "swinv2": V2}
PAPERS = {
    "swin": "Liu et al. 2021: attention within shifted windows, four stages",
    "swinv2": "Liu et al. 2022: Swin with norms after the branches, cosine attention, continuous positions",
}


def swin_config(depth: int, base: SwinConfig = V1["tiny"]) -> SwinConfig:
    """`base` with another number of blocks: 2, 2, n − 6, 2 of n, the papers' rule (n is 12 or 24 there).

    Shifted and unshifted blocks alternate, so every stage has an even number.

    >>> swin_config(24).blocks, swin_config(100).blocks
    ((2, 2, 18, 2), (2, 2, 94, 2))
    """
    if depth < 8 or depth % 2:
        near = "8 and 10" if depth < 8 else f"{depth - 1} and {depth + 1}"
        raise SkipwayError(
            f"depth={depth}: a Swin has an even number of blocks from 8 on (2, 2, n - 6 and 2 of n); near it are {near}"
        )
    return replace(base, blocks=(2, 2, depth - 6, 2))


for family, sizes in NAMES.items():
    FAMILIES.add(
        family,
        Family(
            name=family,
            description=f"{PAPERS[family]}; depth counts blocks",
            module=Swin,
            at_depth=partial(swin_config, base=sizes["tiny"]),
            pattern=rf"{family}-(?P<depth>\d+)",
            aliases={alias: entry for alias, entry in ALIASES.items() if entry[0].partition("-")[0] == family},
            variants=tuple(
                Variant(
                    name=f"{family}-{size}",
                    family=family,
                    config=config,
                    at_depth=partial(swin_config, base=config),
                    parameters=PARAMETERS[family][size],
                    description=f"{config.dim} channels, blocks {config.blocks}, windows of {config.window}",
                )
                for size, config in sizes.items()
            ),
        ),
    )
