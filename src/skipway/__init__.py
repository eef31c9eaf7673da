"""Skipway: residual networks at any depth.

Every network is a stem, a chain of residual connections and a head; a scheme says how each connection is dressed.
Names are imported when they are first used, so `import skipway` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from skipway._version import __version__

if TYPE_CHECKING:
    from skipway.diagnosis import Diagnosis, diagnose
    from skipway.errors import CheckpointError, DataError, DivergedError, MissingExtraError, SkipwayError
    from skipway.inference.backend_choice import optimize
    from skipway.inference.predict import from_pretrained
    from skipway.models import BasicBlock, Bottleneck, ResNet, ResNetConfig, build, projection
    from skipway.nn import Residual
    from skipway.nn.kit import Kit
    from skipway.nn.placement import Placement
    from skipway.nn.site import Site
    from skipway.optim.groups import param_groups
    from skipway.probes.features import features, stage_features
    from skipway.schemes import (
        DeepNorm,
        DepthScaled,
        Fixup,
        Identity,
        LayerScale,
        NormFree,
        Plain,
        PreActivation,
        ReZero,
        Scheme,
        SkipInit,
        StochasticDepth,
        ZeroInit,
    )
    from skipway.schemes.initialisation import initialise_
    from skipway.surgery import deepen, lesion, remove_norm, rescheme, shorten
    from skipway.surgery.acceleration import accelerate
    from skipway.surgery.fusion import fold
    from skipway.tracing.chain import Chain, Connection, chain
    from skipway.weights import load

_HOME = {
    "tracing.chain": ("Chain", "Connection", "chain"),
    "diagnosis": ("Diagnosis", "diagnose"),
    "errors": ("CheckpointError", "DataError", "DivergedError", "MissingExtraError", "SkipwayError"),
    "surgery.fusion": ("fold",),
    "optim.groups": ("param_groups",),
    "schemes.initialisation": ("initialise_",),
    "models": ("BasicBlock", "Bottleneck", "ResNet", "ResNetConfig", "build", "projection"),
    "nn": ("Residual",),
    "schemes": (
        "DeepNorm",
        "DepthScaled",
        "Fixup",
        "Identity",
        "LayerScale",
        "NormFree",
        "Plain",
        "PreActivation",
        "ReZero",
        "Scheme",
        "SkipInit",
        "StochasticDepth",
        "ZeroInit",
    ),
    "nn.kit": ("Kit",),
    "nn.placement": ("Placement",),
    "nn.site": ("Site",),
    "inference.backend_choice": ("optimize",),
    "surgery.acceleration": ("accelerate",),
    "surgery": ("deepen", "lesion", "remove_norm", "rescheme", "shorten"),
    "probes.features": ("features", "stage_features"),
    "inference.predict": ("from_pretrained",),
    "weights": ("load",),
}
_ORIGIN = {name: f"skipway.{module}" for module, names in _HOME.items() for name in names}

__all__ = sorted(["__version__", *_ORIGIN])


def __getattr__(name: str) -> Any:
    if name in _ORIGIN:
        value = getattr(import_module(_ORIGIN[name]), name)
        globals()[name] = value
        return value
    try:
        return import_module(f"skipway.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"skipway.{name}":
            raise
    raise AttributeError(f"module 'skipway' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ORIGIN])
