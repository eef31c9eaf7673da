"""Skipway: residual networks at any depth.

Every network is a stem, a chain of residual connections and a head; a scheme says how each connection is dressed.
Names are imported when they are first used, so `import skipway` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from skipway.anatomy import Chain, Connection, chain
    from skipway.diagnosis import Diagnosis, diagnose
    from skipway.errors import CheckpointError, DataError, DivergedError, MissingExtraError, SkipwayError
    from skipway.folding import fold
    from skipway.groups import param_groups
    from skipway.init import initialise_
    from skipway.models import BasicBlock, Bottleneck, ResNet, ResNetConfig, build, projection
    from skipway.nn import Residual
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
    from skipway.site import Kit, Placement, Site
    from skipway.speed import accelerate, optimize
    from skipway.surgery import deepen, lesion, remove_norm, rescheme, shorten
    from skipway.taps import features, stage_features
    from skipway.training.using import from_pretrained
    from skipway.weights import load

_HOME = {
    "anatomy": ("Chain", "Connection", "chain"),
    "diagnosis": ("Diagnosis", "diagnose"),
    "errors": ("CheckpointError", "DataError", "DivergedError", "MissingExtraError", "SkipwayError"),
    "folding": ("fold",),
    "groups": ("param_groups",),
    "init": ("initialise_",),
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
    "site": ("Kit", "Placement", "Site"),
    "speed": ("accelerate", "optimize"),
    "surgery": ("deepen", "lesion", "remove_norm", "rescheme", "shorten"),
    "taps": ("features", "stage_features"),
    "training.using": ("from_pretrained",),
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
