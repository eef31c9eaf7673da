"""Families, their published variants, and `build`: from a name to an initialised network."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from skipway.errors import SkipwayError, suggest
from skipway.kernels.torch_faults import subsample_first
from skipway.registry import Registry, parse_spec
from skipway.schemes import Scheme
from skipway.schemes import parse_scheme as read_scheme
from skipway.schemes.initialisation import initialise_
from skipway.validation import check_rule, is_real, is_whole

__all__ = [
    *("FAMILIES", "Family", "Variant", "build", "families", "find_config", "join_options", "split_options"),
    "variants",
]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A published network: a row of a paper's table.

    Args:
        name: as people type it.
        family: the name of its family.
        config: its frozen config.
        at_depth: the same network at another depth.
        parameters: the published number of parameters.
        description: one line.
    """

    name: str
    family: str
    config: Any
    at_depth: Callable[[int], Any]
    parameters: int
    description: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """Networks that differ in their config only.

    Args:
        name: of the family.
        module: makes the network from its config.
        at_depth: makes the config for a depth (weight layers on the longest path); raises where there is none.
        pattern: regular expression of further names; its groups are the arguments of `named`, or of the dial.
        named: makes the config that a name describes, where that is more than a depth.
        variants: the published members.
        description: one line.
        aliases: entry points of other libraries: name → (our name, the options that make it the same network).
    """

    name: str
    module: Callable[[Any], nn.Module]
    at_depth: Callable[..., Any]
    pattern: str
    named: Callable[..., Any] | None = None
    variants: tuple[Variant, ...] = ()
    description: str = ""
    aliases: Mapping[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)


FAMILIES: Registry[Family] = Registry("model")


def families() -> list[Family]:
    """All families."""
    return list(FAMILIES.entries.values())


def variants() -> list[Variant]:
    """All published variants of all families.

    >>> [v.parameters for v in variants() if v.name == "resnet50"]
    [25557032]
    """
    return [variant for family in families() for variant in family.variants]


