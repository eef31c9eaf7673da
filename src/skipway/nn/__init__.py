"""Modules: the residual connection and what goes into its slots."""

from skipway.nn.act import ScaledActivation
from skipway.nn.branch import Branch, Conv, ConvBranch
from skipway.nn.drop import DropPath
from skipway.nn.gain import Bias, Gain, Multiply
from skipway.nn.gate import SqueezeExcitation
from skipway.nn.initial import FanInUniform, HeNormal, Initial, TruncatedNormal, XavierNormal
from skipway.nn.maps import Classifier, Conv2d, Linear, LinearMap, ScaledStandardConv2d, ScaledStandardLinear
from skipway.nn.residual import Residual
from skipway.nn.role import Role
from skipway.nn.sequence import sequence
from skipway.nn.shortcut import Carry, Cut, Pad, Projection, ScaledShortcut, Shortcut
from skipway.nn.tokens import Attention, Mlp

__all__ = [
    "Attention",
    "Bias",
    "Branch",
    "Carry",
    "Classifier",
    "Conv",
    "Conv2d",
    "ConvBranch",
    "Cut",
    "DropPath",
    "FanInUniform",
    "Gain",
    "HeNormal",
    "Initial",
    "Linear",
    "LinearMap",
    "Mlp",
    "Multiply",
    "Pad",
    "Projection",
    "Residual",
    "Role",
    "ScaledActivation",
    "ScaledShortcut",
    "ScaledStandardConv2d",
    "ScaledStandardLinear",
    "Shortcut",
    "SqueezeExcitation",
    "TruncatedNormal",
    "XavierNormal",
    "sequence",
]
