"""Skipway: residual networks at any depth.

Every network is a stem, a chain of residual connections and a head; a scheme decides how each connection is scaled,
normalised and initialised. Names and rooms are imported when they are first used, so `import skipway` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from skipway._version import __version__

if TYPE_CHECKING:
    from skipway.checkpoint.loop import LoopCheckpoints
    from skipway.classifier import TrainedClassifier, fit
    from skipway.depth_transfer import DepthTransfer, transfer
    from skipway.diagnosis import Comparison, Diagnosis, Finding, Treatment, diagnose
    from skipway.errors import CheckpointError, DataError, DivergedError, MissingExtraError, SkipwayError
    from skipway.inference.generate import generate
    from skipway.inference.optimized_model import OptimizedModel, load_optimized, optimize
    from skipway.inference.predict import from_pretrained
    from skipway.inference.quantized_model import quantize
    from skipway.models import (
        GPT,
        BasicBlock,
        Bottleneck,
        CaiT,
        CaiTConfig,
        ConvNeXt,
        ConvNeXtConfig,
        GPTConfig,
        ResNet,
        ResNetConfig,
        Swin,
        SwinConfig,
        ViT,
        ViTConfig,
        build,
        projection,
    )
    from skipway.monitoring.watch import monitor
    from skipway.nn import Residual
    from skipway.nn.kit import Kit
    from skipway.nn.placement import Placement
    from skipway.nn.site import Site
    from skipway.nn.warmup import set_step
    from skipway.optim.groups import param_groups
    from skipway.probes.features import features, stage_features
    from skipway.probes.mixing_matrix import DepthMixing, depth_mixing
    from skipway.probes.stream_health import StreamHealth, stream_health
    from skipway.recipe import Recipe
    from skipway.schemes import (
        MHC,
        MUDD,
        AttentionResiduals,
        DeepNorm,
        DenseFormer,
        DepthScaled,
        DualResidual,
        DyT,
        Fixup,
        FracConnections,
        GatedStreams,
        GTrXL,
        Highway,
        HybridNorm,
        HyperConnections,
        Identity,
        Keel,
        LAuReL,
        LayerNormScaling,
        LayerScale,
        MixNorm,
        NormFree,
        Orthogonal,
        PeriNorm,
        Plain,
        PreActivation,
        ProRes,
        ReZero,
        Scheme,
        SiameseNorm,
        SkipInit,
        StochasticDepth,
        UMuP,
        ValueResiduals,
        X0Residual,
        ZeroInit,
    )
    from skipway.schemes.initialisation import initialise_
    from skipway.surgery import (
        Operation,
        checkpointed,
        deepen,
        fold_gains,
        influence,
        lesion,
        remove_norm,
        rescheme,
        reversible,
        shorten,
        skip_compute,
    )
    from skipway.surgery.acceleration import accelerate
    from skipway.surgery.fusion import fuse
    from skipway.tracing.chain import Chain, Connection, WatchedConnection, chain
    from skipway.training.loop import train
    from skipway.training.run import Outcome
    from skipway.weights import load

_HOME = {
    "checkpoint.loop": "LoopCheckpoints",
    "classifier": "TrainedClassifier fit",
    "depth_transfer": "DepthTransfer transfer",
    "diagnosis": "Comparison Diagnosis Finding Treatment diagnose",
    "errors": "CheckpointError DataError DivergedError MissingExtraError SkipwayError",
    "inference.optimized_model": "OptimizedModel load_optimized optimize",
    "inference.generate": "generate",
    "inference.predict": "from_pretrained",
    "inference.quantized_model": "quantize",
    "models": (
        "BasicBlock Bottleneck CaiT CaiTConfig ConvNeXt ConvNeXtConfig GPT GPTConfig ResNet ResNetConfig Swin "
        "SwinConfig ViT ViTConfig build projection"
    ),
    "monitoring.watch": "monitor",
    "nn": "Residual",
    "nn.kit": "Kit",
    "nn.placement": "Placement",
    "nn.site": "Site",
    "nn.warmup": "set_step",
    "optim.groups": "param_groups",
    "probes.mixing_matrix": "DepthMixing depth_mixing",
    "probes.stream_health": "StreamHealth stream_health",
    "probes.features": "features stage_features",
    "recipe": "Recipe",
    "schemes": (
        "AttentionResiduals DeepNorm DenseFormer DepthScaled DualResidual DyT Fixup FracConnections GatedStreams "
        "GTrXL Highway HybridNorm HyperConnections Identity Keel LAuReL LayerNormScaling LayerScale MHC MixNorm MUDD "
        "NormFree Orthogonal PeriNorm Plain PreActivation ProRes ReZero Scheme SiameseNorm SkipInit StochasticDepth "
        "UMuP ValueResiduals X0Residual ZeroInit"
    ),
    "schemes.initialisation": "initialise_",
    "surgery": (
        "Operation checkpointed deepen fold_gains influence lesion remove_norm rescheme reversible shorten skip_compute"
    ),
    "surgery.acceleration": "accelerate",
    "surgery.fusion": "fuse",
    "tracing.chain": "Chain Connection WatchedConnection chain",
    "training.loop": "train",
    "training.run": "Outcome",
    "weights": "load",
}
_ROOMS = [
    "checkpoint",
    "data",
    "depth_transfer",
    "diagnosis",
    "hardware",
    "inference",
    "kernels",
    "models",
    "monitoring",
    "nn",
    "optim",
    "probes",
    "report",
    "schemes",
    "studies",
    "surgery",
    "tracing",
    "training",
    "weights",
    "zoo",
]
_ORIGIN = {name: f"skipway.{module}" for module, names in _HOME.items() for name in names.split()}

__all__ = sorted(["__version__", *_ORIGIN, *_ROOMS])


def __getattr__(name: str) -> Any:
    if name in _ORIGIN:
        value = getattr(import_module(_ORIGIN[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return import_module(f"skipway.{name}")
    raise AttributeError(f"module 'skipway' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