def build(
    name: str,
    *,
    depth: int | None = None,
    scheme: str | Scheme | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """Build a residual network and initialise it.

    Args:
        name: a published variant ("resnet50", "vit-small-16"), a family ("resnet"), which needs `depth` or `blocks`, or
            an entry point of timm or torchvision ("vit_small_patch16_224", "swin_t"); options may stand in brackets
            behind it, "gpt-4(dim=64, heads=4)".
        depth: weight layers on the longest path, the number in the papers' names.
        scheme: how the connections are dressed, a `Scheme` or its spec string, "layerscale(init=1e-5)".
        device: where the parameters live; by default torch's default device. "meta" builds without initialising.
        dtype: of the parameters.
        **options: any other field of the family's config: `classes=10`, `channels=1`, `width=32`, …

    Returns:
        the network, in training mode, its frozen config as `.config`.

    Raises:
        SkipwayError: unknown name or option (with suggestions), impossible depth (with the possible ones near it), or
            blocks of another depth than the one given.

    >>> model = build("resnet", depth=110, scheme="zeroinit", classes=10)
    >>> model.config.branches, sum(p.numel() for p in model.parameters())
    (54, 1727962)
    """
    name, options = resolve(name, options, depth)
    family, config = find_config(name, least_depth(name) if depth is None and "blocks" in options else depth)
    check_options(name, options, config)
    if scheme is not None:
        options["scheme"] = scheme
    if "scheme" in options:
        options["scheme"] = read_scheme(options["scheme"])
    config = replace(config, **options)
    if depth is not None and "blocks" in options and config.depth != depth:
        raise SkipwayError(
            f"depth={depth}, blocks={options['blocks']}: these blocks make a depth of {config.depth}; give "
            "one of the two"
        )
    with no_garbage_collection():
        with torch.device("meta"):
            network = family.module(config)
        if dtype is not None:
            network.to(dtype)
        if device is not None and torch.device(device).type == "meta":
            return network
        initialise_(network, device=device)
        subsample_first(network)
        return network


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Within it nothing is collected: a network is many objects and no garbage, and those of one of 4,000 branches were
    walked through for two fifths of the time that building it took.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def resolve(name: str, options: Mapping[str, Any], depth: int | None = None) -> tuple[str, dict[str, Any]]:
    """An entry point of timm or torchvision as our name and options; given options go before the alias's own,
    and another depth, given by itself or among the options, before its blocks.

    timm's tag of the weights (`vit_small_patch16_224.augreg_in21k`) says nothing of the architecture.

    >>> resolve("vit_small_patch16_384.augreg_in1k", {"classes": 10})
    ('vit-small-16', {'image': 384, 'classes': 10})
    """
    check_rule("name", name, isinstance(name, str), "a text: an architecture, or an entry point of timm or torchvision")
    name, given = split_options(name)
    options = {**given, **options}
    entry = name.partition(".")[0]
    for family in families():
        if entry in family.aliases:
            ours, own = family.aliases[entry]
            given_depth = options.get("depth", depth)
            if given_depth is not None and "blocks" in own:
                published = replace(own_config(ours, None)[1], blocks=own["blocks"]).depth
            else:
                published = given_depth
            if published != given_depth:
                own = {key: value for key, value in own.items() if key != "blocks"}
            return ours, {**own, **options}
    return name, options


def least_depth(name: str) -> int | None:
    """The least depth of a family, from whose config one with other blocks is made; None of all other names.

    >>> least_depth("resnet-cifar"), least_depth("resnet20")
    (8, None)
    """
    if name in FAMILIES:
        for depth in range(1, 100):
            with suppress(SkipwayError):
                FAMILIES[name].at_depth(depth)
                return depth
    return None


def split_options(text: str) -> tuple[str, dict[str, Any]]:
    """A name and the options in brackets behind it, Python literals.

    >>> split_options("gpt-4(dim=64, act='silu')")
    ('gpt-4', {'dim': 64, 'act': 'silu'})
    """
    name, bracket, rest = text.partition("(")
    return (name, parse_spec(f"options({rest}", lambda _: lambda **options: options)) if bracket else (text, {})


def join_options(name: str, options: Mapping[str, Any]) -> str:
    """A name with options in brackets, from which `split_options` makes both; objects stand there as their text.

    >>> join_options("gpt-4", {"dim": 64, "act": "silu"})
    "gpt-4(dim=64, act='silu')"
    """
    plain = (bool, int, float, str, tuple, type(None))
    pairs = ((key, value if isinstance(value, plain) else str(value)) for key, value in options.items())
    listed = ", ".join(f"{key}={value!r}" for key, value in pairs)
    return f"{name}({listed})" if options else name


def find_config(name: str, depth: int | None = None) -> tuple[Family, Any]:
    """The family and the config that a name, ours or an entry point of timm or torchvision, and a depth describe."""
    ours, own = resolve(name, {}, depth)
    family, config = own_config(ours, depth)
    check_options(ours, own, config)
    if "scheme" in own:
        own["scheme"] = read_scheme(own["scheme"])
    return family, replace(config, **own) if own else config


def check_options(name: str, options: Mapping[str, Any], config: Any) -> None:
    """Raise unless all options are fields of a config, and numbers where those are."""
    known = {field.name: str(field.type) for field in fields(config)}
    for option, value in options.items():
        if option not in known:
            raise SkipwayError(f"{name}: {suggest('option', option, known)}")
        kinds = known[option].split(" | ")
        if all(kind in NUMBERS for kind in kinds):
            fits, rules = zip(*(NUMBERS[kind] for kind in kinds), strict=True)
            check_rule(option, value, any(each(value) for each in fits), " or ".join(rules))


NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (is_whole, "a whole number"),
    "float": (is_real, "a number"),
    "None": (lambda value: value is None, "None"),
}
"""Types of a config's fields that are one number, and none: what fits them, in words. Rows of numbers are read by the
config alone, since an iterator gives them once.
"""


def own_config(name: str, depth: int | None) -> tuple[Family, Any]:
    """`find_config` for one of Skipway's own names."""
    if depth is not None:
        check_rule("depth", depth, is_whole(depth), "a whole number")
    for variant in variants():
        if Registry.key(variant.name) == Registry.key(name):
            return FAMILIES[variant.family], variant.config if depth is None else variant.at_depth(depth)
    if name in FAMILIES:
        family = FAMILIES[name]
        if depth is None:
            examples = ", ".join(variant.name for variant in family.variants[:4])
            raise SkipwayError(
                f"{name!r} is a family and needs a depth or blocks: build({name!r}, depth=…), or one of {examples}, …"
            )
        return family, family.at_depth(depth)
    for family in families():
        match = re.fullmatch(family.pattern, name.lower().replace("_", "-"))
        if match:
            given = {key: int(value) if value.isdigit() else value for key, value in match.groupdict().items()}
            if family.named is None and (depth is None or "depth" in given):
                named = family.at_depth(**given)  # refuses a depth that there is not, whatever is given beside it
                return family, named if depth is None else family.at_depth(**{**given, "depth": depth})
            if family.named is not None:
                config = family.named(**given)
                return family, config if depth is None else family.at_depth(depth, base=config)
    aliases = [alias for family in families() for alias in family.aliases]
    raise SkipwayError(
        suggest(
            "model",
            name,
            dict.fromkeys([*FAMILIES, *(variant.name for variant in variants()), *aliases]),
            "skipway models",
        )
    )
