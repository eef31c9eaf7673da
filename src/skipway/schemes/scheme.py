"""A scheme says how every residual connection of a network is dressed: a few hooks with neutral defaults."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import nn

from skipway.errors import SkipwayError
from skipway.nn import sequence
from skipway.nn.kit import Kit
from skipway.nn.placement import Placement
from skipway.nn.shortcut import Cut
from skipway.nn.site import Kind, Site
from skipway.nn.streams import Streams
from skipway.registry import Registry, parse_spec
from skipway.tracing.chain import Chain
from skipway.validation import check_rule

__all__ = ["Scheme", "Stack", "all_schemes", "parse_scheme", "short_spec"]

REGISTRY: Registry[type[Scheme]] = Registry("scheme", "skipway schemes")


class Scheme:
    """Abstract base of residual schemes. A scheme is a final, frozen dataclass derived from it.

    Each hook answers for one slot of `Residual`, y = post(shortcut(x, h) + drop(scale(branch(h)))), h = enter(pre(x)):

    | hook | decides | overridden by |
    |---|---|---|
    | `kit(site, kit)` | what branches, stem and head are built from | SkipInit, Fixup, ReZero, NormFree |
    | `place(site, placement)` | where norm and activation stand | PreActivation, DeepNorm, ReZero, NormFree |
    | `enter(site)` | what stands last before the branch and the projection | Fixup, NormFree, LayerNormScaling |
    | `transition(site)` | what stands before a map between stages that is no connection | Fixup, NormFree |
    | `scale(site)` | what multiplies the branch | SkipInit, LayerScale, ReZero, Fixup, NormFree, DepthScaled |
    | `carry(site, shortcut)` | what happens to the skip | Plain, DeepNorm |
    | `drop(site)` | what may drop the branch | StochasticDepth |
    | `join(site)` | what takes the place of the addition | Orthogonal, LAuReL, Highway, GTrXL |
    | `streams(site, kit)` | how several streams or earlier outputs are read, mixed and written; `open()` \
      and `close()` begin and end them, `restart()` ends a history between stages \
      | HyperConnections, MHC, AttentionResiduals |
    | `init_(chain)` | the whole-network step after a full reset | Fixup, ZeroInit, DeepNorm, DepthScaled |

    Schemes add: `LayerScale() + StochasticDepth(0.1)`. A class that derives from `Scheme` is registered under its own
    name in lower case, so `build(..., scheme="fixup")` finds it.
    """

    equation: ClassVar[str]
    """The connection in one line."""
    norm_note: ClassVar[str] = "keeps it"
    """Effect of the scheme on the family's normalisation."""
    when: ClassVar[str]
    """When to use it, in one line."""
    source: ClassVar[str]
    """Paper and year, with the equation or table."""
    kinds: ClassVar[tuple[Kind, ...]] = ("conv", "attention", "mlp")
    """Kinds of branches that the scheme is for; others are refused."""
    numbers_blocks: ClassVar[bool] = False
    """Whether `enter` depends on the number of the block, `site.block_number`."""
    refusal: ClassVar[str] = ""
    """Why other kinds are refused, with a way out."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__name__ != "Stack":
            REGISTRY.add(cls.__name__.lower(), cls)

    @property
    def silent(self) -> bool:
        """True if exactly one factor of every branch starts at zero: the network starts as its shortcuts alone."""
        return False

    def kit(self, site: Site | None, kit: Kit) -> Kit:
        """The kit that a connection is built from; `site` is None for stem and head."""
        return kit

    def place(self, site: Site | None, placement: Placement) -> Placement:
        """The positions of norm and activation; `site` is None for stem and head."""
        return placement

    def enter(self, site: Site) -> nn.Module | None:
        """The module between pre(x) and the first map; a projection shortcut sees its output, too."""
        return None

    def transition(self, site: Site) -> nn.Module | None:
        """The module before a map between stages that is no connection, or None."""
        return None

    def scale(self, site: Site) -> nn.Module | None:
        """The module that scales the branch, or None."""
        return None

    def carry(self, site: Site, shortcut: nn.Module | None) -> nn.Module | None:
        """The shortcut to use; None carries x unchanged."""
        return shortcut

    def drop(self, site: Site) -> nn.Module | None:
        """The module that drops the branch, or None."""
        return None

    def join(self, site: Site) -> nn.Module | None:
        """The module that joins (skip, f) in place of the addition, or None."""
        return None

    def streams(self, site: Site, kit: Kit | None = None) -> Streams | None:
        """How the connection reads, mixes and writes several streams; None for one stream. The kit is dressed; there is
        none where a network exists already.
        """
        return None

    def open(self) -> nn.Module | None:
        """The last module of the stem, which opens several streams, or None."""
        return None

    def restart(self, dim: int, spatial: int) -> nn.Module | None:
        """The module before a map between stages that is no connection, which ends a history of `dim` channels."""
        return None

    def close(self, dim: int, spatial: int, kit: Kit | None = None) -> nn.Module | None:
        """The first module of the head, which closes several streams of `dim` channels, or None. The kit is the
        head's.
        """
        return None

    def init_(self, chain: Chain) -> None:
        """The whole-network step; may multiply in place. Only `initialise_` calls it, after a full reset."""

    def slots(
        self,
        site: Site,
        *,
        branch: Callable[[Kit, Placement], nn.Module],
        shortcut: nn.Module | None,
        kit: Kit,
        placement: Placement,
    ) -> dict[str, Any]:
        """The slots of one dressed `Residual`: what every family builds its connections with.

        Args:
            site: where the connection stands.
            branch: makes the branch from the dressed (kit, placement).
            shortcut: takes (x, h); None carries x.
            kit: the family's kit, undressed.
            placement: the family's placement.

        Raises:
            SkipwayError: the scheme is not for branches of the site's kind.
        """
        for member in members_of(self):
            if site.kind not in member.kinds:
                raise SkipwayError(f"scheme={type(member).__name__.lower()!r}: {member.refusal}")
        kit, placement = self.kit(site, kit), self.place(site, placement)
        join, streams = self.join(site), self.streams(site, kit)
        if join is not None and streams is not None:
            raise SkipwayError(
                f"scheme={str(self)!r}: several streams are written into, so no other join fits; keep one"
            )
        shortcut = self.carry(site, shortcut)
        if join is not None and isinstance(shortcut, Cut):
            raise SkipwayError(f"scheme={str(self)!r}: the skip is cut, so nothing is left to be joined; keep one")
        return {
            "pre": sequence(**kit.parts(placement.pre, site.entry), enter=self.enter(site)),
            "branch": branch(kit, placement),
            "scale": self.scale(site),
            "drop": self.drop(site),
            "shortcut": shortcut,
            "post": sequence(**kit.parts(placement.post, site.dim, fresh=True)),
            "join": join,
            "streams": streams,
            "site": site,
            "scheme": self,
        }

    def __add__(self, other: Scheme) -> Stack:
        return Stack(members_of(self) + members_of(other))

    def __str__(self) -> str:
        """The spec string: `parse_scheme(str(s)) == s`."""
        given = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__.lower()}({given})"


@dataclass(frozen=True)
class Stack(Scheme):
    """Schemes one after the other: every hook passes through all members, in order.

    At most one member may be silent: two zero factors in one branch give exactly zero gradient for ever.

    >>> str(parse_scheme("preactivation + layerscale"))
    'preactivation() + layerscale(init=0.0001, rate=1.0)'
    """

    members: tuple[Scheme, ...]

    equation = "the members' equations combined"
    when = "to combine orthogonal schemes"
    source = "-"

    def __post_init__(self) -> None:
        silent = [str(member) for member in self.members if member.silent]
        if len(silent) > 1:
            raise SkipwayError(
                f"{' and '.join(silent)} each start the branch at zero; two zero factors in one branch never learn. "
                "Keep one, or give the other a non-zero start"
            )
        several = [str(member) for member in self.members if has_streams(member)]
        if len(several) > 1:
            raise SkipwayError(
                f"{' and '.join(several)} each carry several streams or earlier outputs of their own; keep one"
            )
        joins = [str(member) for member in self.members if type(member).join is not Scheme.join]
        if len(joins) > 1:
            raise SkipwayError(f"{' and '.join(joins)} each join skip and branch in their own way; keep one")

    @property
    def silent(self) -> bool:
        return any(member.silent for member in self.members)

    def kit(self, site: Site | None, kit: Kit) -> Kit:
        for member in self.members:
            kit = member.kit(site, kit)
        return kit

    def place(self, site: Site | None, placement: Placement) -> Placement:
        for member in self.members:
            placement = member.place(site, placement)
        return placement

    def enter(self, site: Site) -> nn.Module | None:
        return chain_modules([member.enter(site) for member in self.members])

    def transition(self, site: Site) -> nn.Module | None:
        return chain_modules([member.transition(site) for member in self.members])

    def scale(self, site: Site) -> nn.Module | None:
        return chain_modules([member.scale(site) for member in self.members])

    def carry(self, site: Site, shortcut: nn.Module | None) -> nn.Module | None:
        for member in self.members:
            shortcut = member.carry(site, shortcut)
        return shortcut

    def drop(self, site: Site) -> nn.Module | None:
        return chain_modules([member.drop(site) for member in self.members])

    def join(self, site: Site) -> nn.Module | None:
        return next((each for member in self.members if (each := member.join(site)) is not None), None)

    def streams(self, site: Site, kit: Kit | None = None) -> Streams | None:
        return next((each for member in self.members if (each := member.streams(site, kit)) is not None), None)

    def open(self) -> nn.Module | None:
        return chain_modules([member.open() for member in self.members])

    def restart(self, dim: int, spatial: int) -> nn.Module | None:
        return chain_modules([member.restart(dim, spatial) for member in self.members])

    def close(self, dim: int, spatial: int, kit: Kit | None = None) -> nn.Module | None:
        return chain_modules([member.close(dim, spatial, kit) for member in self.members])

    def init_(self, chain: Chain) -> None:
        for member in self.members:
            member.init_(chain)

    def __str__(self) -> str:
        return " + ".join(str(member) for member in self.members)


def members_of(scheme: Scheme) -> tuple[Scheme, ...]:
    """The schemes that a stack consists of; a single scheme is its own only member."""
    return scheme.members if isinstance(scheme, Stack) else (scheme,)


def has_streams(scheme: Scheme) -> bool:
    """Whether a scheme carries several streams or earlier outputs."""
    return any(type(member).streams is not Scheme.streams for member in members_of(scheme))


def chain_modules(modules: list[nn.Module | None]) -> nn.Module | None:
    """The present modules in a row; one stands alone, none is None."""
    present = [module for module in modules if module is not None]
    if len(present) <= 1:
        return present[0] if present else None
    return nn.Sequential(*present)


def all_schemes(kind: Kind | None = None) -> dict[str, type[Scheme]]:
    """All registered schemes by name, in the order of their definition; those for branches of a kind.

    >>> list(all_schemes())[:4]
    ['plain', 'identity', 'preactivation', 'zeroinit']
    >>> sorted(set(all_schemes()) - set(all_schemes("conv")))
    ['dualresidual', 'hybridnorm', 'layernormscaling', 'siamesenorm', 'valueresiduals']
    """
    return {name: scheme for name, scheme in REGISTRY.entries.items() if kind is None or kind in scheme.kinds}


def parse_scheme(spec: str | Scheme) -> Scheme:
    """The scheme that a spec string describes; a scheme is returned as it is.

    >>> parse_scheme("layerscale(init=1e-5)")
    LayerScale(init=1e-05, rate=1.0)
    >>> parse_scheme("layerscal")
    Traceback (most recent call last):
    skipway.errors.SkipwayError: unknown scheme 'layerscal'; did you mean 'layerscale' or 'layernormscaling'?

    Raises:
        SkipwayError: unknown name (with the closest known ones), unknown argument, or a value that is not allowed.
    """
    if isinstance(spec, Scheme):
        return spec
    rule = 'a Scheme, or its name or spec string, "layerscale" for example'
    check_rule("scheme", spec, isinstance(spec, str), rule)
    parts = [parse_spec(part, REGISTRY.__getitem__) for part in re.split(r"\+(?![^(]*\))", spec)]
    return parts[0] if len(parts) == 1 else Stack(tuple(member for part in parts for member in members_of(part)))


def short_spec(scheme: Scheme) -> str:
    """The shortest spec string of a scheme, without what is the default.

    >>> short_spec(parse_scheme("layerscale(init=0.1, rate=1.0) + stochasticdepth(0.1)"))
    'layerscale(init=0.1) + stochasticdepth'
    """
    names = []
    for member in members_of(scheme):
        values = [
            f"{each.name}={getattr(member, each.name)!r}"
            for each in fields(member)  # type: ignore[arg-type]
            if each.init and getattr(member, each.name) != each.default
        ]
        name = str(member).partition("(")[0]
        names.append(f"{name}({', '.join(values)})" if values else name)
    short = " + ".join(names)
    return short if parse_scheme(short) == scheme else str(scheme)
