"""Modules: the residual connection and what goes into its slots."""

from skipway.nn.act import QuickGELU, ScaledActivation
from skipway.nn.branch import Branch, Conv, ConvBranch
from skipway.nn.causal import CausalAttention, DecodingState, GatedMlp, RotaryPositions, decoding
from skipway.nn.classattention import ClassAttention, FirstToken, TalkingHeads
from skipway.nn.depthwise import DepthwiseMlp
from skipway.nn.drop import DropPath
from skipway.nn.fractions import DynamicFracConnection, FracConnection
from skipway.nn.gain import Bias, Gain, Multiply
from skipway.nn.gate import SqueezeExcitation
from skipway.nn.history import (
    AttentionExit,
    AttentionRead,
    AttentionResidual,
    DenseResidual,
    DynamicDenseResidual,
    History,
    LastExit,
    StemResidual,
    ValueResidual,
)
from skipway.nn.initial import (
    ColumnOrthogonal,
    FanInNormal,
    FanInUniform,
    HeNormal,
    Initial,
    TruncatedNormal,
    XavierNormal,
    Zeros,
)
from skipway.nn.join import GRUGate, HighwayGate, LowRankMap, OrthogonalSum, WeightedSum
from skipway.nn.manifold import ManifoldHyperConnection
from skipway.nn.maps import Classifier, Conv2d, Linear, LinearMap, ScaledStandardConv2d, ScaledStandardLinear
from skipway.nn.norm import GlobalResponseNorm, LayerNorm2d
from skipway.nn.normed_pair import NormedPair, NormedPairExit
from skipway.nn.residual import Residual
from skipway.nn.role import BranchFactors, Role
from skipway.nn.rope import RotaryScaling, parse_rotary_scaling
from skipway.nn.saturation import DynamicErf, DynamicTanh
from skipway.nn.sequence import sequence
from skipway.nn.shortcut import Carry, Cut, Pad, Projection, ScaledShortcut, Shortcut
from skipway.nn.stage import ChannelsFirst, ChannelsLast, StageMap, TokenGrid
from skipway.nn.stream_algebra import sinkhorn
from skipway.nn.stream_gate import GatedExit, GatedRead, GatedResidual
from skipway.nn.streams import DynamicHyperConnection, HyperConnection, StreamEntry, StreamExit, Streams
from skipway.nn.tokens import Attention, Mlp
from skipway.nn.warmup import ResidualWarmup, WarmupState, find_warmups, set_step, warmup_state
from skipway.nn.window import CosineWindowAttention, Window, WindowAttention

__all__ = [
    "Attention",
    "AttentionExit",
    "AttentionRead",
    "AttentionResidual",
    "Bias",
    "Branch",
    "BranchFactors",
    "Carry",
    "CausalAttention",
    "ChannelsFirst",
    "ChannelsLast",
    "ClassAttention",
    "Classifier",
    "ColumnOrthogonal",
    "Conv",
    "Conv2d",
    "ConvBranch",
    "CosineWindowAttention",
    "Cut",
    "DecodingState",
    "DenseResidual",
    "DepthwiseMlp",
    "DropPath",
    "DynamicDenseResidual",
    "DynamicErf",
    "DynamicFracConnection",
    "DynamicHyperConnection",
    "DynamicTanh",
    "FanInNormal",
    "FanInUniform",
    "FirstToken",
    "FracConnection",
    "GRUGate",
    "Gain",
    "GatedExit",
    "GatedMlp",
    "GatedRead",
    "GatedResidual",
    "GlobalResponseNorm",
    "HeNormal",
    "HighwayGate",
    "History",
    "HyperConnection",
    "Initial",
    "LastExit",
    "LayerNorm2d",
    "Linear",
    "LinearMap",
    "LowRankMap",
    "ManifoldHyperConnection",
    "Mlp",
    "Multiply",
    "NormedPair",
    "NormedPairExit",
    "OrthogonalSum",
    "Pad",
    "Projection",
    "QuickGELU",
    "Residual",
    "ResidualWarmup",
    "Role",
    "RotaryPositions",
    "RotaryScaling",
    "ScaledActivation",
    "ScaledShortcut",
    "ScaledStandardConv2d",
    "ScaledStandardLinear",
    "Shortcut",
    "SqueezeExcitation",
    "StageMap",
    "StemResidual",
    "StreamEntry",
    "StreamExit",
    "Streams",
    "TalkingHeads",
    "TokenGrid",
    "TruncatedNormal",
    "ValueResidual",
    "WarmupState",
    "WeightedSum",
    "Window",
    "WindowAttention",
    "XavierNormal",
    "Zeros",
    "decoding",
    "find_warmups",
    "parse_rotary_scaling",
    "sequence",
    "set_step",
    "sinkhorn",
    "warmup_state",
]
