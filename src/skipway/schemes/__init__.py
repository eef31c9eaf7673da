"""Schemes: one idea per class."""
# ruff: noqa: I001 - the order of import is the order in which schemes are listed, from the plain net to the special

from skipway.schemes.plain import Plain
from skipway.schemes.identity import Identity
from skipway.schemes.preactivation import PreActivation
from skipway.schemes.zeroinit import ZeroInit
from skipway.schemes.skipinit import SkipInit
from skipway.schemes.rezero import ReZero
from skipway.schemes.fixup import Fixup
from skipway.schemes.layerscale import LayerScale
from skipway.schemes.normfree import NormFree
from skipway.schemes.deepnorm import DeepNorm
from skipway.schemes.depthscaled import DepthScaled
from skipway.schemes.umup import UMuP
from skipway.schemes.perinorm import PeriNorm
from skipway.schemes.keel import Keel
from skipway.schemes.mixnorm import MixNorm
from skipway.schemes.hybridnorm import HybridNorm
from skipway.schemes.layernormscaling import LayerNormScaling
from skipway.schemes.dyt import DyT
from skipway.schemes.hyperconnections import HyperConnections
from skipway.schemes.mhc import MHC
from skipway.schemes.gatedstreams import GatedStreams
from skipway.schemes.fracconnections import FracConnections
from skipway.schemes.dualresidual import DualResidual
from skipway.schemes.siamesenorm import SiameseNorm
from skipway.schemes.orthogonal import Orthogonal
from skipway.schemes.attentionresiduals import AttentionResiduals
from skipway.schemes.denseformer import DenseFormer
from skipway.schemes.mudd import MUDD
from skipway.schemes.x0residual import X0Residual
from skipway.schemes.valueresiduals import ValueResiduals
from skipway.schemes.prores import ProRes
from skipway.schemes.laurel import LAuReL
from skipway.schemes.highway import Highway
from skipway.schemes.gtrxl import GTrXL
from skipway.schemes.stochasticdepth import StochasticDepth
from skipway.schemes.scheme import Scheme, Stack, parse_scheme, all_schemes
from skipway.schemes.cards import card

__all__ = [
    "MHC",
    "MUDD",
    "AttentionResiduals",
    "DeepNorm",
    "DenseFormer",
    "DepthScaled",
    "DualResidual",
    "DyT",
    "Fixup",
    "FracConnections",
    "GTrXL",
    "GatedStreams",
    "Highway",
    "HybridNorm",
    "HyperConnections",
    "Identity",
    "Keel",
    "LAuReL",
    "LayerNormScaling",
    "LayerScale",
    "MixNorm",
    "NormFree",
    "Orthogonal",
    "PeriNorm",
    "Plain",
    "PreActivation",
    "ProRes",
    "ReZero",
    "Scheme",
    "SiameseNorm",
    "SkipInit",
    "Stack",
    "StochasticDepth",
    "UMuP",
    "ValueResiduals",
    "X0Residual",
    "ZeroInit",
    "all_schemes",
    "card",
    "parse_scheme",
]
