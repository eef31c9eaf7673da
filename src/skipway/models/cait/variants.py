"""The published members of the CaiT family."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from skipway.errors import SkipwayError
from skipway.models.cait.config import CaiTConfig
from skipway.models.cait.network import CaiT
from skipway.models.family import FAMILIES, Family, Variant
from skipway.schemes import parse_scheme

__all__ = ["cait_config"]

# Touvron et al. 2021, table 2: width, heads, depth; γ₀ as in the authors' cait_models.py, where XXS-36 departs from
# the paper's rule;
# image side and the parameters that go with it: timm 1.0
ROWS = {
    "xxs24": (192, 4, 24, 1e-5, 224, 11_956_264),
    "xxs36": (192, 4, 36, 1e-5, 224, 17_299_720),
    "xs24": (288, 6, 24, 1e-5, 384, 26_670_088),
    "s24": (384, 8, 24, 1e-5, 224, 46_916_200),
    "s36": (384, 8, 36, 1e-6, 384, 68_366_632),
    "m36": (768, 16, 36, 1e-6, 384, 271_221_352),
    "m48": (768, 16, 48, 1e-6, 448, 356_460_520),
}


def cait_config(depth: int, base: CaiTConfig | None = None) -> CaiTConfig:
    """`base` (by default CaiT-S) with another number of self-attention blocks.

    >>> cait_config(48).branches
    100
    """
    if depth < 1:
        raise SkipwayError(f"depth={depth}: a CaiT has at least one block; every depth from 1 on is possible")
    return replace(base or cait_variant("s24").config, blocks=depth)


def cait_variant(name: str) -> Variant:
    """A row of the table."""
    dim, heads, blocks, init, image, parameters = ROWS[name]
    config = CaiTConfig(
        dim=dim, heads=heads, blocks=blocks, image=image, scheme=parse_scheme(f"layerscale(init={init})")
    )
    return Variant(
        name=f"cait-{name}",
        family="cait",
        config=config,
        at_depth=partial(cait_config, base=config),
        parameters=parameters,
        description=f"{blocks} blocks of {dim} channels",
    )


FAMILIES.add(
    "cait",
    Family(
        name="cait",
        description="Touvron et al. 2021: LayerScale, talking heads, class attention; depth counts blocks",
        module=CaiT,
        at_depth=cait_config,
        pattern=r"cait-(?P<depth>\d+)",
        aliases={
            f"cait_{name}_{image}": (f"cait-{name}", {"image": image})
            for name, image in (
                *(("xxs24", 224), ("xxs24", 384), ("xxs36", 224), ("xxs36", 384), ("xs24", 384)),
                *(("s24", 224), ("s24", 384), ("s36", 384), ("m36", 384), ("m48", 448)),
            )
        },
        variants=tuple(cait_variant(name) for name in ROWS),
    ),
)
